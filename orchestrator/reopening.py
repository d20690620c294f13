"""Finished trials that go on after all: promoted from a rung, or retried after they failed or were cancelled.

Nothing else changes a trial that was finished. Whoever keeps such trials follows the events of their going on.
"""

from collections.abc import Collection
from datetime import datetime

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from orchestrator import mistakes, store
from orchestrator.errors import IllegalMove
from orchestrator.lifecycle import RETRIED_FROM, RunState, StudyState, TrialState
from orchestrator.study import Study, Trial
from orchestrator.tables import RUNS, STUDIES, TRIALS, AttemptRow, EventRow, TrialRow

PROMOTED, RETRIED = "trial.promoted", "trial.retried"
"""The kinds of the events after which a finished trial is queued."""


def retry_trial(session: Session, study_id: int, number: int, now: datetime) -> Trial:
    """Queue a failed or cancelled trial once more, its last run with new attempts. Reopens a complete study.

    Raises NotFound, and IllegalMove for a trial that did not fail and was not cancelled, or where its study is stopped.
    """
    state = store.hold_study(session, study_id)
    if state is StudyState.STOPPED:
        name = session.scalar(select(STUDIES.c.name).where(STUDIES.c.id == study_id))
        raise IllegalMove(f"study {name}", state, "retry trials", ("running", "paused", "complete"))
    if not _queue_again(session, study_id, (number,), now):
        trial = store.get_trial(session, study_id, number)
        raise IllegalMove(f"trial {number}", trial.state, "be retried", RETRIED_FROM)
    store.reopen(session, study_id, now)
    _say_retried(session, study_id, (number,), now)
    return store.get_trial(session, study_id, number)


def move_study(session: Session, study_id: int, to: StudyState, now: datetime) -> Study:
    """Move a study as store.move_study does; where one that paused by its own mistake goes on, the trials that failed
    for it are retried. Raises NotFound, IllegalMove."""
    retried: list[int] = []
    if to is StudyState.RUNNING and store.hold_study(session, study_id) is StudyState.PAUSED:
        why = session.scalar(select(STUDIES.c.reason).where(STUDIES.c.id == study_id))
        ended = select(TrialRow.number, TrialRow.reason).where(TrialRow.study_id == study_id, mistakes.FAILED)
        failed = () if why is None else session.execute(ended.order_by(TrialRow.number))
        retried = [number for number, reason in failed if reason and mistakes.pause_reason(reason) == why]
        retried = _queue_again(session, study_id, retried, now)
    study = store.move_study(session, study_id, to, now)
    _say_retried(session, study_id, retried, now)
    return study


def _queue_again(session: Session, study_id: int, numbers: Collection[int], now: datetime) -> list[int]:
    """Queue those of these trials that may be retried, the last run of each with new attempts; which they were."""
    queued = session.execute(
        update(TRIALS)
        .where(TRIALS.c.study_id == study_id, TRIALS.c.number.in_(numbers), TRIALS.c.state.in_(RETRIED_FROM))
        .values(state=TrialState.QUEUED, finished_at=None, reason=None).returning(TRIALS.c.id, TRIALS.c.number)
    ).all()  # fmt: skip
    for trial_id, _number in queued:
        run_id = session.scalar(select(func.max(RUNS.c.id)).where(RUNS.c.trial_id == trial_id))
        made = select(func.coalesce(func.max(AttemptRow.number), 0)).where(AttemptRow.run_id == run_id)
        session.execute(
            update(RUNS).where(RUNS.c.id == run_id)
            .values(state=RunState.QUEUED, queued_at=now, forgiven=made.scalar_subquery())
        )  # fmt: skip
    return sorted(number for _trial_id, number in queued)


def _say_retried(session: Session, study_id: int, numbers: Collection[int], now: datetime) -> None:
    if numbers:
        said = [(number, RETRIED, f"Trial {number} is tried again") for number in numbers]
        store.add_events(session, study_id, said, now)


def list_reopened(session: Session, study_id: int, after: int) -> tuple[set[int], int]:
    """The trials that went on by events above `after`, by number, and the study's last event."""
    last = session.scalar(select(func.max(EventRow.id)).where(EventRow.study_id == study_id)) or 0
    news = (EventRow.study_id == study_id, EventRow.id > after, EventRow.id <= last)
    kinds = EventRow.kind.in_((PROMOTED, RETRIED))
    reopened = session.scalars(select(EventRow.trial_number).where(*news, kinds)) if last > after else ()
    return {number for number in reopened if number is not None}, last
