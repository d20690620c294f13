"""`caddie up` as a user runs it: one process tree, driven over HTTP alone, killed and started again."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from deadline import wait_for

from orchestrator import store
from orchestrator.database import Database

STEPS = 40


class Up:
    """A running `caddie up`. `kill` ends its first process as the kernel's out-of-memory killer would."""

    def __init__(self, home: Path, data: Path, database_url: str, launcher: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("CADDIE_")} | {
            "CADDIE_HOME": str(home),
            "CADDIE_DATA": str(data),
            "CADDIE_DATABASE_URL": database_url,
            "CADDIE_RANKS": "1",
            "CADDIE_PORT": str(self.port),
            "CADDIE_URL": "http://127.0.0.1:9",  # the client's alone
            "CADDIE_LAUNCHER": launcher,
            "CADDIE_GRACE_SECONDS": "1",
            "OMP_NUM_THREADS": "1",
        }
        self.home = home
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=30)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start and wait for the API; the seconds it took."""
        began = time.monotonic()
        with (self.home / "up.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "api.cli", "up"], env=self.environment, stdout=log, stderr=log
            )
        wait_for(lambda: self.answers(), "the API to answer", 60)
        return time.monotonic() - began

    def answers(self) -> bool:
        assert self.process is not None and self.process.poll() is None, (self.home / "up.log").read_text()
        try:
            return self.http.get("/healthz").status_code == 200
        except httpx.TransportError:
            return False

    def tree(self) -> list[psutil.Process]:
        assert self.process is not None
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def child(self, module: str) -> psutil.Process:
        """The child that runs this module, waited for: it may just be started again."""
        assert self.process is not None
        children = psutil.Process(self.process.pid).children

        def found() -> list[psutil.Process]:
            return [child for child in children() if alive(child) and module in child.cmdline()]

        wait_for(lambda: bool(found()), f"a process of {module}", 30)
        return found()[0]

    def gang(self) -> set[int]:
        """The ids of the processes that are ranks on Ray."""
        return {process.pid for process in self.tree() if process.name().startswith("ray::RayRank")}

    def kill(self) -> None:
        """SIGKILL, and wait until nothing of the tree is left."""
        assert self.process is not None
        family = self.tree()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        wait_for(lambda: not any(alive(process) for process in family), "every process of the tree to end", 15)

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Ctrl-C or another signal; the exit code, once nothing of the tree is left."""
        assert self.process is not None
        family = self.tree() if self.process.poll() is None else []
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(timeout=60)
        wait_for(lambda: not any(alive(process) for process in family), "every process of the tree to end", 60)
        return code

    def get(self, path: str) -> Any:
        answer = self.http.get(path)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def post(self, path: str, body: Any = None, status: int = 201) -> Any:
        answer = self.http.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def up(request: pytest.FixtureRequest, tmp_path: Path, data_root: Path, database_url: str) -> Iterator[Up]:
    running = Up(tmp_path, data_root, database_url, request.param)
    running.start()
    yield running
    running.stop()
    running.http.close()


@pytest.fixture
def local_up(tmp_path: Path, data_root: Path) -> Iterator[Up]:
    """On SQLite, with local processes: the quickest."""
    running = Up(tmp_path, data_root, f"sqlite:///{tmp_path / 'caddie.db'}", "local")
    running.start()
    yield running
    running.stop()
    running.http.close()


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("backend", "up"),
    [("postgresql", "ray"), ("sqlite", "local"), pytest.param("sqlite", "ray", marks=pytest.mark.soak)],
    indirect=True,
)
def test_every_trial_ends_exactly_once_though_caddie_is_killed_in_the_middle(up: Up) -> None:
    up.post("/v1/studies", study("sweep", max_trials=2))
    submitted = up.post("/v1/studies/sweep/trials", {"overrides": {"sharing.lora.rank": 1}})["number"]
    with closing(watched(up, submitted)) as said:
        first = next(data for kind, data in said if kind == "measured")
    assert first[0] in up.get(f"/v1/studies/sweep/trials/{submitted}/measurements")["items"]

    up.kill()
    up.start()

    extra = up.post("/v1/studies/sweep/trials", {"overrides": {"sharing.lora.rank": 3, "budget.steps": 100_000}})[
        "number"
    ]
    with closing(watched(up, extra)) as said:
        assert next(kind for kind, _ in said if kind != "state") == "measured"
        up.post(f"/v1/studies/sweep/trials/{extra}/cancel", status=200)
        assert list(said)[-1] == ("end", {"state": "cancelled"})
    wait_for(lambda: up.get("/v1/studies/sweep")["state"] == "complete", "the study to complete", 240)

    trials = [
        up.get(f"/v1/studies/sweep/trials/{trial['number']}") for trial in up.get("/v1/studies/sweep/trials")["items"]
    ]
    assert [trial["number"] for trial in trials] == list(range(4))
    for trial in trials:
        ended = [attempt["outcome"] for run in trial["runs"] for attempt in run["attempts"]]
        assert None not in ended
        assert ended.count("succeeded") == (0 if trial["number"] == extra else 1)
        assert trial["state"] == ("cancelled" if trial["number"] == extra else "complete")
    retried = [attempt["outcome"] for run in trials[submitted]["runs"] for attempt in run["attempts"]]
    assert retried[-1] == "succeeded"
    board = up.get("/v1/studies/sweep/leaderboard")["rows"]
    assert [row["val_bpb"] for row in board] == sorted(row["val_bpb"] for row in board)
    assert {row["number"] for row in board} == {trial["number"] for trial in trials} - {extra}


@pytest.fixture
def ray_up(tmp_path: Path, data_root: Path) -> Iterator[Up]:
    """On SQLite, with the Ray that it starts, and leases that outlast a restart on a busy machine."""
    running = Up(tmp_path, data_root, f"sqlite:///{tmp_path / 'caddie.db'}", "ray")
    running.environment["CADDIE_LEASE_SECONDS"] = "60"
    running.start()
    yield running
    running.stop()
    running.http.close()


@pytest.mark.soak
def test_an_attempt_outlives_its_orchestrator_but_not_its_ray(ray_up: Up) -> None:
    ray_up.post("/v1/studies", study("sweep", max_trials=0))
    limits = {"budget.steps": None, "budget.seconds": 30}
    ray_up.post("/v1/studies/sweep/trials", {"overrides": limits})
    wait_for(lambda: measured(ray_up, 0), "the first measurement", 120)
    gang = ray_up.gang()
    assert len(gang) == 1
    log = ray_up.home / "orchestrator.log"
    for adopted, number in enumerate((signal.SIGKILL, signal.SIGTERM), start=1):
        orchestrator = ray_up.child("orchestrator")
        orchestrator.send_signal(number)
        orchestrator.wait(timeout=20)
        wait_for(lambda times=adopted: log.read_text().count("trial 0 goes on") == times, "its adoption", 60)  # type: ignore[misc]
        assert ray_up.gang() == gang
    assert "left 1 attempts to the next orchestrator" in log.read_text()
    wait_for(lambda: ray_up.get("/v1/studies/sweep/trials/0")["state"] == "complete", "the trial to complete", 120)
    assert outcomes(ray_up, 0) == ["succeeded"]
    assert ray_up.gang() == gang, "it is warm"

    ray_up.post("/v1/studies/sweep/trials", {"overrides": {"budget.steps": 100_000}})
    wait_for(lambda: measured(ray_up, 1), "the second trial to train", 60)
    ray_up.child("orchestrator.ray_head").send_signal(signal.SIGKILL)
    wait_for(lambda: outcomes(ray_up, 1) == ["lost", None], "its second attempt, on another Ray", 60)
    wait_for(lambda: len(ray_up.gang() - gang) == 1, "its second gang", 60)
    ray_up.kill()


@pytest.mark.parametrize(
    ("number", "code"), [pytest.param(signal.SIGINT, 130, marks=pytest.mark.soak), (signal.SIGTERM, 143)]
)
def test_caddie_that_is_asked_to_end_hands_its_attempts_back(local_up: Up, number: signal.Signals, code: int) -> None:
    local_up.post("/v1/studies", study("sweep", max_trials=0))
    local_up.post("/v1/studies/sweep/trials", {"overrides": {"budget.steps": 100_000}})
    wait_for(lambda: measured(local_up, 0), "the first measurement", 60)
    assert len(local_up.tree()) == 3, "the API, the orchestrator and one rank"
    assert f"Caddie is up: http://127.0.0.1:{local_up.port}  (" in (local_up.home / "up.log").read_text()

    assert local_up.stop(number) == code

    with closing(Database(local_up.environment["CADDIE_DATABASE_URL"])) as database, database.read() as session:
        trial = store.get_trial(session, store.get_study(session, "sweep").id, 0)
        attempts = store.list_attempts(session, trial.id)
    assert trial.state == "queued"
    assert [attempt.outcome for attempt in attempts] == ["preempted"]


def study(name: str, max_trials: int) -> dict[str, Any]:
    return {
        "name": name,
        "recipe": "laptop",
        "cap_train_seconds": 1e6,  # what trains until it is killed is not refused for it
        "overrides": {
            "budget.steps": STEPS,
            "evaluation.validation_tokens": 2048,
            "model.width": 48,
            "quantisation.level": 3,
        },
        "space": {"sharing.lora.rank": {"choice": [0, 2, 4]}, "sharing.tying": {"choice": ["cycle", "sequence"]}},
        "max_trials": max_trials,
    }


def outcomes(up: Up, number: int) -> list[str | None]:
    """How each attempt at a trial ended; None for one that runs."""
    trial = up.get(f"/v1/studies/sweep/trials/{number}")
    return [attempt["outcome"] for run in trial["runs"] for attempt in run["attempts"]]


def watched(up: Up, number: int) -> Generator[tuple[str, Any]]:
    """What the trial's event stream says, as it comes: the kind of each event, and its data."""
    kind = "measured"  # these have no name of their own
    path = f"/v1/studies/sweep/trials/{number}/measurements/stream"
    with up.http.stream("GET", path, timeout=200) as stream:
        for line in stream.iter_lines():
            name, _, value = line.partition(": ")
            if name == "data":
                yield kind, json.loads(value)
            kind = value if name == "event" else kind if line else "measured"


def measured(up: Up, number: int) -> bool:
    return bool(up.get(f"/v1/studies/sweep/trials/{number}/measurements")["items"])
