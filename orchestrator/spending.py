"""What a study has spent, what its open attempts will still cost, and whether what is left pays for another run.

Seconds here are those of every rank together, of CPU ranks too. What a run will cost, by what is known of its like:
- of the last LIKE successes of its study at the same rung, ranks and budget, as much as the dearest;
- before the first of them, where its budget is in seconds: these and the longest evaluation that the study allows. If
  nothing else of the study runs, it is enough that the training can be paid for;
- otherwise its share of the dearest success at another rung; without any, all that is left: the first runs alone.
A run that takes longer than that is not stopped: by so much a study may overspend.
"""

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import inf
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from orchestrator.cost import IDLE, held_seconds
from orchestrator.errors import OverBudget
from orchestrator.ledger import seconds_by_phase
from orchestrator.lifecycle import Outcome, TrialState
from orchestrator.rows import study_of
from orchestrator.shortening import share_of
from orchestrator.study import NewStudy, SpendingConfig, Study
from orchestrator.tables import AttemptRow, RunRow, StudyRow, TrialRow
from worker.spec import BudgetConfig

LIKE = 20
HOUR = 3600.0
BUDGET_LOCK = 0x0CADD1  # any fixed number: PostgreSQL's advisory lock, with the study's id, of claims under a budget


@dataclass(frozen=True)
class Kind:
    """Runs that cost alike."""

    rung: int
    ranks: int
    budget: BudgetConfig

    @classmethod
    def of(cls, rung: int, ranks: int, budget: Mapping[str, Any]) -> "Kind":
        return cls(rung, ranks, BudgetConfig.model_validate(budget))


@dataclass(frozen=True)
class Account:
    """A study's hours, of every rank together. `reserved_hours` are what open attempts will still take, as far as the
    budget goes; `limit_hours` is the nearer of its limits, on hours or on dollars."""

    limit_hours: float
    spent_hours: float
    reserved_hours: float
    open_attempts: int

    @property
    def left_hours(self) -> float:
        return max(self.limit_hours - self.spent_hours - self.reserved_hours, 0.0)


def limit_hours(spending: SpendingConfig) -> float | None:
    """What a study may spend, in hours of every rank together; None where nothing limits that."""
    limits = [] if spending.gpu_hours is None else [spending.gpu_hours]
    if spending.dollars is not None and spending.gpu_hour_dollars:
        limits.append(spending.dollars / spending.gpu_hour_dollars)
    return min(limits, default=None)


@dataclass(frozen=True)
class _Open:
    kind: Kind
    so_far_seconds: float


class Purse:
    """One study under a budget. Ended attempts never change, so that each is read once: all of it is cache."""

    def __init__(self, study_id: int, definition: NewStudy, limit: float) -> None:
        self._study_id, self._definition, self._limit = study_id, definition, limit
        self._ended = 0.0  # seconds of attempts below `_next`, which have all ended
        self._next = 0
        self._costs: dict[Kind, deque[float]] = {}  # of successes, idle seconds before them aside
        self._counted: set[int] = set()  # the attempts that they are of

    def read(self, session: Session, now: datetime) -> Account:
        """The account as of this session."""
        ended, open_attempts = self._look(session, now)
        spent = (ended + sum(each.so_far_seconds for each in open_attempts)) / HOUR
        most = sum(max(self._cost(each.kind)[1] - each.so_far_seconds, 0.0) for each in open_attempts) / HOUR
        return Account(self._limit, spent, min(most, max(self._limit - spent, 0.0)), len(open_attempts))

    def require(self, session: Session, kind: Kind, now: datetime) -> None:
        """Raise OverBudget unless what is left pays for a run of this kind."""
        if session.get_bind().dialect.name == "postgresql":  # SQLite has one writer
            session.execute(
                text("SELECT pg_advisory_xact_lock(:lock, :id)"), {"lock": BUDGET_LOCK, "id": self._study_id}
            )
        account = self.read(session, now)
        least, most = (seconds / HOUR for seconds in self._cost(kind))
        needed = most if account.open_attempts else least
        if account.left_hours <= 0 or needed > account.left_hours:
            raise OverBudget(self._study_id, self._sentence(account, least), final=not account.open_attempts)

    def _look(self, session: Session, now: datetime) -> tuple[float, list[_Open]]:
        rows = session.execute(
            select(
                AttemptRow.id, AttemptRow.outcome, AttemptRow.finished_at, AttemptRow.queued_at, AttemptRow.started_at,
                AttemptRow.phase, AttemptRow.phase_since, AttemptRow.phase_seconds, RunRow.rung, RunRow.ranks,
                RunRow.budget,
            )
            .join(RunRow, RunRow.id == AttemptRow.run_id).join(TrialRow, TrialRow.id == RunRow.trial_id)
            .where(TrialRow.study_id == self._study_id, AttemptRow.id >= self._next).order_by(AttemptRow.id)
        ).all()  # fmt: skip
        ended, open_attempts = self._ended, []
        for row in rows:
            by_phase = seconds_by_phase(
                row.queued_at, row.started_at, row.phase, row.phase_since, row.phase_seconds, row.finished_at or now
            )
            kind, seconds = Kind.of(row.rung, row.ranks, row.budget), held_seconds(by_phase) * row.ranks
            if row.outcome is None:
                open_attempts.append(_Open(kind, seconds))
                continue
            ended += seconds
            if not open_attempts:  # those after an open one are read again
                self._ended, self._next = ended, row.id + 1
            if row.outcome == Outcome.SUCCEEDED and row.id not in self._counted:
                self._counted.add(row.id)
                costs = self._costs.setdefault(kind, deque(maxlen=LIKE))
                costs.append(seconds - by_phase.get(IDLE, 0.0) * row.ranks)
        return ended, open_attempts

    def _cost(self, kind: Kind) -> tuple[float, float]:
        """What a run of this kind costs at the least and at the most, in seconds."""
        if kind in self._costs:
            return max(self._costs[kind]), max(self._costs[kind])
        if kind.budget.seconds is not None:
            evaluated = kind.budget.seconds + self._definition.cap_evaluate_seconds
            return kind.budget.seconds * kind.ranks, evaluated * kind.ranks
        scaled = [
            share * max(costs)
            for other, costs in self._costs.items()
            if (share := share_of(kind.budget, kind.ranks, other.budget, other.ranks)) is not None
        ]
        return (max(scaled), max(scaled)) if scaled else (0.0, inf)

    def _sentence(self, account: Account, least: float) -> str:
        spending = self._definition.spending
        limits = [] if spending.gpu_hours is None else [f"{spending.gpu_hours:g} GPU-hours"]
        if spending.dollars is not None:
            limits.append(f"${spending.dollars:g} at ${spending.gpu_hour_dollars:g} a GPU-hour")
        budget = f"the budget of {' and '.join(limits)} is spent: {account.spent_hours:.4g} GPU-hours so far"
        return f"{budget}, and the next run would take about {least:.4g}" if least else budget


class Purses:
    """Those of every study: what one may spend, and when it has found enough. All of it is cache."""

    def __init__(self) -> None:
        self._purses: dict[int, tuple[Any, Purse | None]] = {}  # with the terms that each was made for
        self._complete: dict[int, int] = {}

    def require(self, session: Session, study_id: int, terms: Any, kind: Kind, now: datetime) -> None:
        """Raise OverBudget unless the study may start a run of this kind. `terms` is the budget that it has now, as its
        row has it. Asks nothing where that limits no hours."""
        held = self._purses.get(study_id)
        if held is None or held[0] != terms:
            held = self._purses[study_id] = terms, purse_of(study_of(session.get_one(StudyRow, study_id)))
        if held[1] is not None:
            held[1].require(session, kind, now)

    def enough(self, session: Session, studies: Sequence[Study], now: datetime) -> dict[int, str]:
        """The studies among these that should stop, by id, and why: their time is over, or their target is reached."""
        why: dict[int, str] = {}
        for study in studies:
            spending = study.definition.spending
            if spending.wall_hours is not None and now - study.created_at >= timedelta(hours=spending.wall_hours):
                why[study.id] = f"its {spending.wall_hours:g} hours are over"
            elif spending.target_bpb and (reached := self._reached(session, study, spending.target_bpb)):
                why[study.id] = reached
        return why

    def _reached(self, session: Session, study: Study, target_bpb: float) -> str | None:
        complete = (TrialRow.study_id == study.id, TrialRow.state == TrialState.COMPLETE)
        count = session.scalar(select(func.count()).where(*complete)) or 0  # by an index; rows are long
        if count == self._complete.get(study.id):
            return None
        best = session.execute(
            select(TrialRow.number, TrialRow.val_bpb)
            .where(*complete, TrialRow.feasible.is_(True), TrialRow.origin != "imported")  # nobody here measured those
            .order_by(TrialRow.val_bpb).limit(1)
        ).one_or_none()  # fmt: skip
        if best is None or best.val_bpb > target_bpb:
            self._complete[study.id] = count
            return None
        return f"trial {best.number} has reached the target of {target_bpb:g} BPB with {best.val_bpb:.4f}"


class Accounts:
    """Those of every study, for readers on several threads. All of it is cache, of what was committed."""

    def __init__(self) -> None:
        self._purses: dict[int, tuple[SpendingConfig, Purse | None]] = {}  # with the terms that each was made for
        self._lock = threading.Lock()

    def read(self, session: Session, study: Study, now: datetime) -> Account | None:
        """What the study has spent; None where nothing limits its hours."""
        with self._lock:
            terms, held = study.definition.spending, self._purses.get(study.id)
            if held is None or held[0] != terms:
                held = self._purses[study.id] = terms, purse_of(study)
            return None if held[1] is None else held[1].read(session, now)


def purse_of(study: Study) -> Purse | None:
    """A purse for the study; None where nothing limits its hours."""
    limit = limit_hours(study.definition.spending)
    return None if limit is None else Purse(study.id, study.definition, limit)
