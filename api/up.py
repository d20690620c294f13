"""`caddie up`: the API in this process at once, the orchestrator as a child behind it, restarted should it die."""

import logging
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from api.app import create_app
from api.program import program
from api.server import Server
from orchestrator.database import Database
from orchestrator.settings import Settings
from worker.shape import FieldError

log = logging.getLogger(__name__)
RESTART_SECONDS = 2.0


def serve(settings: Settings, database: Database) -> None:
    """Serve the API until SIGINT or SIGTERM."""
    app = create_app(database, artifacts=settings.artifacts, gpu_hour_dollars=settings.gpu_hour_dollars)
    Server(app, host=settings.host, port=settings.port).run()


def up(settings: Settings, environment: Mapping[str, str]) -> None:
    """Migrate, then serve with an orchestrator behind, until SIGINT or SIGTERM; then nothing of either is left.

    Raises FieldError, before anything starts, where the port is taken.
    """
    require_free_port(settings)
    database = Database(settings.database_url)
    database.migrate()
    settings.home.mkdir(parents=True, exist_ok=True)
    # One name for all the orchestrators that this process starts, so that each knows what the last one left.
    named = {"CADDIE_OWNER": settings.owner, **environment}
    orchestrator = Orchestrator(named, settings.home / "orchestrator.log")
    # uvicorn gives a signal back once it has closed; by default SIGTERM would then end us before the orchestrator.
    signal.signal(signal.SIGTERM, _exit)
    try:
        orchestrator.start()
        print(
            f"Caddie is up: {settings.url}  (API docs {settings.url}/docs, Optuna dashboard {settings.url}/dashboard)",
            flush=True,
        )
        print(f"database {database.url.render_as_string(hide_password=True)}, log {orchestrator.log_path}", flush=True)
        serve(settings, database)
    finally:
        orchestrator.stop()
        database.close()


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


class Orchestrator:
    """The child process. It lives and dies with us: its standard input is our pipe, which closes even on SIGKILL.

    It leads a session of its own, so that a Ctrl-C at the terminal reaches us alone
    and the gangs are handed back in order.
    """

    def __init__(self, environment: dict[str, str], log_path: Path) -> None:
        self.log_path = log_path
        self._environment = environment
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._watcher = threading.Thread(target=self._watch, name="orchestrator-watcher", daemon=True)

    def start(self) -> None:
        """Start the child and keep one running from now on."""
        self._watcher.start()

    def stop(self) -> None:
        """Ask the child to hand its attempts back and end; kill it should it not within 20 seconds."""
        with self._lock:
            self._stopping.set()
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _watch(self) -> None:
        while True:
            with self._lock, self.log_path.open("ab") as output:
                if self._stopping.is_set():
                    return
                self._process = subprocess.Popen(
                    program("orchestrator", "--with-parent"),
                    stdin=subprocess.PIPE, stdout=output, stderr=output, env=self._environment, start_new_session=True,
                )  # fmt: skip
            code = self._process.wait()
            if self._stopping.wait(RESTART_SECONDS):
                return
            log.error("the orchestrator ended with code %d and is started again; see %s", code, self.log_path)
