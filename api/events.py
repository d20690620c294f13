"""Server-sent events: state changes of one study or of all, what gangs do now, and a trial's measurements as they come.

Every stream can be taken up again where it broke off: browsers send the id of the last event as `Last-Event-ID`.
"""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Annotated, TypeVar

from fastapi import APIRouter, Depends, Header, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool

from api.context import LARGEST_ID, Context, ContextOf, DatabaseOf, StudyName, TrialNumber
from api.problems import responses
from api.schemas import ActivityOut, EventOut, MeasurementOut
from orchestrator import store
from orchestrator.activity import list_activity
from orchestrator.database import Database
from orchestrator.lifecycle import OPEN_TRIALS
from orchestrator.study import Study, Trial
from worker.shape import FieldError

POLL_SECONDS = 0.5
BATCH = 500

router = APIRouter(tags=["events"], responses=responses(422))
Cursor = Annotated[int, Query(ge=0, le=LARGEST_ID, description="Leave out events up to this id.")]
LastEventId = Annotated[str | None, Header(description="The last event's id; it wins over `after`.")]
Read = TypeVar("Read")


@dataclass
class Feed:
    """What one reader of state changes has seen."""

    after: int
    study: Study | None = None
    names: dict[int, str] = field(default_factory=dict)
    activity: list[ActivityOut] = field(default_factory=list)

    def read(self, session: Session) -> list[ServerSentEvent]:
        """What is new: events in the order of their commits, then the study's activity where it has changed."""
        events = store.list_events(session, self.after, self.study.id if self.study is not None else None, BATCH)
        if any(event.study_id not in self.names for event in events):
            self.names = {study.id: study.name for study in store.list_studies(session)}
        news = [ServerSentEvent(data=EventOut.of(e, self.names[e.study_id]), id=str(e.id)) for e in events]
        self.after = events[-1].id if events else self.after
        if self.study is not None:
            activity = [ActivityOut.of(one) for one in list_activity(session, self.study.id)]
            if activity != self.activity:
                news.append(ServerSentEvent(data=activity, event="activity"))
                self.activity = activity
        return news


@dataclass
class Curve:
    """What one reader of a trial's measurements has seen: of each attempt, the messages up to a number."""

    trial: Trial
    after: dict[int, int]
    doing: tuple[object, ...] = ()
    over: bool = False

    def read(self, session: Session) -> list[ServerSentEvent]:
        """The new measurements in one event; a `state` where the trial moved on; once it has ended, an `end`."""
        # The state first: what a gang said before its trial ended was committed before that.
        state = store.get_trial(session, self.trial.study_id, self.trial.number).state
        doing = (state, *((a.id, a.phase, a.outcome) for a in store.list_attempts(session, self.trial.id)))
        measured = store.list_measurements(session, self.trial.id, self.after)
        for progress in measured:
            self.after[progress.attempt_id] = progress.measurement.number
        news = [ServerSentEvent(data=[MeasurementOut.of(p) for p in measured], id=self.cursor)] if measured else []
        if doing != self.doing:
            news.append(ServerSentEvent(data={"state": state}, event="state"))
            self.doing = doing
        if state not in OPEN_TRIALS:
            news.append(ServerSentEvent(data={"state": state}, event="end", id=self.cursor))
            self.over = True
        return news

    @property
    def cursor(self) -> str:
        return ",".join(f"{attempt_id}:{number}" for attempt_id, number in sorted(self.after.items()))


async def _event_cursor(after: Cursor = 0, last_event_id: LastEventId = None) -> int:
    if not last_event_id:
        return after
    if not re.fullmatch(r"\d{1,10}", last_event_id) or int(last_event_id) > LARGEST_ID:
        raise FieldError("Last-Event-ID", last_event_id, "must be the id of an event of this stream")
    return int(last_event_id)


async def _curve_cursor(last_event_id: LastEventId = None) -> dict[int, int]:
    if not last_event_id:
        return {}
    if not re.fullmatch(r"\d{1,9}:\d{1,9}(,\d{1,9}:\d{1,9}){0,99}", last_event_id):
        raise FieldError("Last-Event-ID", last_event_id, "must be the id of an event of this stream")
    return {int(attempt): int(number) for attempt, number in (pair.split(":") for pair in last_event_id.split(","))}


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
    feed = Feed(after)
    async for event in _follow(context, feed.read, lambda: False):
        yield event


@router.get("/studies/{study}/events", response_class=EventSourceResponse, responses=responses(404))
async def stream_study_events(
    context: ContextOf, found: Annotated[Study, Depends(_study)], after: Annotated[int, Depends(_event_cursor)]
) -> AsyncIterator[ServerSentEvent]:
    """A study's state changes from the cursor on, then live; and an `activity` event whenever its gangs have news."""
    feed = Feed(after, found)
    async for event in _follow(context, feed.read, lambda: False):
        yield event


@router.get(
    "/studies/{study}/trials/{number}/measurements/stream", response_class=EventSourceResponse, responses=responses(404)
)
async def stream_measurements(
    context: ContextOf,
    found: Annotated[Trial, Depends(_trial)],
    after: Annotated[dict[int, int], Depends(_curve_cursor)],
) -> AsyncIterator[ServerSentEvent]:
    """A trial's measurements, then live; a `state` event whenever it moves on, and an `end` once it has ended."""
    curve = Curve(found, after)
    async for event in _follow(context, curve.read, lambda: curve.over):
        yield event


async def _follow(
    context: Context, read: Callable[[Session], list[ServerSentEvent]], over: Callable[[], bool]
) -> AsyncIterator[ServerSentEvent]:
    """What `read` finds, about twice a second, until it is over or the server goes down.

    Once all that was there has been sent, a comment says so: `live`.
    """
    yield ServerSentEvent(comment="open", retry=1000)
    live = False
    while not context.closing.is_set():
        news = await run_in_threadpool(_read, context.database, read)
        for event in news:
            yield event
        if over():
            return
        if len(news) < BATCH:
            if not live:
                live = True
                yield ServerSentEvent(comment="live")
            await asyncio.sleep(POLL_SECONDS)


def _read(database: Database, read: Callable[[Session], Read]) -> Read:
    with database.read() as session:
        return read(session)
