"""A study's trials page by page: filtered, in a few orders, each page from where the one before ended."""

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from math import isfinite
from typing import Any, Literal, get_args

from sqlalchemy import ColumnElement, and_, exists, literal, or_, select, true, tuple_
from sqlalchemy.orm import Session

from orchestrator.arms import SUBMITTED, UNNAMED
from orchestrator.lifecycle import StudyState, TrialState
from orchestrator.rows import study_of, trial_of
from orchestrator.study import Origin, Study, Trial, Verdict
from orchestrator.tables import TRIALS, StudyRow, TagRow, TrialRow

Order = Literal["number", "val_bpb", "artifact_bytes", "created_at", "finished_at"]
ORDERS: tuple[Order, ...] = get_args(Order)


@dataclass(frozen=True)
class Wanted:
    """Which trials of a study: those that meet every one of these that is given. Of tags they must have all."""

    states: Collection[TrialState] = ()
    origins: Collection[Origin] = ()
    verdicts: Collection[Verdict] = ()
    arms: Collection[str] = ()
    """As the study's account of arms names them."""
    tags: Collection[str] = ()
    after: int = -1
    """Only numbers above this."""


@dataclass(frozen=True)
class Sort:
    """By a column, then by number in the same direction. Trials that have nothing there come last in both."""

    order: Order = "number"
    descending: bool = False

    def __str__(self) -> str:
        return f"-{self.order}" if self.descending else self.order


@dataclass(frozen=True)
class Place:
    """Where a page ended: the last trial's value of what they are sorted by, None where it has none, and number."""

    value: int | float | datetime | None
    number: int

    def written(self) -> str:
        """As text from which `read_place` makes it again."""
        value = self.value.isoformat() if isinstance(self.value, datetime) else self.value
        return json.dumps([value, self.number], separators=(",", ":"))


def read_place(text: str, sort: Sort) -> Place:
    """The place that was written so. Raises ValueError for text that no page of this order ended with."""
    value, number = json.loads(text)
    if type(number) is not int or not 0 <= number < 2**31:
        raise ValueError(f"{number} is no trial's number")
    if value is None:
        return Place(None, number)
    if sort.order in ("created_at", "finished_at"):
        at = datetime.fromisoformat(value)
        if at.tzinfo is None:
            raise ValueError(f"{value} has no time zone")
        return Place(at, number)
    wanted = (int, float) if sort.order == "val_bpb" else (int,)
    if type(value) not in wanted or not isfinite(value) or abs(value) >= 2**63:
        raise ValueError(f"{value} is no {sort.order}")
    return Place(value, number)


def list_page(
    session: Session, study_id: int, wanted: Wanted, sort: Sort, after: Place | None, limit: int
) -> tuple[tuple[Trial, ...], Place | None]:
    """Trials in this order, from after this place on, and the place where they end if there are more."""
    found: list[tuple[int, Any, int]] = []
    for part in _parts(sort, after):
        column, number = TRIALS.c[sort.order], TRIALS.c.number
        query = select(TRIALS.c.id, column, number).where(TRIALS.c.study_id == study_id, part, *_filters(wanted))
        order = (number,) if sort.order == "number" else (column, number)
        query = query.order_by(*(each.desc() if sort.descending else each.asc() for each in order))
        found += [(row[0], row[1], row[2]) for row in session.execute(query.limit(limit + 1 - len(found)))]
        if len(found) > limit:
            break
    ids = [trial_id for trial_id, _, _ in found[:limit]]
    rows = {row.id: row for row in session.scalars(select(TrialRow).where(TrialRow.id.in_(ids)))}
    _, value, number_of_last = found[:limit][-1] if found else (0, None, 0)
    ended = Place(value, number_of_last) if len(found) > limit else None
    return tuple(trial_of(rows[trial_id]) for trial_id in ids), ended


def list_studies_page(
    session: Session, states: Collection[StudyState], archived: bool, after: int, limit: int
) -> tuple[Study, ...]:
    """Studies with ids above `after`, oldest first: in these states (all, where none is named), archived or in use."""
    query = select(StudyRow).where(StudyRow.id > after, StudyRow.archived_at.is_not(None) == archived)
    if states:
        query = query.where(StudyRow.state.in_(states))
    return tuple(study_of(row) for row in session.scalars(query.order_by(StudyRow.id).limit(limit)))


def _parts(sort: Sort, after: Place | None) -> Iterator[ColumnElement[bool]]:
    """What is read one after the other: trials with a value, then those without, which databases place differently."""
    column, number = TRIALS.c[sort.order], TRIALS.c.number
    beyond: ColumnElement[bool] = true()
    if after is not None:
        beyond = number < after.number if sort.descending else number > after.number
    if sort.order == "number":
        yield beyond
        return
    if after is None:
        yield column.is_not(None)
    elif after.value is not None:
        here, last = tuple_(column, number), tuple_(literal(after.value, column.type), literal(after.number))
        yield here < last if sort.descending else here > last
    without = column.is_(None)
    yield and_(without, beyond) if after is not None and after.value is None else without


def _filters(wanted: Wanted) -> Iterator[ColumnElement[bool]]:
    trial = TRIALS.c
    if wanted.states:
        yield trial.state.in_(wanted.states)
    if wanted.origins:
        yield trial.origin.in_(wanted.origins)
    if wanted.verdicts:
        yield trial.verdict.in_(wanted.verdicts)
    if wanted.arms:
        unnamed, proposed = trial.suggestion.is_(None), trial.origin == "proposed"
        named = {UNNAMED: and_(unnamed, proposed), SUBMITTED: and_(unnamed, ~proposed)}
        arms = [named[arm] for arm in wanted.arms if arm in named]
        yield or_(trial.suggestion["arm"].as_string().in_([*wanted.arms]), *arms)
    if wanted.after >= 0:
        yield trial.number > wanted.after
    for tag in wanted.tags:
        yield exists().where(TagRow.trial_id == trial.id, TagRow.tag == tag)
