"""`caddie demo`: settings of its own, and a sweep that ends in order and goes on where it was interrupted."""

import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from claims import claimed
from deadline import wait_for
from rich.console import Console

from api.client import Caddie
from api.demo import demo_settings, prepare
from orchestrator import leases, store
from orchestrator.database import Database
from orchestrator.lifecycle import Cause, Outcome, StudyState
from orchestrator.settings import KNOWN
from orchestrator.study import AttemptResult

ROOT = Path(__file__).parents[1]
STUDY: dict[str, Any] = {
    "name": "small",
    "recipe": "laptop",
    "overrides": {"budget.steps": 20, "model.width": 48, "quantisation.level": 3, "evaluation.validation_tokens": 2048},
    "space": {"sharing.lora.rank": {"choice": [0, 2]}},
    "max_trials": 1,
    "cap_bytes": 450_000,
}
PROGRAM = """
import json, sys
from rich.console import Console
from api.cli import main
from api.demo import run_demo

sys.exit(run_demo(Console(), json.loads(sys.argv[1])))
"""
NO_BROWSER = {"PATH": "/nowhere"}  # a picture of the page takes seconds, and is the page's own test


class Demo:
    """Demos in one folder, each the leader of a group, as a terminal's foreground program is."""

    def __init__(self, home: Path, data: Path) -> None:
        self.home = home
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CADDIE_")}
        self.environment = kept | NO_BROWSER | {
            "CADDIE_HOME": str(home), "CADDIE_DATA": str(data), "CADDIE_LAUNCHER": "local", "CADDIE_RANKS": "1",
            "CADDIE_DATABASE_URL": "postgresql://production/caddie", "PYTHONPATH": str(ROOT), "COLUMNS": "120",
        }  # fmt: skip
        self.running: list[subprocess.Popen[str]] = []

    def start(self, **fields: object) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROGRAM, json.dumps(STUDY | fields)],
            cwd=self.home.parent, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        self.running.append(process)
        return process

    def attempts(self) -> list[str | None]:
        """How each attempt at trial 0 ended; None for one that runs."""
        with closing(Database(f"sqlite:///{self.home / 'caddie.db'}")) as database, database.read() as session:
            trial = store.get_trial(session, store.get_study(session, "small").id, 0)
            return [attempt.outcome for attempt in store.list_attempts(session, trial.id)]


@pytest.fixture
def demo(tmp_path: Path, data_root: Path) -> Iterator[Demo]:
    demo = Demo(tmp_path / "home", data_root)
    yield demo
    for process in demo.running:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def heard(process: subprocess.Popen[str], pattern: str) -> str:
    """What the demo prints up to the first line that matches; or all, after an assertion."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return "".join(lines)
    raise AssertionError("".join(lines))


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_a_demo_obeys_no_setting_of_an_installation_in_use(name: str, tmp_path: Path) -> None:
    obeyed = {"CADDIE_PORT": "1234", "CADDIE_RANKS": "7", "CADDIE_LAUNCHER": "local"}
    home = {"CADDIE_HOME": str(tmp_path), "CADDIE_PORT": "1234", "CADDIE_OWNER": ""}
    given = demo_settings({**home, name: obeyed.get(name, "/elsewhere")})
    plain = demo_settings({"CADDIE_HOME": str(tmp_path), "CADDIE_PORT": "1234"})
    changes = name in {"CADDIE_HOME", "CADDIE_DATA", "CADDIE_RANKS", "CADDIE_LAUNCHER"}
    assert (given != plain) == changes


def test_a_demo_lies_in_the_users_folder_and_speaks_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = demo_settings({"CADDIE_PORT": "1234", "CADDIE_URL": "http://production"})
    assert settings.home == tmp_path / "demo"
    assert settings.database_url == f"sqlite:///{tmp_path}/demo/caddie.db"
    assert settings.url == "http://127.0.0.1:1234"
    with pytest.raises(ValueError, match="CADDIE_PROT is '1': is not a setting"):
        demo_settings({"CADDIE_PROT": "1"})


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.soak)],
)
def test_a_demo_that_is_interrupted_leaves_no_process_and_goes_on_later(
    demo: Demo, number: signal.Signals, code: int
) -> None:
    interrupted = demo.start()
    heard(interrupted, r"demo-over-the-cap: trial \d+ is infeasible")
    wait_for(lambda: demo.attempts() == [None], "the first attempt")
    whole = [psutil.Process(interrupted.pid), *psutil.Process(interrupted.pid).children(recursive=True)]
    assert len(whole) >= 3, "the demo, its `caddie up`, the orchestrator"
    if number == signal.SIGINT:
        os.killpg(interrupted.pid, number)  # as a terminal does
    else:
        interrupted.send_signal(number)
    printed, _ = interrupted.communicate(timeout=100)
    assert interrupted.returncode == code, printed
    assert "Traceback" not in printed + (demo.home / "up.log").read_text()
    assert not psutil.wait_procs(whole, timeout=0)[1]
    assert demo.attempts() == ["preempted"]
    if number == signal.SIGTERM:
        return  # what is left is the same, and SIGINT shows how it goes on

    resumed = demo.start()
    printed, _ = resumed.communicate(timeout=200)
    assert resumed.returncode == 0, printed
    assert demo.attempts() == ["preempted", "succeeded"]
    names = "rank +trial +BPB +± +n +before +bytes +params +tying map +LoRA +ranks +sec"  # all that the issue asks for
    for part in (
        "resuming the study", "Leaderboard \\(cap 450,000 bytes", names, "was refused before training", "best ",
        f"page .*, while this runs:\\n +caddie up --home {demo.home} --port ",
    ):  # fmt: skip
        assert re.search(part, printed), printed
    assert "submitted" not in printed


def test_a_demo_that_is_started_again_retries_what_failed_and_adds_nothing(
    small_database: Database, serve: Callable[..., str], now: datetime
) -> None:
    out, small = io.StringIO(), {**STUDY, "max_trials": 0}
    with Caddie(serve(small_database, dashboard=False), token="") as caddie:
        prepare(Console(file=out), caddie, small)
        with small_database.write() as session:
            failed = AttemptResult(Outcome.FAILED, cause=Cause.BAD_INPUT, reason="no dataset")
            leases.finish(session, claimed(session, now).lease, failed, now)
            store.move_study(session, store.get_study(session, "small").id, StudyState.PAUSED, now, "no dataset")
        prepare(Console(file=out), caddie, small)
        assert [trial.state for trial in caddie.trials("small")] == ["queued", "infeasible"]
        assert caddie.study("small").state == "running"
    assert out.getvalue().splitlines() == [
        "submitted over REST as demo-untied: trial 0 is queued",
        "submitted over REST as demo-over-the-cap: trial 1 is infeasible",
        "resuming the study; remove the folder to start over",
        "trying again what failed: trial 0",
    ]


@pytest.mark.soak
def test_a_demo_in_which_nothing_fits_says_so(demo: Demo) -> None:
    ended = demo.start(max_trials=0, cap_bytes=1_000)
    printed, _ = ended.communicate(timeout=100)
    assert ended.returncode == 0, printed
    assert "no trial is complete\n" in printed
