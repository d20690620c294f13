"""What every handler is given: the database, the folder of artifacts, the time, and names it can trust."""

import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any

from anyio import CapacityLimiter
from fastapi import Depends, Path, Query, Request
from sqlalchemy.orm import Session

from api.follow import Streams
from api.kept import Kept
from api.together import Together
from orchestrator.access import Principal
from orchestrator.artifacts import ArtifactStore
from orchestrator.audit import add_audit
from orchestrator.calibration import Calibrations
from orchestrator.database import Database
from orchestrator.errors import NotFound
from orchestrator.settings import GPU_HOUR_DOLLARS
from orchestrator.spending import Accounts

LARGEST_ID = 2**31 - 1  # what an INTEGER holds on PostgreSQL
MAX_PAGE = 500
MOST_ASKING = 8
"""Executors at a time: an ask may take seconds, or wait for another that does, and the threads are everyone's."""
STUDY_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


@dataclass(frozen=True)
class Context:
    """What one application works with. `closing` is set when the server goes down, so that open streams end."""

    database: Database
    artifacts: ArtifactStore | None
    gpu_hour_dollars: float = GPU_HOUR_DOLLARS
    closing: threading.Event = field(default_factory=threading.Event)
    accounts: Accounts = field(default_factory=Accounts)
    kept: Kept = field(default_factory=Kept)
    calibrations: Calibrations = field(default_factory=Calibrations)
    submissions: Together[Any, Any] = field(default_factory=Together)
    asking: CapacityLimiter = field(default_factory=lambda: CapacityLimiter(MOST_ASKING))
    streams: Streams = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "streams", Streams(self.database))


@dataclass(frozen=True)
class Writer:
    """What one request writes with: every session of it is committed together with who did what, when."""

    database: Database
    actor: str
    now: datetime
    calibrations: Calibrations = field(default_factory=Calibrations)

    @contextmanager
    def write(self, action: str, subject: str) -> Iterator[Session]:
        """A session as Database.write gives. `action` is such as `trial.cancel`, `subject` such as
        `studies/sweep/trials/3`: the path below /v1 of what is changed."""
        with self.database.write() as session:
            yield session
            add_audit(session, self.actor, action, subject, self.now)


async def _context(request: Request) -> Context:
    context: Context = request.app.state.context
    return context


async def _database(request: Request) -> Database:
    context: Context = request.app.state.context
    return context.database


async def _now() -> datetime:
    return datetime.now(UTC)


async def _principal(request: Request) -> Principal:
    principal: Principal = request.state.principal
    assert principal is not None, "a path without a door changes nothing and knows nobody"
    return principal


PrincipalOf = Annotated[Principal, Depends(_principal)]


async def _writer(
    principal: PrincipalOf, context: Annotated[Context, Depends(_context)], now: Annotated[datetime, Depends(_now)]
) -> Writer:
    return Writer(context.database, principal.name, now, context.calibrations)


async def _study_name(study: Annotated[str, Path(description="The study's name.")]) -> str:
    # A name that no study can have never reaches the database: PostgreSQL refuses some text, such as NUL.
    if not STUDY_NAME.fullmatch(study):
        raise NotFound("study", study)
    return study


ContextOf = Annotated[Context, Depends(_context)]
DatabaseOf = Annotated[Database, Depends(_database)]
Now = Annotated[datetime, Depends(_now)]
WriterOf = Annotated[Writer, Depends(_writer)]
StudyName = Annotated[str, Depends(_study_name)]
TrialNumber = Annotated[int, Path(ge=0, le=LARGEST_ID, description="The trial's number within its study.")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="How many at the most.")]
After = Annotated[int, Query(ge=-1, le=LARGEST_ID, description="The `next` of the page before.")]
