"""Mailboxes: where one rank leaves what it says, and others read it, in memory or as files. Torch-free."""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, Literal, Protocol, TypeVar

from pydantic import Field

from worker.report import Directive, LogLine, Measurement, Reporter, TrialResult, log_lines
from worker.shape import Frozen

Cause = Literal["out_of_memory", "diverged", "bad_input", "error"]
"""Why a job failed. One that diverged (ArithmeticError) or had bad input (ValueError) would do so again."""

REASON_LENGTH = 500
BEAT_SECONDS = 0.2  # a file's beats are no closer than this, so that asking costs a step nothing


class Closing(Frozen):
    """The last thing a rank says about a job. `result` is set on rank 0, unless the job failed.

    `cause` is set where it failed. `traceback` holds the last lines of a failure's, for a log. A job was declined where
    its rank did not begin it, and should be replaced.
    """

    outcome: Literal["succeeded", "stopped", "failed", "declined"]
    reason: str = ""
    cause: Cause | None = None
    traceback: str = ""
    result: TrialResult | None = None


def failed(error: BaseException, cause: Cause, traceback: str = "") -> Closing:
    """The closing of a job that raised this. Bad input says itself what is wrong; any other error its kind too."""
    kind, message = type(error).__name__, " ".join(str(error).split())
    reason = message if cause == "bad_input" else f"{kind}: {message}" if message else kind
    return Closing(outcome="failed", reason=(reason or kind)[:REASON_LENGTH], cause=cause, traceback=traceback)


class Mail(Frozen):
    """What a rank has said: its phase, the measurements and log lines asked for, and its closing once there is one.

    `beats` counts its signs of life: a rank whose beats stand still has not said or asked anything. `seconds` is what
    each phase took so far, by the rank's own clock; "idle" is what the rank waited for the job before it.
    """

    phase: str = "start"
    beats: int = 0
    seconds: dict[str, float] = Field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()
    lines: tuple[LogLine, ...] = ()
    closing: Closing | None = None


class Mailbox(Reporter, Protocol):
    """One job's mailbox in one rank. The job writes to it as its Reporter; whoever started the job reads."""

    def close(self, closing: Closing, artifact: bytes | None = None) -> None:
        """Say how the job ended; nothing may be said after it. Raises PydanticSerializationError, saying nothing, where
        the result holds something that JSON cannot."""
        ...

    def read(self, after: int, logged: int = 0) -> Mail:
        """Everything said, with the measurements numbered above `after` and the log lines numbered above `logged`.
        Reading changes nothing."""
        ...

    def stop(self) -> None:
        """Answer STOP from now on."""
        ...

    def artifact(self) -> bytes:
        """The artifact left with the closing. Raises KeyError where there is none."""
        ...


class Phases(Frozen):
    """Where a job is: its phase, since when by a clock of its machine, and the seconds of what came before."""

    phase: str = "start"
    since: float
    seconds: dict[str, float] = Field(default_factory=dict)
    ended: bool = False

    def enter(self, phase: str, now: float, *, ended: bool = False) -> "Phases":
        return Phases(phase=phase, since=now, seconds=self.until(now), ended=ended)

    def until(self, now: float) -> dict[str, float]:
        """Seconds by phase, up to `now` unless the job had ended before."""
        spent = 0.0 if self.ended else max(now - self.since, 0.0)
        return {**self.seconds, self.phase: self.seconds.get(self.phase, 0.0) + spent}

    def elapsed(self, now: float) -> float:
        """Seconds since the job was given to its rank, which may have waited for it before."""
        return sum(seconds for phase, seconds in self.until(now).items() if phase != "idle")


class MemoryMailbox:
    """A mailbox within one process, for any number of threads."""

    def __init__(self, phase: str = "start", clock: Callable[[], float] = time.monotonic) -> None:
        self._lock = threading.Lock()
        self._clock = clock
        self._mail = Mail()
        self._phases = Phases(phase=phase, since=clock())
        self._measurements: list[Measurement] = []
        self._lines: list[LogLine] = []
        self._beats = 0
        self._directive = Directive.CONTINUE
        self._artifact: bytes | None = None

    def measure(self, step: int, elapsed_seconds: float, metrics: Mapping[str, float]) -> Directive:
        with self._lock:
            number = len(self._measurements) + 1
            self._measurements.append(
                Measurement(number=number, step=step, elapsed_seconds=elapsed_seconds, metrics=dict(metrics))
            )
            self._beats += 1
            return self._directive

    def directive(self) -> Directive:
        with self._lock:
            self._beats += 1
            return self._directive

    def phase(self, name: str) -> None:
        with self._lock:
            self._beats += 1
            self._phases = self._phases.enter(name, self._clock())

    def log(self, text: str) -> None:
        with self._lock:
            self._beats += 1
            self._lines += log_lines(text, len(self._lines), self._phases.elapsed(self._clock()))

    def begin(self, idle_seconds: float) -> None:
        """Say that the job begins, for which its rank has waited so long with nothing else to do."""
        with self._lock:
            begun = self._phases.enter("start", self._clock())
            self._phases = begun.model_copy(update={"seconds": {**begun.seconds, "idle": idle_seconds}})

    def close(self, closing: Closing, artifact: bytes | None = None) -> None:
        said = Closing.model_validate_json(closing.model_dump_json())  # what a reader elsewhere would get, from here on
        with self._lock:
            self._artifact = artifact
            self._phases = self._phases.enter(self._phases.phase, self._clock(), ended=True)
            self._mail = self._mail.model_copy(update={"closing": said})

    def read(self, after: int, logged: int = 0) -> Mail:
        with self._lock:
            said = {
                "phase": self._phases.phase,
                "seconds": self._phases.until(self._clock()),
                "measurements": tuple(self._measurements[after:]),
                "lines": tuple(self._lines[logged:]),
                "beats": self._beats,
            }
            return self._mail.model_copy(update=said)

    def stop(self) -> None:
        self._directive = Directive.STOP

    def artifact(self) -> bytes:
        if self._artifact is None:
            raise KeyError("this mailbox holds no artifact")
        return self._artifact


Said = TypeVar("Said", Measurement, LogLine)


class _Growing(Generic[Said]):
    """A file that grows by whole lines, each a value as JSON."""

    def __init__(self, path: Path, kind: type[Said]) -> None:
        self._path, self._offset = path, 0
        self._kind: type[Said] = kind
        self._said: list[Said] = []

    def read(self) -> list[Said]:
        """All that was written, as far as its lines are whole."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                fresh = file.read()
        except FileNotFoundError:
            return self._said
        whole = fresh[: fresh.rfind(b"\n") + 1]
        self._said += [self._kind.model_validate_json(line) for line in whole.splitlines()]
        self._offset += len(whole)
        return self._said

    def write(self, *said: Said) -> None:
        with self._path.open("ab") as file:
            file.write(b"".join(one.model_dump_json().encode() + b"\n" for one in said))


class FileMailbox:
    """A mailbox in a folder, for one writing process and any reading ones. Survives the writer's death at any moment.

    All of them are on one machine, whose monotonic clock they share.

    `measurements.jsonl` and `lines.jsonl` grow by whole lines and `beats` by a byte each; every other file appears
    complete, under its name, or not at all; the closing is written last.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Makes the folder where it is missing. What lies in it already counts as said."""
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._clock = clock
        self._beat_at = -math.inf
        self._measurements = _Growing(directory / "measurements.jsonl", Measurement)
        self._lines = _Growing(directory / "lines.jsonl", LogLine)

    def measure(self, step: int, elapsed_seconds: float, metrics: Mapping[str, float]) -> Directive:
        number = len(self._measurements.read()) + 1
        said = Measurement(number=number, step=step, elapsed_seconds=elapsed_seconds, metrics=dict(metrics))
        self._beat()  # before: whoever reads the measurement has its beat as well
        self._measurements.write(said)
        return self._answer()

    def directive(self) -> Directive:
        self._beat()
        return self._answer()

    def phase(self, name: str) -> None:
        self._beat()
        self._enter(name)

    def log(self, text: str) -> None:
        self._beat()
        with contextlib.suppress(OSError):  # a full disk, say: no line is worth an attempt
            self._lines.write(*log_lines(text, len(self._lines.read()), self._phases().elapsed(self._clock())))

    def close(self, closing: Closing, artifact: bytes | None = None) -> None:
        said = closing.model_dump_json().encode()
        if artifact is not None:
            self._write("artifact", artifact)
        self._enter(self._phases().phase, ended=True)
        self._write("closing.json", said)

    def read(self, after: int, logged: int = 0) -> Mail:
        closing = self._read("closing.json")  # first: what was said before it is then there to be read
        phases = self._phases()
        return Mail(
            phase=phases.phase,
            seconds=phases.until(self._clock()),
            beats=self._beats(),
            measurements=tuple(self._measurements.read()[after:]),
            lines=tuple(self._lines.read()[logged:]),
            closing=None if closing is None else Closing.model_validate_json(closing),
        )

    def stop(self) -> None:
        self._write("stop", b"")

    def artifact(self) -> bytes:
        artifact = self._read("artifact")
        if artifact is None:
            raise KeyError(f"{self._directory} holds no artifact")
        return artifact

    def _phases(self) -> Phases:
        said = self._read("phases.json")
        return Phases(since=self._clock()) if said is None else Phases.model_validate_json(said)

    def _enter(self, phase: str, *, ended: bool = False) -> None:
        self._write("phases.json", self._phases().enter(phase, self._clock(), ended=ended).model_dump_json().encode())

    def _answer(self) -> Directive:
        return Directive.STOP if os.path.exists(self._directory / "stop") else Directive.CONTINUE

    def _beat(self) -> None:
        now = self._clock()
        if now - self._beat_at >= BEAT_SECONDS:
            self._beat_at = now
            with contextlib.suppress(OSError), (self._directory / "beats").open("ab") as file:
                file.write(b".")  # where it cannot be written, a full disk say, training goes on while patience lasts

    def _beats(self) -> int:
        try:
            return (self._directory / "beats").stat().st_size
        except FileNotFoundError:
            return 0

    def _write(self, name: str, data: bytes) -> None:
        unfinished = self._directory / f".{name}"
        unfinished.write_bytes(data)
        unfinished.replace(self._directory / name)

    def _read(self, name: str) -> bytes | None:
        try:
            return (self._directory / name).read_bytes()
        except FileNotFoundError:
            return None
