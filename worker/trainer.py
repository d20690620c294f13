"""What a gang runs: a job, and the function that trains it. Torch-free: a trainer may do without."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from worker.report import Reporter, TrialResult
from worker.spec import TrialSpec


@dataclass(frozen=True)
class Job:
    """One attempt, as one rank of its gang sees it."""

    spec: TrialSpec
    data_root: Path
    rank: int = 0
    ranks: int = 1
    defer: bool = False
    """Whether the trainer may leave what needs no rank to a Finish, so that its rank is free sooner."""


Finish = Callable[[], tuple[TrialResult, bytes]]
"""What is left of a job: gives what the trainer would have given in its place, or raises as it would.

To be called once, in any thread, while this process may run the next job: it needs no rank, no process group and no
device, and holds nothing that a job after it could change.
"""

Produced = tuple[TrialResult, bytes] | Finish | None
"""The result and the artifact's bytes on rank 0, or, where the job allows it, how to get them; None on other ranks."""

Trainer = Callable[[Job, Reporter], Produced]


def finished(produced: Produced) -> tuple[TrialResult, bytes] | None:
    """What a trainer produced, whatever it had left done here and now."""
    return produced() if callable(produced) else produced


def find_trainer(name: str) -> Trainer:
    """The function that `module:function` names. Raises ImportError or AttributeError where there is none."""
    module, _, function = name.partition(":")
    trainer: Trainer = getattr(importlib.import_module(module), function)
    return trainer


def find_check(name: str) -> Callable[[Job], None] | None:
    """The function `check` beside the one that `module:function` names, None where there is none: it raises ValueError
    for a job whose data is not as its spec says, at little cost and in any thread."""
    module, _, _function = name.partition(":")
    check: Callable[[Job], None] | None = getattr(importlib.import_module(module), "check", None)
    return check
