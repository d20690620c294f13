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


Trainer = Callable[[Job, Reporter], tuple[TrialResult, bytes] | None]
"""The result and the artifact's bytes on rank 0, None on the others."""


def find_trainer(name: str) -> Trainer:
    """The function that `module:function` names. Raises ImportError or AttributeError where there is none."""
    module, _, function = name.partition(":")
    trainer: Trainer = getattr(importlib.import_module(module), function)
    return trainer
