"""What people say of trials: tags to find them by, and notes. Neither changes what the loop or the search does."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import delete, func, insert, select
from sqlalchemy.orm import Session

from orchestrator.errors import Conflict, NotFound
from orchestrator.store import insert_missing
from orchestrator.tables import NoteRow, TagRow, TrialRow

MOST_TAGS, MOST_NOTES = 32, 100
"""Of one trial."""


@dataclass(frozen=True)
class Note:
    """What somebody wrote about a trial: plain text."""

    id: int
    at: datetime
    author: str
    text: str


def set_tags(session: Session, trial_id: int, tags: Collection[str]) -> None:
    """Give a trial these tags, and take all others from it."""
    _hold(session, trial_id)
    session.execute(delete(TagRow).where(TagRow.trial_id == trial_id, TagRow.tag.not_in(tags)))
    if tags:
        insert_missing(session, TagRow, [{"trial_id": trial_id, "tag": tag} for tag in sorted(set(tags))])


def change_tags(session: Session, trial_id: int, add: Collection[str], remove: Collection[str]) -> tuple[str, ...]:
    """Give a trial these tags, take those from it, and leave the others; all that it then has. A tag in both is taken.
    Raises Conflict where that would be more than MOST_TAGS."""
    _hold(session, trial_id)
    session.execute(delete(TagRow).where(TagRow.trial_id == trial_id, TagRow.tag.in_(remove)))
    if new := sorted({*add} - {*remove}):
        insert_missing(session, TagRow, [{"trial_id": trial_id, "tag": tag} for tag in new])
    tags = list_tags(session, [trial_id]).get(trial_id, ())
    if len(tags) > MOST_TAGS:
        raise Conflict("tags", len(tags), f"must stay at {MOST_TAGS} a trial: remove some first")
    return tags


def list_tags(session: Session, trial_ids: Sequence[int]) -> dict[int, tuple[str, ...]]:
    """The tags of each of these trials (a few hundred at most), in alphabetical order; those without any left out."""
    tags: dict[int, tuple[str, ...]] = {}
    query = select(TagRow.trial_id, TagRow.tag).where(TagRow.trial_id.in_(trial_ids)).order_by(TagRow.tag)
    for trial_id, tag in session.execute(query):
        tags[trial_id] = (*tags.get(trial_id, ()), tag)
    return tags


def add_note(session: Session, trial_id: int, author: str, text: str, now: datetime) -> Note:
    """Add a note to a trial. Raises Conflict where it has MOST_NOTES already."""
    _hold(session, trial_id)
    count = session.scalar(select(func.count()).select_from(NoteRow).where(NoteRow.trial_id == trial_id)) or 0
    if count >= MOST_NOTES:
        raise Conflict("notes", count, f"must stay at {MOST_NOTES} a trial: delete one first")
    values = {"trial_id": trial_id, "at": now, "author": author, "text": text}
    note_id = session.scalar(insert(NoteRow).values(values).returning(NoteRow.id))
    assert note_id is not None
    return Note(note_id, now, author, text)


def delete_note(session: Session, trial_id: int, note_id: int) -> None:
    """Remove a note of a trial. Raises NotFound."""
    which = delete(NoteRow).where(NoteRow.id == note_id, NoteRow.trial_id == trial_id).returning(NoteRow.id)
    if session.scalar(which) is None:
        raise NotFound("note", note_id)


def list_notes(session: Session, trial_id: int) -> tuple[Note, ...]:
    """A trial's notes, oldest first."""
    rows = session.scalars(select(NoteRow).where(NoteRow.trial_id == trial_id).order_by(NoteRow.id))
    return tuple(Note(row.id, row.at, row.author, row.text) for row in rows)


def _hold(session: Session, trial_id: int) -> None:
    """Let nobody else label the trial until the commit. On SQLite the whole database is held already."""
    session.execute(select(TrialRow.id).where(TrialRow.id == trial_id).with_for_update(key_share=True))
