"""The contract between the loop and whatever runs gangs. Two implementations: local processes, and Ray."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.lifecycle import Cause, Outcome
from worker.report import LogLine, Measurement, TrialResult
from worker.spec import GangConfig, TrialSpec


@dataclass(frozen=True)
class Assignment:
    """One attempt for one gang: the spec to train, at the run's seed and budget."""

    attempt_id: int
    spec: TrialSpec


@dataclass(frozen=True)
class Ending:
    """How an attempt ended. `result` is set exactly when the outcome is succeeded, or stopped with a score, and `cause`
    exactly when it is failed."""

    outcome: Outcome
    reason: str
    result: TrialResult | None = None
    cause: Cause | None = None
    traceback: str = field(default="", compare=False)
    """The last lines of a failure's, where there are any."""


@dataclass(frozen=True)
class Update:
    """What a gang has said since the caller last asked. Asking again with the same cursor gives the same messages.

    `beats` counts rank 0's signs of life: one that stands still has not taken a step, nor said or asked anything.
    `seconds` is what each phase took so far, by the gang's own clock. Phase "queue": it waits for the attempt before it
    on its gang; "store": its ranks are at the next one already.
    """

    phase: str
    measurements: tuple[Measurement, ...]
    ending: Ending | None
    beats: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict, compare=False)
    lines: tuple[LogLine, ...] = ()


@dataclass(frozen=True)
class Offer:
    """A gang, by its name, that would take an attempt: at once, or `behind` the one that it runs."""

    gang: str
    behind: bool


class NoRoom(RuntimeError):
    """The gang that was offered cannot take the attempt after all. Nothing was started."""


class Launcher(Protocol):
    """Runs gangs. Every call returns without waiting for training; none raises because a gang died (poll says so)."""

    def free(self, gang: GangConfig) -> int:
        """How many gangs of this shape could start an attempt right now, idle ones of the shape included."""
        ...

    def capacity(self, gang: GangConfig) -> int:
        """How many gangs of this shape could run here if nothing else did; 0 says that one would wait for ever."""
        ...

    def offer(self, gang: GangConfig) -> Offer | None:
        """A gang of this shape that would take an attempt: one that is free or can be made, else one whose attempt is
        about to end. Promises nothing, and changes nothing."""
        ...

    def reserve(self, gang: GangConfig | None) -> None:
        """Keep room for one gang of this shape, and for no other that was said before: where it can be had soonest,
        nothing of another shape starts. None: keep none."""
        ...

    def want(self, gangs: Mapping[GangConfig, int]) -> None:
        """So many runs wait, by shape: ask for the nodes to run them, where nodes can be asked for."""
        ...

    def start(self, assignment: Assignment, gang: str) -> str:
        """Give the attempt to the gang that was offered for spec.gang's shape, or to a new one where that is gone; the
        name of the gang that has it. Raises NoRoom."""
        ...

    def adopt(self, attempt_id: int, gang: str) -> bool:
        """Take over an attempt that a launcher before this one started on the gang of that name, wherever it has come
        to by now; whether that gang is still there. Repeatable."""
        ...

    def reap(self) -> int:
        """Remove every gang that a launcher before this one left and nobody adopted; how many there were."""
        ...

    def poll(self, cursors: Mapping[int, int], logged: Mapping[int, int] | None = None) -> dict[int, Update]:
        """For each attempt its measurements numbered above its cursor, its log lines numbered above its place in
        `logged`, and its ending once there is one. One that is not known here is lost. Gangs that are not polled for
        long may take it that nobody wants them."""
        ...

    def wait(self, seconds: float) -> None:
        """Return once an attempt has ended that no poll has shown to have ended, or after so many seconds."""
        ...

    def stop(self, attempt_id: int) -> None:
        """Ask the attempt to end at its next step; it then evaluates, packs, and ends as stopped. Repeatable."""
        ...

    def artifact(self, attempt_id: int) -> bytes:
        """The model bytes of an attempt whose ending has a result. Raises KeyError where there are none."""
        ...

    def release(self, attempt_id: int) -> None:
        """Free the attempt's gang. One still running is killed, with every process of its gang; one that waits for
        another is taken from it. Repeatable."""
        ...

    def leave(self) -> bool:
        """Remove the gangs that hold no attempt and leave the others to be adopted, where gangs outlive this process;
        whether they do. Where not, nothing has happened."""
        ...

    def close(self) -> None:
        """Kill every gang; afterwards no process or reservation of this launcher is left. Repeatable."""
        ...
