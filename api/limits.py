"""How much one visitor may ask for: bytes and depth of a body, seconds to send it, requests a second, open streams."""

import asyncio
import math
import re
import time
from collections.abc import Mapping

from starlette.types import Message, Receive

from api.problems import Refusal

BODY_BYTES = 2 << 20
OPEN_BODY_BYTES = 16 << 10  # where nobody is asked who they are: a sign-in's form has 200
LARGE_BODIES: tuple[tuple[re.Pattern[str], int], ...] = ((re.compile(r"/v1/attempts/[^/]+/artifact"), 256 << 20),)
"""Paths whose bodies are files: passed on as they come instead of being read first, and never parsed."""
MAX_DEPTH = 32  # a spec has five levels
MAX_STREAMS = 500
MAX_STREAMS_EACH = 50  # of one token
STREAM = re.compile(r"/v1/(?:studies/[^/]+/)?events|/v1/.*/stream")
BURST_SECONDS = 2.0
MOST_COUNTED = 10_000
_TOKENS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)


class Rate:
    """How often each of many may come: `per_second`, and twice that at once after a rest."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._burst = max(per_second * BURST_SECONDS, 1.0)
        self._left: dict[str, tuple[float, float]] = {}

    def take(self, who: str) -> None:
        """Count one request. Raises Refusal, with the seconds to wait, where it is one too many."""
        left = self._refilled(who)
        if left < 1.0:
            raise self._refusal(left)
        if len(self._left) >= MOST_COUNTED:
            self._left.clear()
        self._left[who] = (left - 1.0, time.monotonic())

    def _refilled(self, who: str) -> float:
        left, at = self._left.get(who, (self._burst, 0.0))
        return min(self._burst, left + (time.monotonic() - at) * self._per_second)

    def _refusal(self, left: float) -> Refusal:
        seconds = max(1, math.ceil((1.0 - left) / self._per_second))
        detail = f"more than {self._per_second:g} requests a second; wait {seconds} s"
        return Refusal("too-many-requests", detail, {"Retry-After": str(seconds)})


async def read_body(
    path: str, headers: Mapping[bytes, bytes], receive: Receive, seconds: float, most: int = BODY_BYTES
) -> tuple[bytes, Receive]:
    """The body, of `most` bytes at most, and a `receive` that gives it once more. Of a large one nothing is read: the
    bytes are empty, and `receive` raises Refusal where too much comes, or nothing for so many seconds. Raises Refusal.
    """
    if b"content-length" not in headers and b"transfer-encoding" not in headers:
        return b"", receive
    large = next((size for pattern, size in LARGE_BODIES if pattern.fullmatch(path)), None)
    _require_length(headers, large or most)
    if large is not None:
        return b"", _Pieces(receive, large, seconds)
    try:
        async with asyncio.timeout(seconds):
            body, ended = await _read_whole(receive, most)
    except TimeoutError:
        raise _too_slow("the body", seconds) from None
    if b"\0" in body:  # UTF-16, in which brackets could not be counted; JSON and forms are UTF-8
        raise Refusal("malformed-body", "the body must be UTF-8 without NUL")
    if b"json" in headers.get(b"content-type", b"").lower():  # nothing else is ever parsed as JSON
        require_shallow(body)
    again: list[Message] = [ended if ended is not None else {"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return again.pop() if again else await receive()

    return body, replay


def require_shallow(body: bytes) -> None:
    """Raises Refusal where JSON nests deeper than anything we read; the parser would recurse as deep as it does."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    depth = 0
    for token in _TOKENS.finditer(body):
        if token[0] in (b"[", b"{"):
            depth += 1
            if depth > MAX_DEPTH:
                raise Refusal("malformed-body", f"the body nests more than {MAX_DEPTH} levels deep")
        elif token[0] in (b"]", b"}"):
            depth -= 1


class _Pieces:
    """A `receive` that counts."""

    def __init__(self, receive: Receive, most: int, seconds: float) -> None:
        self._receive = receive
        self._most = most
        self._seconds = seconds
        self._size = 0
        self._ended = False

    async def __call__(self) -> Message:
        if self._ended:
            return await self._receive()
        try:
            async with asyncio.timeout(self._seconds):
                message = await self._receive()
        except TimeoutError:
            raise _too_slow("the next piece", self._seconds) from None
        self._size += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        if self._size > self._most:
            raise _too_large(self._most)
        return message


async def _read_whole(receive: Receive, most: int) -> tuple[bytes, Message | None]:
    """The body, and the message that says so where its sender has gone."""
    pieces, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return b"", message
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > most:
            raise _too_large(most)
        if not message.get("more_body", False):
            return b"".join(pieces), None


def _require_length(headers: Mapping[bytes, bytes], most: int) -> None:
    said = headers.get(b"content-length", b"0")
    if not said.isdigit() or len(said) > 18 or int(said) > most:
        raise _too_large(most)


def _too_large(most: int) -> Refusal:
    return Refusal("too-large", f"a body here has at most {most:,} bytes", {"Connection": "close"})


def _too_slow(what: str, seconds: float) -> Refusal:
    return Refusal("too-slow", f"{what} did not come within {seconds:g} seconds", {"Connection": "close"})
