"""What may change of a study after it was created: its budget, its priority, and whether it is archived."""

from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from orchestrator import store
from orchestrator.errors import Conflict, IllegalMove, NotFound
from orchestrator.lifecycle import StudyState
from orchestrator.rows import study_of
from orchestrator.study import SpendingConfig, Study
from orchestrator.tables import StudyRow

BUDGETED = (StudyState.RUNNING, StudyState.PAUSED, StudyState.COMPLETE)
ENDED = (StudyState.STOPPED, StudyState.COMPLETE)


def amend_study(
    session: Session,
    name: str,
    now: datetime,
    *,
    max_trials: int | None = None,
    spending: SpendingConfig | None = None,
    priority: int | None = None,
) -> Study:
    """Give the study these in place of its own. One that was complete runs again where it may propose more.

    Raises NotFound; IllegalMove for a budget in a stopped study; Conflict for fewer trials than were proposed.
    """
    study = _held(session, name)
    changes: dict[str, object] = {}
    if max_trials is not None or spending is not None:
        if study.state not in BUDGETED:
            raise IllegalMove(f"study {name}", study.state, "get another budget", BUDGETED)
        if max_trials is not None and max_trials < study.proposed:
            message = f"must be at least {study.proposed}: so many are proposed already"
            raise Conflict("max_trials", max_trials, message, existing=f"/v1/studies/{name}")
        given = {"max_trials": max_trials, "spending": spending}
        update_with = {field: value for field, value in given.items() if value is not None}
        definition = study.definition.model_copy(update=update_with)
        changes["definition"] = definition.model_dump(mode="json")
        if max_trials is not None and definition.space:
            changes["max_trials"] = max_trials
    if priority is not None:
        changes["priority"] = priority
    if changes:
        session.execute(update(StudyRow).where(StudyRow.id == study.id).values(**changes))
        if max_trials is not None and study.definition.space and max_trials > study.proposed:
            store.reopen(session, study.id, now)
        store.add_event(session, study.id, None, "study.changed", f"Study {name} has {_said(changes)}", now)
    return store.get_study(session, name)


def archive_study(session: Session, name: str, archived: bool, now: datetime) -> Study:
    """Leave a study out of lists, or put it back. Raises NotFound, and IllegalMove for archiving one that may go on."""
    study = _held(session, name)
    if archived and study.state not in ENDED:
        raise IllegalMove(f"study {name}", study.state, "be archived", ENDED)
    if archived != (study.archived_at is not None):
        at = now if archived else None
        session.execute(update(StudyRow).where(StudyRow.id == study.id).values(archived_at=at))
        kind = "archived" if archived else "unarchived"
        store.add_event(session, study.id, None, f"study.{kind}", f"Study {name} was {kind}", now)
    return store.get_study(session, name)


def _held(session: Session, name: str) -> Study:
    """The study, which nobody else changes until the commit."""
    row = session.scalar(select(StudyRow).where(StudyRow.name == name).with_for_update())
    if row is None:
        raise NotFound("study", name)
    return study_of(row)


def _said(changes: dict[str, object]) -> str:
    said = ["another budget"] if "definition" in changes else []
    return " and ".join([*said, f"priority {changes['priority']}"] if "priority" in changes else said)
