"""`python -m orchestrator`: one loop with its launcher.

SIGINT, or the end of its parent, ends it at once: its attempts are queued again. SIGTERM drains it: nothing is claimed
any more, and what still runs when the grace is over is left to the next orchestrator of its name, or queued again
where gangs do not outlive it.
"""

import argparse
import logging
import os
import signal
import sys
import threading
from datetime import UTC, datetime, timedelta

from sqlalchemy.exc import OperationalError

from orchestrator.artifacts import ArtifactStore
from orchestrator.database import Database, shown
from orchestrator.journal import write_journal
from orchestrator.launcher import Launcher
from orchestrator.local_launcher import LocalLauncher
from orchestrator.loop import Loop, run
from orchestrator.owner import Owner
from orchestrator.ray_launcher import RayLauncher
from orchestrator.settings import Settings
from worker.spec import GangConfig

log = logging.getLogger("orchestrator")


def main(arguments: list[str] | None = None) -> int:
    """Run the loop; 0 after a stop that was asked for, 2 where the environment is wrong or the owner's name taken, 1
    without a database."""
    parser = argparse.ArgumentParser(prog="python -m orchestrator", description=__doc__)
    parser.add_argument(
        "--with-parent", action="store_true", help="stop when standard input closes: the parent has died"
    )
    options = parser.parse_args(arguments)
    write_journal(logging.INFO)
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
        owner = Owner(database, settings.owner)
        if not owner.take():
            return _taken(settings)
    except OperationalError as error:
        which = shown(database.url)
        print(f"caddie: the database {which} does not answer: {' '.join(str(error.orig).split())}", file=sys.stderr)
        return 1
    stop, drain = threading.Event(), threading.Event()
    signal.signal(signal.SIGINT, lambda _number, _frame: stop.set())
    signal.signal(signal.SIGTERM, lambda _number, _frame: drain.set())
    if options.with_parent:
        threading.Thread(target=_stop_with_parent, args=(stop,), daemon=True).start()
    launcher = open_launcher(settings)
    try:
        launcher.free(GangConfig())  # Ray takes seconds to start; no lease may run out meanwhile
        log.info("orchestrator %s is ready", settings.owner)
        lease = timedelta(seconds=settings.lease_seconds)
        loop = Loop(database, launcher, ArtifactStore(settings.artifacts), settings.owner, lease)
        taken = run_as(owner, loop, stop, drain, timedelta(seconds=settings.grace_seconds))
    finally:
        launcher.close()
        owner.release()
        database.close()
    return _taken(settings) if taken else 0


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


def run_as(owner: Owner, loop: Loop, stop: threading.Event, drain: threading.Event, grace: timedelta) -> bool:
    """Run the loop until one of the events, or until another took the owner's name while PostgreSQL was away: which."""
    taken = False

    def wait(seconds: float) -> bool:
        nonlocal taken
        taken = not owner.keep(_now())
        return stop.wait(seconds) or taken

    run(loop, _now, wait, drain.is_set, grace)
    return taken


def _now() -> datetime:
    return datetime.now(UTC)


def _taken(settings: Settings) -> int:
    why = f"an orchestrator named {settings.owner!r} runs already: end it, or set CADDIE_OWNER to another name here"
    print(f"caddie: {why}", file=sys.stderr)
    return 2


def _stop_with_parent(stop: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 4096):  # not through the buffer, whose lock the interpreter's end would wait for
        pass
    stop.set()


if __name__ == "__main__":
    sys.exit(main())
