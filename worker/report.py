"""What a worker says: measurements while it trains, and one result at the end. Torch-free."""

from collections.abc import Iterator, Mapping
from enum import StrEnum
from typing import Any, Protocol

from worker.shape import Frozen

MAX_LINE = 2000
"""Characters of a line that are kept."""
MAX_LINES = 4000
"""Of one attempt; the last of them says that no more are kept."""


class Directive(StrEnum):
    """The orchestrator's answer to a measurement."""

    CONTINUE = "continue"
    STOP = "stop"


class Measurement(Frozen):
    """Metrics at one step of one attempt. `number` counts from 1 within the attempt and never repeats."""

    number: int
    step: int
    elapsed_seconds: float
    metrics: dict[str, float]
    """By name: train_loss (nats, penalty included), val_bpb, lr_multiplier, fraction (of the budget), ... Scores that
    come with their fraction can be compared with other trainings'."""


class LogLine(Frozen):
    """One line of an attempt's log. `number` counts from 1 within the attempt and never repeats."""

    number: int
    elapsed_seconds: float
    """Since the attempt began, by its gang's clock."""
    line: str


def log_lines(text: str, said: int, elapsed_seconds: float) -> Iterator[LogLine]:
    """The text as lines that come after `said` others, each short enough to be kept; none beyond MAX_LINES."""
    for number, line in enumerate(text.splitlines(), said + 1):
        if number < MAX_LINES:
            yield LogLine(number=number, elapsed_seconds=elapsed_seconds, line=printable(line)[:MAX_LINE])
        elif number == MAX_LINES:
            last = f"no more is kept of this log: it has {MAX_LINES:,} lines"
            yield LogLine(number=number, elapsed_seconds=elapsed_seconds, line=last)


def printable(line: str) -> str:
    """The line without what a terminal would obey."""
    if line.isprintable():
        return line
    return "".join(
        character if character.isprintable() else " " if character == "\t" else "\ufffd" for character in line
    )


class Reporter(Protocol):
    """Where rank 0 speaks. Other ranks say nothing."""

    def measure(self, step: int, elapsed_seconds: float, metrics: Mapping[str, float]) -> Directive:
        """Deliver metrics in order and learn whether to go on."""
        ...

    def directive(self) -> Directive:
        """Whether to go on, without delivering anything. Cheap enough to ask every step."""
        ...

    def phase(self, name: str) -> None:
        """Say what the attempt is doing now: data, compile (on a GPU), train, evaluate or pack."""
        ...

    def log(self, text: str) -> None:
        """Say something, in one line or several, to whoever looks into this attempt later. Kept up to MAX_LINES."""
        ...


class Hardware(Frozen):
    """What one attempt trained on, and how fast each rank's device did the same small piece of work."""

    device: str
    """Model of the GPU, or of the processor."""
    node: str
    """The host's name."""
    node_devices: int
    """GPUs of the node, or its cores."""
    ranks: int
    clocks_mhz: tuple[float, ...]
    """By rank, right after training; empty where they are not known."""
    clock_limit_mhz: float | None
    torch: str
    cuda: str | None
    probe_seconds: tuple[float, ...]
    """By rank, just before training."""
    probe_after_seconds: tuple[float, ...]
    """By rank, just after it."""

    @property
    def slowest_probe_seconds(self) -> float:
        """Of any rank, before or after: ranks wait for the slowest of them."""
        return max(*self.probe_seconds, *self.probe_after_seconds)


class TrialResult(Frozen):
    """What one attempt produced. Bytes are bytes, seconds are seconds, BPB is bits per byte of validation text."""

    val_bpb: float
    """Of the model loaded back from the artifact's bytes: the score."""
    val_bpb_prequant: float
    val_loss: float
    """Nats per token behind `val_bpb`."""
    parameters: int
    model_bytes: int
    code_bytes: int
    artifact_bytes: int
    """model_bytes + code_bytes: what the byte cap is about."""
    artifact_sha256: str
    """Of the model bytes."""
    steps: int
    tokens: int
    train_seconds: float
    evaluate_seconds: float
    pack_seconds: float
    step_seconds: float
    """Median wallclock of a training step."""
    stopped: bool
    """True where a directive ended training before the budget did."""
    bytes_by_class: dict[str, int]
    """model_bytes by tensor class, with `header`: what is shared is split by what an ideal code spends on each."""
    diagnostics: dict[str, Any]
    """Gammas by path and virtual layer, and whatever else the trained model reveals about its sharing."""
    hardware: Hardware | None = None
    """None from a trainer that does not look."""
