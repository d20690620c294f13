"""Streams that follow the database: all of a process look together, twice a second, in one thread and one session.

Streams that have seen the same of the same topic share what is found: a thousand readers of one study cost hardly more
than one. A reader that is slow, or new, has a cursor of its own, and catches up from the database.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi.sse import ServerSentEvent
from sqlalchemy.orm import Session

from api.together import Together
from orchestrator.database import Database

POLL_SECONDS = 0.5
AT_ONCE, PAUSE_SECONDS = 8, 0.01
"""So many streams go on together after a look; other requests come between them and the next."""


@dataclass(frozen=True)
class News:
    """What a read found: events to send, and the cursor behind them; None once there is nothing more to come."""

    events: Sequence[ServerSentEvent]
    cursor: Hashable | None
    more: bool = False
    """Whether there may be more already."""


Read = Callable[[Session, Any], News]
"""What is new behind a cursor. It depends on nothing but its topic, the cursor and the database."""


@dataclass
class Streams:
    """The streams of one application, in one event loop."""

    database: Database
    _found: dict[tuple[Hashable, Hashable], asyncio.Task[News]] = field(default_factory=dict)
    """Since the last look, by topic and cursor; but for what failed or is over, which the next may find otherwise."""
    _reads: Together[tuple[Read, Hashable], News] = field(default_factory=Together)
    _rest: asyncio.Task[None] | None = None
    _woken: int = 0

    async def follow(
        self, topic: Hashable, cursor: Hashable, read: Read, closing: Callable[[], bool]
    ) -> AsyncIterator[ServerSentEvent]:
        """What `read` finds behind the cursor, and then what comes, until it is over or the server is closing.

        Once all that was there has been sent, a comment says so: `live`.
        """
        yield ServerSentEvent(comment="open", retry=1000)
        live = False
        while not closing():
            news = await self._look(topic, cursor, read)
            for event in news.events:
                yield event
            if news.cursor is None:
                return
            cursor = news.cursor
            if not news.more:
                if not live:
                    live = True
                    yield ServerSentEvent(comment="live")
                await self._wait()

    async def _look(self, topic: Hashable, cursor: Hashable, read: Read) -> News:
        self._count_down()
        place = topic, cursor
        task = self._found.get(place)
        if task is None:
            task = asyncio.create_task(self._reads.ask((read, cursor), self._read))
            self._found[place] = task
            task.add_done_callback(partial(self._drop, place))
        return await asyncio.shield(task)  # which others wait for too

    def _drop(self, place: tuple[Hashable, Hashable], task: asyncio.Task[News]) -> None:
        over = task.cancelled() or task.exception() is not None or task.result().cursor is None
        if over and self._found.get(place) is task:
            del self._found[place]

    def _count_down(self) -> asyncio.Task[None]:
        """Until the next look."""
        if self._rest is None:
            self._rest = asyncio.create_task(self._sleep())
        return self._rest

    async def _wait(self) -> None:
        rest = self._count_down()
        self._woken += 1
        pause = self._woken // AT_ONCE * PAUSE_SECONDS
        await asyncio.shield(rest)
        await asyncio.sleep(pause)

    async def _sleep(self) -> None:
        await asyncio.sleep(POLL_SECONDS)
        self._rest, self._woken = None, 0
        self._found.clear()

    def _read(self, asked: Sequence[tuple[Read, Hashable]]) -> list[News | Exception]:
        found: list[News | Exception] = []
        with self.database.read() as session:
            for read, cursor in asked:
                try:
                    found.append(read(session, cursor))
                except Exception as error:  # noqa: BLE001 - it is raised where it was asked
                    session.rollback()
                    found.append(error)
        return found
