"""Ask and tell over HTTP, for executors that are not Ray: nothing is written without the lease, and what is written
with it is safe to repeat. An ask is not: each gives out another run."""

import base64
import binascii
import re
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Path, Request, Response
from starlette.concurrency import run_in_threadpool

from api.context import LARGEST_ID, ContextOf, Now, PrincipalOf, StudyName, Writer, WriterOf
from api.desk import AskIn, AskOut, DirectiveOut, HeartbeatIn, ReportIn, TellIn, ToldOut
from api.plain import PlainRoute
from api.problems import responses
from api.schemas import ArtifactOut
from orchestrator.artifacts import ArtifactStore
from orchestrator.errors import NotFound
from orchestrator.executors import Executors
from orchestrator.lifecycle import Cause, Outcome
from orchestrator.study import AttemptResult, Lease
from worker.shape import FieldError

MOST_ARTIFACT_BYTES = 256 << 20
PIECE_BYTES = 1 << 20

router = APIRouter(route_class=PlainRoute, tags=["executors"])


async def _lease(
    attempt_id: Annotated[int, Path(ge=1, le=LARGEST_ID)],
    token: Annotated[str, Header(alias="Caddie-Lease", pattern=r"^[0-9a-f]{32}$", description="The lease's token.")],
) -> Lease:
    return Lease(attempt_id, token)


async def _executors(request: Request) -> Executors:
    executors: Executors = request.app.state.executors
    return executors


LeaseOf = Annotated[Lease, Depends(_lease)]
ExecutorsOf = Annotated[Executors, Depends(_executors)]


@router.post(
    "/studies/{study}/ask", status_code=201, response_model=AskOut,
    responses={**responses(400, 404, 415, 422), 204: {"description": "There is nothing to do now"}},
)  # fmt: skip
async def ask(
    study: StudyName, body: AskIn, executors: ExecutorsOf, context: ContextOf, principal: PrincipalOf
) -> AskOut | Response:
    """A run of the study for this executor, under a lease: the first in line, or else a new proposal.

    Each ask gives out another run; one whose answer was lost goes back to the queue once its lease has run out.
    204: the study does not run, its budget or its proposals are used up, or what is left runs already.
    """
    ttl = timedelta(seconds=body.lease_seconds)
    asked = partial(executors.ask, study, body.gang, body.executor, ttl, _clock, principal.name)
    claim = await to_thread.run_sync(asked, limiter=context.asking)
    if claim is None:
        return Response(status_code=204)
    return AskOut.of(study, claim, claim.started_at + ttl)


@router.post("/attempts/{attempt_id}/heartbeat", responses=responses(400, 409, 415, 422))
def heartbeat(lease: LeaseOf, body: HeartbeatIn, executors: ExecutorsOf, now: Now) -> DirectiveOut:
    """Say that the attempt goes on, which renews its lease, and learn whether it should."""
    ttl = timedelta(seconds=body.lease_seconds)
    directive = executors.report(lease, body.phase, (), (), ttl, now)
    return DirectiveOut(directive=directive, lease_expires_at=now + ttl)


@router.post("/attempts/{attempt_id}/report", responses=responses(400, 409, 415, 422))
def report(lease: LeaseOf, body: ReportIn, executors: ExecutorsOf, now: Now) -> DirectiveOut:
    """Keep measurements and log lines, each once by its number, and renew the lease."""
    ttl = timedelta(seconds=body.lease_seconds)
    measurements, lines = [each.said() for each in body.measurements], [each.said() for each in body.lines]
    directive = executors.report(lease, body.phase, measurements, lines, ttl, now)
    return DirectiveOut(directive=directive, lease_expires_at=now + ttl)


@router.post("/attempts/{attempt_id}/tell", responses=responses(400, 409, 415, 422))
def tell(
    lease: LeaseOf, body: TellIn, executors: ExecutorsOf, context: ContextOf, principal: PrincipalOf, now: Now
) -> ToldOut:
    """End the attempt. Told again under the same lease, the answer is the same, and nothing changes."""
    told = executors.tell(lease, _ended(body), context.artifacts, now, principal.name)
    return ToldOut(attempt_id=told.attempt_id, outcome=told.outcome, reason=told.reason)


@router.put(
    "/attempts/{attempt_id}/artifact", responses=responses(404, 409, 422),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)  # fmt: skip
async def put_artifact(
    lease: LeaseOf,
    request: Request,
    context: ContextOf,
    executors: ExecutorsOf,
    writer: WriterOf,
    repr_digest: Annotated[str | None, Header(description="sha-256=:base64: of the bytes (RFC 9530).")] = None,
    content_digest: Annotated[str | None, Header(description="The same, where no Repr-Digest is sent.")] = None,
) -> ArtifactOut:
    """Store the model's bytes, before the attempt is told to have succeeded. They must have the digest announced."""
    await run_in_threadpool(executors.require_held, lease)
    if context.artifacts is None:
        raise NotFound("folder of artifacts of attempt", lease.attempt_id)
    sha256 = _digest("Content-Digest" if repr_digest is None else "Repr-Digest", repr_digest or content_digest)
    size = await _store(request, context.artifacts, sha256)
    await run_in_threadpool(_note, writer, lease)
    return ArtifactOut(bytes=size, sha256=sha256)


def _note(writer: Writer, lease: Lease) -> None:
    with writer.write("executor.artifact", f"attempts/{lease.attempt_id}/artifact"):
        pass


async def _store(request: Request, artifacts: ArtifactStore, sha256: str) -> int:
    with artifacts.receive(sha256) as incoming:
        pieces = bytearray()
        async for piece in request.stream():
            pieces += piece
            if incoming.size + len(pieces) > MOST_ARTIFACT_BYTES:
                raise FieldError("body", "…", f"must have at most {MOST_ARTIFACT_BYTES:,} bytes")
            if len(pieces) >= PIECE_BYTES:
                await run_in_threadpool(incoming.write, bytes(pieces))
                pieces.clear()
        await run_in_threadpool(incoming.write, bytes(pieces))
        if incoming.size == 0 or await run_in_threadpool(incoming.keep) is None:
            raise FieldError(
                "body", f"{incoming.size:,} bytes", "must have the SHA-256 that the digest's header announces"
            )
        return incoming.size


def _digest(name: str, value: str | None) -> str:
    """The SHA-256 (hex) that a header announces."""
    found = re.search(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/=]{44}):", value or "")
    try:
        digest = base64.b64decode(found[1], validate=True) if found else b""
    except binascii.Error:
        digest = b""
    if len(digest) != 32:
        raise FieldError(name, value, "must be sha-256=:…: with the base64 of 32 bytes")
    return digest.hex()


def _ended(body: TellIn) -> AttemptResult:
    if (body.outcome == "succeeded") and body.result is None:
        raise FieldError("result", None, "must be there for outcome succeeded")
    if body.outcome in ("failed", "preempted") and body.result is not None:
        raise FieldError("result", "…", f"must not be there for outcome {body.outcome}")
    if body.outcome != "failed" and (body.cause is not None or body.traceback):
        raise FieldError("cause", body.cause, "must not be there but for outcome failed")
    cause = (body.cause or Cause.ERROR) if body.outcome == "failed" else None
    seconds = None if body.seconds is None else {str(phase): spent for phase, spent in body.seconds.items()}
    return AttemptResult(
        Outcome(body.outcome), body.reason, body.result, None, cause, seconds, traceback=body.traceback
    )


def _clock() -> datetime:
    return datetime.now(UTC)
