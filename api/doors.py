"""The door of all that is served, the pages and Optuna's dashboard included: who asks, whether they may, and how much.

A visitor shows a token (`Authorization: Bearer`) or the cookie of a sign-in. GET and HEAD take a viewer, the rest a
submitter, unless the route's `openapi_extra` has another `x-role`. A cookie is sent by the browser whoever made it ask,
so that a write with one must also come from our own pages and carry their token against forgery.
"""

import asyncio
import hmac
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from fastapi.routing import iter_route_contexts
from sqlalchemy.exc import OperationalError, ProgrammingError, TimeoutError
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api import pages
from api.admission import Admission, Credential, Door, is_loopback
from api.limits import BODY_BYTES, MAX_STREAMS, MAX_STREAMS_EACH, OPEN_BODY_BYTES, STREAM, Rate, read_body
from api.problems import NotReady, Refusal, problem_of, respond
from orchestrator.access import LOCAL, Principal, Role

OPEN_PATHS = ("/healthz", "/readyz", "/sign-in")
READING = ("GET", "HEAD")
FORM = b"application/x-www-form-urlencoded"
COOKIE, SECURE_COOKIE = "caddie_sign_in", "__Host-caddie_sign_in"
HEADERS = (
    (b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY"),
    (b"cross-origin-resource-policy", b"same-origin"),
)  # fmt: skip
Headers = Mapping[bytes, bytes]
_CONTROL = re.compile(r"[\0-\x1f\x7f]")


class Doors:
    """The outermost part of the application: plain ASGI, so that streams stay streams."""

    def __init__(self, app: ASGIApp, *, admission: Admission, door: Door, routes: Iterable[BaseRoute]) -> None:
        self._app = app
        self._admission = admission
        self._rate = Rate(door.requests_per_second)
        self._patience_seconds = door.patience_seconds
        self._streams: Counter[str] = Counter()  # open ones, by whose they are
        listed = [
            (
                route.path_regex,
                route.methods or (),
                Role(_extra(route)["x-role"]) if "x-role" in _extra(route) else None,
            )
            for route in iter_route_contexts(list(routes))
            if route.path is not None
        ]
        self._routes = listed
        self._admins = [(pattern, methods) for pattern, methods, role in listed if role is Role.ADMIN]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        send = _with_headers(send)
        try:
            credential, replay = await self._enter(scope, receive)
        except (NotReady, Refusal) as refusal:
            await _refuse(scope, refusal)(scope, receive, send)
            return
        except (OperationalError, ProgrammingError, TimeoutError) as error:
            why = NotReady(f"the database does not answer, or is not migrated: {type(error).__name__}")
            await _refuse(scope, why)(scope, receive, send)
            return
        if STREAM.fullmatch(scope["path"]):
            await self._stream(scope, replay, send, credential)
        else:
            await self._app(scope, replay, send)

    async def _enter(self, scope: Scope, receive: Receive) -> tuple[Credential | None, Receive]:
        """Let a request in: its state then says who it is of. Raises Refusal."""
        headers: Headers = dict(reversed(scope["headers"]))  # the first of a name counts, as for the routes
        path: str = scope["path"]
        if _CONTROL.search(path):  # a route would match with a newline at the end, and the door's own patterns not
            raise Refusal("not-found", "there is no such path: it has a control character")
        writes = scope["method"] not in READING
        state: dict[str, Any] = scope.setdefault("state", {})
        state["principal"], state["csrf"] = None, ""
        credential = None
        by_browser = True  # rather than by a program, which no other site can make ask
        is_open_path = path.startswith("/assets/") or path in OPEN_PATHS
        if is_open_path:
            self._rate.take(f"from {address_of(scope)}")
        elif await self._admission.is_open():
            _require_local(scope, headers)
            state["principal"] = LOCAL
        else:
            credential = credential_of(scope, headers)
            state["principal"] = await self._known(scope, credential)
            by_browser = credential.kind == "cookie"
            if by_browser:
                state["csrf"] = csrf_token(credential)
        principal: Principal | None = state["principal"]
        if principal is not None:
            self._rate.take(principal.name)
            self._require_role(principal, path, scope["method"])
        if writes and by_browser:
            _require_own_page(headers)
        most = OPEN_BODY_BYTES if is_open_path else BODY_BYTES
        body, receive = await read_body(path, headers, receive, self._patience_seconds, most)
        if writes and credential is not None and by_browser:
            _require_csrf(state["csrf"], headers, body)
        return credential, receive

    async def _known(self, scope: Scope, credential: Credential) -> Principal:
        found = await self._admission.admit(credential, address_of(scope))
        if found is None:
            raise unknown("what was shown is unknown, expired or revoked", 'Bearer error="invalid_token"')
        return found.principal

    def _require_role(self, principal: Principal, path: str, method: str) -> None:
        """Raises Refusal where the route takes another role. Only who lacks the usual one has the routes searched."""
        needed = Role.VIEWER if method in READING else Role.SUBMITTER
        if any(method in methods and pattern.match(path) for pattern, methods in self._admins):
            needed = Role.ADMIN
        if principal.role.includes(needed):
            return
        if needed is Role.SUBMITTER:
            routes = (role for pattern, methods, role in self._routes if method in methods and pattern.match(path))
            if next(routes, None) is Role.VIEWER:
                return
        raise Refusal("forbidden", f"{principal.name} is a {principal.role}; this takes a role of {needed} or above")

    async def _stream(self, scope: Scope, receive: Receive, send: Send, credential: Credential | None) -> None:
        """Let a stream run for as long as whoever opened it is known: nothing is sent to one who no longer is."""
        whose = "" if credential is None else scope["state"]["principal"].name
        crowded = f"{MAX_STREAMS} streams are open" if self._streams.total() >= MAX_STREAMS else ""
        if whose and self._streams[whose] >= MAX_STREAMS_EACH:
            crowded = f"{whose} has {MAX_STREAMS_EACH} streams open, which is all that one token may have"
        if crowded:
            many = Refusal("too-many-requests", f"{crowded}: close one", {"Retry-After": "5"})
            await _refuse(scope, many)(scope, receive, send)
            return
        gone = asyncio.Event()
        started = False

        async def send_to_known(message: Message) -> None:
            nonlocal started
            if gone.is_set() or (credential is not None and not await self._still_known(credential)):
                gone.set()
                return
            started = True
            await send(message)

        async def receive_or_gone() -> Message:
            waits = (asyncio.ensure_future(receive()), asyncio.ensure_future(gone.wait()))
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                return waits[0].result() if waits[0].done() else {"type": "http.disconnect"}
            finally:
                for wait in waits:
                    wait.cancel()

        self._streams[whose] += 1
        try:
            await self._app(scope, receive_or_gone, send_to_known)
        finally:
            self._streams[whose] -= 1
            self._streams += Counter()  # keeps those above zero
        if gone.is_set():
            if not started:
                await _refuse(scope, unknown("what was shown is unknown, expired or revoked"))(scope, receive, send)
            else:
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _still_known(self, credential: Credential) -> bool:
        try:
            return await self._admission.visitor(credential) is not None
        except (OperationalError, TimeoutError):  # without a database there is no news to send either
            return False


def credential_of(scope: Scope, headers: Headers) -> Credential:
    """The token or cookie that a request shows. Raises Refusal where it shows neither."""
    scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() == "bearer" and token:
        return Credential("token", token.strip())
    cookie = Request(scope).cookies.get(cookie_name(scope))
    if cookie:
        return Credential("cookie", cookie)
    here = "; caddie token create NAME --role admin --local makes one" if is_loopback(address_of(scope)) else ""
    raise unknown(f"send the header Authorization: Bearer <token>; caddie takes it from CADDIE_TOKEN{here}")


def address_of(scope: Scope) -> str:
    """Where a request comes from."""
    client = scope.get("client")
    return client[0] if client else ""


def cookie_name(scope: Scope) -> str:
    """The cookie's name. With the prefix a browser takes it over https alone, and from this host alone."""
    return SECURE_COOKIE if scope["scheme"] == "https" else COOKIE


def csrf_token(credential: Credential) -> str:
    """What our pages send back with every write: who cannot read the cookie cannot know it."""
    return hmac.new(credential.secret.encode(), b"caddie csrf", "sha256").hexdigest()


def unknown(detail: str, challenge: str = "Bearer") -> Refusal:
    """The refusal of whoever is not known."""
    return Refusal("unauthenticated", detail, {"WWW-Authenticate": challenge})


def _extra(route: Any) -> Mapping[str, Any]:
    return getattr(route, "openapi_extra", None) or {}


def _require_local(scope: Scope, headers: Headers) -> None:
    """An open door is for this machine: not for who came through a proxy on it, and not for a page of another site,
    whose name was made to point at this machine. Raises Refusal."""
    try:
        host = urlsplit(f"//{headers.get(b'host', b'').decode('latin-1')}").hostname or ""
    except ValueError:
        host = ""
    forwarded = any(name in (b"via", b"forwarded") or name.startswith(b"x-forwarded-") for name in headers)
    if forwarded or not is_loopback(host) or not is_loopback(address_of(scope)):
        detail = "as long as there is no token, Caddie answers this machine alone, under the name localhost"
        if forwarded:
            detail += ", and nobody who comes through a proxy"
        raise Refusal("forbidden", f"{detail}: make one with caddie token create NAME --role admin --local")


def _require_own_page(headers: Headers) -> None:
    """Raises Refusal for a write that another site's page has a browser make. A browser of before 2023, and one that
    is not on https, may say its origin alone."""
    site, origin = headers.get(b"sec-fetch-site"), headers.get(b"origin")
    if site is None and origin is not None:
        site = b"same-origin" if _names_host(origin, headers.get(b"host", b"")) else b"cross-site"
    if site not in (None, b"same-origin", b"none"):
        raise Refusal("forbidden", "a page of another site may not write here")


def _names_host(origin: bytes, host: bytes) -> bool:
    try:
        return urlsplit(origin.decode("latin-1")).netloc == host.decode("latin-1")
    except ValueError:
        return False


def _require_csrf(expected: str, headers: Headers, body: bytes) -> None:
    sent = headers.get(b"x-csrf-token", b"")
    if not sent and headers.get(b"content-type", b"").startswith(FORM):
        try:
            form = parse_qs(body.decode("latin-1"), max_num_fields=1000)
        except ValueError as error:
            raise Refusal("malformed-body", f"the body is not a form: {error}") from None
        sent = form.get("csrf", [""])[0].encode("utf-8", "replace")
    if not hmac.compare_digest(sent, expected.encode()):
        raise Refusal(
            "forbidden", "send the page's csrf token: in the header X-CSRF-Token, or in the form's field csrf"
        )


def _refuse(scope: Scope, refusal: NotReady | Refusal) -> Response:
    """The answer to a refused request: for a person who is not known, the way to the sign-in."""
    request = Request(scope)
    details = problem_of(refusal)
    if details.status == 401 and pages.wants_page(request) and scope["method"] in READING:
        query = scope["query_string"].decode("latin-1")
        here = scope["path"] + (f"?{query}" if query else "")
        return RedirectResponse(f"/sign-in?next={quote(here, safe='')}", 303)
    if pages.wants_page(request):
        return pages.error_page(request, details)
    return respond(details, getattr(refusal, "headers", None))


def _with_headers(send: Send) -> Send:
    """Every answer says that it is what it says it is, and is shown in no other site's page."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            given = message.get("headers", ())
            names = {name for name, _ in given}
            message["headers"] = [*given, *(header for header in HEADERS if header[0] not in names)]
        await send(message)

    return send_with_headers
