"""Streams that look together, and requests that are answered together: one that fails is its own affair."""

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from fastapi.sse import ServerSentEvent
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from api.follow import News, Read, Streams
from api.together import Together
from orchestrator.database import Database


def counting(session: Session, cursor: int) -> News:
    """Counts to three; an event for each."""
    number = cursor + session.scalars(text("SELECT 1")).one()
    return News([ServerSentEvent(data=number)], number if number < 3 else None, more=True)


async def followed(streams: Streams, read: Read, topic: str = "topic") -> list[Any]:
    return [event.data async for event in streams.follow(topic, 0, read, lambda: False) if event.data is not None]


def test_a_read_that_fails_ends_its_own_streams_and_the_next_one_reads_again(database: Database) -> None:
    fails = threading.Event()
    fails.set()

    def failing(session: Session, cursor: int) -> News:
        if fails.is_set():
            session.execute(text("SELECT nothing FROM nowhere"))
        return counting(session, cursor)

    async def run() -> None:
        streams = Streams(database)
        ended = await asyncio.gather(
            followed(streams, failing), followed(streams, failing), followed(streams, counting, "other"),
            return_exceptions=True,
        )  # fmt: skip
        assert all(isinstance(one, DBAPIError) for one in ended[:2]) and ended[2] == [1, 2, 3]
        fails.clear()
        assert await followed(streams, failing) == [1, 2, 3]

    asyncio.run(run())


def test_what_is_over_may_begin_again(small_database: Database) -> None:
    states = iter(("cancelled", "queued"))

    def read(_session: Session, _cursor: int) -> News:
        return News([ServerSentEvent(data=next(states))], None)

    async def run() -> None:
        streams = Streams(small_database)
        assert await followed(streams, read) == ["cancelled"]
        assert await followed(streams, read) == ["queued"]

    asyncio.run(run())


def test_an_answer_of_another_length_and_one_that_fails_leave_nobody_waiting() -> None:
    def answer(asked: Sequence[int]) -> list[int]:
        if 0 in asked:
            raise ValueError("no zero")
        return [one for one in asked if one > 0]

    async def run() -> None:
        together = Together[int, int]()
        for number, error in ((0, ValueError), (-1, AssertionError)):
            with pytest.raises(error):
                await together.ask(number, answer)
        assert await together.ask(1, answer) == 1

    asyncio.run(run())
