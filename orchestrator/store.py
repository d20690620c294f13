"""Studies and trials in SQL: created, read, moved between states. Values in, values out; no row leaves this package.

Every function takes a session and works inside the caller's transaction. Functions that change anything begin with the
guarded UPDATE that decides, need a session from Database.write, and take `now`. On PostgreSQL every writer takes its
row locks in one order, so that no two can wait for each other: study, trial, run, attempt, and the events' lock last.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Any, cast

from sqlalchemy import (
    ColumnElement,
    CursorResult,
    Table,
    Text,
    bindparam,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy import cast as sql_cast
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from orchestrator.errors import Conflict, IllegalMove, NotFound
from orchestrator.lifecycle import (
    OPEN_RUNS,
    STUDY_MOVES,
    TRIAL_MOVES,
    Outcome,
    RunState,
    StudyState,
    TrialState,
    states_before,
)
from orchestrator.rows import attempt_of, gang_of, run_of, study_of, trial_of
from orchestrator.shortening import Rung
from orchestrator.study import Attempt, Event, NewStudy, NewTrial, Origin, Run, Study, Trial
from orchestrator.tables import (
    EVENTS,
    RUNS,
    STUDIES,
    TRIALS,
    ArtifactRow,
    AttemptRow,
    Base,
    EventRow,
    RunRow,
    StudyRow,
    TrialRow,
)
from worker.spec import GangConfig, TrialSpec

EVENT_LOCK = 0x0CADD1F  # any fixed number: PostgreSQL's advisory lock that makes event ids follow commit order
_LOCK_EVENTS = text(f"SELECT pg_advisory_xact_lock({EVENT_LOCK})")
_ADD_EVENTS = insert(EVENTS)
# JSON as it was written: a definition seldom changes, and is built from the same text once.
_STUDY = select(
    *(column for column in STUDIES.c if column.key != "definition"),
    sql_cast(STUDIES.c.definition, Text).label("definition"),
).where(STUDIES.c.name == bindparam("name"))


def create_study(session: Session, new: NewStudy, now: datetime) -> Study:
    """Add a study that is running. Raises Conflict where the name is taken."""
    values = {
        "name": new.name, "state": StudyState.RUNNING, "definition": new.model_dump(mode="json"),
        "max_trials": new.max_trials if new.space else 0, "created_at": now, "changed_at": now,
    }  # fmt: skip
    if insert_missing(session, StudyRow, [values]) != 1:
        raise Conflict("name", new.name, "is taken by another study", existing=new.name)
    study = get_study(session, new.name)
    add_event(session, study.id, None, "study.created", f"Study {new.name} was created", now)
    return study


def get_study(session: Session, name: str) -> Study:
    """The study of this name. Raises NotFound."""
    row = session.connection().execute(_STUDY, {"name": name}).one_or_none()
    if row is None:
        raise NotFound("study", name)
    return study_of(row)


def list_studies(session: Session, states: Collection[StudyState] = ()) -> tuple[Study, ...]:
    """Studies in these states (all, where none is named), oldest first."""
    query = select(StudyRow).order_by(StudyRow.id)
    if states:
        query = query.where(StudyRow.state.in_(states))
    return tuple(study_of(row) for row in session.scalars(query))


def move_study(session: Session, study_id: int, to: StudyState, now: datetime, reason: str | None = None) -> Study:
    """Move a study along STUDY_MOVES. Stopping cancels its queued trials; one with open trials cannot become complete.

    Raises NotFound, IllegalMove.
    """
    before = tuple(state for state, targets in STUDY_MOVES.items() if to in targets)
    moved = session.execute(
        update(StudyRow).where(StudyRow.id == study_id, StudyRow.state.in_(before))
        .values(state=to, reason=reason, changed_at=now, archived_at=None)
    )  # fmt: skip
    row = session.get(StudyRow, study_id)
    if row is None:
        raise NotFound("study", study_id)
    if _count(moved) != 1:
        raise IllegalMove(f"study {row.name}", row.state, f"become {to}", tuple(before))
    if to is StudyState.COMPLETE and count_open_runs(session, study_id):
        raise IllegalMove(f"study {row.name}", "running with open runs", "become complete", ("running without any",))
    queued = (TrialRow.study_id == study_id, TrialRow.state == TrialState.QUEUED)
    stopped = to is StudyState.STOPPED
    cancelled = _end_trials(session, *queued, now=now, reason="the study was stopped") if stopped else ()
    if stopped:  # further seeds of trials that are complete
        trials = select(TrialRow.id).where(TrialRow.study_id == study_id)
        session.execute(
            update(RunRow).where(RunRow.trial_id.in_(trials), RunRow.state == RunState.QUEUED)
            .values(state=RunState.CANCELLED).execution_options(synchronize_session=False)
        )  # fmt: skip
    message = f"Study {row.name} is {to}" + (f": {reason}" if reason else "")
    add_event(session, study_id, None, f"study.{to}", message, now)
    for number in cancelled:
        add_event(session, study_id, number, "trial.cancelled", f"Trial {number} was cancelled with its study", now)
    return study_of(row)


def count_refused(session: Session, study_id: int, refused: int) -> None:
    """Add points that no cap let through to the study's count."""
    session.execute(update(StudyRow).where(StudyRow.id == study_id).values(refused=StudyRow.refused + refused))


def add_trial(session: Session, study_id: int, new: NewTrial, now: datetime, rung: Rung | None = None) -> Trial | None:
    """Add a trial with its first run, queued; or, where the verdict is cannot_fit, an infeasible one without a run.

    The run is at this rung, or else at the spec's own budget.
    None where a proposal came too late: the study has its proposals, or does not run. Submitting reopens a complete
    study. Raises IllegalMove for a submission to a stopped study, and lets IntegrityError through where two of the same
    idempotency key, or two proposals of the same spec, meet: the transaction is then void.
    """
    infeasible = new.verdict == "cannot_fit"
    number = next_number(session, study_id, new.origin)
    if number is None:
        return None
    values = {
        "study_id": study_id, "number": number, "origin": new.origin, "spec": new.spec.model_dump(mode="json"),
        "state": TrialState.INFEASIBLE if infeasible else TrialState.QUEUED, "spec_hash": new.spec.canonical_hash,
        "params": new.params, "prediction": asdict(new.prediction), "verdict": new.verdict, "reason": new.reason,
        "idempotency_key": new.idempotency_key, "suggestion": new.suggestion and new.suggestion.model_dump(mode="json"),
        "created_at": now, "finished_at": now if infeasible else None,
    }  # fmt: skip
    trial_id = session.scalar(insert(TRIALS).values(values).returning(TRIALS.c.id))
    row = TrialRow(id=trial_id, **values)
    if infeasible:
        add_event(session, study_id, number, "trial.infeasible", f"Trial {number} was refused: {new.reason}", now)
        return trial_of(row, new.spec)
    add_run(session, row, rung or Rung(0, new.spec.budget, new.spec.gang), now)
    if new.origin == "submitted":
        reopen(session, study_id, now)
    add_event(session, study_id, number, "trial.queued", f"Trial {number} was {new.origin}", now)
    return trial_of(row, new.spec)


def hold_study(session: Session, study_id: int) -> StudyState:
    """Let nobody else add to the study until the commit; its state. Comes first in its transaction. Raises NotFound."""
    held = update(STUDIES).where(STUDIES.c.id == study_id).values(refused=STUDIES.c.refused).returning(STUDIES.c.state)
    state = session.scalar(held)
    if state is None:
        raise NotFound("study", study_id)
    return StudyState(state)


def add_run(session: Session, trial: TrialRow, rung: Rung, now: datetime) -> None:
    """Queue a run of a trial at its own seed."""
    session.execute(
        insert(RUNS).values(
            trial_id=trial.id, seed=trial.spec["seed"], rung=rung.number, budget=rung.budget.model_dump(mode="json"),
            state=RunState.QUEUED, ranks=rung.gang.ranks, device=rung.gang.device,
            priority=10 if trial.origin == "submitted" else 0, cold=trial.spec["limits"]["cold"],
            created_at=now, queued_at=now,
        )
    )  # fmt: skip


def reopen(session: Session, study_id: int, now: datetime, state: StudyState = StudyState.COMPLETE) -> None:
    """Let a complete study run on, or one that is in this state."""
    name = session.scalar(
        update(StudyRow).where(StudyRow.id == study_id, StudyRow.state == state)
        .values(state=StudyState.RUNNING, reason=None, changed_at=now, archived_at=None).returning(StudyRow.name)
    )  # fmt: skip
    if name is not None:
        add_event(session, study_id, None, "study.running", f"Study {name} is running again", now)


def next_number(session: Session, study_id: int, origin: Origin) -> int | None:
    """Take the study's next trial number and hold its row; None where a proposal came too late.

    Raises NotFound, and IllegalMove where the study takes no trials.
    """
    proposal = origin == "proposed"
    open_states = (StudyState.RUNNING,) if proposal else (StudyState.RUNNING, StudyState.PAUSED, StudyState.COMPLETE)
    study = STUDIES.c
    take = update(STUDIES).where(study.id == study_id, study.state.in_(open_states))
    values: dict[str, Any] = {"next_number": study.next_number + 1}
    if proposal:
        take = take.where(study.proposed < study.max_trials)
        values["proposed"] = study.proposed + 1
    number = session.scalar(take.values(values).returning(study.next_number))
    if number is None and not proposal:
        row = session.get(StudyRow, study_id)
        if row is None:
            raise NotFound("study", study_id)
        raise IllegalMove(f"study {row.name}", row.state, "take trials", tuple(open_states))
    return None if number is None else number - 1


def cancel_trial(session: Session, study_id: int, number: int, now: datetime) -> Trial:
    """End an open trial, its runs and their open attempts; whoever holds a lease on one has lost it.

    Raises NotFound, and IllegalMove for a trial that is finished.
    """
    before = states_before(TRIAL_MOVES, TrialState.CANCELLED)
    this = (TrialRow.study_id == study_id, TrialRow.number == number, TrialRow.state.in_(before))
    if not _end_trials(session, *this, now=now):
        trial = get_trial(session, study_id, number)
        raise IllegalMove(f"trial {number}", trial.state, "be cancelled", tuple(before))
    add_event(session, study_id, number, "trial.cancelled", f"Trial {number} was cancelled", now)
    return get_trial(session, study_id, number)


def _end_trials(
    session: Session, *which: ColumnElement[bool], now: datetime, reason: str | None = None
) -> tuple[int, ...]:
    """Cancel these trials with their open runs and attempts, in that order of locks; the trials' numbers, sorted."""
    trials = session.execute(
        update(TrialRow).where(*which).values(state=TrialState.CANCELLED, reason=reason, finished_at=now)
        .returning(TrialRow.id, TrialRow.number)
    ).all()  # fmt: skip
    for trial_id, _number in trials:
        runs = select(RunRow.id).where(RunRow.trial_id == trial_id)
        session.execute(
            update(RunRow).where(RunRow.trial_id == trial_id, RunRow.state.in_((RunState.QUEUED, RunState.RUNNING)))
            .values(state=RunState.CANCELLED)
        )  # fmt: skip
        session.execute(
            update(AttemptRow).where(AttemptRow.run_id.in_(runs), AttemptRow.outcome.is_(None))
            .values(
                outcome=Outcome.STOPPED, reason=reason or "cancelled", finished_at=now, lease_token=None,
                lease_expires_at=None,
            )
        )  # fmt: skip
    return tuple(sorted(number for _trial_id, number in trials))


def get_trial(session: Session, study_id: int, number: int) -> Trial:
    """The trial of this number. Raises NotFound."""
    row = session.scalar(select(TrialRow).where(TrialRow.study_id == study_id, TrialRow.number == number))
    if row is None:
        raise no_trial(session, study_id, number)
    return trial_of(row)


def no_trial(session: Session, study_id: int, number: int) -> NotFound:
    """What to raise where the study has no such trial."""
    return NotFound("trial", number, f"study {session.get_one(StudyRow, study_id).name}")


def find_trial(
    session: Session,
    study_id: int,
    *,
    spec_hash: str | None = None,
    idempotency_key: str | None = None,
    state: TrialState | None = None,
) -> Trial | None:
    """The first trial with this canonical spec hash or this idempotency key, and in this state, if there is one."""
    query = select(TrialRow).where(TrialRow.study_id == study_id).order_by(TrialRow.number).limit(1)
    if spec_hash is not None:
        query = query.where(TrialRow.spec_hash == spec_hash)
    if idempotency_key is not None:
        query = query.where(TrialRow.idempotency_key == idempotency_key)
    if state is not None:
        query = query.where(TrialRow.state == state)
    row = session.scalar(query)
    return None if row is None else trial_of(row)


def list_states(
    session: Session, study_id: int, *, numbers: Collection[int] | None = None, after: int = -1
) -> dict[int, TrialState]:
    """States by number, of all trials or as in list_trials: what is new, for whoever keeps the finished ones."""
    query = select(TrialRow.number, TrialRow.state).where(TrialRow.study_id == study_id, TrialRow.number > after)
    if numbers is not None:
        query = query.where(TrialRow.number.in_(numbers))
    query = query.order_by(TrialRow.number)
    return {number: TrialState(state) for number, state in session.execute(query)}


def list_trials(
    session: Session,
    study_id: int,
    *,
    states: Collection[TrialState] = (),
    numbers: Collection[int] | None = None,
    after: int = -1,
    limit: int | None = None,
    specs: Mapping[int, TrialSpec] | None = None,
) -> tuple[Trial, ...]:
    """Trials by number: all, or those in these states, of these numbers (a few hundred at most), above `after`.

    `specs` are those that the caller knows, by number: a trial's never changes, and building one takes time.
    """
    query = select(TrialRow).where(TrialRow.study_id == study_id, TrialRow.number > after)
    if numbers is not None:
        query = query.where(TrialRow.number.in_(numbers))
    if states:
        query = query.where(TrialRow.state.in_(states))
    known = specs or {}
    rows = session.scalars(query.order_by(TrialRow.number).limit(limit))
    return tuple(trial_of(row, known.get(row.number)) for row in rows)


def count_trials(session: Session, study_id: int) -> dict[TrialState, int]:
    """How many trials are in each state; states without a trial are left out."""
    query = select(TrialRow.state, func.count()).where(TrialRow.study_id == study_id).group_by(TrialRow.state)
    return {TrialState(state): count for state, count in session.execute(query)}


def count_queued(session: Session) -> dict[tuple[int, GangConfig], int]:
    """How many runs wait, by study and by the shape of gang they wait for, in the studies that run."""
    query = (
        select(TrialRow.study_id, RunRow.ranks, RunRow.device, func.count())
        .join(TrialRow, TrialRow.id == RunRow.trial_id).join(StudyRow, StudyRow.id == TrialRow.study_id)
        .where(RunRow.state == RunState.QUEUED, StudyRow.state == StudyState.RUNNING)
        .group_by(TrialRow.study_id, RunRow.ranks, RunRow.device)
    )  # fmt: skip
    return {(study_id, gang_of(ranks, device)): count for study_id, ranks, device, count in session.execute(query)}


def list_runs(session: Session, trial_id: int) -> tuple[Run, ...]:
    """A trial's runs, in the order in which they were added."""
    rows = session.scalars(select(RunRow).where(RunRow.trial_id == trial_id).order_by(RunRow.id))
    return tuple(run_of(row) for row in rows)


def count_open_runs(session: Session, study_id: int) -> int:
    """How many runs of the study are queued or running, those of complete trials included."""
    query = select(func.count()).select_from(RunRow).join(TrialRow, TrialRow.id == RunRow.trial_id)
    return session.scalar(query.where(TrialRow.study_id == study_id, RunRow.state.in_(OPEN_RUNS))) or 0


def list_attempts(session: Session, trial_id: int) -> tuple[Attempt, ...]:
    """Every attempt at a trial's runs, in the order in which they were claimed."""
    query = (
        select(AttemptRow, ArtifactRow).outerjoin(ArtifactRow, ArtifactRow.attempt_id == AttemptRow.id)
        .join(RunRow, RunRow.id == AttemptRow.run_id).where(RunRow.trial_id == trial_id).order_by(AttemptRow.id)
    )  # fmt: skip
    return tuple(attempt_of(row, artifact) for row, artifact in session.execute(query))


def list_events(session: Session, after: int = 0, study_id: int | None = None, limit: int = 1000) -> tuple[Event, ...]:
    """Events with ids above `after`, in commit order: of one study, or of all."""
    query = select(EventRow).where(EventRow.id > after).order_by(EventRow.id).limit(limit)
    if study_id is not None:
        query = query.where(EventRow.study_id == study_id)
    return tuple(Event(r.id, r.study_id, r.trial_number, r.at, r.kind, r.message) for r in session.scalars(query))


def add_event(session: Session, study_id: int, number: int | None, kind: str, message: str, now: datetime) -> None:
    """Add an event to the transaction. Call it last: on PostgreSQL it holds a lock until the commit."""
    add_events(session, study_id, [(number, kind, message)], now)


def add_events(session: Session, study_id: int, said: Sequence[tuple[int | None, str, str]], now: datetime) -> None:
    """Add events as add_event does, each by its trial's number, kind and message."""
    if session.get_bind().dialect.name == "postgresql":
        session.connection().execute(_LOCK_EVENTS)
    rows = [
        {"study_id": study_id, "trial_number": number, "at": now, "kind": kind, "message": message}
        for number, kind, message in said
    ]
    session.connection().execute(_ADD_EVENTS, rows)


def insert_missing(session: Session, table: type[Base], rows: Sequence[Mapping[str, Any]]) -> int:
    """Insert the rows that clash with no unique key of what is there; how many they were."""
    dialect = postgresql if session.get_bind().dialect.name == "postgresql" else sqlite
    missing = dialect.insert(cast(Table, table.__table__)).on_conflict_do_nothing()
    return _count(session.execute(missing, rows, execution_options={"preserve_rowcount": True}))


def _count(result: object) -> int:
    return cast(CursorResult[Any], result).rowcount
