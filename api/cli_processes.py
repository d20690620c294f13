"""Commands that run Caddie's own programs: servers, the loop, the demo, and what keeps them well."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from api.options import AsJson, StudyName, connect
from api.program import SECRETS, environment_of, program
from orchestrator.settings import KNOWN, Settings
from worker.spec import GangConfig

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
    with database_errors(settings):
        up(settings, environment_of(settings))


def api() -> None:
    """Serve the API and pages alone, as docker-compose.yml does. Settings come from CADDIE_* variables."""
    from api.up import require_door, require_free_port, serve
    from orchestrator.database import Database

    settings = Settings.read(os.environ)
    require_free_port(settings)
    with database_errors(settings), closing(Database(settings.database_url)) as database:
        require_door(settings, database, datetime.now(UTC))
        database.needs_migration()  # whether it answers at all: /readyz says whether the schema is ours
        serve(settings, database)


def orchestrator() -> None:
    """Run the loop and its launcher alone, as docker-compose.yml does. Settings come from CADDIE_* variables."""
    environment = environment_of(Settings.read(os.environ))
    os.execve(sys.executable, program("orchestrator"), environment)  # not a child: signals must reach the loop


def migrate() -> None:
    """Bring the database to this version's schema. Safe to repeat, and by several at once."""
    from orchestrator.database import Database, shown

    settings = Settings.read(os.environ)
    with database_errors(settings), closing(Database(settings.database_url)) as database:
        database.migrate()
    print(f"{shown(database.url)} is at this version's schema")


def doctor(
    clear: Annotated[bool, typer.Option("--clear", help="Clear what can be cleared without losing anything.")] = False,
    as_json: AsJson = False,
) -> None:
    """List what does not belong in the database, the artifacts or the Ray cluster; exit 1 while anything remains."""
    from api.doctor import run_doctor

    settings = Settings.read(os.environ)
    with database_errors(settings):
        sys.exit(run_doctor(settings, clearing=clear, as_json=as_json))


def demo() -> None:
    """Run a small real sweep on this machine, and show it live. Again goes on with it, and retries what failed."""
    from rich.console import Console

    from api.demo import run_demo

    sys.exit(run_demo(Console()))


def work(
    study: StudyName,
    ranks: Annotated[
        int | None, typer.Option(help="Of the gang to ask for (default: the study's first shape).")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu or gpu: what those ranks are (default: cpu).")] = None,
    name: Annotated[str | None, typer.Option(help="This executor's name (default: the host's).")] = None,
) -> None:
    """Train a study's runs on this machine for the API that CADDIE_URL names, without Ray, until there are no more."""
    import logging
    import platform

    if device is not None and ranks is None:
        raise typer.BadParameter("--device says what --ranks are: give both")

    from api.work import work as drain
    from orchestrator.local_launcher import LocalLauncher

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    settings = Settings.read(os.environ)
    gang = None if ranks is None else GangConfig.model_validate({"ranks": ranks, "device": device or "cpu"})
    with connect() as caddie:
        for secret in SECRETS:
            os.environ.pop(secret, None)
        gpus = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu]
        launcher = LocalLauncher(settings.home / "executor", settings.data, max(settings.ranks, ranks or 1), gpus=gpus)
        try:
            count = drain(caddie, study, launcher, name or platform.node(), gang)
        finally:
            launcher.close()
    print(f"{count} attempts; there is nothing more to do for {study} now")


def data(context: typer.Context) -> None:
    """Build datasets of your text, fetch the challenge's, list them: `caddie data build | fetch | list`."""
    command = program("worker", "data", *context.args)
    sys.exit(subprocess.call(command, env=environment_of(Settings.read(os.environ))))


@contextmanager
def database_errors(settings: Settings) -> Iterator[None]:
    """Turns a database that does not answer, or that refuses, into a ConnectionError of one line."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import DBAPIError

    from orchestrator.database import shown

    try:
        yield
    except DBAPIError as error:
        which = shown(make_url(settings.database_url))
        why = " ".join(str(error.orig).split())
        setting = "CADDIE_DATABASE_URL, or else CADDIE_HOME, says which"
        raise ConnectionError(f"the database {which}: {why} ({setting})") from None
