"""Who may use this server, over HTTP: tokens, what was done with them, and who I am."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from api.context import LARGEST_ID, After, DatabaseOf, Limit, PrincipalOf, WriterOf
from api.credentials import AuditOut, MadeTokenOut, MeOut, TokenIn, TokenOut
from api.plain import PlainRoute
from api.problems import responses
from api.schemas import Page
from orchestrator.access import LOCAL
from orchestrator.audit import add_audit, list_audits
from orchestrator.tokens import create_token, list_tokens, require_admin, revoke_token

ADMINS = {"x-role": "admin"}
router = APIRouter(route_class=PlainRoute, tags=["access"], responses=responses(422))
TokenId = Annotated[int, Path(ge=0, le=LARGEST_ID, description="The token's number, which its text says too.")]
Before = Annotated[int | None, Query(ge=0, le=LARGEST_ID, description="The `next` of the page before.")]


@router.get("/me")
async def get_me(principal: PrincipalOf) -> MeOut:
    """Who I am to this server."""
    return MeOut(name=principal.name, role=principal.role, token_id=principal.token_id)


@router.post("/tokens", status_code=201, responses=responses(400, 409, 415), openapi_extra=ADMINS)
def create(body: TokenIn, writer: WriterOf, response: Response) -> MadeTokenOut:
    """Make a token. Its text is in this answer and never again."""
    # Not through `writer.write`: what is changed has its number only now.
    with writer.database.write() as session:
        if writer.actor == LOCAL.name:
            require_admin(session, body.role, writer.now)
        token, text = create_token(session, body.name, body.role, writer.now, body.end(writer.now))
        add_audit(session, writer.actor, "token.create", f"tokens/{token.id}", writer.now)
    response.headers["Cache-Control"] = "no-store"
    return MadeTokenOut(**TokenOut.of(token).model_dump(), token=text)


@router.get("/tokens", openapi_extra=ADMINS)
def list_all(database: DatabaseOf, limit: Limit = 100, after: After = -1) -> Page[TokenOut]:
    """Tokens by number, revoked and expired ones included."""
    with database.read() as session:
        tokens = list_tokens(session, after, limit + 1)
    items = [TokenOut.of(token) for token in tokens[:limit]]
    return Page(items=items, next=items[-1].id if len(tokens) > limit else None)


@router.delete("/tokens/{token_id}", responses=responses(404), openapi_extra=ADMINS)
def revoke(token_id: TokenId, writer: WriterOf) -> TokenOut:
    """Make a token worthless, for good: within a second nothing opens to it, or to whoever signed in with it."""
    with writer.write("token.revoke", f"tokens/{token_id}") as session:
        return TokenOut.of(revoke_token(session, token_id, writer.now))


@router.get("/audit", openapi_extra=ADMINS)
def list_audit(database: DatabaseOf, limit: Limit = 100, before: Before = None) -> Page[AuditOut]:
    """Every write through the API, latest first."""
    with database.read() as session:
        found = list_audits(session, before=before, limit=limit + 1)
    items = [AuditOut(**vars(audit)) for audit in found[:limit]]
    return Page(items=items, next=items[-1].id if len(found) > limit else None)
