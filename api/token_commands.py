"""`caddie token`: who may use a server."""

import json
import os
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from api.client import Caddie
from api.credentials import MadeTokenOut, TokenIn, TokenOut
from orchestrator.access import Role
from orchestrator.settings import Settings

token_app = typer.Typer(help="Say who may use a server: tokens, their roles and their ends.", no_args_is_help=True)
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@token_app.command("create")
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
        with Caddie() as caddie:
            made = caddie.create_token(body.model_dump(mode="json", exclude_none=True))
    print(made.model_dump_json(indent=2) if as_json else made.token)


@token_app.command("list")
def list_tokens(as_json: AsJson = False) -> None:
    """All tokens, revoked and expired ones included."""
    with Caddie() as caddie:
        tokens = caddie.tokens()
    if as_json:
        print(json.dumps([token.model_dump(mode="json") for token in tokens], indent=2))
        return
    table = Table("id", "name", "role", "ends", "last used", box=None)
    for token in tokens:
        ends = token.expires_at.strftime("%Y-%m-%d %H:%M") if token.expires_at else "never"
        used = token.last_used_at.strftime("%Y-%m-%d %H:%M") if token.last_used_at else "never"
        table.add_row(str(token.id), token.name, token.role, "revoked" if token.revoked_at else ends, used)
    Console().print(table)


@token_app.command("revoke")
def revoke(
    token_id: Annotated[int, typer.Argument(help="Its number, as `caddie token list` says.")], as_json: AsJson = False
) -> None:
    """Make a token worthless, for good, within a second."""
    with Caddie() as caddie:
        token = caddie.revoke_token(token_id)
    print(token.model_dump_json(indent=2) if as_json else f"token {token.id} of {token.name} is revoked")


def _create_here(body: TokenIn) -> MadeTokenOut:
    """The same without a server: whoever can write the database needs nobody's leave."""
    from orchestrator.audit import add_audit
    from orchestrator.database import Database
    from orchestrator.tokens import create_token

    now, database = datetime.now(UTC), Database(Settings.read(os.environ).database_url)
    try:
        if database.is_sqlite:
            database.migrate()
        with database.write() as session:
            token, text = create_token(session, body.name, body.role, now, body.end(now))
            add_audit(session, "local", "token.create", f"tokens/{token.id}", now)
    finally:
        database.close()
    return MadeTokenOut(**TokenOut.of(token).model_dump(), token=text)
