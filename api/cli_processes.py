"""Commands that run Caddie's own programs: servers, the loop, the demo, and what keeps them well."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from api.options import AsJson
from api.program import environment_of, program
from orchestrator.settings import KNOWN, Settings

# What a server loads takes a second, which no command should pay but the one that needs it: hence the inner imports.


def up(
    home: Annotated[Path | None, typer.Option(help=KNOWN["CADDIE_HOME"])] = None,
    port: Annotated[int | None, typer.Option(help=KNOWN["CADDIE_PORT"])] = None,
    ranks: Annotated[int | None, typer.Option(help=KNOWN["CADDIE_RANKS"])] = None,
    launcher: Annotated[str | None, typer.Option(help=KNOWN["CADDIE_LAUNCHER"])] = None,
) -> None:
    """Run the API, the loop, a local Ray and the database: one process tree, until Ctrl-C."""
    from api.up import up

    flags = {"CADDIE_HOME": home, "CADDIE_PORT": port, "CADDIE_RANKS": ranks, "CADDIE_LAUNCHER": launcher}
    chosen = {name: str(value) for name, value in flags.items() if value is not None}
    settings = Settings.read({**os.environ, **chosen})
    with database_errors():
        up(settings, environment_of(settings))


def api() -> None:
    """Serve the API and pages alone, as docker-compose.yml does. Settings come from CADDIE_* variables."""
    from api.up import require_door, require_free_port, serve
    from orchestrator.database import Database

    settings = Settings.read(os.environ)
    require_free_port(settings)
    with database_errors():
        database = Database(settings.database_url)
        database.needs_migration()  # whether it answers at all: /readyz says whether the schema is ours
        require_door(settings, database, datetime.now(UTC))
        serve(settings, database)


def orchestrator() -> None:
    """Run the loop and its launcher alone, as docker-compose.yml does. Settings come from CADDIE_* variables."""
    environment = environment_of(Settings.read(os.environ))
    os.execve(sys.executable, program("orchestrator"), environment)  # not a child: signals must reach the loop


def migrate() -> None:
    """Bring the database to this version's schema. Safe to repeat, and by several at once."""
    from orchestrator.database import Database

    settings = Settings.read(os.environ)
    with database_errors():
        database = Database(settings.database_url)
        database.migrate()
    print(f"{database.url.render_as_string(hide_password=True)} is at this version's schema")


def doctor(
    clear: Annotated[bool, typer.Option("--clear", help="Clear what can be cleared without losing anything.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what does not belong in the database, the artifacts or the Ray cluster; exit 1 while anything remains."""
    from api.doctor import run_doctor

    with database_errors():
        sys.exit(run_doctor(Settings.read(os.environ), clearing=clear, as_json=as_json))


def demo() -> None:
    """Run a small real sweep on this machine, show it live, and print its leaderboard. Again resumes it."""
    from rich.console import Console

    from api.demo import run_demo

    sys.exit(run_demo(Console()))


def data(context: typer.Context) -> None:
    """Build, fetch or list datasets: `caddie data build | fetch | list`."""
    command = program("worker", "data", *context.args)
    sys.exit(subprocess.call(command, env=environment_of(Settings.read(os.environ))))


@contextmanager
def database_errors() -> Iterator[None]:
    """Turns a database that does not answer, or that refuses, into a ConnectionError of one line."""
    from sqlalchemy.exc import DBAPIError

    try:
        yield
    except DBAPIError as error:
        raise ConnectionError(f"the database: {' '.join(str(error.orig).split())}") from None
