"""The model's shape: the frozen base of every spec part, and the config of one transformer."""

from pydantic import BaseModel, ConfigDict, Field, model_validator


class FieldError(ValueError):
    """Bad input: which field (a dotted path), the value it has, and what would be right."""

    def __init__(self, path: str, value: object, expected: str) -> None:
        super().__init__(f"{path} is {value!r}: {expected}")
        self.path = path
        self.value = value
        self.expected = expected


class Frozen(BaseModel):
    """A frozen value that refuses unknown keys, NaN and infinity."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelConfig(Frozen):
    """One transformer without its sharing: widths in values, not bytes.

    Components follow the parameter-golf baseline (OpenAI, 2026): grouped-query attention with RMS-normalised queries
    and keys, rotary positions, a squared-ReLU MLP, additive U-Net skips, a tied embedding and a tanh logit soft-cap.
    `bigram_buckets` and `smear_gate` are the stem that EBLS (pull request 433) adds; 0 and false leave it out.
    """

    vocab_size: int = Field(default=1024, ge=8, le=65_536)
    width: int = Field(default=512, ge=8, le=16_384)
    heads: int = Field(default=8, ge=1)
    kv_heads: int = Field(default=4, ge=1)
    mlp_multiple: float = Field(default=2.0, gt=0, le=16)
    rope_base: float = Field(default=10_000.0, gt=1)
    qk_gain: float = Field(default=1.5, gt=0)
    logit_softcap: float = Field(default=30.0, gt=0)
    embedding_init_std: float = Field(default=0.005, gt=0)
    unet_skips: bool = True
    bigram_buckets: int = Field(default=0, ge=0, le=1_000_000)
    bigram_width: int = Field(default=128, ge=1)
    smear_gate: bool = False

    @model_validator(mode="after")
    def _check(self) -> "ModelConfig":
        if self.width % self.heads:
            raise FieldError("heads", self.heads, f"must divide the width, {self.width}")
        if (self.width // self.heads) % 2:
            raise FieldError("heads", self.heads, f"must leave an even head width, not {self.width // self.heads}")
        if self.heads % self.kv_heads:
            raise FieldError("kv_heads", self.kv_heads, f"must divide heads, {self.heads}")
        if self.mlp_width < 1:
            raise FieldError("mlp_multiple", self.mlp_multiple, "must give at least one hidden unit")
        return self

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def kv_width(self) -> int:
        return self.kv_heads * self.head_width

    @property
    def mlp_width(self) -> int:
        return int(self.mlp_multiple * self.width)
