"""One trial with its runs, attempts, tags and notes, by a single statement: what people and programs ask for most."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, cast

from sqlalchemy import JSON, ColumnElement, Table, Text, bindparam, exists, select
from sqlalchemy import cast as sql_cast
from sqlalchemy.orm import Session

from orchestrator.errors import NotFound
from orchestrator.labels import Note, list_notes, list_tags
from orchestrator.rows import attempt_of, run_of, trial_of
from orchestrator.store import get_study
from orchestrator.study import Attempt, Run, Trial
from orchestrator.tables import ATTEMPTS, RUNS, STUDIES, TRIALS, ArtifactRow, NoteRow, TagRow

ARTIFACTS, NOTES, TAGS = (cast(Table, row.__table__) for row in (ArtifactRow, NoteRow, TagRow))


KEPT = 1024
"""Trials that are not built again as long as their rows say the same."""


@dataclass(frozen=True, eq=False)
class Detail:
    """A trial, and all that belongs to it but measurements, logs and events. Read again unchanged, it is the same."""

    trial: Trial
    runs: tuple[Run, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    tags: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()


def get_detail(session: Session, study: str, number: int) -> Detail:
    """The trial of this number of the study of this name. Raises NotFound."""
    rows = session.connection().execute(_DETAIL, {"study": study, "number": number}).all()
    if not rows:
        get_study(session, study)
        raise NotFound("trial", number, f"study {study}")
    trial_id, first = rows[0][0], rows[0]
    tags = list_tags(session, [trial_id]).get(trial_id, ()) if first.has_tags else ()
    notes = list_notes(session, trial_id) if first.has_notes else ()
    return _detail(tuple(map(tuple, rows)), tags, notes)


@lru_cache(maxsize=KEPT)
def _detail(rows: tuple[tuple[Any, ...], ...], tags: tuple[str, ...], notes: tuple[Note, ...]) -> Detail:
    trial = trial_of(_part(rows[0], "trial"))
    runs, attempts = dict[int, Run](), dict[int, Attempt]()
    for row in rows:
        run, attempt, artifact = (_part(row, name) for name in ("run", "attempt", "artifact"))
        if run.id is not None and run.id not in runs:
            runs[run.id] = run_of(run)
        if attempt.id is not None:
            attempt.result = None if attempt.step_seconds is None else {"step_seconds": attempt.step_seconds}
            attempts[attempt.id] = attempt_of(attempt, None if artifact.uri is None else artifact)
    return Detail(trial, tuple(runs.values()), tuple(attempts[key] for key in sorted(attempts)), tags, notes)


def _columns() -> dict[str, dict[str, ColumnElement[Any]]]:
    """The statement's columns by the value that they belong to. Of an attempt's result its step time counts alone."""
    step = ATTEMPTS.c.result["step_seconds"].as_float()
    return {
        "trial": dict(TRIALS.c),
        "run": dict(RUNS.c),
        "attempt": {**{name: column for name, column in ATTEMPTS.c.items() if name != "result"}, "step_seconds": step},
        "artifact": dict(ARTIFACTS.c),
    }


_COLUMNS = _columns()
_NAMES: dict[str, tuple[int, list[str]]] = {}
"""By value: the place of its first column, and the names of all."""
for _name, _own in _COLUMNS.items():
    _NAMES[_name] = (sum(len(names) for _, names in _NAMES.values()), list(_own))
_WRITTEN = {
    (name, own)
    for name, columns in _COLUMNS.items()
    for own, column in columns.items()
    if isinstance(column.type, JSON)
}
"""What is read as the text that was written: it tells whether a trial has changed, and is seldom built anew."""


def _shown(name: str, own: str, column: ColumnElement[Any]) -> ColumnElement[Any]:
    return (sql_cast(column, Text) if (name, own) in _WRITTEN else column).label(f"{name}_{own}")


_DETAIL = (
    select(
        *(_shown(name, own, column) for name, columns in _COLUMNS.items() for own, column in columns.items()),
        exists().where(TAGS.c.trial_id == TRIALS.c.id).label("has_tags"),
        exists().where(NOTES.c.trial_id == TRIALS.c.id).label("has_notes"),
    )
    .select_from(STUDIES).join(TRIALS, TRIALS.c.study_id == STUDIES.c.id)
    .outerjoin(RUNS, RUNS.c.trial_id == TRIALS.c.id).outerjoin(ATTEMPTS, ATTEMPTS.c.run_id == RUNS.c.id)
    .outerjoin(ARTIFACTS, ARTIFACTS.c.attempt_id == ATTEMPTS.c.id)
    .where(STUDIES.c.name == bindparam("study"), TRIALS.c.number == bindparam("number")).order_by(RUNS.c.id)
)  # fmt: skip


def _part(row: Sequence[Any], name: str) -> Any:
    """The row's share of one value, as its mapped row would be."""
    start, names = _NAMES[name]
    values = dict(zip(names, row[start : start + len(names)], strict=True))
    for own, value in values.items():
        if value is not None and (name, own) in _WRITTEN:
            values[own] = json.loads(value)
    return SimpleNamespace(**values)
