"""Commands about who may use a server, and who did what with it."""

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

import typer

from api.cli_processes import database_errors
from api.credentials import AuditOut, MadeTokenOut, TokenIn, TokenOut
from api.options import AsJson, answer, connect
from api.tables import Column, Grid
from api.terminal import time_text
from orchestrator.access import Role
from orchestrator.settings import Settings
from worker.shape import FieldError

app = typer.Typer(help="Say who may use a server: tokens, their roles and their ends.", no_args_is_help=True)


@app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Whose it is; the audit calls its holder so. Never given twice.")],
    role: Annotated[Role, typer.Option(help="What its holder may do: read; also change studies; also give tokens.")],
    days: Annotated[float | None, typer.Option(help="When it ends; without, when it is revoked.", min=0.01)] = None,
    local: Annotated[
        bool, typer.Option("--local", help="Write into CADDIE_DATABASE_URL itself, as a cluster's first token must be.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a token and print it, this once."""
    body = TokenIn(name=name, role=role, expires_in_days=days)
    if local:
        made = _create_here(body)
    else:
        with connect() as caddie:
            made = caddie.create_token(body.model_dump(mode="json", exclude_none=True))
    answer(made, as_json, made.token)


@app.command("list")
def list_tokens(as_json: AsJson = False) -> None:
    """All tokens, revoked and expired ones included."""
    with connect() as caddie:
        tokens = caddie.tokens()
    answer(tokens, as_json, _tokens_table(tokens))


@app.command("revoke")
def revoke(
    token_id: Annotated[int, typer.Argument(help="Its number, as `caddie token list` says.")], as_json: AsJson = False
) -> None:
    """Make a token worthless, for good, within a second."""
    with connect() as caddie:
        token = caddie.revoke_token(token_id)
    answer(token, as_json, f"token {token.id} of {token.name} is revoked")


def me(as_json: AsJson = False) -> None:
    """Who the server takes you for, and what you may do."""
    with connect() as caddie:
        found = caddie.me()
    answer(found, as_json, f"{found.name}, {found.role}")


def audit(
    limit: Annotated[int, typer.Option("--limit", "-n", help="How many at the most.", min=1, max=500)] = 100,
    as_json: AsJson = False,
) -> None:
    """Who wrote what, latest first."""
    with connect() as caddie:
        found = caddie.audit(limit)
    answer(found, as_json, _audit_table(found))


def _create_here(body: TokenIn) -> MadeTokenOut:
    """The same without a server: whoever can write the database needs nobody's leave."""
    from orchestrator.audit import add_audit
    from orchestrator.database import Database
    from orchestrator.errors import Conflict
    from orchestrator.tokens import create_token, require_admin

    now, settings = datetime.now(UTC), Settings.read(os.environ)
    database = Database(settings.database_url)
    try:
        with database_errors(settings):
            if database.is_sqlite:
                database.migrate()
            with database.write() as session:
                if settings.admin_token is None:
                    require_admin(session, body.role, now)
                token, text = create_token(session, body.name, body.role, now, body.end(now))
                add_audit(session, "local", "token.create", f"tokens/{token.id}", now)
    except Conflict as taken:
        raise FieldError(taken.field, taken.value, taken.message) from None
    finally:
        database.close()
    return MadeTokenOut(**TokenOut.of(token).model_dump(), token=text)


def _tokens_table(tokens: Sequence[TokenOut]) -> Grid:
    columns = (
        Column("id"), Column("name", left=True, cut=12), Column("role", left=True), Column("ends", left=True),
        Column("last used", 1, left=True), Column("created", 2, left=True),
    )  # fmt: skip
    cells = [
        (
            str(token.id), token.name, token.role,
            "revoked" if token.revoked_at else time_text(token.expires_at) if token.expires_at else "never",
            time_text(token.last_used_at), time_text(token.created_at),
        )
        for token in tokens
    ]  # fmt: skip
    return Grid(columns, cells)


def _audit_table(entries: Sequence[AuditOut]) -> Grid:
    columns = (
        Column("id", 1), Column("at", left=True), Column("who", left=True, cut=12), Column("what", left=True),
        Column("of", left=True, cut=20),
    )  # fmt: skip
    return Grid(columns, [(str(one.id), time_text(one.at), one.actor, one.action, one.subject) for one in entries])
