"""The sign-in: a browser shows a token once, and then a cookie that no script reads and no other site can use."""

from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import urlsplit

from fastapi import APIRouter, Depends, Query, Request
from starlette.responses import RedirectResponse, Response

from api.admission import Admission, Credential, Visitor
from api.context import DatabaseOf, Now
from api.doors import address_of, cookie_name, credential_of
from api.forms import FormOf
from api.pages import page
from api.problems import Refusal
from orchestrator.audit import add_audit
from orchestrator.sign_ins import SIGN_IN_DAYS, close_sign_in, open_sign_in

router = APIRouter(include_in_schema=False)


async def _visitor(request: Request, form: FormOf) -> Visitor | None:
    """Whoever holds the token in the form. Raises Refusal where they sign in all the time."""
    admission: Admission = request.app.state.admission
    visitor = await admission.admit(Credential("token", form.get("token", "").strip()), address_of(request.scope))
    if visitor is not None:
        admission.sign_ins.take(visitor.principal.name)
    return visitor


@router.get("/sign-in")
async def show_sign_in(request: Request, place: Annotated[str, Query(alias="next")] = "/") -> Response:
    """The form. Where the door is open there is nothing to sign in to."""
    admission: Admission = request.app.state.admission
    if await admission.is_open():
        return RedirectResponse(own_path(place), 303)
    return page(request, "sign_in.html", next=own_path(place), wrong=False)


@router.post("/sign-in")
def sign_in(
    request: Request,
    form: FormOf,
    visitor: Annotated[Visitor | None, Depends(_visitor)],
    database: DatabaseOf,
    now: Now,
) -> Response:
    """Take the token, give a cookie, and go on to where the visitor wanted to."""
    place = own_path(form.get("next", "/"))
    if visitor is None:
        return page(request, "sign_in.html", 401, next=place, wrong=True)
    with database.write() as session:
        cookie = open_sign_in(session, visitor.token_sha256, now)
        add_audit(session, visitor.principal.name, "sign-in.open", "me", now)
    answer = RedirectResponse(place, 303)
    # Lax: a link that somebody was sent opens signed in. What a link can do is read; writes are checked by the door.
    answer.set_cookie(
        cookie_name(request.scope), cookie, max_age=SIGN_IN_DAYS * 86_400, path="/", httponly=True, samesite="lax",
        secure=request.url.scheme == "https",
    )  # fmt: skip
    return answer


@router.post("/sign-out", openapi_extra={"x-role": "viewer"})
def sign_out(request: Request, database: DatabaseOf) -> Response:
    """Make the cookie worthless, and forget it."""
    answer = RedirectResponse("/sign-in", 303)
    try:
        shown = credential_of(request.scope, dict(request.scope["headers"]))
    except Refusal:  # an open door: nobody is signed in
        return answer
    if shown.kind == "cookie":
        now = datetime.now(UTC)
        with database.write() as session:
            close_sign_in(session, shown.secret)
            add_audit(session, request.state.principal.name, "sign-in.close", "me", now)
        admission: Admission = request.app.state.admission
        admission.forget(shown)
        answer.delete_cookie(cookie_name(request.scope), path="/", httponly=True, samesite="lax")
    return answer


def own_path(place: str) -> str:
    """A path of this server, or the first page for anything else: a link to the sign-in leads nowhere but here."""
    try:
        parts = urlsplit(place)
    except ValueError:
        return "/"
    plain = place.startswith("/") and not place.startswith(("//", "/\\")) and place.isprintable() and "\\" not in place
    return place if plain and not parts.scheme and not parts.netloc else "/"
