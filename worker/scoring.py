"""How a trial is scored: validation in bits per byte."""

from pydantic import Field

from worker.shape import Frozen


class TttConfig(Frozen):
    """Score-first test-time training: each chunk of validation text is scored before the model learns from it by SGD.

    The learning rate falls as half a cosine over the chunks.
    """

    lr: float = Field(default=0.002, gt=0)
    epochs: int = Field(default=1, ge=1)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    chunk_tokens: int = Field(default=32_768, ge=2)
    gradient_clip: float = Field(default=1.0, ge=0)


class EvaluationConfig(Frozen):
    """Scoring in bits per byte: by plain windows, by sliding ones with a `stride`, and while adapting with `ttt`."""

    validations: int = Field(default=4, ge=0, le=1000)
    """Validations during training, at equal fractions of the budget, over plain windows."""
    validation_tokens: int | None = Field(default=None, ge=2)
    """Validation tokens of those intermediate scores and of diagnostics; none means all, as final scores always use,
    and two million for diagnostics."""
    batch_sequences: int = Field(default=64, ge=1)
    sequence_length: int | None = Field(default=None, ge=2, le=65_536)
    """Tokens of a window; none means those of training."""
    stride: int | None = Field(default=None, ge=1)
    """Windows start this far apart, and each but the first scores its last `stride` tokens; none: no overlap."""
    ttt: TttConfig | None = None
    extra_recurrence: int = Field(default=2, ge=0, le=100)
    """How often the tied blocks run once more after the last layer, for the contraction report and scores by depth."""
