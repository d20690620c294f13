"""`python -m orchestrator` that is asked to end: by SIGTERM it drains, by SIGINT it hands back at once."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from claims import NewStudies, NewTrials
from deadline import wait_for

from orchestrator import store
from orchestrator.database import Database
from orchestrator.study import Attempt, Trial

ROOT = Path(__file__).parents[1]
SMALL = {"model.width": 48, "quantisation.level": 3, "evaluation.validation_tokens": 2048}


class Scene:
    """Two queued trials, room for one, and an orchestrator that trains the first."""

    def __init__(self, folder: Path, data: Path, database: Database) -> None:
        self.database = database
        self.log = folder / "orchestrator.log"
        kept = {name: value for name, value in os.environ.items() if not name.startswith("CADDIE_")}
        self.environment = kept | {
            "CADDIE_HOME": str(folder), "CADDIE_DATA": str(data), "CADDIE_LAUNCHER": "local", "CADDIE_RANKS": "1",
            "CADDIE_OWNER": "one", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "CADDIE_DATABASE_URL": database.url.render_as_string(hide_password=False),
        }  # fmt: skip
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, **settings: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            command = [sys.executable, "-P", "-m", "orchestrator"]
            self.processes.append(subprocess.Popen(command, env=self.environment | settings, stdout=log, stderr=log))
        return self.processes[-1]

    def trials(self) -> tuple[Trial, ...]:
        with self.database.read() as session:
            return store.list_trials(session, store.get_study(session, "sharing").id)

    def attempts(self) -> list[Attempt]:
        trials = self.trials()
        with self.database.read() as session:
            return [attempt for trial in trials for attempt in store.list_attempts(session, trial.id)]


@pytest.fixture
def scene(tmp_path: Path, data_root: Path, sqlite_template: Path) -> Iterator[Scene]:
    (tmp_path / "caddie.db").write_bytes(sqlite_template.read_bytes())
    database = Database(f"sqlite:///{tmp_path / 'caddie.db'}")
    scene = Scene(tmp_path, data_root, database)
    yield scene
    for process in scene.processes:
        process.kill()
        process.wait()
    database.close()


@pytest.mark.parametrize(
    ("number", "grace", "steps", "outcome"),
    [
        (signal.SIGTERM, "300", 20, "succeeded"),
        (signal.SIGTERM, "0", 100_000, "preempted"),
        (signal.SIGINT, "60", 100_000, "preempted"),
    ],
)
def test_an_orchestrator_that_is_asked_to_end_claims_nothing_and_lets_attempts_end_within_the_grace(
    scene: Scene,
    now: datetime,
    new_study: NewStudies,
    new_trial: NewTrials,
    number: signal.Signals,
    grace: str,
    steps: int,
    outcome: str,
) -> None:
    with scene.database.write() as session:
        study = store.create_study(session, new_study(max_trials=0), now)
        for _ in range(2):
            store.add_trial(session, study.id, new_trial({**SMALL, "budget.steps": steps}, origin="submitted"), now)
    orchestrator = scene.start(CADDIE_GRACE_SECONDS=grace)
    wait_for(lambda: [attempt.phase for attempt in scene.attempts()] == ["train"], "the first trial to train")

    orchestrator.send_signal(number)

    assert orchestrator.wait(timeout=120) == 0, scene.log.read_text()
    assert [attempt.outcome for attempt in scene.attempts()] == [outcome]
    first = "complete" if outcome == "succeeded" else "queued"
    assert [trial.state for trial in scene.trials()] == [first, "queued"]


def test_a_second_orchestrator_of_one_name_does_not_start(scene: Scene) -> None:
    first = scene.start()
    wait_for(lambda: "is ready" in scene.log.read_text(), "the orchestrator")
    second = scene.start()
    assert second.wait(timeout=60) == 2
    assert "'one' runs already: end it, or set CADDIE_OWNER to another name" in scene.log.read_text()
    assert first.poll() is None
