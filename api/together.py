"""Requests that are answered together: what arrives while a group is being answered makes up the next one."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from starlette.concurrency import run_in_threadpool

MOST = 64
"""In one group."""

Ask = TypeVar("Ask")
Given = TypeVar("Given")


class Together(Generic[Ask, Given]):
    """Answers asks in the order in which they come, in one thread at a time. Whoever is alone waits for nobody.

    Used from one event loop.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Ask, asyncio.Future[Given]]] = []
        self._answering: asyncio.Task[None] | None = None

    async def ask(self, what: Ask, answer: Callable[[Sequence[Ask]], Sequence[Given | Exception]]) -> Given:
        """What `answer` gives for this; raises it where it is an exception. `answer` is the same for every ask."""
        future: asyncio.Future[Given] = asyncio.get_running_loop().create_future()
        self._waiting.append((what, future))
        if self._answering is None:
            self._answering = asyncio.create_task(self._answer(answer))
        return await future

    async def _answer(self, answer: Callable[[Sequence[Ask]], Sequence[Given | Exception]]) -> None:
        group: list[tuple[Ask, asyncio.Future[Given]]] = []
        try:
            while self._waiting:
                group, self._waiting = self._waiting[:MOST], self._waiting[MOST:]
                given: Sequence[Given | Exception]
                try:
                    given = await run_in_threadpool(answer, [what for what, _ in group])
                    assert len(given) == len(group), "each has an answer"
                except Exception as error:  # noqa: BLE001 - it is raised where each of them was asked
                    given = [error] * len(group)
                for (_, future), one in zip(group, given, strict=True):
                    if future.done():  # its client has gone
                        continue
                    if isinstance(one, Exception):
                        future.set_exception(one)
                    else:
                        future.set_result(one)
        finally:  # nobody waits for an answer that will not come
            self._answering = None
            for _, future in (*group, *self._waiting):
                future.cancel()
            self._waiting = []
