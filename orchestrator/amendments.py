"""What may change of a study after it was created: its state, budget and priority, and whether it is archived."""

from collections.abc import Callable
from datetime import datetime

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from orchestrator import reopening, store
from orchestrator.errors import Conflict, IllegalMove, NotFound
from orchestrator.lifecycle import StudyState
from orchestrator.rows import study_of
from orchestrator.spending import Purses, purse_of
from orchestrator.study import NewStudy, SpendingConfig, Study
from orchestrator.tables import StudyRow

BUDGETED = (StudyState.RUNNING, StudyState.PAUSED, StudyState.COMPLETE)
ENDED = (StudyState.STOPPED, StudyState.COMPLETE)


def amend_study(
    session: Session,
    name: str,
    now: datetime,
    *,
    state: StudyState | None = None,
    max_trials: int | None = None,
    spending: Callable[[SpendingConfig], SpendingConfig] | None = None,
    priority: int | None = None,
) -> Study:
    """Give the study these in place of its own; `spending` makes the new budget of the one that it has. One that was
    complete runs again where it may propose more, and one that its own budget stopped where the new one gives room.

    Raises NotFound; IllegalMove for such a move, and for a budget in a study that was stopped for good; Conflict for
    fewer trials than were proposed.
    """
    study = _held(session, name)
    changes: dict[str, object] = {}
    if max_trials is not None or spending is not None:
        definition = _budgeted(study, max_trials, spending)
        changes["definition"] = definition.model_dump(mode="json")
        if max_trials is not None and definition.space:
            changes["max_trials"] = max_trials
    if priority is not None:
        changes["priority"] = priority
    if changes:
        session.execute(update(StudyRow).where(StudyRow.id == study.id).values(**changes))
        changed = store.get_study(session, name)
        if study.state is StudyState.STOPPED:
            if "definition" in changes and _has_room(session, changed, now):
                store.reopen(session, study.id, now, StudyState.STOPPED)
        elif max_trials is not None and study.definition.space and max_trials > study.proposed:
            store.reopen(session, study.id, now)
    if state is not None and state is not store.get_study(session, name).state:
        reopening.move_study(session, study.id, state, now)
    if changes:  # last: stopping locks trials, which whoever adds their events has locked before
        store.add_event(session, study.id, None, "study.changed", f"Study {name} has {_said(changes)}", now)
    return store.get_study(session, name)


def _budgeted(
    study: Study, max_trials: int | None, spending: Callable[[SpendingConfig], SpendingConfig] | None
) -> NewStudy:
    stopped_itself = study.state is StudyState.STOPPED and study.reason is not None  # people give no reason
    if study.state not in BUDGETED and not stopped_itself:
        raise IllegalMove(f"study {study.name}", study.state, "get another budget", BUDGETED)
    if max_trials is not None and max_trials < study.proposed:
        message = f"must be at least {study.proposed}: so many are proposed already"
        raise Conflict("max_trials", max_trials, message, existing=f"/v1/studies/{study.name}")
    given = {"max_trials": max_trials, "spending": spending and spending(study.definition.spending)}
    return study.definition.model_copy(update={field: value for field, value in given.items() if value is not None})


def _has_room(session: Session, study: Study, now: datetime) -> bool:
    """Whether the study's budget does not stop it again at once."""
    purse = purse_of(study)
    left = purse is None or purse.read(session, now).left_hours > 0
    return left and not Purses().enough(session, [study], now)


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
    """The study, which nobody else changes until the commit. What refers to it, as new events do, need not wait."""
    row = session.scalar(select(StudyRow).where(StudyRow.name == name).with_for_update(key_share=True))
    if row is None:
        raise NotFound("study", name)
    return study_of(row)


def _said(changes: dict[str, object]) -> str:
    said = ["another budget"] if "definition" in changes else []
    return " and ".join([*said, f"priority {changes['priority']}"] if "priority" in changes else said)
