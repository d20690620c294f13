"""Promotion through rungs: asynchronous successive halving (Li et al., 2020), while rungs rank trials as the next do.

A proposal is trained at a cheap rung first, a complete training of its own. Its trial is then pruned, and queued again
at the next rung once it is among the best `keep` of all that have finished the rung so far, or if it was drawn to go on
whatever it scored. Scores are compared within a rung alone.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import exists, or_, select, true, update
from sqlalchemy.orm import Session

from orchestrator import store
from orchestrator.lifecycle import OPEN_RUNS, Outcome, RunState, StudyState, TrialState
from orchestrator.reopening import PROMOTED, list_reopened
from orchestrator.shortening import Rung
from orchestrator.statistics import Correlation, spearman
from orchestrator.study import PromotionConfig, Study
from orchestrator.tables import TRIALS, AttemptRow, EventRow, RunRow, StudyRow, TrialRow
from worker.spec import GangConfig, parse_spec

FIRST_LOOK = 10
"""Pairs of scores that there are when the correlation is first judged. It is again each time they have doubled, so that
looking often does not find it low by chance; what one look has found stands."""


@dataclass(frozen=True)
class Promotion:
    """A trial that should go on, to which rung, and why."""

    number: int
    rung: Rung
    why: str


@dataclass(frozen=True)
class Finished:
    """A trial's score at a rung. Those over a cap of the study come after all others."""

    number: int
    over: bool
    val_bpb: float
    finished_at: datetime
    gang: GangConfig
    """That of its spec."""

    @property
    def place(self) -> tuple[bool, float, int]:
        return self.over, self.val_bpb, self.number


class Ladder:
    """The rungs of one study, and who has come to which. All of it is cache: settled runs change only when they
    are retried."""

    def __init__(self, study: Study, promotion: PromotionConfig) -> None:
        self._study_id, self._seed, self._promotion = study.id, study.definition.seed, promotion
        self._own = parse_spec(study.definition.base).budget
        self._shapes = study.definition.shapes
        self.numbers = range(-len(promotion.rungs), 0)
        self._reached: dict[int, set[int]] = {number: set() for number in (*self.numbers, 0)}
        self._finished: dict[int, dict[int, Finished]] = {number: {} for number in (*self.numbers, 0)}
        self._next = 0
        self._reopened_until = 0  # the last event that was followed
        self.told: set[int] = set()
        """The rungs that no longer decide, as far as an event says so."""

    def rung(self, number: int, gang: GangConfig) -> Rung:
        """What a trial whose spec asks for this gang trains with at a rung."""
        if number == 0:
            return Rung(0, self._own, gang)
        config = self._promotion.rungs[number]
        ranks = min(config.ranks or gang.ranks, gang.ranks)
        return Rung(number, config.budget, gang.model_copy(update={"ranks": ranks}))

    def shapes(self) -> tuple[GangConfig, ...]:
        """Every shape of gang that a run of the study may wait for."""
        return tuple(
            dict.fromkeys(self.rung(number, gang).gang for number in (*self.numbers, 0) for gang in self._shapes)
        )

    def start(self, gang: GangConfig) -> Rung:
        """Where a proposal for this gang starts: at the cheapest rung that decides."""
        return self.rung(next((number for number in self.numbers if self.low(number) is None), 0), gang)

    def read(self, session: Session) -> None:
        """Take in what has happened by this session."""
        reopened, self._reopened_until = list_reopened(session, self._study_id, self._reopened_until)
        news = or_(RunRow.id >= self._next, TrialRow.number.in_(reopened)) if self._next else true()
        rows = session.execute(
            select(
                RunRow.id, RunRow.rung, RunRow.state, RunRow.scores, TrialRow.number,
                TrialRow.spec["gang"].label("gang"), AttemptRow.finished_at,
            )
            .join(TrialRow, TrialRow.id == RunRow.trial_id)
            .outerjoin(AttemptRow, (AttemptRow.run_id == RunRow.id) & (AttemptRow.outcome == Outcome.SUCCEEDED))
            .where(TrialRow.study_id == self._study_id, news).order_by(RunRow.id)
        ).all()  # fmt: skip
        for row in rows:
            gang, finished = GangConfig.model_validate(row.gang), None
            if row.state == RunState.SUCCEEDED and row.scores is not None:
                over, val_bpb = not row.scores["feasible"], row.scores["val_bpb"]
                finished = Finished(row.number, over, val_bpb, row.finished_at, gang)
            self.take(row.number, row.rung, finished)
        still_open = (row.id for row in rows if row.state in OPEN_RUNS)
        self._next = min(still_open, default=max(rows[-1].id + 1 if rows else 0, self._next))

    def take(self, number: int, rung: int, finished: Finished | None) -> None:
        """Take in that a trial has come to a rung, and with which score where it has finished there."""
        if rung in self._reached:
            self._reached[rung].add(number)
            if finished is not None:  # further seeds come after a trial's first run
                self._finished[rung].setdefault(number, finished)

    def due(self, gang: GangConfig | None = None, *, last: bool = False) -> Promotion | None:
        """The promotion to make next, onto a gang of this shape or of any: at the dearest rung, the best trial first.

        `last`: nothing more will come, so that each rung sends on its best trial, however few it has seen.
        """
        for number in reversed(self.numbers):
            for finished, why in self._passing(number, last):
                rung = self.rung(number + 1, finished.gang)
                if gang is None or rung.gang == gang:
                    return Promotion(finished.number, rung, why)
        return None

    def low(self, number: int) -> Correlation | None:
        """What showed that the rung does not rank trials as the next one does; None while nothing has."""
        pairs = sorted(
            (above.finished_at, finished.number, finished.val_bpb, above.val_bpb)
            for finished in self._finished[number].values()
            if (above := self._finished[number + 1].get(finished.number)) is not None
        )
        look = FIRST_LOOK
        while look <= len(pairs):
            found = spearman([pair[2] for pair in pairs[:look]], [pair[3] for pair in pairs[:look]])
            if found.high < self._promotion.min_correlation:
                return found
            look *= 2
        return None

    def _passing(self, number: int, last: bool) -> Iterator[tuple[Finished, str]]:
        """The trials that should leave a rung and have not, best first."""
        ranked = sorted(self._finished[number].values(), key=lambda finished: finished.place)
        quota = max(int(len(ranked) * self._promotion.keep), 1 if last else 0)
        low = self.low(number)
        for place, finished in enumerate(ranked, 1):
            if finished.number in self._reached[number + 1]:
                continue
            score = f"{finished.val_bpb:.4f} BPB is number {place} of {len(ranked)} at rung {number}"
            if place <= quota:
                yield finished, score
            elif low is not None:
                yield finished, f"{score}, which no longer decides"
            elif drawn(self._seed, "promotion", finished.number, number) < self._promotion.spare:
                yield finished, f"{score}, and it was drawn to show how well that ranks trials"


def promote(session: Session, study_id: int, promotion: Promotion, now: datetime) -> bool:
    """Queue a pruned trial again, at a higher rung; False where another has, or the study does not run."""
    running = select(StudyRow.id).where(StudyRow.id == study_id, StudyRow.state == StudyState.RUNNING)
    if session.scalar(running.with_for_update(read=True)) is None:
        return False
    rung, cleared = promotion.rung, dict.fromkeys(("result", "val_bpb", "artifact_bytes", "feasible", "reason"))
    there = exists().where(RunRow.trial_id == TRIALS.c.id, RunRow.rung >= rung.number)
    trial_id = session.scalar(
        update(TRIALS)
        .where(TRIALS.c.study_id == study_id, TRIALS.c.number == promotion.number, ~there)
        .where(TRIALS.c.state == TrialState.PRUNED)
        .values(state=TrialState.QUEUED, finished_at=None, **cleared).returning(TRIALS.c.id)
    )  # fmt: skip
    if trial_id is None:
        return False
    store.add_run(session, session.get_one(TrialRow, trial_id), rung, now)
    message = f"Trial {promotion.number} goes on to rung {rung.number}: {promotion.why}"
    store.add_event(session, study_id, promotion.number, PROMOTED, message, now)
    return True


def tell_of_low(session: Session, study_id: int, number: int, low: Correlation, now: datetime) -> None:
    """Say once, as an event of the study, that a rung no longer decides, and what has shown it."""
    message = (
        f"Rung {number} no longer decides: over {low.count} trials its scores and those of rung {number + 1} correlate "
        f"by {low.value:.2f} ({low.low:.2f} to {low.high:.2f})"
    )
    told = select(EventRow.id).where(EventRow.study_id == study_id, EventRow.message == message)
    if session.scalar(told) is None:
        store.add_event(session, study_id, None, "study.rung", message, now)


def drawn(*parts: Any) -> float:
    """A number from 0 to 1 that differs wherever any part does, and is the same for ever."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") / 2**64
