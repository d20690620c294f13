"""Who a visitor is, by the token or the cookie shown. The database is asked once a second, so that reads keep their
speed, and a token that was revoked, or has expired, opens nothing a second later."""

import asyncio
import hmac
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from ipaddress import ip_address
from typing import TypeVar

from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from api.limits import Rate
from orchestrator.access import Principal, Role, Token
from orchestrator.database import Database
from orchestrator.sign_ins import WRITTEN as WRITTEN_COOKIE
from orchestrator.sign_ins import find_sign_in
from orchestrator.tokens import USE_NOTED, digest, find_token, has_tokens, note_use, token_of_digest
from orchestrator.tokens import WRITTEN as WRITTEN_TOKEN

REMEMBERED_SECONDS = 1.0
MOST_REMEMBERED = 1000
WRONG_PER_SECOND = 10.0  # from one address
SIGN_INS_PER_SECOND = 5.0  # of one principal
MOST_LOOKUPS = 4  # at once: made-up tokens must not take the threads that answer
log = logging.getLogger(__name__)
Found = TypeVar("Found")


@dataclass(frozen=True)
class Door:
    """What the server was started with. Open is only a door that this machine alone can reach, while nobody has made a
    token: then whoever comes is `local`, and may do everything."""

    loopback: bool = True
    admin_sha256: str | None = None
    """Of CADDIE_ADMIN_TOKEN, which is an admin's token without a row."""
    requests_per_second: int = 3000
    patience_seconds: float = 20.0
    """For the head of a request, for its body, for each piece of a body that is a file, and for a client to read on."""


@dataclass(frozen=True)
class Credential:
    """What a visitor shows: a token in a header, or the cookie of a sign-in."""

    kind: str
    secret: str

    @property
    def could_be_known(self) -> bool:
        """Whether it reads like one that was handed out."""
        written = WRITTEN_TOKEN if self.kind == "token" else WRITTEN_COOKIE
        return written.fullmatch(self.secret) is not None


@dataclass(frozen=True)
class Visitor:
    """Someone known. `token_sha256` is what a sign-in would stand for."""

    principal: Principal
    token_sha256: str


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address of this name."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


NOBODY: tuple[float, Visitor | None] = (0.0, None)


class Admission:
    """Answers who somebody is, from memory for a second at most."""

    def __init__(self, database: Database, door: Door) -> None:
        self._database = database
        self._door = door
        self._shut = not door.loopback or door.admin_sha256 is not None
        self._open_until = 0.0
        self._looking = asyncio.Lock()
        self._wrong = Rate(WRONG_PER_SECOND)
        self.sign_ins = Rate(SIGN_INS_PER_SECOND)
        self._lookups = asyncio.Semaphore(MOST_LOOKUPS)
        self._known: dict[str, tuple[float, Visitor | None]] = {}
        self._asking: dict[str, asyncio.Task[Visitor | None]] = {}
        self._noting: set[asyncio.Task[None]] = set()

    async def is_open(self) -> bool:
        """Whether nobody is asked who they are. Once there is a token, never again: tokens are not deleted."""
        if self._shut:
            return False
        if time.monotonic() >= self._open_until:
            async with self._looking:
                if time.monotonic() >= self._open_until:
                    asked = time.monotonic()
                    self._shut = await run_in_threadpool(self._read, has_tokens)
                    self._open_until = asked + REMEMBERED_SECONDS
        return not self._shut

    async def admit(self, credential: Credential, address: str) -> Visitor | None:
        """Who is behind this, or None. Raises Refusal where too many came from this address that are no token's text.

        What could be a token is always looked up: others may be behind the same address, a proxy's, and guessing 256
        bits is hopeless.
        """
        admin = self._door.admin_sha256
        if credential.could_be_known or (admin is not None and hmac.compare_digest(digest(credential.secret), admin)):
            return await self.visitor(credential)
        self._wrong.take(address)
        return None

    async def visitor(self, credential: Credential) -> Visitor | None:
        """Who is behind this, or None. Many who ask at once are one question to the database."""
        key = _key(credential)
        until, found = self._known.get(key, NOBODY)
        if time.monotonic() < until:
            return found
        task = self._asking.get(key)
        if task is None:
            task = self._asking[key] = asyncio.create_task(self._ask(key, credential))
            task.add_done_callback(lambda _task: self._asking.pop(key, None))
        return await asyncio.shield(task)

    def forget(self, credential: Credential) -> None:
        """Ask again who this is: its holder has just signed out."""
        self._known.pop(_key(credential), None)

    async def _ask(self, key: str, credential: Credential) -> Visitor | None:
        asked, now = time.monotonic(), datetime.now(UTC)
        async with self._lookups:
            found, token = await run_in_threadpool(self._find, credential, now)
        if len(self._known) >= MOST_REMEMBERED:
            self._known.clear()
        self._known[key] = (asked + REMEMBERED_SECONDS, found)
        if token is not None and found is not None and _is_old(token.last_used_at, now):
            # Not awaited: a read must not wait for SQLite's one writer.
            task = asyncio.create_task(run_in_threadpool(self._note, token.id, now))
            self._noting.add(task)
            task.add_done_callback(self._noting.discard)
        return found

    def _find(self, credential: Credential, now: datetime) -> tuple[Visitor | None, Token | None]:
        admin = self._door.admin_sha256
        environment = None if admin is None else Visitor(Principal("environment", Role.ADMIN), admin)
        if credential.kind == "token":
            if admin is not None and hmac.compare_digest(digest(credential.secret), admin):
                return environment, None
            token = self._read(lambda session: find_token(session, credential.secret))
        else:
            shown = self._read(lambda session: find_sign_in(session, credential.secret, now))
            if shown is not None and admin is not None and hmac.compare_digest(shown, admin):
                return environment, None
            token = None if shown is None else self._read(lambda session: token_of_digest(session, shown))
        if token is None or not token.is_usable(now):
            return None, None
        return Visitor(token.principal, token.sha256), token

    def _read(self, question: Callable[..., Found]) -> Found:
        with self._database.read() as session:
            return question(session)

    def _note(self, token_id: int, now: datetime) -> None:
        try:
            with self._database.write() as session:
                note_use(session, token_id, now)
        except SQLAlchemyError as error:  # whoever reads on should not be kept from it
            log.warning("the use of token %d was not noted: %s", token_id, type(error).__name__)


def _key(credential: Credential) -> str:
    return f"{credential.kind} {digest(credential.secret)}"


def _is_old(last_used_at: datetime | None, now: datetime) -> bool:
    return last_used_at is None or last_used_at <= now - USE_NOTED
