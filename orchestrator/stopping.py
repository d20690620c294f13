"""Stopping hopeless runs early: each new intermediate BPB beside those of other runs at the same share of the budget.

Curves cross late, since learning rates fall at the end. So some runs that would have been stopped are spared at random
and train on: `regret` says what stopping them would have cost.
"""

import logging
from bisect import insort
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from math import ceil, sqrt
from statistics import NormalDist, median

from sqlalchemy import and_, or_, select, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, aliased

from orchestrator import store
from orchestrator.database import Database
from orchestrator.lifecycle import OPEN_RUNS, RunState, TrialState
from orchestrator.rows import study_of
from orchestrator.rungs import drawn
from orchestrator.statistics import Interval
from orchestrator.study import Claim, StoppingConfig, Study
from orchestrator.tables import RUNS, AttemptRow, MeasurementRow, RunRow, StudyRow, TrialRow
from worker.report import Measurement

log = logging.getLogger(__name__)

Curve = Sequence[tuple[float, float]]
"""BPB by the share of the budget that was spent, ascending."""
NEAR = 0.01
"""A curve is not continued beyond its ends by more than this share of the budget."""


def value_at(curve: Curve, fraction: float) -> float | None:
    """A curve's BPB at a share of the budget, between its points on a straight line; None where it has no points near.

    One that has not come so far has none.
    """
    if not curve or curve[0][0] > fraction + NEAR or curve[-1][0] < fraction - NEAR:
        return None
    for (left, before), (right, after) in pairwise(curve):
        if left <= fraction <= right:
            return before if left == right else before + (after - before) * (fraction - left) / (right - left)
    return curve[0][1] if fraction < curve[0][0] else curve[-1][1]


def threshold(
    config: StoppingConfig, own: Curve, finished: Sequence[Curve], others: Sequence[Curve], since: float | None = None
) -> tuple[float, str] | None:
    """The BPB that the last point of `own` misses, with what it is; None where the run may go on.

    `finished` are the curves of runs that trained to the end; `others` are these too, and all that have come as far.
    `since` is the share of the budget at which the run was judged before: at its last point but one, if none is given.
    """
    fraction, value = own[-1]
    if not config.after_fraction <= fraction < 1 or len(finished) < config.min_runs:
        return None
    compared = others if config.rule == "halving" else finished
    known = sorted(found for curve in compared if (found := value_at(curve, fraction)) is not None)
    if len(known) < config.min_runs:
        return None
    if config.rule == "median":
        limit, what = median(known), f"the median of {len(known)} runs"
    elif config.rule == "percentile":
        limit = known[max(int(len(known) * config.percent / 100), 1) - 1]
        what = f"what the best {config.percent:g}% of {len(known)} runs had"
    else:
        before = (own[-2][0] if len(own) > 1 else 0.0) if since is None else since
        if _halvings(config, before) == _halvings(config, fraction):
            return None
        limit = sorted([*known, value])[ceil((len(known) + 1) / 2) - 1]
        what = f"what the better half of {len(known) + 1} runs had"
    return (limit, what) if value > limit else None


def _halvings(config: StoppingConfig, fraction: float) -> int:
    """How often what is left after `after_fraction` has been halved, that fraction itself counted."""
    left, times = 1 - config.after_fraction, 0
    while fraction >= 1 - left:
        left, times = left / 2, times + 1
    return times


@dataclass
class _Run:
    """A run as its latest attempt has measured it."""

    id: int
    rung: int
    state: RunState
    deciding: bool
    """Whether its trial waits for it. A further seed of a complete trial does not decide anything."""
    spared: bool
    attempt_id: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)


class _Curves:
    """The curves of one study. Those of runs that have ended are read once: all of it is cache."""

    def __init__(self, study_id: int) -> None:
        self._study_id = study_id
        self._first: dict[tuple[int, int], _Run] = {}  # by trial and rung: its first run
        self._next = 0
        self.judged: dict[int, float] = {}
        """By open attempt, the share of the budget at which it was judged last."""

    def read(self, session: Session, asked: Collection[int]) -> tuple[_Run, ...]:
        """Every trial's first run at each rung. Those asked for, by id, are read again: they may have been retried."""
        bpb, fraction = aliased(MeasurementRow), aliased(MeasurementRow)
        of_attempt = and_(bpb.attempt_id == AttemptRow.id, bpb.name == "val_bpb")
        same = (fraction.attempt_id == bpb.attempt_id, fraction.number == bpb.number, fraction.name == "fraction")
        rows = session.execute(
            select(
                RunRow.id, RunRow.trial_id, RunRow.rung, RunRow.state, RunRow.spared_at, TrialRow.state.label("trial"),
                AttemptRow.id.label("attempt_id"), fraction.value.label("fraction"), bpb.value.label("val_bpb"),
            )
            .join(TrialRow, TrialRow.id == RunRow.trial_id).outerjoin(AttemptRow, AttemptRow.run_id == RunRow.id)
            .outerjoin(bpb, of_attempt).outerjoin(fraction, and_(*same))
            .where(TrialRow.study_id == self._study_id, or_(RunRow.id >= self._next, RunRow.id.in_(asked)))
            .order_by(RunRow.id, AttemptRow.id, bpb.number)
        ).all()  # fmt: skip
        fresh: dict[int, _Run] = {}
        for row in rows:
            state, deciding = RunState(row.state), row.trial == TrialState.RUNNING
            run = fresh.setdefault(row.id, _Run(row.id, row.rung, state, deciding, row.spared_at is not None))
            if self._first.setdefault((row.trial_id, row.rung), run).id == row.id:
                self._first[row.trial_id, row.rung] = run
            if row.fraction is None:
                continue
            if row.attempt_id != run.attempt_id:  # the last that measured counts: it tells its whole curve
                run.attempt_id, run.curve = row.attempt_id, []
            run.curve.append((row.fraction, row.val_bpb))
        still_open = (run.id for run in fresh.values() if run.state in OPEN_RUNS)
        self._next = min(still_open, default=max(rows[-1].id + 1 if rows else 0, self._next))
        return tuple(self._first.values())


class Stopping:
    """Which running attempts should be stopped now, in every study that stops any. All of it is cache."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._curves: dict[int, tuple[Study, StoppingConfig, _Curves] | None] = {}

    def look(self, news: Sequence[tuple[Claim, Sequence[Measurement]]], now: datetime) -> dict[int, str]:
        """The attempts to stop, by id, and why: of those that have just measured this, all of it in the database."""
        asked: dict[int, dict[int, Claim]] = {}  # by study, then run
        for claim, measurements in news:
            if any({"val_bpb", "fraction"} <= measurement.metrics.keys() for measurement in measurements):
                asked.setdefault(claim.study_id, {})[claim.run_id] = claim
        stopped: dict[int, str] = {}
        for study_id, claims in asked.items():
            try:
                if study_id not in self._curves:
                    self._curves[study_id] = self._open(study_id)
                if (known := self._curves[study_id]) is not None:
                    stopped |= self._judge(*known, claims, now)
            except OperationalError:
                raise
            except Exception:  # one study must not stop the others
                log.exception("the runs of study %d could not be judged", study_id)
        return stopped

    def _open(self, study_id: int) -> tuple[Study, StoppingConfig, _Curves] | None:
        with self._database.read() as session:
            study = study_of(session.get_one(StudyRow, study_id))
        config = study.definition.stopping
        return None if config is None else (study, config, _Curves(study_id))

    def _judge(
        self, study: Study, config: StoppingConfig, curves: _Curves, claims: Mapping[int, Claim], now: datetime
    ) -> dict[int, str]:
        with self._database.read() as session:
            runs = curves.read(session, claims)
        stopped: dict[int, str] = {}
        for run in runs:
            claim = claims.get(run.id)
            if claim is None or not run.deciding or run.spared or run.attempt_id != claim.lease.attempt_id:
                continue
            others = [other for other in runs if other.rung == run.rung and other.id != run.id]
            finished = [other.curve for other in others if other.state is RunState.SUCCEEDED]
            compared = [
                other.curve for other in others if other.state not in (RunState.FAILED, RunState.CANCELLED)
            ]  # fmt: skip
            since = curves.judged.get(run.attempt_id)
            curves.judged[run.attempt_id] = run.curve[-1][0]
            missed = threshold(config, run.curve, finished, compared, since)
            if missed is None:
                continue
            fraction, value = run.curve[-1]
            why = f"{config.rule}: {value:.4f} BPB at {fraction:.0%} of its budget is over {missed[0]:.4f}, {missed[1]}"
            if drawn(study.definition.seed, "spare", claim.trial_number, claim.spec.seed, run.rung) < config.spare:
                self._spare(claim, fraction, why, now)
            else:
                log.info("trial %d is stopped: %s", claim.trial_number, why)
                stopped[claim.lease.attempt_id] = why
        return stopped

    def _spare(self, claim: Claim, fraction: float, why: str, now: datetime) -> None:
        """Let the run train on to its end, and remember from where it would not have."""
        with self._database.write() as session:
            here = (RUNS.c.id == claim.run_id, RUNS.c.state == RunState.RUNNING, RUNS.c.spared_at.is_(None))
            spared = session.scalar(update(RUNS).where(*here).values(spared_at=fraction).returning(RUNS.c.id))
            if spared is not None:
                message = f"Trial {claim.trial_number} is spared, to see what stopping costs. By the {why}"
                store.add_event(session, claim.study_id, claim.trial_number, "trial.spared", message, now)


@dataclass(frozen=True)
class Regret:
    """What stopping would have got wrong, by the runs that it spared and that trained to the end.

    `wrong` of them would have passed the rule with their final score, beside those that had finished before them;
    `best` would have been better than all of these.
    """

    stopped: int
    spared: int
    finished: int
    wrong: int
    error_rate: Interval
    """Of all stops: Wilson's 90% interval; everything while none has finished."""
    best: int
    given_up_bpb: float | None
    """The mean of what the best would have been worse by, without those."""


def regret(session: Session, study: Study) -> Regret:
    """What the study's stopping has been seen to cost."""
    config = study.definition.stopping or StoppingConfig()  # without one it has spared nothing
    rows = session.execute(
        select(RunRow.trial_id, RunRow.rung, RunRow.state, RunRow.spared_at, RunRow.scores)
        .join(TrialRow, TrialRow.id == RunRow.trial_id).join(AttemptRow, AttemptRow.run_id == RunRow.id)
        .where(TrialRow.study_id == study.id, AttemptRow.outcome.in_(("succeeded", "stopped")))
        .order_by(AttemptRow.finished_at, AttemptRow.id)
    ).all()  # fmt: skip
    spared, wrong, given_up = [row for row in rows if row.spared_at is not None], 0, []
    before: dict[int, list[float]] = {}
    firsts: set[tuple[int, int]] = set()
    for row in rows:
        # Further seeds are of trials that have done well: beside them, few would seem to have been stopped wrongly.
        if row.state != RunState.SUCCEEDED or row.scores is None or (row.trial_id, row.rung) in firsts:
            continue
        firsts.add((row.trial_id, row.rung))
        value, earlier = row.scores["val_bpb"], before.setdefault(row.rung, [])
        if row.spared_at is not None and earlier:
            share = config.percent / 100 if config.rule == "percentile" else 0.5
            limit = median(earlier) if config.rule == "median" else earlier[max(int(len(earlier) * share), 1) - 1]
            wrong += value <= limit
            given_up.append(max(earlier[0] - value, 0.0))
        insort(earlier, value)
    return Regret(
        stopped=sum(row.state == RunState.STOPPED for row in rows), spared=len(spared), finished=len(given_up),
        wrong=wrong, error_rate=_wilson(wrong, len(given_up)), best=sum(bpb > 0 for bpb in given_up),
        given_up_bpb=sum(given_up) / len(given_up) if given_up else None,
    )  # fmt: skip


def _wilson(hits: int, count: int, confidence: float = 0.9) -> Interval:
    if not count:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    share, width = hits / count, 1 + z * z / count
    middle = (share + z * z / (2 * count)) / width
    half = z / width * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return Interval(max(middle - half, 0.0), min(middle + half, 1.0))
