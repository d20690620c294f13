"""The queue: claims, leases, and everything that may only be written under one.

An attempt is written by one guarded UPDATE that names its id and its lease's token. Zero rows mean that the lease is
lost, which raises LeaseLost and changes nothing. Sessions come from Database.write; the store says in which order rows
are locked.
"""

import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from sqlalchemy import ColumnElement, ScalarSelect, func, insert, literal, select, true, update
from sqlalchemy.orm import Session, aliased

from orchestrator.caps import scores_of
from orchestrator.errors import LeaseLost
from orchestrator.lifecycle import OPEN_TRIALS, PERMANENT, UNCHARGED, Cause, Outcome, RunState, StudyState, TrialState
from orchestrator.logs import add_last_words, add_lines, last_line
from orchestrator.mistakes import pause_if_mistaken
from orchestrator.rows import run_of, study_of
from orchestrator.shortening import Rung, eased, shortened
from orchestrator.spending import Kind, Purses
from orchestrator.store import add_event, insert_missing
from orchestrator.study import AttemptResult, Claim, Lease, Resumed
from orchestrator.tables import (
    ATTEMPTS,
    RUNS,
    TRIALS,
    ArtifactRow,
    AttemptRow,
    MeasurementRow,
    RunRow,
    StudyRow,
    TrialRow,
    UtcDateTime,
)
from orchestrator.validity import judged
from worker.report import LogLine, Measurement
from worker.spec import BudgetConfig, GangConfig, TrialSpec

MAX_ATTEMPTS = 3  # charged ones: failures that were the run's own
MAX_OUT_OF_MEMORY = 2  # of these; the second has half the micro-batch
MAX_LOST = 20  # uncharged, but beyond this something is wrong with the run after all


def claim(
    session: Session,
    gang: GangConfig,
    owner: str,
    now: datetime,
    ttl: timedelta,
    *,
    name: str | None = None,
    warm: bool = False,
    purses: Purses | None = None,
    without: tuple[int, ...] = (),
    study_id: int | None = None,
) -> Claim | None:
    """Take the queued run of this shape that is first in line, and open its next attempt under a new lease.

    `name` is that of the gang which is to have it: whoever resumes looks for it there. `warm`: it is to wait behind
    another attempt, which is not for runs that start cold. `without` are studies that have no turn, and `study_id` is
    the only one that has. Raises OverBudget where `purses` say that the run's study cannot pay for it: the transaction
    is then void.
    """
    ranked = study_id is None and _are_ranked(session)
    first = _first_in_line(gang, warm, without, study_id, ranked)
    taken = session.execute(
        update(RUNS).where(RUNS.c.id == first, RUNS.c.state == RunState.QUEUED)
        .values(state=RunState.RUNNING)
        .returning(RUNS.c.id, RUNS.c.trial_id, RUNS.c.seed, RUNS.c.rung, RUNS.c.budget, RUNS.c.queued_at)
    ).one_or_none()  # fmt: skip
    if taken is None:
        return None
    trial = session.get_one(TrialRow, taken.trial_id)
    made, times, terms = _made(session, taken.id, trial.study_id)
    if purses is not None:
        purses.require(session, trial.study_id, terms, Kind.of(taken.rung, gang.ranks, taken.budget), now)
    lease = _open(
        session, now + ttl, run_id=taken.id, number=made + 1, owner=owner, gang=name, queued_at=taken.queued_at,
        phase_since=now, started_at=now,
    )  # fmt: skip
    _start_trial(session, trial.id, now)
    spec = _spec_of(trial, taken.seed, Rung(taken.rung, BudgetConfig.model_validate(taken.budget), gang))
    again = trial.state == TrialState.COMPLETE  # a further seed of it
    message = f"Trial {trial.number}{f' at seed {taken.seed}' if again else ''} started, attempt {made + 1}"
    if times:
        spec = eased(spec, times)
        message += f", with micro-batches of {spec.data.micro_batch_sequences} sequences"
    add_event(session, trial.study_id, trial.number, "run.running" if again else "trial.running", message, now)
    return Claim(lease, taken.id, trial.id, trial.number, trial.study_id, spec, now, taken.rung)


def _open(session: Session, expires_at: datetime, **values: Any) -> Lease:
    """Add an attempt that is open under a new lease."""
    token = secrets.token_hex(16)
    values |= {"phase": "queue", "phase_seconds": {}, "permanent": False}
    values |= {"lease_token": token, "lease_expires_at": expires_at}
    attempt_id = session.scalar(insert(ATTEMPTS).values(values).returning(ATTEMPTS.c.id))
    assert attempt_id is not None
    return Lease(attempt_id, token)


def _start_trial(session: Session, trial_id: int, now: datetime) -> None:
    started_at = func.coalesce(TRIALS.c.started_at, literal(now, UtcDateTime()))
    queued = update(TRIALS).where(TRIALS.c.id == trial_id, TRIALS.c.state == TrialState.QUEUED)
    session.execute(queued.values(state=TrialState.RUNNING, started_at=started_at))


def _made(session: Session, run_id: int, study_id: int) -> tuple[int, int, Any]:
    """How many attempts at a run there were, how many of them ran out of memory, and what its study may spend."""
    out_of_memory = func.count().filter(AttemptRow.cause == Cause.OUT_OF_MEMORY)
    terms = select(StudyRow.definition["spending"]).where(StudyRow.id == study_id).scalar_subquery()
    attempts = func.coalesce(func.max(AttemptRow.number), 0)
    made = select(attempts, out_of_memory, terms).where(AttemptRow.run_id == run_id)
    number, times, spending = session.execute(made).one()
    return number, times, spending


def _spec_of(trial: TrialRow, seed: int, rung: Rung) -> TrialSpec:
    return shortened(TrialSpec.model_validate({**trial.spec, "seed": seed}), rung)


def _are_ranked(session: Session) -> bool:
    """Whether studies that run differ in priority. Where they do not, runs are ordered by their own columns: among ten
    thousand, PostgreSQL then finds the first in a quarter of the time."""
    of_running = select(func.min(StudyRow.priority), func.max(StudyRow.priority))
    low, high = session.execute(of_running.where(StudyRow.state == StudyState.RUNNING)).one()
    return bool(low != high)


@lru_cache(maxsize=64)  # to put it together takes longer than to run it
def _first_in_line(
    gang: GangConfig, warm: bool, without: tuple[int, ...], study_id: int | None, ranked: bool
) -> ScalarSelect[int]:
    """The queued run of this shape that is next, as part of a statement; `ranked` where studies differ in priority."""
    queued = aliased(RunRow)
    return (
        select(queued.id).join(TrialRow, TrialRow.id == queued.trial_id)
        .join(StudyRow, StudyRow.id == TrialRow.study_id)
        .where(queued.state == RunState.QUEUED, queued.ranks == gang.ranks, queued.device == gang.device)
        .where(StudyRow.state == StudyState.RUNNING, queued.cold.is_(False) if warm else true())
        .where(StudyRow.id.not_in(without) if without else true())
        .where(StudyRow.id == study_id if study_id is not None else true())
        .order_by(*(StudyRow.priority.desc(),) * ranked, queued.priority.desc(), queued.id).limit(1)
        # What another transaction holds is being claimed or cancelled: the next in line is ours.
        .with_for_update(skip_locked=True, key_share=True, of=(TrialRow, queued)).scalar_subquery()
    )  # fmt: skip


def renew(session: Session, lease: Lease, now: datetime, ttl: timedelta, **changes: Any) -> None:
    """Extend a lease that nobody has taken, and set the attempt's `gang` or `phase` where given. Raises LeaseLost."""
    values = {"lease_expires_at": now + ttl, **changes}
    if "phase" in changes:  # nearly always the one that it is in already, which takes one statement
        if _written(session, lease, values, ATTEMPTS.c.phase == changes["phase"]):
            return
        values |= _time_spent(session, lease, now)
    _write(session, lease, **values)


def resume(session: Session, owner: str, now: datetime, ttl: timedelta) -> list[Resumed]:
    """Take over the open attempts of the orchestrator of this name that ran before, each under a new token.

    An orchestrator of the name that runs after all has lost them.
    """
    resumed = []
    left = session.execute(
        select(AttemptRow.id, AttemptRow.lease_token, AttemptRow.gang, AttemptRow.phase)
        .where(AttemptRow.outcome.is_(None), AttemptRow.owner == owner).order_by(AttemptRow.id)
    ).all()  # fmt: skip
    for attempt_id, token, gang, phase in left:
        assert token is not None, "an open attempt has a lease"
        lease = Lease(attempt_id, secrets.token_hex(16))
        values = {"lease_token": lease.token, "lease_expires_at": now + ttl}
        if not _written(session, Lease(attempt_id, token), values):
            continue  # another orchestrator has just ended it as expired
        claimed = claim_of(session, lease)
        after = session.scalar(select(func.max(MeasurementRow.number)).where(MeasurementRow.attempt_id == attempt_id))
        resumed.append(Resumed(claimed, gang, phase, after or 0, last_line(session, attempt_id)))
    return resumed


def claim_of(session: Session, lease: Lease) -> Claim:
    """What was claimed under a lease that is still held. Raises LeaseLost."""
    found = session.execute(
        select(RunRow, TrialRow, AttemptRow.started_at).join(TrialRow, TrialRow.id == RunRow.trial_id)
        .join(AttemptRow, AttemptRow.run_id == RunRow.id)
        .where(AttemptRow.id == lease.attempt_id, AttemptRow.lease_token == lease.token)
    ).one_or_none()  # fmt: skip
    if found is None:
        raise LeaseLost(lease.attempt_id)
    run, trial, started_at = found
    known = run_of(run)
    spec = _spec_of(trial, run.seed, Rung(run.rung, known.budget, known.gang))
    return Claim(lease, run.id, trial.id, trial.number, trial.study_id, spec, started_at, run.rung)


def ask_to_stop(session: Session, lease: Lease, why: str) -> None:
    """Keep with an open attempt why it is to end early, for whoever holds its lease. Raises LeaseLost."""
    _write(session, lease, reason=why)


def still_held(session: Session, held: Sequence[Lease]) -> set[int]:
    """The attempts among these leases that are still open under their token."""
    query = select(AttemptRow.id, AttemptRow.lease_token).where(AttemptRow.id.in_([lease.attempt_id for lease in held]))
    tokens = {row.id: row.lease_token for row in session.execute(query)}
    return {lease.attempt_id for lease in held if tokens.get(lease.attempt_id) == lease.token}


def record(
    session: Session,
    lease: Lease,
    phase: str | None,
    measurements: Sequence[Measurement],
    now: datetime,
    ttl: timedelta,
    lines: Sequence[LogLine] = (),
) -> None:
    """Keep measurements and log lines, each exactly once however often it is delivered, and renew the lease. Raises
    LeaseLost. Without a phase, the attempt stays in the one that it is in."""
    renew(session, lease, now, ttl, **({} if phase is None else {"phase": phase}))
    add_lines(session, lease.attempt_id, lines)
    rows = [
        {
            "attempt_id": lease.attempt_id, "number": measurement.number, "name": name, "step": measurement.step,
            "value": value, "elapsed_seconds": measurement.elapsed_seconds,
        }
        for measurement in measurements
        for name, value in measurement.metrics.items()
    ]  # fmt: skip
    if rows:
        insert_missing(session, MeasurementRow, rows)


def finish(session: Session, lease: Lease, ended: AttemptResult, now: datetime) -> AttemptResult:
    """Record how an attempt ended, free its lease, and move its run and trial on; what was recorded.

    Raises LeaseLost, changing nothing.
    A success completes the trial, or below its own budget prunes it, until it is promoted. A stop prunes it. A failure
    goes back to the queue while the run has attempts left, unless its cause is permanent; one that ran out of memory
    goes back once, to half its micro-batch; an attempt lost or preempted goes back without charge, and so does a
    success whose timing is void. Nothing goes back in a stopped study.
    """
    _lock(session, AttemptRow.id == lease.attempt_id, moving=ended.cause is Cause.BAD_INPUT)
    ended = judged(session, lease.attempt_id, ended)
    result = None if ended.result is None else ended.result.model_dump(mode="json")
    measured: dict[str, Any] = {}
    if ended.seconds is not None:
        measured = {"phase_seconds": dict(ended.seconds), "phase_since": now}
        if ended.phase is not None:
            measured["phase"] = ended.phase
    _write(
        session, lease, **measured, outcome=ended.outcome, reason=ended.reason or None, cause=ended.cause,
        permanent=ended.cause in PERMANENT, finished_at=now, lease_token=None, lease_expires_at=None,
        result=result, hardware=result and result["hardware"],
    )  # fmt: skip
    if (stored := ended.artifact) is not None:
        values = {"attempt_id": lease.attempt_id, "uri": stored.uri, "bytes": stored.bytes, "sha256": stored.sha256}
        session.execute(insert(ArtifactRow).values(values))
    if ended.outcome is not Outcome.SUCCEEDED:
        words = "\n".join(filter(None, (ended.traceback, f"{ended.outcome}: {ended.reason}")))
        add_last_words(session, lease.attempt_id, words, now)
    # The trial has no score of a void attempt; the attempt keeps its result and its artifact, as evidence.
    _settle(session, lease.attempt_id, replace(ended, result=None) if ended.outcome is Outcome.VOID else ended, now)
    if ended.cause is Cause.BAD_INPUT:
        pause_if_mistaken(session, lease.attempt_id, now)
    return ended


def expire(
    session: Session, now: datetime, grace: timedelta = timedelta(0), among: Collection[int] | None = None
) -> int:
    """End every attempt, or those `among` these, whose lease ran out `grace` ago as lost and queue its run again; how
    many there were."""
    which = true() if among is None else AttemptRow.id.in_(among)
    overdue = (AttemptRow.outcome.is_(None), AttemptRow.lease_expires_at <= now - grace, which)
    trials = _lock(session, *overdue)
    ended = AttemptResult(Outcome.LOST, "its lease ran out")
    lost = session.scalars(
        update(AttemptRow).where(*overdue, AttemptRow.run_id.in_(select(RunRow.id).where(RunRow.trial_id.in_(trials))))
        .values(outcome=ended.outcome, reason=ended.reason, finished_at=now, lease_token=None, lease_expires_at=None)
        .returning(AttemptRow.id).execution_options(synchronize_session=False)
    ).all()  # fmt: skip
    for attempt_id in sorted(lost):
        _settle(session, attempt_id, ended, now)
    return len(lost)


def _lock(session: Session, *which: ColumnElement[bool], moving: bool = False) -> Sequence[int]:
    """Hold the trials of these attempts until the commit, and their studies: where they are, or alone where they may
    be `moving`; the trials' ids. On SQLite the whole database is held already."""
    attempts = select(TrialRow.id).join(RunRow, RunRow.trial_id == TrialRow.id)
    attempts = attempts.join(AttemptRow, AttemptRow.run_id == RunRow.id).where(*which)
    ids = session.scalars(attempts.distinct().order_by(TrialRow.id)).all()
    if ids and session.get_bind().dialect.name == "postgresql":
        studies = select(TrialRow.study_id).where(TrialRow.id.in_(ids))
        session.execute(
            select(StudyRow.id)
            .where(StudyRow.id.in_(studies))
            .order_by(StudyRow.id)
            .with_for_update(read=not moving, key_share=moving)
        )
        session.execute(
            select(TrialRow.id).where(TrialRow.id.in_(ids)).order_by(TrialRow.id).with_for_update(key_share=True)
        )
    return ids


def _time_spent(session: Session, lease: Lease, now: datetime) -> dict[str, Any]:
    """What the ledger keeps where an attempt leaves its phase: the seconds in it."""
    left = session.execute(
        select(AttemptRow.phase, AttemptRow.phase_since, AttemptRow.phase_seconds)
        .where(AttemptRow.id == lease.attempt_id)
    ).one_or_none()  # fmt: skip
    if left is None or left.phase_since is None:
        return {}
    spent = max((now - left.phase_since).total_seconds(), 0.0)  # another machine's clock may have been ahead
    seconds = (left.phase_seconds or {}).get(left.phase, 0.0) + spent
    return {"phase_since": now, "phase_seconds": {**(left.phase_seconds or {}), left.phase: seconds}}


def _write(session: Session, lease: Lease, **values: Any) -> None:
    if not _written(session, lease, values):
        raise LeaseLost(lease.attempt_id)


def _written(session: Session, lease: Lease, values: Mapping[str, Any], *which: ColumnElement[bool]) -> bool:
    """Whether the lease was still held, and its attempt such that it was written."""
    # Not on the expiry: a lease that ran out is ours until `expire` takes it, and a gang that trains on is not thrown
    # away because the database was away for longer than a lease.
    attempt = ATTEMPTS.c
    held = (attempt.id == lease.attempt_id, attempt.outcome.is_(None), attempt.lease_token == lease.token)
    written = session.scalar(update(ATTEMPTS).where(*held, *which).values(values).returning(attempt.id))
    return written is not None


def _settle(session: Session, attempt_id: int, ended: AttemptResult, now: datetime) -> None:
    """Move the run and the trial of an attempt that has just ended."""
    run_id, seed, rung, trial_id, number, study = session.execute(
        select(RunRow.id, RunRow.seed, RunRow.rung, TrialRow.id, TrialRow.number, StudyRow)
        .join(AttemptRow, AttemptRow.run_id == RunRow.id).join(TrialRow, TrialRow.id == RunRow.trial_id)
        .join(StudyRow, StudyRow.id == TrialRow.study_id).where(AttemptRow.id == attempt_id)
    ).one()  # fmt: skip
    run_state, trial_state = _next_states(session, run_id, ended)
    if trial_state is TrialState.COMPLETE and rung < 0:
        trial_state = TrialState.PRUNED
        ended = replace(ended, reason=f"it has finished rung {rung}, and goes on if it is among the best there")
    if trial_state is TrialState.QUEUED and study.state == StudyState.STOPPED:
        run_state, trial_state = RunState.CANCELLED, TrialState.CANCELLED
    moves: dict[str, Any] = {"state": run_state}
    if run_state is RunState.QUEUED:
        moves["queued_at"] = now
    scores = None if ended.result is None else scores_of(ended.result, study_of(study).definition)
    if scores is not None:
        moves["scores"] = asdict(scores)
    session.execute(update(RUNS).where(RUNS.c.id == run_id, RUNS.c.state == RunState.RUNNING).values(moves))
    values: dict[str, Any] = {"state": trial_state}
    if trial_state not in OPEN_TRIALS:  # the reason is why it has ended
        values |= {"reason": ended.reason or None, "finished_at": now}
    if ended.result is not None and scores is not None:
        values |= {
            "result": ended.result.model_dump(mode="json"), "val_bpb": scores.val_bpb,
            "artifact_bytes": scores.artifact_bytes, "feasible": scores.feasible,
        }  # fmt: skip
    running = (TRIALS.c.id == trial_id, TRIALS.c.state == TrialState.RUNNING)
    moved = session.scalar(update(TRIALS).where(*running).values(values).returning(TRIALS.c.id))
    if moved is None:  # another of its runs has decided it
        message = _sentence(f"Trial {number} at seed {seed}", run_state, ended)
        add_event(session, study.id, number, f"run.{run_state}", message, now)
        return
    add_event(session, study.id, number, f"trial.{trial_state}", _sentence(f"Trial {number}", trial_state, ended), now)


def _next_states(session: Session, run_id: int, ended: AttemptResult) -> tuple[RunState, TrialState]:
    if ended.outcome is Outcome.SUCCEEDED:
        return RunState.SUCCEEDED, TrialState.COMPLETE
    if ended.outcome is Outcome.STOPPED:
        return RunState.STOPPED, TrialState.PRUNED
    made = select(AttemptRow.outcome, AttemptRow.cause).join(RunRow, RunRow.id == AttemptRow.run_id)
    counted = (AttemptRow.outcome.is_not(None), AttemptRow.number > RunRow.forgiven)
    ends = session.execute(made.where(RunRow.id == run_id, *counted)).all()
    spent = (
        sum(end.outcome not in UNCHARGED for end in ends) >= MAX_ATTEMPTS,
        sum(end.outcome == Outcome.LOST for end in ends) >= MAX_LOST,
        sum(end.cause == Cause.OUT_OF_MEMORY for end in ends) >= MAX_OUT_OF_MEMORY,
    )
    if ended.cause in PERMANENT or any(spent):
        return RunState.FAILED, TrialState.FAILED
    return RunState.QUEUED, TrialState.QUEUED


def _sentence(what: str, state: TrialState | RunState, ended: AttemptResult) -> str:
    if ended.result is not None:
        scored = f"{ended.result.val_bpb:.4f} BPB in {ended.result.artifact_bytes:,} bytes"
        return f"{what} is {state}: {scored}" + (f"; {ended.reason}" if state is TrialState.PRUNED else "")
    return f"{what} is {state}: attempt {ended.outcome}" + (f", {ended.reason}" if ended.reason else "")
