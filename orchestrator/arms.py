"""What proposed a study's trials, and what came of it: arm by arm, and of the guided ones rule by rule."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from orchestrator.lifecycle import TrialState
from orchestrator.tables import TrialRow

SUBMITTED = "submitted by hand"
UNNAMED = "sampler"
GUIDED = "guided"


@dataclass
class Record:
    """The trials of one arm, or of one guided rule. Scores are those of complete trials that keep every cap."""

    name: str
    trials: int = 0
    scores: list[float] = field(default_factory=list)
    bests: int = 0
    """How often one of them was better than every trial before it."""
    gains: list[float] = field(default_factory=list)
    """BPB of the trial that each was made from, minus its own: above 0 where it did better."""

    @property
    def best_bpb(self) -> float | None:
        return min(self.scores, default=None)

    @property
    def median_bpb(self) -> float | None:
        return median(self.scores) if self.scores else None

    @property
    def mean_gain(self) -> float | None:
        return fmean(self.gains) if self.gains else None

    @property
    def better(self) -> int:
        """How many did better than the trial that they were made from."""
        return sum(gain > 0 for gain in self.gains)


@dataclass(frozen=True)
class _Known:
    number: int
    origin: str
    score: float | None
    suggestion: Mapping[str, Any] | None
    """A Suggestion as it was written: there may be ten thousand to read."""


def arms(session: Session, study_id: int) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    """The study's arms, those that set most bests first, and the rules of guided proposals."""
    row = TrialRow
    columns = (row.number, row.origin, row.val_bpb, row.feasible, row.state, row.suggestion)
    query = select(*columns).where(row.study_id == study_id).order_by(row.number)
    known = [
        _Known(number, origin, bpb if feasible and state == TrialState.COMPLETE else None, suggestion)
        for number, origin, bpb, feasible, state, suggestion in session.execute(query)
    ]
    return _records(known)


def _records(known: Sequence[_Known]) -> tuple[tuple[Record, ...], tuple[Record, ...]]:
    by_arm: dict[str, Record] = {}
    by_rule: dict[str, Record] = {}
    scores = {one.number: one.score for one in known}
    best: float | None = None
    for one in known:
        suggestion = one.suggestion or {}
        arm, rule, parent = (suggestion.get(name) for name in ("arm", "rule", "parent"))
        name = arm or (UNNAMED if one.origin == "proposed" else SUBMITTED)
        records = [by_arm.setdefault(name, Record(name))]
        if arm == GUIDED and rule is not None:
            records.append(by_rule.setdefault(rule, Record(rule)))
        is_best = one.score is not None and (best is None or one.score < best)
        before = None if parent is None else scores.get(parent)
        for record in records:
            record.trials += 1
            if one.score is not None:
                record.scores.append(one.score)
                record.bests += is_best
                if before is not None:
                    record.gains.append(before - one.score)
        if is_best:
            best = one.score
    ordered = sorted(by_arm.values(), key=lambda record: (-record.bests, -record.trials, record.name))
    return tuple(ordered), tuple(sorted(by_rule.values(), key=lambda record: (-record.trials, record.name)))
