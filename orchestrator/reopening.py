"""Finished trials that go on after all: promoted from a rung, or retried after they failed or were cancelled.

Nothing else changes a trial that was finished. Whoever keeps such trials follows the events of their going on.
"""

from datetime import datetime

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from orchestrator import store
from orchestrator.errors import IllegalMove
from orchestrator.lifecycle import RETRIED_FROM, RunState, StudyState, TrialState
from orchestrator.study import Trial
from orchestrator.tables import RUNS, TRIALS, AttemptRow, EventRow

PROMOTED, RETRIED = "trial.promoted", "trial.retried"
"""The kinds of the events after which a finished trial is queued."""


def retry_trial(session: Session, study_id: int, number: int, now: datetime) -> Trial:
    """Queue a failed or cancelled trial once more, its last run with new attempts. Reopens a complete study.

    Raises NotFound, and IllegalMove for a trial that did not fail and was not cancelled, or where its study is stopped.
    """
    state = store.hold_study(session, study_id)
    if state is StudyState.STOPPED:
        raise IllegalMove("the study", state, "retry trials", ("running", "paused", "complete"))
    trial_id = session.scalar(
        update(TRIALS)
        .where(TRIALS.c.study_id == study_id, TRIALS.c.number == number, TRIALS.c.state.in_(RETRIED_FROM))
        .values(state=TrialState.QUEUED, finished_at=None, reason=None).returning(TRIALS.c.id)
    )  # fmt: skip
    if trial_id is None:
        trial = store.get_trial(session, study_id, number)
        raise IllegalMove(f"trial {number}", trial.state, "be retried", RETRIED_FROM)
    run_id = session.scalar(select(func.max(RUNS.c.id)).where(RUNS.c.trial_id == trial_id))
    made = select(func.coalesce(func.max(AttemptRow.number), 0)).where(AttemptRow.run_id == run_id)
    session.execute(
        update(RUNS).where(RUNS.c.id == run_id)
        .values(state=RunState.QUEUED, queued_at=now, forgiven=made.scalar_subquery())
    )  # fmt: skip
    store.reopen(session, study_id, now)
    store.add_event(session, study_id, number, RETRIED, f"Trial {number} is tried again", now)
    return store.get_trial(session, study_id, number)


def list_reopened(session: Session, study_id: int, after: int) -> tuple[set[int], int]:
    """The trials that went on by events above `after`, by number, and the study's last event."""
    last = session.scalar(select(func.max(EventRow.id)).where(EventRow.study_id == study_id)) or 0
    news = (EventRow.study_id == study_id, EventRow.id > after, EventRow.id <= last)
    kinds = EventRow.kind.in_((PROMOTED, RETRIED))
    reopened = session.scalars(select(EventRow.trial_number).where(*news, kinds)) if last > after else ()
    return {number for number in reopened if number is not None}, last
