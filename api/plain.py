"""JSON that says one thing to everyone: no key twice in one object, and no text that a database cannot keep.

Parsers differ on which of two equal keys counts, and PostgreSQL keeps neither NUL nor half a surrogate pair.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from itertools import islice
from typing import Any

from fastapi import HTTPException
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

from worker.spec import InvalidSpec, Problem

Handler = Callable[[Request], Coroutine[Any, Any, Response]]
MOST_PROBLEMS = 50  # what else is wrong is told once those are mended
MOST_KEYS = 30_000  # a hundred whole specs have half of them; to judge each takes its time
_UNKEPT = re.compile("[\0\ud800-\udfff]")


class InvalidBody(HTTPException):
    """JSON that can be parsed, and may not be read: every problem with it, by its place in the body."""

    def __init__(self, problems: tuple[Problem, ...]) -> None:
        super().__init__(422)
        self.invalid = InvalidSpec(problems)


class PlainRoute(APIRoute):
    """A route whose JSON body is read by `read_plain`."""

    def get_route_handler(self) -> Handler:
        """The handler, given a request that reads its body so."""
        handle = super().get_route_handler()

        async def handle_plain(request: Request) -> Response:
            return await handle(_PlainRequest(request.scope, request.receive))

        return handle_plain


class _PlainRequest(Request):
    async def json(self) -> Any:
        return read_plain(await self.body())


def read_plain(body: bytes) -> Any:
    """What the JSON says. Raises JSONDecodeError, and InvalidBody for keys that come twice and text beyond keeping."""
    twice: list[Problem] = []
    keys = 0

    def whole(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal keys
        keys += len(pairs)
        if keys > MOST_KEYS:
            raise InvalidBody((Problem("body", keys, f"has more than {MOST_KEYS:,} keys, all objects together"),))
        found = dict(pairs)
        if len(found) < len(pairs) and len(twice) < MOST_PROBLEMS:
            counts = Counter(key for key, _ in pairs)
            twice.extend(
                Problem(key, found[key], f"is given {count} times in one object: give it once")
                for key, count in counts.items()
                if count > 1
            )
        return found

    said = json.loads(body, object_pairs_hook=whole)
    problems = (*twice, *islice(_unkept(said) if b"\\u" in body else (), MOST_PROBLEMS))
    if problems:
        raise InvalidBody(problems)
    return said


def _unkept(said: Any, path: str = "") -> Iterator[Problem]:
    if isinstance(said, str):
        if _UNKEPT.search(said):
            yield Problem(path or "body", said, "must be text without NUL and without half a surrogate pair")
        return
    parts = said.items() if isinstance(said, dict) else enumerate(said) if isinstance(said, list) else ()
    for name, value in parts:
        place = f"{path}.{name}" if path else str(name)
        if isinstance(name, str) and _UNKEPT.search(name):
            yield Problem(place, name, "must be a key without NUL and without half a surrogate pair")
        yield from _unkept(value, place)
