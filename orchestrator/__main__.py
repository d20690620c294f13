"""`python -m orchestrator`: one loop with its launcher, until SIGTERM, SIGINT, or the end of its parent."""

import argparse
import logging
import os
import signal
import sys
import threading
from datetime import UTC, datetime, timedelta
from types import FrameType

from sqlalchemy.exc import OperationalError

from orchestrator.artifacts import ArtifactStore
from orchestrator.database import Database
from orchestrator.launcher import Launcher
from orchestrator.local_launcher import LocalLauncher
from orchestrator.loop import Loop, run
from orchestrator.ray_launcher import RayLauncher
from orchestrator.settings import Settings
from worker.spec import GangConfig

log = logging.getLogger("orchestrator")


def main(arguments: list[str] | None = None) -> int:
    """Run the loop; 0 after a stop that was asked for, 2 where the environment is wrong, 1 without a database."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator", description=__doc__)
    parser.add_argument(
        "--with-parent", action="store_true", help="stop when standard input closes: the parent has died"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(levelname)s %(message)s")
    try:
        settings = Settings.read(os.environ)
        database = Database(settings.database_url)
    except ValueError as error:
        print(f"caddie: {error}", file=sys.stderr)
        return 2
    try:
        if database.is_sqlite:
            database.migrate()
        elif database.needs_migration():
            print("caddie: the database is not at this version's schema: run `caddie migrate` first", file=sys.stderr)
            return 2
    except OperationalError as error:
        print(f"caddie: the database does not answer: {' '.join(str(error.orig).split())}", file=sys.stderr)
        return 1
    stop = threading.Event()
    _stop_on_signals(stop)
    if options.with_parent:
        threading.Thread(target=_stop_with_parent, args=(stop,), daemon=True).start()
    launcher = open_launcher(settings)
    try:
        launcher.free(GangConfig())  # Ray takes seconds to start; no lease may run out meanwhile
        log.info("orchestrator %s is ready", settings.owner)
        loop = Loop(
            database,
            launcher,
            ArtifactStore(settings.artifacts),
            settings.owner,
            timedelta(seconds=settings.lease_seconds),
        )
        run(loop, lambda: datetime.now(UTC), stop.wait)
    finally:
        launcher.close()
        database.close()
    return 0


def open_launcher(settings: Settings) -> Launcher:
    """The launcher that the settings name. Nothing is started yet."""
    if settings.launcher == "local":
        gpus = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        return LocalLauncher(settings.home / "gangs", settings.data, settings.ranks, gpus=gpus)
    # A lease is renewed every third of its length: a gang that is silent to nobody for the rest has surely lost it.
    orphan_seconds = settings.lease_seconds * 2 / 3
    return RayLauncher(
        settings.ray_address, settings.data, settings.ranks, owner=settings.owner, orphan_seconds=orphan_seconds
    )


def _stop_on_signals(stop: threading.Event) -> None:
    def ask(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ask)


def _stop_with_parent(stop: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not through the buffer, whose lock the interpreter's end would wait for
        pass
    stop.set()


if __name__ == "__main__":
    sys.exit(main())
