"""The loop over a real database and real gangs, killed between any two of its steps. Time is an argument."""

import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from claims import NewStudies, NewTrials
from sqlalchemy import select

from orchestrator import leases, reopening, store
from orchestrator.artifacts import ArtifactStore
from orchestrator.curves import list_measurements
from orchestrator.database import Database
from orchestrator.launcher import Assignment
from orchestrator.lifecycle import OPEN_TRIALS, Cause, Outcome, StudyState, TrialState
from orchestrator.local_launcher import LocalLauncher
from orchestrator.loop import Loop, run
from orchestrator.queue import BACKFILL
from orchestrator.reopening import PROMOTED
from orchestrator.spending import Accounts
from orchestrator.study import NewStudy, NewTrial, Study, Trial
from orchestrator.tables import MeasurementRow
from worker.recipes import load_recipe
from worker.spec import GangConfig, override

TTL = timedelta(seconds=30)
TICK = timedelta(milliseconds=200)
TICKS = 3000  # each lasts at least PAUSE: a bound on how long a busy machine may take
PAUSE = 0.05
ON_SQLITE = pytest.mark.parametrize("backend", ["sqlite"], indirect=True)  # the store's own suite runs on both


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the loop may catch it."""


class Scene:
    """A study, and orchestrators that come and go over one database while time passes by hand."""

    def __init__(self, database: Database, folder: Path, now: datetime, new: NewStudy) -> None:
        self.database, self.folder, self.now = database, folder, now
        with database.write() as session:
            self.study = store.create_study(session, new, now)
        self.artifacts = ArtifactStore(folder / "artifacts")
        self.loops: list[Loop] = []

    def orchestrator(self, ranks: int = 3) -> Loop:
        name = f"orchestrator-{len(self.loops)}"
        launcher = LocalLauncher(
            self.folder / name, self.folder, ranks, "trainers:run", import_path=[Path(__file__).parent]
        )
        self.loops.append(Loop(self.database, launcher, self.artifacts, name, TTL))
        return self.loops[-1]

    def run(self, loop: Loop, until: Callable[[], bool], pause: Callable[[float], Any]) -> None:
        for _ in range(TICKS):
            loop.tick(self.now)
            if until():
                return
            pause(PAUSE)
            self.now += TICK
        pytest.fail(f"after {TICKS} ticks: {self.trials()}")

    def kill(self, loop: Loop) -> None:
        """What the end of its process does: its gangs die with it, its leases run out."""
        loop.launcher.close()
        self.now += TTL + TICK

    def trials(self) -> tuple[Trial, ...]:
        with self.database.read() as session:
            return store.list_trials(session, self.study.id)

    def current(self) -> Study:
        with self.database.read() as session:
            return store.get_study(session, self.study.name)

    def states(self) -> list[TrialState]:
        return [trial.state for trial in self.trials()]

    def outcomes(self, number: int) -> list[Outcome | None]:
        with self.database.read() as session:
            trial = store.get_trial(session, self.study.id, number)
            return [attempt.outcome for attempt in store.list_attempts(session, trial.id)]

    def causes(self, number: int) -> list[Cause | None]:
        with self.database.read() as session:
            trial = store.get_trial(session, self.study.id, number)
            return [attempt.cause for attempt in store.list_attempts(session, trial.id)]

    def measured(self) -> bool:
        with self.database.read() as session:
            return bool(session.scalar(select(MeasurementRow.number)))

    def furthest(self) -> list[int]:
        """The last step measured, by trial."""
        with self.database.read() as session:
            told = [list_measurements(session, trial.id) for trial in self.trials()]
        return [each[-1].measurement.step if each else 0 for each in told]

    def submit(self, trial: NewTrial) -> Trial:
        with self.database.write() as session:
            added = store.add_trial(session, self.study.id, trial, self.now)
        assert added is not None
        return added

    def complete(self) -> bool:
        return self.current().state is StudyState.COMPLETE


@pytest.fixture
def pause() -> Callable[[float], Any]:
    """Lets real gangs get on between two ticks; no result depends on how long it is."""
    return threading.Event().wait


@pytest.fixture
def scene(database: Database, tmp_path: Path, now: datetime, new_study: NewStudies) -> Iterator[Callable[..., Scene]]:
    made: list[Scene] = []

    def build(**fields: Any) -> Scene:
        overrides = {"data.dataset": fields.pop("dataset", "count"), "budget.steps": 3}
        base = override(load_recipe("laptop"), overrides)
        made.append(Scene(database, tmp_path, now, new_study(base=base, **fields)))
        return made[-1]

    yield build
    for each in made:
        for loop in each.loops:
            loop.launcher.close()


def test_a_study_runs_to_its_end_on_gangs_of_both_shapes(scene: Callable[..., Scene], pause: Any) -> None:
    stage = scene(max_trials=5, gangs=[{"ranks": 1}, {"ranks": 2}])
    stage.run(stage.orchestrator(), stage.complete, pause)
    trials = stage.trials()
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 5
    assert {trial.spec.gang.ranks for trial in trials} == {1, 2}
    assert len({trial.spec_hash for trial in trials}) == 5
    assert stage.current().reason == "all proposed trials are finished"
    with stage.database.read() as session:
        for trial in trials:
            (attempt,) = store.list_attempts(session, trial.id)
            assert attempt.artifact is not None
            assert len(stage.artifacts.get(attempt.artifact)) == attempt.artifact.bytes
            measured = [progress.measurement for progress in list_measurements(session, trial.id)]
            assert [each.step for each in measured] == [1, 2, 3]


STEPS = [
    ("launcher", "start"),
    ("launcher", "poll"),
    ("launcher", "artifact"),
    ("launcher", "release"),
    ("artifacts", "put"),
    ("database", "write"),
]


class Trap:
    """Stands before or after one step of an orchestrator, and kills it there at its n-th passing."""

    def __init__(self, step: Callable[..., Any], after: bool, passing: int) -> None:
        self.step, self.after, self.left = step, after, passing

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise Killed
        made = self.step(*arguments, **keywords)
        if self.left == 0:
            raise Killed
        return made


@ON_SQLITE
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("part", "step"), STEPS)
def test_killed_around_any_step_every_trial_still_ends_exactly_once(
    scene: Callable[..., Scene], pause: Any, part: str, step: str, after: bool
) -> None:
    stage = scene(max_trials=2)
    doomed = stage.orchestrator()
    setattr(getattr(doomed, part), step, Trap(getattr(getattr(doomed, part), step), after, passing=2))
    with pytest.raises(Killed):
        stage.run(doomed, stage.complete, pause)
    stage.kill(doomed)

    stage.run(stage.orchestrator(), stage.complete, pause)
    assert stage.states() == [TrialState.COMPLETE] * 2
    for trial in stage.trials():
        assert stage.outcomes(trial.number).count(Outcome.SUCCEEDED) == 1
        assert None not in stage.outcomes(trial.number)


@ON_SQLITE
def test_a_cancel_frees_the_gang_and_nothing_is_recorded_afterwards(
    scene: Callable[..., Scene], pause: Any, new_trial: NewTrials
) -> None:
    stage = scene(max_trials=0, dataset="hang")
    trial = stage.submit(new_trial({"data.dataset": "hang"}, origin="submitted"))
    loop = stage.orchestrator(ranks=1)
    stage.run(loop, stage.measured, pause)
    assert loop.launcher.free(GangConfig()) == 0
    with stage.database.write() as session:
        store.cancel_trial(session, stage.study.id, trial.number, stage.now)
    loop.tick(stage.now)
    assert loop.launcher.free(GangConfig()) == 1
    assert not loop.held
    assert stage.states() == [TrialState.CANCELLED]
    assert stage.outcomes(trial.number) == [Outcome.STOPPED]


@ON_SQLITE
def test_a_stop_hands_attempts_back_and_the_next_orchestrator_goes_on_at_once(
    scene: Callable[..., Scene], pause: Any, new_trial: NewTrials
) -> None:
    stage = scene(max_trials=0)
    trial = stage.submit(new_trial({"data.dataset": "hang"}, origin="submitted"))
    first = stage.orchestrator()
    stage.run(first, lambda: bool(first.held), pause)
    first.hand_back(stage.now)
    assert stage.states() == [TrialState.QUEUED]
    assert first.launcher.free(GangConfig()) == 3
    second = stage.orchestrator()
    second.tick(stage.now)
    assert [held.claim.trial_number for held in second.held.values()] == [trial.number]
    assert stage.outcomes(trial.number) == [Outcome.PREEMPTED, None]


@ON_SQLITE
@pytest.mark.parametrize(
    ("dataset", "attempts", "cause"),
    [
        ("vanishes", 3, Cause.CRASH),
        ("diverged", 1, Cause.DIVERGED),
        ("bad-data", 1, Cause.BAD_INPUT),
        ("out-of-memory", 2, Cause.OUT_OF_MEMORY),
    ],
)
def test_a_failure_is_tried_again_unless_it_would_end_the_same_way(
    scene: Callable[..., Scene], pause: Any, new_trial: NewTrials, dataset: str, attempts: int,
    cause: Cause,
) -> None:  # fmt: skip
    stage = scene(max_trials=0)
    trial = stage.submit(new_trial({"data.dataset": dataset}, origin="submitted"))
    stage.run(stage.orchestrator(), lambda: stage.states() == [TrialState.FAILED], pause)
    assert stage.outcomes(trial.number) == [Outcome.FAILED] * attempts
    assert stage.causes(trial.number) == [cause] * attempts
    assert stage.trials()[0].reason


@ON_SQLITE
@pytest.mark.parametrize(
    ("limits", "cause", "reason"),
    [
        ({"silence_seconds": 3600}, Cause.HANG, "no progress for 3600 s in phase start"),
        ({"attempt_seconds": 3600, "silence_seconds": 7200}, Cause.LIMIT, "not finished after 3600 s"),
    ],
)
def test_a_gang_that_outlives_its_limits_is_killed_and_its_run_tried_again(
    scene: Callable[..., Scene], pause: Any, new_trial: NewTrials, limits: dict[str, float],
    cause: Cause, reason: str,
) -> None:  # fmt: skip
    stage = scene(max_trials=0)
    trial = stage.submit(new_trial({"data.dataset": "hang", "limits": limits}, origin="submitted"))
    loop = stage.orchestrator(ranks=1)
    stage.run(loop, stage.measured, pause)
    began = stage.now
    while stage.outcomes(trial.number) == [None]:  # and the gang, which has measured, stays silent
        stage.now += TTL
        loop.tick(stage.now)
    assert timedelta(seconds=3500) < stage.now - began < timedelta(seconds=3700)
    assert stage.outcomes(trial.number) == [Outcome.FAILED, None]
    assert stage.causes(trial.number) == [cause, None]
    with stage.database.read() as session:
        assert store.list_attempts(session, trial.id)[0].reason == reason
    assert len(loop.held) == 1, "the next gang is there, and the one that hung is not"
    assert loop.launcher.free(GangConfig()) == 0


@ON_SQLITE
def test_the_limit_of_an_attempt_goes_on_under_the_orchestrator_that_takes_it_over(
    scene: Callable[..., Scene], pause: Any, new_trial: NewTrials
) -> None:
    stage = scene(max_trials=0)
    trial = stage.submit(new_trial({"data.dataset": "hang", "limits.attempt_seconds": 3600}, origin="submitted"))
    gone = stage.orchestrator(ranks=1)
    stage.run(gone, stage.measured, pause)
    stage.now += timedelta(hours=1)
    back = Loop(stage.database, gone.launcher, stage.artifacts, gone.owner, TTL)
    back.resume(stage.now)
    back.tick(stage.now)
    assert stage.causes(trial.number) == [Cause.LIMIT, None]


@ON_SQLITE
def test_a_study_that_its_own_mistake_pauses_starts_nothing_more_and_goes_on_once_it_is_mended(
    scene: Callable[..., Scene], pause: Any
) -> None:
    stage = scene(max_trials=3, dataset="bad-data")
    loop = stage.orchestrator(ranks=1)
    stage.run(loop, lambda: stage.current().state is StudyState.PAUSED, pause)
    for _ in range(3):
        loop.tick(stage.now)
    assert not loop.held
    assert [stage.outcomes(number) for number in range(2)] == [[Outcome.FAILED]] * 2
    assert set(stage.states()[2:]) <= {TrialState.QUEUED}
    (stage.folder / "mended").touch()
    with stage.database.write() as session:
        reopening.move_study(session, stage.study.id, StudyState.RUNNING, stage.now)
    stage.run(loop, stage.complete, pause)
    assert sorted(path.name for path in (stage.folder / "orchestrator-0").iterdir()) == ["1", "2"], "what failed"
    assert stage.states() == [TrialState.COMPLETE] * 3
    assert [stage.outcomes(number) for number in range(2)] == [[Outcome.FAILED, Outcome.SUCCEEDED]] * 2


@ON_SQLITE
def test_a_study_with_nothing_left_to_propose_completes_and_says_why(scene: Callable[..., Scene], pause: Any) -> None:
    stage = scene(max_trials=50, space={"sharing.lora.rank": {"choice": [0, 2]}})
    stage.run(stage.orchestrator(), stage.complete, pause)
    assert stage.states() == [TrialState.COMPLETE] * 2
    assert "no point left to try" in str(stage.current().reason)


@ON_SQLITE
def test_a_study_whose_whole_space_is_over_the_cap_says_so_without_running(
    scene: Callable[..., Scene], pause: Any
) -> None:
    stage = scene(max_trials=5, cap_bytes=1000)
    stage.run(stage.orchestrator(), stage.complete, pause)
    assert stage.trials() == ()
    assert "certain not to fit the cap of 1,000 bytes" in str(stage.current().reason)
    assert stage.current().refused > 0


def test_two_orchestrators_on_one_study_execute_no_run_twice(scene: Callable[..., Scene], pause: Any) -> None:
    stage = scene(max_trials=6)
    first, second = stage.orchestrator(ranks=1), stage.orchestrator(ranks=1)

    def both() -> bool:
        second.tick(stage.now)
        return stage.complete()

    stage.run(first, both, pause)
    with stage.database.read() as session:
        attempts = [attempt for trial in stage.trials() for attempt in store.list_attempts(session, trial.id)]
    assert [attempt.outcome for attempt in attempts] == [Outcome.SUCCEEDED] * 6
    assert {attempt.owner for attempt in attempts} == {"orchestrator-0", "orchestrator-1"}


@ON_SQLITE
def test_an_expired_attempt_is_dropped_by_the_orchestrator_that_was_away(
    scene: Callable[..., Scene], pause: Any, new_trial: NewTrials
) -> None:
    stage = scene(max_trials=0)
    trial = stage.submit(new_trial({"data.dataset": "hang"}, origin="submitted"))
    away, other = stage.orchestrator(), stage.orchestrator()
    stage.run(away, lambda: bool(away.held), pause)
    stage.now += TTL + TICK
    with stage.database.write() as session:
        assert leases.expire(session, stage.now) == 1
    other.tick(stage.now)
    away.tick(stage.now)
    assert not away.held
    assert away.launcher.free(GangConfig()) == 3
    assert stage.outcomes(trial.number) == [Outcome.LOST, None]


@ON_SQLITE
def test_a_run_cancelled_while_its_gang_starts_is_released(
    scene: Callable[..., Scene], pause: Any, new_trial: NewTrials
) -> None:
    stage = scene(max_trials=0)
    trial = stage.submit(new_trial({"data.dataset": "hang"}, origin="submitted"))
    loop = stage.orchestrator()
    start = loop.launcher.start

    def start_and_cancel(assignment: Assignment, gang: str) -> str:
        name = start(assignment, gang)
        with stage.database.write() as session:
            store.cancel_trial(session, stage.study.id, trial.number, stage.now)
        return name

    loop.launcher.start = start_and_cancel  # type: ignore[method-assign]
    loop.tick(stage.now)
    loop.tick(stage.now)
    assert not loop.held
    assert loop.launcher.free(GangConfig()) == 3
    assert stage.states() == [TrialState.CANCELLED]


@ON_SQLITE
def test_an_outage_longer_than_a_lease_costs_nothing(
    scene: Callable[..., Scene], pause: Any, new_trial: NewTrials
) -> None:
    stage = scene(max_trials=0)
    trial = stage.submit(new_trial({"data.dataset": "hang"}, origin="submitted"))
    loop = stage.orchestrator()
    stage.run(loop, lambda: bool(loop.held), pause)
    stage.now += 3 * TTL
    loop.tick(stage.now)
    assert [held.claim.trial_number for held in loop.held.values()] == [trial.number]
    assert stage.outcomes(trial.number) == [None]


@ON_SQLITE
def test_a_gang_that_cannot_start_fails_its_own_attempt_alone(
    scene: Callable[..., Scene], pause: Any, new_trial: NewTrials
) -> None:
    stage = scene(max_trials=0)
    running = stage.submit(new_trial({"data.dataset": "hang"}, origin="submitted"))
    loop = stage.orchestrator()
    stage.run(loop, lambda: bool(loop.held), pause)
    (stage.folder / "orchestrator-0" / "2").write_text("where the second attempt's folder should be")
    broken = stage.submit(new_trial({"data.dataset": "count"}, origin="submitted"))
    stage.run(loop, lambda: len(stage.outcomes(broken.number)) > 1, pause)
    assert stage.outcomes(broken.number)[0] is Outcome.FAILED
    assert stage.outcomes(running.number) == [None]


@ON_SQLITE
def test_a_result_whose_artifact_cannot_be_stored_waits_until_there_is_room(
    scene: Callable[..., Scene], pause: Any, new_trial: NewTrials
) -> None:
    stage = scene(max_trials=0)
    trial = stage.submit(new_trial({"data.dataset": "count"}, origin="submitted"))
    loop = stage.orchestrator()
    stage.artifacts.root.write_text("not a folder")
    stage.run(loop, lambda: any(held.unstored for held in loop.held.values()), pause)
    for _ in range(3):
        stage.now += TTL / 2
        loop.tick(stage.now)
    assert stage.outcomes(trial.number) == [None]
    stage.artifacts.root.unlink()
    stage.run(loop, lambda: stage.states() == [TrialState.COMPLETE], pause)
    assert stage.outcomes(trial.number) == [Outcome.SUCCEEDED]


@ON_SQLITE
def test_what_ended_since_the_last_look_is_recorded_before_a_stop(
    scene: Callable[..., Scene], pause: Any, new_trial: NewTrials
) -> None:
    stage = scene(max_trials=0)
    trial = stage.submit(new_trial({"data.dataset": "count"}, origin="submitted"))
    loop = stage.orchestrator()
    stage.run(loop, lambda: bool(loop.held), pause)
    (attempt,) = loop.held
    while loop.launcher.poll({attempt: 0})[attempt].ending is None:
        pause(PAUSE)
    loop.hand_back(stage.now)
    assert stage.outcomes(trial.number) == [Outcome.SUCCEEDED]


@ON_SQLITE
def test_a_study_goes_on_for_one_shape_when_another_has_nothing_left(scene: Callable[..., Scene], pause: Any) -> None:
    space = {"data.batch_tokens": {"choice": [128, 256, 384, 512]}}  # 1 to 4 sequences: 2 ranks divide two of them
    stage = scene(max_trials=20, space=space, gangs=[{"ranks": 1}, {"ranks": 2}])
    stage.run(stage.orchestrator(), stage.complete, pause)
    assert len(stage.trials()) == 4
    assert set(stage.states()) == {TrialState.COMPLETE}


@ON_SQLITE
def test_runs_that_nothing_here_can_hold_are_told_of_once(scene: Callable[..., Scene], new_trial: NewTrials) -> None:
    stage = scene(max_trials=0)
    stage.submit(new_trial({"gang.device": "gpu"}, origin="submitted"))
    loop = stage.orchestrator()
    for _ in range(3):
        loop.tick(stage.now)
    with stage.database.read() as session:
        told = [event.message for event in store.list_events(session) if event.kind == "study.waiting"]
    assert told == ["Runs wait for a gang of 1 gpu ranks: orchestrator-0 has no node that could hold one"]


@ON_SQLITE
def test_whatever_ends_the_loop_hands_the_attempts_back(
    scene: Callable[..., Scene], pause: Any, new_trial: NewTrials
) -> None:
    stage = scene(max_trials=0)
    stage.submit(new_trial({"data.dataset": "hang"}, origin="submitted"))
    loop = stage.orchestrator()
    stage.run(loop, lambda: bool(loop.held), pause)
    loop.database.read = None  # type: ignore[assignment]
    with pytest.raises(TypeError):
        run(loop, lambda: stage.now, lambda seconds: True, lambda: False, timedelta(0))
    del loop.database.read
    assert stage.states() == [TrialState.QUEUED]


@ON_SQLITE
def test_an_orchestrator_that_comes_back_adopts_its_gangs_and_the_training_never_notices(
    scene: Callable[..., Scene], pause: Any
) -> None:
    there = scene(max_trials=1)
    gone = there.orchestrator()
    there.run(gone, lambda: bool(gone.held), pause)
    back = Loop(there.database, gone.launcher, there.artifacts, gone.owner, TTL)
    back.resume(there.now)
    assert set(back.held) == set(gone.held)
    there.run(back, there.complete, pause)
    assert there.outcomes(0) == [Outcome.SUCCEEDED]
    with there.database.read() as session:
        numbers = session.scalars(select(MeasurementRow.step).where(MeasurementRow.name == "total")).all()
    assert sorted(numbers) == [1, 2, 3]


@ON_SQLITE
def test_what_died_with_its_orchestrator_is_queued_again_as_soon_as_that_is_back(
    scene: Callable[..., Scene], pause: Any
) -> None:
    there = scene(max_trials=1, dataset="hang")
    gone = there.orchestrator()
    there.run(gone, lambda: bool(gone.held), pause)
    gone.launcher.close()
    back = there.orchestrator()
    back.owner = gone.owner
    back.resume(there.now)
    assert not back.held
    assert there.outcomes(0) == [Outcome.LOST]
    assert there.states() == [TrialState.QUEUED]


@ON_SQLITE
def test_narrow_runs_pass_a_wide_one_only_for_so_long(
    scene: Callable[..., Scene], pause: Any, new_trial: NewTrials
) -> None:
    stage = scene(max_trials=0)
    loop = stage.orchestrator(ranks=2)

    def submit(seed: int, trainer: str, ranks: int) -> int:
        changes = {"data.dataset": trainer, "gang.ranks": ranks, "seed": seed}
        return stage.submit(new_trial(changes, origin="submitted")).number

    long = submit(1, "hang", 1)
    stage.run(loop, lambda: stage.states() == [TrialState.RUNNING], pause)
    wide, narrow = submit(2, "count", 2), submit(3, "count", 1)
    stage.run(loop, lambda: stage.states()[narrow] is TrialState.COMPLETE, pause)
    assert stage.states()[wide] is TrialState.QUEUED
    stage.now += BACKFILL
    loop.tick(stage.now)
    late = submit(4, "count", 1)
    for _ in range(3):
        loop.tick(stage.now)
    assert stage.states()[late] is TrialState.QUEUED, "room is kept for the wide one"
    with stage.database.write() as session:
        store.cancel_trial(session, stage.study.id, long, stage.now)
    stage.run(loop, lambda: stage.states()[wide] is TrialState.COMPLETE, pause)
    stage.run(loop, lambda: stage.states()[late] is TrialState.COMPLETE, pause)


def let_come_to(stage: Scene, tenth: int) -> None:
    """Let trainings that are paced come so far, and no further."""
    for number in range(1, 11):
        (stage.folder / str(number)).unlink(missing_ok=True)
        if number <= tenth:
            (stage.folder / str(number)).touch()


def submit_paced(stage: Scene, new_trial: NewTrials, *finals: float) -> list[int]:
    """Trials that will score this in the end."""
    return [
        stage.submit(new_trial({"data.dataset": "paced", "optimizer.matrix_lr": final / 10}, origin="submitted")).number
        for final in finals
    ]


@ON_SQLITE
def test_a_hopeless_run_is_stopped_where_the_study_says_and_the_trial_says_why(
    scene: Callable[..., Scene], pause: Any, new_trial: NewTrials
) -> None:
    stage = scene(max_trials=0, stopping={"after_fraction": 0.5, "min_runs": 3, "spare": 0.001})
    loop = stage.orchestrator()
    submit_paced(stage, new_trial, 2.0, 2.1, 2.2)
    let_come_to(stage, 10)
    stage.run(loop, lambda: stage.states() == [TrialState.COMPLETE] * 3, pause)
    let_come_to(stage, 4)
    hopeless, hopeful = submit_paced(stage, new_trial, 3.0, 2.05)
    stage.run(loop, lambda: stage.furthest() == [10, 10, 10, 4, 4], pause)
    for _ in range(3):
        loop.tick(stage.now)
    assert [held.stopped for held in loop.held.values()] == [None, None]
    let_come_to(stage, 5)
    stage.run(loop, lambda: stage.states()[hopeless] is TrialState.PRUNED, pause)
    assert stage.outcomes(hopeless) == [Outcome.STOPPED]
    trial = stage.trials()[hopeless]
    assert trial.reason == "median: 3.5000 BPB at 50% of its budget is over 2.6000, the median of 3 runs"
    assert trial.result is not None
    assert trial.result.stopped
    let_come_to(stage, 10)
    stage.run(loop, lambda: stage.states()[hopeful] is TrialState.COMPLETE, pause)


@ON_SQLITE
def test_an_orchestrator_killed_before_it_told_a_run_to_stop_leaves_it_to_the_next(
    scene: Callable[..., Scene], pause: Any, new_trial: NewTrials
) -> None:
    stage = scene(max_trials=0, stopping={"after_fraction": 0.5, "min_runs": 2, "spare": 0.001})
    gone = stage.orchestrator()
    submit_paced(stage, new_trial, 2.0, 2.1)
    let_come_to(stage, 10)
    stage.run(gone, lambda: stage.states() == [TrialState.COMPLETE] * 2, pause)
    let_come_to(stage, 5)
    (hopeless,) = submit_paced(stage, new_trial, 3.0)
    gone.launcher.stop = Trap(gone.launcher.stop, after=False, passing=1)  # type: ignore[method-assign]
    with pytest.raises(Killed):
        stage.run(gone, lambda: False, pause)
    del gone.launcher.stop
    back = Loop(stage.database, gone.launcher, stage.artifacts, gone.owner, TTL)
    back.resume(stage.now)
    let_come_to(stage, 6)
    stage.run(back, lambda: stage.states()[hopeless] is TrialState.PRUNED, pause)
    assert "at 60% of its budget" in str(stage.trials()[hopeless].reason)


@ON_SQLITE
def test_proposals_climb_rungs_on_real_gangs_and_the_study_completes(scene: Callable[..., Scene], pause: Any) -> None:
    promotion = {"rungs": [{"budget": {"steps": 1}}, {"budget": {"steps": 2}}], "keep": 0.5, "spare": 0.0}
    stage = scene(max_trials=4, promotion=promotion)
    stage.run(stage.orchestrator(), stage.complete, pause)
    steps = []
    with stage.database.read() as session:
        for trial in stage.trials():
            runs = store.list_runs(session, trial.id)
            assert [run.rung for run in runs] == [-2, -1, 0][: len(runs)]
            steps.append(len(list_measurements(session, trial.id)))
    assert sorted(steps) in ([1, 1, 3, 6], [1, 3, 3, 6], [1, 1, 6, 6])


@ON_SQLITE
@pytest.mark.parametrize(
    ("part", "step", "passing"),
    [("launcher", "start", 3), *(("database", "write", passing) for passing in range(6, 11))],
)
def test_killed_around_a_promotion_it_still_happens_once(
    scene: Callable[..., Scene], pause: Any, part: str, step: str, passing: int
) -> None:
    promotion = {"rungs": [{"budget": {"steps": 1}}], "keep": 0.5, "spare": 0.0}
    stage = scene(max_trials=2, promotion=promotion)
    doomed = stage.orchestrator()
    setattr(getattr(doomed, part), step, Trap(getattr(getattr(doomed, part), step), after=True, passing=passing))
    with pytest.raises(Killed):
        stage.run(doomed, stage.complete, pause)
    stage.kill(doomed)
    stage.run(stage.orchestrator(), stage.complete, pause)
    assert sorted(stage.states()) == [TrialState.COMPLETE, TrialState.PRUNED]
    with stage.database.read() as session:
        promoted = [event for event in store.list_events(session) if event.kind == PROMOTED]
    assert len(promoted) == 1


def test_a_study_starts_no_run_that_its_budget_cannot_pay_and_stops_once_nothing_runs(
    scene: Callable[..., Scene], pause: Any
) -> None:
    stage = scene(max_trials=50, spending={"gpu_hours": 1e-3})
    first, second = stage.orchestrator(ranks=2), stage.orchestrator(ranks=2)

    def stopped() -> bool:
        second.tick(stage.now)
        return stage.current().state is StudyState.STOPPED

    stage.run(first, stopped, pause)
    assert "the budget of 0.001 GPU-hours is spent" in str(stage.current().reason)
    assert TrialState.COMPLETE in stage.states()
    assert not set(stage.states()) & OPEN_TRIALS
    with stage.database.read() as session:
        account = Accounts().read(session, stage.current(), stage.now)
    assert account is not None
    assert account.spent_hours < 2e-3


@ON_SQLITE
def test_a_study_stops_at_its_target_and_what_runs_goes_on(
    scene: Callable[..., Scene], pause: Any, new_trial: NewTrials
) -> None:
    stage = scene(max_trials=0, spending={"target_bpb": 2.0})
    loop = stage.orchestrator()
    stage.submit(new_trial({"data.dataset": "hang"}, origin="submitted"))
    stage.run(loop, stage.measured, pause)
    stage.submit(new_trial({"data.dataset": "count"}, origin="submitted"))
    stage.run(loop, lambda: stage.current().state is StudyState.STOPPED, pause)
    assert stage.current().reason == "trial 1 has reached the target of 2 BPB with 2.0000"
    assert stage.states() == [TrialState.RUNNING, TrialState.COMPLETE]
