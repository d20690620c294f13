"""Who changed what, when: one row for every write that came through the API, committed with the change itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import cast

from sqlalchemy import Table, insert, select
from sqlalchemy.orm import Session

from orchestrator.tables import AuditRow

_ADD = insert(cast(Table, AuditRow.__table__))


@dataclass(frozen=True)
class Audit:
    """One write. `subject` is the path of what was changed below /v1."""

    id: int
    at: datetime
    actor: str
    action: str
    subject: str


def add_audit(session: Session, actor: str, action: str, subject: str, now: datetime) -> None:
    """Say in this transaction who makes it."""
    add_audits(session, [(actor, action, subject)], now)


def add_audits(session: Session, said: Sequence[tuple[str, str, str]], now: datetime) -> None:
    """Say so of several writes, or none, each by its actor, action and subject."""
    rows = [{"at": now, "actor": actor, "action": action, "subject": subject} for actor, action, subject in said]
    if rows:
        session.connection().execute(_ADD, rows)


def list_audits(session: Session, *, before: int | None = None, limit: int = 100) -> tuple[Audit, ...]:
    """The latest writes, latest first: those with ids below `before`, where given."""
    query = select(AuditRow).order_by(AuditRow.id.desc()).limit(limit)
    if before is not None:
        query = query.where(AuditRow.id < before)
    return tuple(Audit(row.id, row.at, row.actor, row.action, row.subject) for row in session.scalars(query))
