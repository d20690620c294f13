"""How requests reach the API: with a token, repeated where that is safe, and followed where an answer never ends.

ClientError
├── ApiError       the API refused, and says why
├── Unreachable    no answer came
└── BadAnswer      an answer came that cannot be what was meant: damaged, or another version's
"""

import base64
import hashlib
import random
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

import httpx
from pydantic import BaseModel, ValidationError

from api.refusals import ProblemDetails
from api.schemas import Page

ATTEMPTS = 4
FOLLOW_ATTEMPTS = 20
"""How often a stream that once answered is taken up again before it is given up: for about a minute and a half."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 0.2, 5.0
LONGEST_RETRY_AFTER_SECONDS = 60.0
BUSY = (429, 503)
"""Statuses of a server that will answer later. At 429 nothing was begun, so that every request can be repeated."""
COMMENT = ":"
LIVE = (COMMENT, "live")
"""The kind and the data of what says that all that was there has been sent."""
Answer = TypeVar("Answer", bound=BaseModel)


class ClientError(Exception):
    """What a request can end in but its answer."""


class ApiError(ClientError):
    """The API refused: `status` is HTTP's, `problem` says which fields are wrong where it can."""

    def __init__(self, status: int, problem: ProblemDetails) -> None:
        super().__init__(problem.detail)
        self.status = status
        self.problem = problem

    @property
    def kind(self) -> str:
        """The stable name of what went wrong, such as `not-found`: the last part of the problem's type."""
        return self.problem.type.rpartition(":")[2]


class Unreachable(ClientError):
    """No answer came: the server is down, or went away. A request that is safe to repeat was repeated first."""


class BadAnswer(ClientError):
    """What arrived is damaged, or nothing that this version of the client can read."""


@dataclass(frozen=True)
class Message:
    """One server-sent event; `kind` is empty where it is unnamed, `id` where the stream gave none so far. A comment is
    one of kind COMMENT."""

    kind: str
    id: str
    data: str


class Connection:
    """One server, over as many connections as it takes. Safe to share between threads."""

    def __init__(
        self, base_url: str, *, token: str | None = None, timeout_seconds: float = 60.0, page_size: int = 500
    ) -> None:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._page_size = page_size
        timeout = httpx.Timeout(timeout_seconds, connect=min(timeout_seconds, 10.0))
        self._http = httpx.Client(base_url=base_url, timeout=timeout, headers=headers)

    def close(self) -> None:
        self._http.close()

    def _read(
        self,
        method: str,
        path: str,
        kind: type[Answer],
        *,
        body: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        attempts: int | None = None,
    ) -> Answer:
        repeats = attempts or (ATTEMPTS if method == "GET" else 1)
        answer = self._send(method, path, body=body, headers=headers, attempts=repeats)
        try:
            return kind.model_validate_json(answer.content)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise BadAnswer(
                f"{method} {path} answered what this version cannot read: {where}: {first['msg']}"
            ) from None

    def _pages(self, path: str, kind: type[Page[Answer]], query: Mapping[str, Any] | None = None) -> Iterator[Answer]:
        """The items of every page, which are fetched as they are asked for."""
        asked = {"limit": self._page_size, **(query or {})}
        while True:
            page = self._read("GET", f"{path}?{urlencode(asked, doseq=True)}", kind)
            yield from page.items
            if page.next is None:
                return
            asked["cursor" if isinstance(page.next, str) else "after"] = page.next

    def _send(
        self,
        method: str,
        path: str,
        *,
        body: Mapping[str, Any] | None = None,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        attempts: int,
    ) -> httpx.Response:
        """The answer. A request is sent again after no answer or a BUSY one, up to so many times; where `attempts` is
        1 because that is not safe, it is after 429."""
        for attempt in range(ATTEMPTS):
            try:
                answer = self._http.request(method, path, json=body, content=content, headers=headers)
            except httpx.TransportError as error:
                if attempt >= attempts - 1:
                    raise self._unreachable(error) from None
                _wait(attempt)
                continue
            last = attempt == ATTEMPTS - 1 or (attempt >= attempts - 1 and answer.status_code != 429)
            if answer.status_code not in BUSY or last or not _waited(answer, attempt):
                break
        if not answer.is_success:
            raise _refusal(answer)
        return answer

    def _follow(self, path: str, last_id: str = "") -> Generator[Message]:
        """The stream's messages, for ever, after the one of this id. Goes on where a connection broke or ended."""
        failures, patience = 0, ATTEMPTS
        while True:
            try:
                headers = {"Last-Event-ID": last_id} if last_id else {}
                with self._http.stream("GET", path, headers=headers, timeout=httpx.Timeout(60.0)) as stream:
                    if not stream.is_success:
                        stream.read()
                        if stream.status_code not in BUSY:
                            raise _refusal(stream)
                    else:
                        patience = FOLLOW_ATTEMPTS
                        for message in messages(stream.iter_lines(), last_id):
                            failures, last_id = 0, message.id
                            yield message
                lost: Exception | None = None
            except httpx.TransportError as error:
                lost = error
            failures += 1
            if failures >= patience:
                raise self._unreachable(lost)
            _wait(failures)

    def _download(self, path: str, file: Path) -> Path:
        """What is at the path, in a file of this name once all of it is there and has the digest that was announced.

        Until then it is in a file beside it; one that was left there by an interrupted download is gone on with.
        """
        part = file.with_name(f".{file.name}.part")
        failures = 0
        while True:
            before = _size(part)
            try:
                digest = self._fetch(path, part)
            except httpx.TransportError as error:
                failures = failures + 1 if _size(part) <= before else 1
                if failures == ATTEMPTS:
                    raise self._unreachable(error) from None
                _wait(failures)
                continue
            if digest is not None and _digest(part) == digest:
                return part.replace(file)
            part.unlink(missing_ok=True)
            if before == 0:  # else what was there may have been the rest of something else
                raise BadAnswer(f"{path} arrived damaged: its SHA-256 is not the one announced")

    def _fetch(self, path: str, part: Path) -> bytes | None:
        """Append to the file what it lacks. The digest that all of it should have; none where its start is no start."""
        have = _size(part)
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
        with self._http.stream("GET", path, headers=headers) as answer:
            if answer.status_code == 416:
                return None
            if not answer.is_success:
                answer.read()
                raise _refusal(answer)
            with part.open("ab" if answer.status_code == 206 else "wb") as out:
                for chunk in answer.iter_raw():  # as it arrives: what is kept in memory is lost with the connection
                    out.write(chunk)
            return announced(answer)

    def _unreachable(self, error: Exception | None) -> Unreachable:
        why = "" if error is None else f": {type(error).__name__} {error}"
        return Unreachable(f"{self._http.base_url} does not answer{why}")


def messages(lines: Iterator[str], last_id: str = "") -> Iterator[Message]:
    """A stream's events and comments, by the lines of it."""
    data: list[str] = []
    kind = ""
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                yield Message(kind, last_id, "\n".join(data))
            data, kind = [], ""
        elif not name:
            yield Message(COMMENT, last_id, value)
        elif name == "data":
            data.append(value)
        elif name == "event":
            kind = value
        elif name == "id":
            last_id = value


def announced(answer: httpx.Response) -> bytes | None:
    """The SHA-256 of the whole, as its header says it (RFC 9530)."""
    algorithm, _, value = answer.headers.get("repr-digest", "").partition("=")
    return base64.b64decode(value.strip(":")) if algorithm == "sha-256" else None


def _refusal(answer: httpx.Response) -> ApiError:
    try:
        problem = ProblemDetails.model_validate_json(answer.content)
    except ValueError:  # a proxy's own page, say
        text = " ".join(answer.text.split())[:200]
        detail = f"HTTP {answer.status_code} from {answer.request.url.copy_with(query=None)}: {text}"
        problem = ProblemDetails(type="about:blank", title="", status=answer.status_code, detail=detail)
    return ApiError(answer.status_code, problem)


def _waited(answer: httpx.Response, attempt: int) -> bool:
    """Wait as long as a busy server asks. False where it asks for longer than anybody would wait."""
    after = answer.headers.get("retry-after", "")
    if not after.isdigit():
        _wait(attempt)
    elif int(after) > LONGEST_RETRY_AFTER_SECONDS:
        return False
    else:
        time.sleep(int(after))
    return True


def _wait(failures: int) -> None:
    """Longer after each failure, and not for all clients alike."""
    time.sleep(min(FIRST_WAIT_SECONDS * 2**failures, LONGEST_WAIT_SECONDS) * random.uniform(0.7, 1.3))


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _digest(file: Path) -> bytes:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").digest()
