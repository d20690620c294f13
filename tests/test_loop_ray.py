"""The loop over real gangs on Ray: what waits inside a gang, and what moves on from there."""

import logging
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from claims import NewStudies

from orchestrator import store
from orchestrator.artifacts import ArtifactStore
from orchestrator.database import Database
from orchestrator.lifecycle import Outcome, StudyState, TrialState
from orchestrator.loop import Loop
from orchestrator.ray_launcher import RayLauncher
from orchestrator.study import NewTrial, Study
from worker.recipes import load_recipe
from worker.spec import override

TTL = timedelta(seconds=60)
PATIENCE_SECONDS = 150.0
RANKS = 2

pytestmark = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)


class Scene:
    """One orchestrator on a Ray of its own, and studies that come and go."""

    def __init__(self, database: Database, folder: Path, launcher: RayLauncher, new_study: Any) -> None:
        self.database, self._new_study = database, new_study
        self.loop = Loop(database, launcher, ArtifactStore(folder / "artifacts"), "orchestrator", TTL)

    def study(self, name: str, trainer: str, max_trials: int = 0) -> Study:
        base = override(load_recipe("laptop"), {"data.dataset": trainer, "budget": {"steps": 3}})
        with self.database.write() as session:
            return store.create_study(
                session, self._new_study(name=name, base=base, max_trials=max_trials), datetime.now(UTC)
            )

    def submit(self, study: Study, new: NewTrial) -> int:
        with self.database.write() as session:
            added = store.add_trial(session, study.id, new, datetime.now(UTC))
        assert added is not None
        return added.number

    def cancel(self, study: Study, number: int) -> None:
        with self.database.write() as session:
            store.cancel_trial(session, study.id, number, datetime.now(UTC))

    def until(self, holds: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds():
            assert time.monotonic() < deadline, "not in time"
            self.loop.tick(datetime.now(UTC))
            self.loop.launcher.wait(0.05)

    def phases(self) -> list[str]:
        return [held.phase for held in self.loop.held.values()]

    def state(self, study: Study, number: int) -> TrialState:
        with self.database.read() as session:
            return store.get_trial(session, study.id, number).state

    def outcomes(self, study: Study, number: int) -> list[Outcome | None]:
        with self.database.read() as session:
            trial = store.get_trial(session, study.id, number)
            return [attempt.outcome for attempt in store.list_attempts(session, trial.id)]

    def complete(self, study: Study) -> bool:
        with self.database.read() as session:
            return store.get_study(session, study.name).state is StudyState.COMPLETE


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayLauncher]:
    folder = tmp_path_factory.mktemp("data")
    made = RayLauncher(None, folder, RANKS, "trainers:run", import_path=[Path(__file__).parent])
    yield made
    made.close()


@pytest.fixture
def scene(database: Database, tmp_path: Path, launcher: RayLauncher, new_study: NewStudies) -> Iterator[Scene]:
    stage = Scene(database, tmp_path, launcher, new_study)
    yield stage
    stage.loop.hand_back(datetime.now(UTC))


def test_quick_trials_follow_each_other_inside_their_gangs(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "orchestrator.loop")
    study = scene.study("quick", "nap", max_trials=12)
    scene.until(lambda: scene.complete(study))
    with scene.database.read() as session:
        trials = store.list_trials(session, study.id)
        attempts = [attempt for trial in trials for attempt in store.list_attempts(session, trial.id)]
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 12
    assert all(attempt.outcome is Outcome.SUCCEEDED for attempt in attempts if attempt.outcome is not Outcome.PREEMPTED)
    assert "started behind another" in caplog.text
    assert any(attempt.phase_seconds.get("queue", 0) > 0 for attempt in attempts)
    assert all("idle" in attempt.phase_seconds for attempt in attempts if attempt.outcome is Outcome.SUCCEEDED)


def test_what_waits_behind_another_moves_to_a_gang_that_is_free(scene: Scene, new_trial: Any) -> None:
    study = scene.study("shared", "evaluates")
    long = {"data.dataset": "evaluates", "gang.ranks": 1, "budget": {"steps": 3}}
    numbers = [scene.submit(study, new_trial(long | {"seed": seed}, origin="submitted")) for seed in (1, 2, 3)]
    scene.until(lambda: sorted(scene.phases()) == ["evaluate", "evaluate", "queue"])
    (waits,) = [held.claim.trial_number for held in scene.loop.held.values() if held.phase == "queue"]
    behind = {held.claim.trial_number for held in scene.loop.held.values()} - {waits}
    gang = scene.loop.held
    attempts = {held.claim.trial_number: attempt_id for attempt_id, held in gang.items()}
    with scene.database.read() as session:
        gangs = {
            number: store.list_attempts(session, store.get_trial(session, study.id, number).id)[-1].gang
            for number in numbers
        }
    other = next(number for number in behind if gangs[number] != gangs[waits])
    scene.loop.launcher.stop(attempts[other])
    scene.until(lambda: scene.outcomes(study, waits) == [Outcome.PREEMPTED, None])
    scene.until(lambda: scene.phases() == ["evaluate", "evaluate"])
    for number in set(numbers) - {other}:
        scene.cancel(study, number)
    scene.until(lambda: not scene.loop.held)


def test_a_run_that_starts_cold_gets_processes_that_have_run_nothing(scene: Scene, new_trial: Any) -> None:
    study = scene.study("cold", "count")
    processes = []
    for seed, cold in ((1, False), (2, False), (3, True)):
        changes = {"data.dataset": "count", "gang.ranks": 2, "budget": {"steps": 3}, "seed": seed, "limits.cold": cold}
        number = scene.submit(study, new_trial(changes, origin="submitted"))
        scene.until(lambda number=number: scene.state(study, number) is TrialState.COMPLETE)  # type: ignore[misc]
        with scene.database.read() as session:
            result = store.get_trial(session, study.id, number).result
        assert result is not None
        processes.append(result.diagnostics["process"])
    assert processes[0] == processes[1] != processes[2]
