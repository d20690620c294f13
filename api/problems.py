"""Errors as RFC 9457 problem details: one media type, stable types, and every wrong field named."""

import json
from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import OperationalError, TimeoutError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from api.plain import MOST_PROBLEMS, InvalidBody
from api.refusals import FieldProblem, ProblemDetails
from orchestrator.artifacts import DamagedArtifact
from orchestrator.errors import CaddieError, Conflict, IllegalMove, LeaseLost, NotFound
from worker.shape import FieldError
from worker.spec import InvalidSpec, Problem, problems_at

MEDIA_TYPE = "application/problem+json"
PREFIX = "urn:caddie:problem:"
LONGEST_TEXT = 500

TITLES: dict[str, tuple[int, str]] = {
    "malformed-body": (400, "The body is not JSON"),
    "unauthenticated": (401, "Nobody knows who asks"),
    "forbidden": (403, "Whoever asks may not do this"),
    "not-found": (404, "There is no such thing"),
    "method-not-allowed": (405, "The method is not allowed here"),
    "too-slow": (408, "The request did not arrive in time"),
    "conflict": (409, "What exists forbids it"),
    "lease-lost": (409, "The attempt is not yours any more"),
    "illegal-move": (409, "The state does not allow it"),
    "damaged-artifact": (410, "The stored file is gone or damaged"),
    "too-large": (413, "The body is too large"),
    "range-not-satisfiable": (416, "The file has no such range"),
    "unsupported-media-type": (415, "The body must be JSON"),
    "invalid-input": (422, "The input is not valid"),
    "too-many-requests": (429, "Too many requests"),
    "internal-error": (500, "Something is wrong on our side"),
    "not-ready": (503, "The service is not ready"),
}


def title_of(status: int) -> str:
    """What a status says here. The standard library's phrases differ between versions of Python."""
    return "; or ".join(title for its, title in TITLES.values() if its == status)


class NotReady(Exception):
    """The database cannot be reached, or is not migrated."""


class Refusal(Exception):
    """A request that goes no further: a kind of TITLES, why, and what the answer's headers say besides."""

    def __init__(self, kind: str, detail: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.kind = kind
        self.headers = headers


EXPECTED: tuple[type[Exception], ...] = (
    CaddieError, DamagedArtifact, FieldError, HTTPException, InvalidSpec, NotReady, OperationalError, Refusal,
    RequestValidationError, TimeoutError,
)  # fmt: skip


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The declaration of these errors for a route."""
    return {status: {"model": ProblemDetails, "description": title_of(status)} for status in statuses}


def problem(
    kind: str, detail: str, problems: tuple[Problem, ...] = (), *, existing: str | None = None
) -> ProblemDetails:
    """A problem of one of TITLES."""
    status, title = TITLES[kind]
    if len(problems) > MOST_PROBLEMS:
        detail = f"{len(problems)} problems, of which these are the first {MOST_PROBLEMS}: {detail}"
        problems = problems[:MOST_PROBLEMS]
    fields = [FieldProblem(field=_text(p.field), value=_plain(p.value), message=_text(p.message)) for p in problems]
    return ProblemDetails(
        type=PREFIX + kind, title=title, status=status, detail=_text(detail), problems=fields, existing=existing
    )


def respond(details: ProblemDetails, headers: Mapping[str, str] | None = None) -> Response:
    """The problem as a response."""
    content = details.model_dump(exclude={"existing"} if details.existing is None else None)
    if details.status == 503:
        headers = {"Retry-After": "1", **(headers or {})}
    return JSONResponse(content, details.status, headers=headers, media_type=MEDIA_TYPE)


def problem_of(error: Exception, body: Any = None) -> ProblemDetails:
    """The problem that an error is, of a request whose body was to be of this type; one that nobody expected says
    nothing of what it was."""
    match error:
        case InvalidSpec():
            return problem("invalid-input", str(error), error.problems)
        case FieldError():
            return problem("invalid-input", str(error), (Problem(error.path, error.value, error.expected),))
        case RequestValidationError():
            return _request_problem(error, body)
        case NotFound():
            return problem("not-found", str(error))
        case Conflict():
            found = (Problem(error.field, error.value, error.message),)
            return problem("conflict", str(error), found, existing=error.existing)
        case IllegalMove():
            found = (Problem("state", error.state, f"must be {' or '.join(error.allowed)} to {error.move}"),)
            return problem("illegal-move", str(error), found)
        case LeaseLost():
            return problem("lease-lost", f"{error}: stop it, and do not tell of it")
        case DamagedArtifact():
            return problem("damaged-artifact", str(error))
        case OperationalError() | TimeoutError():  # it is away, or all its connections are busy
            return problem("not-ready", f"the database does not answer: {type(error).__name__}")
        case Refusal():
            return problem(error.kind, str(error))
        case NotReady():
            return problem("not-ready", str(error))
        case InvalidBody():
            return problem_of(error.invalid)
        case HTTPException():
            return _http_problem(error)
    return problem("internal-error", "the error was logged")


def _request_problem(error: RequestValidationError, body: Any) -> ProblemDetails:
    details = error.errors()
    broken = next((detail for detail in details if detail["type"] == "json_invalid"), None)
    if broken is not None:
        return problem(
            "malformed-body", f"the body is not JSON: {broken['ctx']['error']} at character {broken['loc'][-1]}"
        )
    if isinstance(error.body, bytes):
        return problem("unsupported-media-type", "send the header Content-Type: application/json")
    found = tuple(problem for detail in details for problem in _field_problems(detail, body))
    return problem("invalid-input", "; ".join(str(one) for one in found[:MOST_PROBLEMS]), found)


def _field_problems(detail: Mapping[str, Any], body: Any) -> Iterator[Problem]:
    first, *rest = detail["loc"]
    return problems_at(rest if first in ("body", "path") else (first, *rest), detail, body, "body")


def _http_problem(error: HTTPException) -> ProblemDetails:
    by_status = {400: "malformed-body", 404: "not-found", 405: "method-not-allowed", 415: "unsupported-media-type"}
    kind = by_status.get(error.status_code, "internal-error")
    detail = "there is no such path" if error.status_code == 404 and error.detail == "Not Found" else str(error.detail)
    return problem(kind, detail)


def _plain(value: Any) -> Any:
    """The value as JSON that can always be sent: no NaN, no lone surrogates, nothing long. What has parts is text."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if abs(value) < 2**53 else str(value)[:LONGEST_TEXT]
    if isinstance(value, float):
        return value if isfinite(value) else str(value)
    if isinstance(value, str):
        return _text(value)
    if (
        isinstance(value, list | tuple)
        and len(value) <= 256
        and all(item is None or isinstance(item, int | float) for item in value)
    ):
        return [_plain(item) for item in value]
    try:
        return _text(json.dumps(value, default=repr))
    except (ValueError, RecursionError):
        return f"a {type(value).__name__}"


def _text(text: str) -> str:
    safe = text.encode("utf-8", "backslashreplace").decode()
    return safe if len(safe) <= LONGEST_TEXT else safe[:LONGEST_TEXT] + "…"
