"""What a trial's attempts log, over HTTP: from the end, from a line on, or live."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi.sse import EventSourceResponse, ServerSentEvent
from sqlalchemy.orm import Session

from api.context import LARGEST_ID, ContextOf, DatabaseOf, StudyName, TrialNumber
from api.events import LastEventId, read_cursor, write_cursor
from api.follow import News
from api.lines import LogLineOut
from api.problems import responses
from api.schemas import Page
from orchestrator import store
from orchestrator.errors import NotFound
from orchestrator.lifecycle import OPEN_RUNS
from orchestrator.logs import last_lines, list_lines
from orchestrator.study import Trial

MAX_LINES = 1000
"""In one answer, or one event."""

router = APIRouter(prefix="/studies/{study}/trials/{number}/logs", tags=["trials"], responses=responses(404, 422))
AttemptId = Annotated[
    int | None, Query(ge=1, le=LARGEST_ID, description="The attempt's id; without one, the trial's latest attempt.")
]
AfterLine = Annotated[int, Query(ge=0, le=LARGEST_ID, description="Leave out lines up to this number.")]
Tail = Annotated[int | None, Query(ge=0, le=MAX_LINES, description="Only the last so many lines.")]


@router.get("")
def list_logs(
    study: StudyName,
    number: TrialNumber,
    database: DatabaseOf,
    attempt: AttemptId = None,
    after: AfterLine = 0,
    tail: Tail = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LINES, description="How many at the most.")] = MAX_LINES,
) -> Page[LogLineOut]:
    """What one attempt at the trial has logged, line by line."""
    with database.read() as session:
        trial = store.get_trial(session, store.get_study(session, study).id, number)
        attempts = [one.id for one in store.list_attempts(session, trial.id)]
        if attempt is not None and attempt not in attempts:
            raise NotFound(f"attempt at trial {number}:", attempt)
        chosen = attempt or (attempts[-1] if attempts else 0)
        found = list_lines(
            session, trial.id, attempt_id=chosen, after={chosen: after}, tail=tail, limit=limit + (tail is None)
        )
    items = [LogLineOut.of(logged) for logged in found[:limit]]
    return Page(items=items, next=items[-1].number if len(found) > limit else None)


async def _log_cursor(
    after: Annotated[
        str | None,
        Query(description="The id of an event of this stream, or attempt:number: leave out what came before."),
    ] = None,
    last_event_id: LastEventId = None,
) -> dict[int, int]:
    name, cursor = ("Last-Event-ID", last_event_id) if last_event_id else ("after", after)
    return read_cursor(name, cursor)


# A dependency, because an error is an answer only before the stream has begun.
def _trial(study: StudyName, number: TrialNumber, database: DatabaseOf) -> Trial:
    with database.read() as session:
        return store.get_trial(session, store.get_study(session, study).id, number)


@router.get("/stream", response_class=EventSourceResponse)
async def stream_logs(
    context: ContextOf,
    trial: Annotated[Trial, Depends(_trial)],
    after: Annotated[dict[int, int], Depends(_log_cursor)],
    tail: Tail = None,
) -> AsyncIterator[ServerSentEvent]:
    """The lines of all the trial's attempts, then live, some to an event; an `end` once the trial has ended, with
    every seed that it runs at.

    With `tail`, and without a cursor, it begins with the last so many lines.
    """
    start = (tuple(sorted(after.items())), None if after else tail)
    read = partial(_read, trial=trial)
    async for event in context.streams.follow(("logs", trial.id), start, read, context.closing.is_set):
        yield event


def _read(session: Session, seen: tuple[tuple[tuple[int, int], ...], int | None], trial: Trial) -> News:
    """The lines that come next, in one event; an `end` once none of the trial's runs is open and all are read."""
    after, tail = dict(seen[0]), seen[1]
    # The runs first: what a gang said before its run ended was committed before that.
    over = not any(run.state in OPEN_RUNS for run in store.list_runs(session, trial.id))
    before = after if tail is None else last_lines(session, trial.id)
    lines = list_lines(session, trial.id, after=after, tail=tail, limit=MAX_LINES)
    behind = sorted((before | {logged.attempt_id: logged.said.number for logged in lines}).items())
    cursor = write_cursor(dict(behind))
    news = [ServerSentEvent(data=[LogLineOut.of(logged) for logged in lines], id=cursor)] if lines else []
    if over and not lines:
        return News([ServerSentEvent(data={}, event="end", id=cursor)], None)
    return News(news, (tuple(behind), None), more=over or len(lines) == MAX_LINES)
