"""The contract between the loop and whatever runs gangs. Two implementations: local processes, and Ray."""

from dataclasses import dataclass
from typing import Protocol

from orchestrator.lifecycle import Cause, Outcome
from worker.report import Measurement, TrialResult
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


@dataclass(frozen=True)
class Update:
    """What a gang has said since the caller last asked. Asking again with the same cursor gives the same messages.

    `beats` counts rank 0's signs of life: one that stands still has not taken a step, nor said or asked anything.
    """

    phase: str
    measurements: tuple[Measurement, ...]
    ending: Ending | None
    beats: int = 0


class NoRoom(RuntimeError):
    """No gang of this shape can start now. Nothing was started."""


class Launcher(Protocol):
    """Runs gangs. Every call returns without waiting for training; none raises because a gang died (poll says so)."""

    def free(self, gang: GangConfig) -> int:
        """How many gangs of this shape could start an attempt right now, idle ones of the shape included."""
        ...

    def capacity(self, gang: GangConfig) -> int:
        """How many gangs of this shape could run here if nothing else did; 0 says that one would wait for ever."""
        ...

    def start(self, assignment: Assignment) -> str:
        """Give the attempt to a gang of spec.gang's shape and return the gang's name. Raises NoRoom."""
        ...

    def adopt(self, attempt_id: int, gang: str) -> bool:
        """Take over an attempt that a launcher before this one started on the gang of that name, wherever it has come
        to by now; whether that gang is still there. Repeatable."""
        ...

    def reap(self) -> int:
        """Remove every gang that a launcher before this one left and nobody adopted; how many there were."""
        ...

    def poll(self, attempt_id: int, after: int) -> Update:
        """Measurements numbered above `after`, and the ending once there is one. An attempt not known here is lost."""
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
        """Free the attempt's gang. One still running is killed, with every process of its gang. Repeatable."""
        ...

    def close(self) -> None:
        """Kill every gang; afterwards no process or reservation of this launcher is left. Repeatable."""
        ...
