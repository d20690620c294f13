"""`caddie up`: the API in this process at once, the orchestrator and Ray as children, restarted should they die."""

import logging
import secrets
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any

from api.admission import Door, is_loopback
from api.app import create_app
from api.program import program
from api.server import Server
from orchestrator.database import Database, shown
from orchestrator.journal import write_journal
from orchestrator.settings import Settings
from orchestrator.tokens import digest, has_usable_token
from worker.shape import FieldError

log = logging.getLogger(__name__)
RESTART_SECONDS = 0.5  # gangs wait to be adopted for a part of a lease
LOOK_SECONDS = 0.2


def serve(settings: Settings, database: Database) -> None:
    """Serve the API until SIGINT or SIGTERM."""
    write_journal(logging.WARNING)
    door = Door(
        is_loopback(settings.host), None if settings.admin_token is None else digest(settings.admin_token),
        settings.requests_per_second,
    )  # fmt: skip
    app = create_app(database, artifacts=settings.artifacts, gpu_hour_dollars=settings.gpu_hour_dollars, door=door)
    Server(app, host=settings.host, port=settings.port).run()


def up(settings: Settings, environment: Mapping[str, str]) -> None:
    """Migrate, then serve with an orchestrator behind, until SIGINT or SIGTERM; then nothing of either is left.

    Raises FieldError, before anything is made or started, where the port is taken, or where nobody could be told from
    anybody.
    """
    require_free_port(settings)
    with closing(Database(settings.database_url)) as database:
        if database.is_new:  # and so without tokens
            require_door(settings, database, datetime.now(UTC))
        database.migrate()
        require_door(settings, database, datetime.now(UTC))
        settings.home.mkdir(parents=True, exist_ok=True)
        _serve_with_orchestrator(settings, environment, database)


def _serve_with_orchestrator(settings: Settings, environment: Mapping[str, str], database: Database) -> None:
    # One name for all the orchestrators that this process starts, so that each knows what the last one left.
    named = {**environment, "CADDIE_OWNER": settings.owner}
    own_ray = settings.launcher == "ray" and settings.ray_address is None
    orchestrator = Orchestrator(
        _with_token(named) if own_ray else named,
        settings.home / "orchestrator.log",
        settings.ranks if own_ray else None,
    )
    # uvicorn gives a signal back once it has closed; by default SIGTERM would then end us before the orchestrator.
    signal.signal(signal.SIGTERM, _exit)
    try:
        orchestrator.start()
        here = settings.address
        print(f"Caddie is up: {here}  (API docs {here}/docs, Optuna dashboard {here}/dashboard)", flush=True)
        print(f"database {shown(database.url)}, log {orchestrator.log_path}", flush=True)
        serve(settings, database)
    finally:
        orchestrator.stop()


def _exit(number: int, _frame: FrameType | None) -> None:
    sys.exit(128 + number)


def require_free_port(settings: Settings) -> None:
    """Raises FieldError where something else listens on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise FieldError(
                "CADDIE_PORT", settings.port, f"cannot listen on {settings.host}: {error.strerror}"
            ) from None


def require_door(settings: Settings, database: Database, now: datetime) -> None:
    """Raises FieldError where other machines could reach the API, and there is no token that opens it."""
    if is_loopback(settings.host) or settings.admin_token is not None:
        return
    if not database.is_new and not database.needs_migration():
        with database.read() as session:
            if has_usable_token(session, now):
                return
    how = "caddie token create NAME --role admin --local, or set CADDIE_ADMIN_TOKEN"
    raise FieldError("CADDIE_HOST", settings.host, f"other machines reach this address: make a token first ({how})")


class Orchestrator:
    """The orchestrator, and under it a Ray of our own unless there is one to join: children, restarted should they die.

    Each ends once its standard input closes, which it does even if we are killed. The orchestrator holds Ray's too, and
    hands its attempts back first. Each leads a session of its own: a Ctrl-C at the terminal reaches us alone.
    """

    def __init__(self, environment: Mapping[str, str], log_path: Path, ranks: int | None) -> None:
        """With `ranks`, on a Ray of our own with room for so many."""
        self.log_path = log_path
        self._environment = dict(environment)
        self._ranks = ranks
        self._address = ""
        self._stopping = threading.Event()
        self._head: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher = threading.Thread(target=self._watch, name="orchestrator-watcher", daemon=True)

    def start(self) -> None:
        """Start, and keep it running from now on."""
        self._watcher.start()

    def stop(self) -> None:
        """Have it hand its attempts back and end, and then its Ray; kill what does not within 20 seconds."""
        self._stopping.set()
        if self._watcher.is_alive():
            self._watcher.join()

    def _watch(self) -> None:
        while not self._stopping.is_set():
            why = self._run()
            if not self._stopping.wait(RESTART_SECONDS):
                log.error("%s and is started again; see %s", why, self.log_path)
        for child in (self._process, self._head):
            if child is not None:
                _end(child)

    def _run(self) -> str:
        """Keep the orchestrator running until it ends, or Ray does under it, or we are to stop: what happened."""
        shared: tuple[int, ...] = ()
        if self._ranks is not None:
            if self._head is None or self._head.poll() is not None:
                self._head = self._spawn("orchestrator.ray_head", str(self._ranks), stdout=subprocess.PIPE)
                self._address = self._ready(self._head)
            if not self._address:
                return f"Ray ended with code {self._head.wait()}" if not self._stopping.is_set() else ""
            assert self._head.stdin is not None
            shared = (self._head.stdin.fileno(),)
        self._process = self._spawn("orchestrator", "--with-parent", pass_fds=shared)
        children = [child for child in (self._process, self._head) if child is not None]
        while all(child.poll() is None for child in children):
            if self._stopping.wait(LOOK_SECONDS):
                return ""
        if self._process.poll() is None:  # it would wait a minute for a Ray that does not come back
            self._process.kill()
            self._process.wait()
            return f"Ray ended with code {children[-1].returncode}"
        return f"the orchestrator ended with code {self._process.returncode}"

    def _spawn(self, module: str, argument: str, **options: Any) -> subprocess.Popen[bytes]:
        address = {"CADDIE_RAY_ADDRESS": self._address} if self._address else {}
        with self.log_path.open("ab") as output:
            return subprocess.Popen(
                program(module, argument), env=self._environment | address, start_new_session=True,
                **{"stdin": subprocess.PIPE, "stdout": output, "stderr": output, **options},
            )  # fmt: skip

    def _ready(self, head: subprocess.Popen[bytes]) -> str:
        """Ray's address, once it is ready; empty if it has died, or we are to stop before."""
        assert head.stdout is not None
        while not self._stopping.is_set():
            if select.select([head.stdout], [], [], LOOK_SECONDS)[0]:
                return head.stdout.readline().decode().strip()
        return ""


def _end(child: subprocess.Popen[bytes]) -> None:
    """Close what holds the child, and kill it should it not end within 20 seconds."""
    assert child.stdin is not None
    child.stdin.close()
    try:
        child.wait(timeout=20)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _with_token(environment: Mapping[str, str]) -> dict[str, str]:
    """Ray listens on every interface: unless the user has decided, whoever calls it must show a token."""
    if "RAY_AUTH_MODE" in environment:
        return dict(environment)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), **environment}
