"""What attempts log: kept line by line under their lease, read from the end or from a cursor on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from orchestrator.store import insert_missing
from orchestrator.tables import AttemptRow, LogRow, RunRow
from worker.report import LogLine, log_lines


@dataclass(frozen=True)
class Logged:
    """A line of an attempt's log, and when it was said, as far as the clocks of gang and orchestrator agree."""

    attempt_id: int
    at: datetime
    said: LogLine


def add_lines(session: Session, attempt_id: int, lines: Sequence[LogLine]) -> None:
    """Keep the lines, each exactly once however often it is delivered. The caller holds the attempt's lease."""
    rows = [
        {"attempt_id": attempt_id, "number": said.number, "elapsed_seconds": said.elapsed_seconds, "line": said.line}
        for said in lines
    ]
    if rows:
        insert_missing(session, LogRow, rows)


def add_last_words(session: Session, attempt_id: int, text: str, now: datetime) -> None:
    """Add what is known of an attempt's end, after all that it has said itself."""
    started_at = session.scalars(select(AttemptRow.started_at).where(AttemptRow.id == attempt_id)).one()
    elapsed_seconds = max((now - started_at).total_seconds(), 0.0)
    said = last_line(session, attempt_id)
    lines = log_lines(text, 0, elapsed_seconds)
    add_lines(session, attempt_id, [line.model_copy(update={"number": line.number + said}) for line in lines])


def last_line(session: Session, attempt_id: int) -> int:
    """The number of the last line that is kept of the attempt, 0 without any."""
    return session.scalar(select(func.max(LogRow.number)).where(LogRow.attempt_id == attempt_id)) or 0


def last_lines(session: Session, trial_id: int) -> dict[int, int]:
    """The number of the last line of each of a trial's attempts that has logged any."""
    query = (
        select(LogRow.attempt_id, func.max(LogRow.number).label("last"))
        .join(AttemptRow, AttemptRow.id == LogRow.attempt_id).join(RunRow, RunRow.id == AttemptRow.run_id)
        .where(RunRow.trial_id == trial_id).group_by(LogRow.attempt_id)
    )  # fmt: skip
    return {row.attempt_id: row.last for row in session.execute(query)}


def list_lines(
    session: Session,
    trial_id: int,
    *,
    attempt_id: int | None = None,
    after: Mapping[int, int] | None = None,
    tail: int | None = None,
    limit: int = 500,
) -> tuple[Logged, ...]:
    """Lines of a trial's attempts, or of one, attempt by attempt in the order in which they were said.

    `after` leaves out, of each attempt that it names, the lines up to that number. `tail`: only the last so many.
    """
    query = (
        select(LogRow, AttemptRow.started_at).join(AttemptRow, AttemptRow.id == LogRow.attempt_id)
        .join(RunRow, RunRow.id == AttemptRow.run_id).where(RunRow.trial_id == trial_id)
    )  # fmt: skip
    if attempt_id is not None:
        query = query.where(LogRow.attempt_id == attempt_id)
    for known, number in (after or {}).items():
        query = query.where(or_(LogRow.attempt_id != known, LogRow.number > number))
    if tail is None:
        rows = session.execute(query.order_by(LogRow.attempt_id, LogRow.number).limit(limit)).all()
    else:
        last = query.order_by(LogRow.attempt_id.desc(), LogRow.number.desc()).limit(min(tail, limit))
        rows = session.execute(last).all()[::-1]
    return tuple(_logged(row, started_at) for row, started_at in rows)


def _logged(row: LogRow, started_at: datetime) -> Logged:
    said = LogLine(number=row.number, elapsed_seconds=row.elapsed_seconds, line=row.line)
    return Logged(row.attempt_id, started_at + timedelta(seconds=row.elapsed_seconds), said)
