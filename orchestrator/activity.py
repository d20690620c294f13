"""What goes on now: the last thing each gang said, and the latest events."""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from orchestrator.study import Event
from orchestrator.tables import AttemptRow, EventRow, MeasurementRow, RunRow, TrialRow


@dataclass(frozen=True)
class Activity:
    """One open attempt with its last measurement; `step` is None and `metrics` empty before the first."""

    trial: int
    seed: int
    attempt_id: int
    gang: str | None
    phase: str
    started_at: datetime
    step: int | None
    elapsed_seconds: float | None
    metrics: dict[str, float]


def list_activity(session: Session, study_id: int) -> tuple[Activity, ...]:
    """The study's open attempts, by trial number."""
    open_attempts = session.execute(
        select(AttemptRow.id, AttemptRow.gang, AttemptRow.phase, AttemptRow.started_at, TrialRow.number,
               RunRow.seed)
        .join(RunRow, RunRow.id == AttemptRow.run_id).join(TrialRow, TrialRow.id == RunRow.trial_id)
        .where(TrialRow.study_id == study_id, AttemptRow.outcome.is_(None)).order_by(TrialRow.number, AttemptRow.id)
    ).all()  # fmt: skip
    ids = [row.id for row in open_attempts]
    last = (
        select(MeasurementRow.attempt_id, func.max(MeasurementRow.number).label("number"))
        .where(MeasurementRow.attempt_id.in_(ids)).group_by(MeasurementRow.attempt_id).subquery()
    )  # fmt: skip
    said: dict[int, list[MeasurementRow]] = {}
    for measured in session.scalars(
        select(MeasurementRow).join(
            last, (last.c.attempt_id == MeasurementRow.attempt_id) & (last.c.number == MeasurementRow.number)
        )
    ):
        said.setdefault(measured.attempt_id, []).append(measured)
    return tuple(
        Activity(
            trial=row.number, seed=row.seed, attempt_id=row.id, gang=row.gang, phase=row.phase,
            started_at=row.started_at,
            step=said[row.id][0].step if row.id in said else None,
            elapsed_seconds=said[row.id][0].elapsed_seconds if row.id in said else None,
            metrics={measured.name: measured.value for measured in said.get(row.id, ())},
        )
        for row in open_attempts
    )  # fmt: skip


def latest_events(session: Session, study_id: int | None, limit: int) -> tuple[Event, ...]:
    """The last events of one study, or of all, latest first."""
    query = select(EventRow).order_by(EventRow.id.desc()).limit(limit)
    if study_id is not None:
        query = query.where(EventRow.study_id == study_id)
    return tuple(Event(r.id, r.study_id, r.trial_number, r.at, r.kind, r.message) for r in session.scalars(query))


def list_trial_events(session: Session, study_id: int, number: int, after: int, limit: int) -> tuple[Event, ...]:
    """Events of one trial with ids above `after`, in commit order."""
    which = (EventRow.study_id == study_id, EventRow.trial_number == number, EventRow.id > after)
    rows = session.scalars(select(EventRow).where(*which).order_by(EventRow.id).limit(limit))
    return tuple(Event(r.id, r.study_id, r.trial_number, r.at, r.kind, r.message) for r in rows)
