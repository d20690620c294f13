"""Server-sent events: state changes of one study or of all, what gangs do now, and a trial's measurements as they come.

Every stream can be taken up again where it broke off: browsers send the id of the last event as `Last-Event-ID`.
"""

import re
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import TypeAdapter
from sqlalchemy.orm import Session

from api.context import LARGEST_ID, ContextOf, DatabaseOf, StudyName, TrialNumber
from api.follow import News
from api.problems import responses
from api.schemas import ActivityOut, EventOut, MeasurementOut
from orchestrator import store
from orchestrator.activity import list_activity
from orchestrator.curves import list_measurements
from orchestrator.lifecycle import OPEN_RUNS
from orchestrator.study import Study, Trial
from worker.shape import FieldError

BATCH = 500
MOST_ATTEMPTS = 500  # in a cursor: each is a condition, of which SQLite takes a thousand
# Written once for all who read the same: streams would each write what they are given as values.
ACTIVITY, MEASURED = TypeAdapter(list[ActivityOut]), TypeAdapter(list[MeasurementOut])

router = APIRouter(tags=["events"], responses=responses(422))
Cursor = Annotated[int, Query(ge=0, le=LARGEST_ID, description="Leave out events up to this id.")]
LastEventId = Annotated[str | None, Header(description="The last event's id; it wins over `after`.")]


@dataclass(frozen=True)
class Seen:
    """What a reader of state changes has seen: events up to an id, and what gangs did, as it was written."""

    after: int
    activity: str = "[]"


def read_events(session: Session, seen: Seen, study: Study | None) -> News:
    """What is new: events in the order of their commits, then the study's activity where it has changed."""
    events = store.list_events(session, seen.after, study.id if study is not None else None, BATCH)
    names = {study.id: study.name} if study is not None else {}
    if any(event.study_id not in names for event in events):
        names = {each.id: each.name for each in store.list_studies(session)}
    news = [ServerSentEvent(raw_data=EventOut.of(e, names[e.study_id]).model_dump_json(), id=str(e.id)) for e in events]
    activity = seen.activity
    if study is not None:
        shown = [ActivityOut.of(one) for one in list_activity(session, study.id)]
        activity = ACTIVITY.dump_json(shown).decode()
        if activity != seen.activity:
            news.append(ServerSentEvent(raw_data=activity, event="activity"))
    return News(news, Seen(events[-1].id if events else seen.after, activity), more=len(events) == BATCH)


@dataclass(frozen=True)
class Heard:
    """What a reader of a trial's measurements has heard: of each attempt, the messages up to a number."""

    after: tuple[tuple[int, int], ...]
    doing: tuple[object, ...] = ()


def read_curve(session: Session, heard: Heard, trial: Trial) -> News:
    """The next measurements in one event; a `state` where the trial moved on; an `end` once no run of it is open."""
    # The state first: what a gang said before its run ended was committed before that.
    state = store.get_trial(session, trial.study_id, trial.number).state
    runs, attempts = store.list_runs(session, trial.id), store.list_attempts(session, trial.id)
    doing = (state, *((run.id, run.state) for run in runs), *((a.id, a.phase, a.outcome) for a in attempts))
    measured = list_measurements(session, trial.id, dict(heard.after), BATCH)
    after = dict(heard.after) | {each.attempt_id: each.measurement.number for each in measured}
    cursor = write_cursor(after)
    written = MEASURED.dump_json([MeasurementOut.of(each) for each in measured]).decode()
    news = [ServerSentEvent(raw_data=written, id=cursor)] if measured else []
    if doing != heard.doing:
        news.append(ServerSentEvent(data={"state": state}, event="state"))
    more = len(measured) == BATCH
    if not more and not any(run.state in OPEN_RUNS for run in runs):  # those at further seeds go on after its result
        news.append(ServerSentEvent(data={"state": state}, event="end", id=cursor))
        return News(news, None)
    return News(news, Heard(tuple(sorted(after.items())), doing), more)


def write_cursor(after: Mapping[int, int]) -> str:
    """Of each attempt the number that was heard last, as an event's id."""
    return ",".join(f"{attempt_id}:{number}" for attempt_id, number in sorted(after.items()))


def read_cursor(name: str, cursor: str | None) -> dict[int, int]:
    """What write_cursor wrote. Raises FieldError with the name that it was sent under."""
    if not cursor:
        return {}
    pairs = cursor.split(",")
    sound = len(pairs) <= MOST_ATTEMPTS and all(re.fullmatch(r"[0-9]{1,10}:[0-9]{1,10}", pair) for pair in pairs)
    after = {int(attempt): int(number) for attempt, number in (pair.split(":") for pair in pairs)} if sound else {}
    if not sound or max(*after, *after.values()) > LARGEST_ID:
        raise FieldError(name, cursor, "must be the id of an event of this stream")
    return after


async def _event_cursor(after: Cursor = 0, last_event_id: LastEventId = None) -> int:
    if not last_event_id:
        return after
    if not re.fullmatch(r"\d{1,10}", last_event_id) or int(last_event_id) > LARGEST_ID:
        raise FieldError("Last-Event-ID", last_event_id, "must be the id of an event of this stream")
    return int(last_event_id)


async def _curve_cursor(last_event_id: LastEventId = None) -> dict[int, int]:
    return read_cursor("Last-Event-ID", last_event_id)


# Dependencies, because an error is an answer only before the stream has begun.
def _study(study: StudyName, database: DatabaseOf) -> Study:
    with database.read() as session:
        return store.get_study(session, study)


def _trial(study: StudyName, number: TrialNumber, database: DatabaseOf) -> Trial:
    with database.read() as session:
        return store.get_trial(session, store.get_study(session, study).id, number)


@router.get("/events", response_class=EventSourceResponse)
async def stream_events(
    context: ContextOf, after: Annotated[int, Depends(_event_cursor)]
) -> AsyncIterator[ServerSentEvent]:
    """Every state change of every study, from the cursor on, then live."""
    read = partial(read_events, study=None)
    async for event in context.streams.follow("events", Seen(after), read, context.closing.is_set):
        yield event


@router.get("/studies/{study}/events", response_class=EventSourceResponse, responses=responses(404))
async def stream_study_events(
    context: ContextOf, found: Annotated[Study, Depends(_study)], after: Annotated[int, Depends(_event_cursor)]
) -> AsyncIterator[ServerSentEvent]:
    """A study's state changes from the cursor on, then live; and an `activity` event whenever its gangs have news."""
    read = partial(read_events, study=found)
    async for event in context.streams.follow(("events", found.id), Seen(after), read, context.closing.is_set):
        yield event


@router.get(
    "/studies/{study}/trials/{number}/measurements/stream", response_class=EventSourceResponse, responses=responses(404)
)
async def stream_measurements(
    context: ContextOf,
    found: Annotated[Trial, Depends(_trial)],
    after: Annotated[dict[int, int], Depends(_curve_cursor)],
) -> AsyncIterator[ServerSentEvent]:
    """A trial's measurements, some to an event, then live; a `state` event whenever it moves on, and an `end` once it
    has ended, with every seed that it runs at."""
    heard, read = Heard(tuple(sorted(after.items()))), partial(read_curve, trial=found)
    async for event in context.streams.follow(("curve", found.id), heard, read, context.closing.is_set):
        yield event
