"""The best so far: each trial of a study that was better than all before it, and what had been spent by then."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from orchestrator.cost import held_seconds
from orchestrator.ledger import Spent
from orchestrator.lifecycle import TrialState
from orchestrator.tables import TRIALS


@dataclass(frozen=True)
class Best:
    """A trial that was the best when it was complete."""

    number: int
    val_bpb: float
    """Of the run that completed it: what its further seeds score comes later."""
    trials: int
    """Complete ones by then, itself counted."""
    gpu_seconds: float
    """That all attempts of the study which had ended by then held; a CPU rank counts as one GPU."""


@dataclass(frozen=True)
class Course:
    """How a study's best fell, and how far it has come since. A trial that misses a cap is never a best."""

    bests: tuple[Best, ...]
    trials: int
    gpu_seconds: float


def course(session: Session, study_id: int, attempts: Iterable[Spent]) -> Course:
    """The course of a study, whose attempts these are."""
    query = (
        select(TRIALS.c.number, TRIALS.c.val_bpb, TRIALS.c.feasible, TRIALS.c.finished_at)
        .where(TRIALS.c.study_id == study_id, TRIALS.c.state == TrialState.COMPLETE)
        .order_by(TRIALS.c.finished_at, TRIALS.c.number)
    )  # fmt: skip
    ended = sorted(
        ((one.finished_at, held_seconds(one.by_phase) * one.ranks) for one in attempts if one.finished_at is not None),
        key=lambda pair: pair[0],
    )
    found: list[Best] = []
    trials, place, spent = 0, 0, 0.0
    for number, bpb, feasible, finished_at in session.execute(query):
        trials += 1
        if not feasible or (found and bpb >= found[-1].val_bpb):
            continue
        spent, place = _until(ended, finished_at, spent, place)
        found.append(Best(number, bpb, trials, spent))
    return Course(tuple(found), trials, spent + sum(seconds for _, seconds in ended[place:]))


def _until(ended: list[tuple[datetime, float]], moment: datetime, spent: float, place: int) -> tuple[float, int]:
    """What had been spent at this moment, from what had been at an earlier one, and how many attempts had ended."""
    while place < len(ended) and ended[place][0] <= moment:
        spent += ended[place][1]
        place += 1
    return spent, place
