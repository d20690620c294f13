"""Bad input that is a study's own mistake and no trial's: its proposals fail for it, wherever they are."""

from datetime import datetime

from sqlalchemy import and_, exists, func, select, true
from sqlalchemy.orm import Session

from orchestrator import store
from orchestrator.lifecycle import StudyState, TrialState
from orchestrator.tables import AttemptRow, MeasurementRow, RunRow, StudyRow, TrialRow

ENOUGH = 2
"""Proposals that fail for the same bad input, with no success between, show that the point is not to blame."""
_PROPOSED = TrialRow.origin == "proposed"
FAILED = and_(TrialRow.state == TrialState.FAILED, _PROPOSED)


def pause_if_mistaken(session: Session, attempt_id: int, now: datetime) -> None:
    """Pause the study of an attempt that has just ended on bad input, where ENOUGH have. The caller holds the study's
    row: of two that end at once, one sees the other. What has trained may have failed by what it trained to."""
    trained = exists().where(MeasurementRow.attempt_id == attempt_id)
    ended = (
        select(TrialRow.study_id, TrialRow.reason).join(StudyRow, StudyRow.id == TrialRow.study_id)
        .join(RunRow, RunRow.trial_id == TrialRow.id).join(AttemptRow, AttemptRow.run_id == RunRow.id)
        .where(AttemptRow.id == attempt_id, FAILED, StudyRow.state == StudyState.RUNNING, ~trained)
    )  # fmt: skip
    found = session.execute(ended).one_or_none()
    if found is None or found.reason is None:
        return
    succeeded = TrialRow.state.in_((TrialState.COMPLETE, TrialState.PRUNED))
    finished = select(func.max(TrialRow.finished_at)).where(TrialRow.study_id == found.study_id, _PROPOSED, succeeded)
    last = session.scalar(finished)
    since = true() if last is None else TrialRow.finished_at > last
    same = select(func.count()).where(TrialRow.study_id == found.study_id, FAILED, TrialRow.reason == found.reason)
    if (session.scalar(same.where(since)) or 0) >= ENOUGH:
        store.move_study(session, found.study_id, StudyState.PAUSED, now, pause_reason(found.reason))


def pause_reason(reason: str) -> str:
    """Why a study pauses whose trials have failed for this."""
    return f"trials fail for the same bad input; mend it and resume, and they are tried again: {reason}"
