"""The launchers' contract, stated once and run on both, with real processes."""

import hashlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from orchestrator.launcher import Assignment, Ending, Launcher, NoRoom, Offer, Update
from orchestrator.lifecycle import Cause, Outcome
from orchestrator.local_launcher import KEPT, LocalLauncher
from orchestrator.ray_launcher import RayLauncher
from worker.recipes import load_recipe
from worker.report import Measurement
from worker.spec import GangConfig, override, parse_spec

HERE = Path(__file__).parent
PATIENCE_SECONDS = 200.0  # a pair that starts cold takes ten, on a quiet machine
RANKS = 3  # a warm gang of one and one of two, side by side: a pair that starts cold takes ten seconds of CPU
ONE, TWO = GangConfig(ranks=1), GangConfig(ranks=2)
seeds = itertools.count(1)
both_shapes = pytest.mark.parametrize("gang", [ONE, TWO], ids=["1-rank", "2-ranks"])


@dataclass
class Bench:
    """A launcher with room for RANKS ranks, and where its trainers leave their process ids."""

    kind: str
    launcher: Launcher
    data_root: Path

    def start(self, trainer: str, gang: GangConfig = ONE, **changes: Any) -> Assignment:
        """Start an attempt under a number of its own, which is its seed too."""
        attempt = assignment(trainer, gang, **changes)
        self.give(attempt)
        return attempt

    def give(self, attempt: Assignment) -> str:
        """The name of the gang that was offered and took the attempt."""
        offer = self.launcher.offer(attempt.spec.gang)
        return self.launcher.start(attempt, "none" if offer is None else offer.gang)

    def poll(self, attempt: Assignment, after: int) -> Update:
        return self.launcher.poll({attempt.attempt_id: after})[attempt.attempt_id]

    def until(self, attempt: Assignment, holds: Callable[[Update], bool], after: int = 0) -> Update:
        """The first update of which `holds` is true."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not holds(update := self.poll(attempt, after)):
            assert update.ending is None, f"ended instead: {update.ending}"
            assert time.monotonic() < deadline, f"still {update}"
            time.sleep(0.01)
        return update

    def ending(self, attempt: Assignment) -> Ending:
        ending = self.until(attempt, lambda update: update.ending is not None).ending
        assert ending is not None
        return ending

    def processes(self, attempt: Assignment) -> list[psutil.Process]:
        """The attempt's ranks that still run."""
        paths = self.data_root.glob(f"{attempt.spec.seed}-*.pid")
        return [psutil.Process(pid) for path in paths if psutil.pid_exists(pid := int(path.read_text()))]


def assignment(trainer: str, gang: GangConfig, **changes: Any) -> Assignment:
    number = next(seeds)
    base = override(load_recipe("laptop"), {"data.dataset": trainer, "gang": gang.model_dump(), "seed": number})
    return Assignment(number, parse_spec(override(base, {"budget.steps": 3} | changes)))


def make(kind: str, folder: Path, data_root: Path) -> Launcher:
    if kind == "local":
        return LocalLauncher(folder, data_root, RANKS, "trainers:run", import_path=[HERE])
    return RayLauncher(None, data_root, RANKS, "trainers:run", import_path=[HERE])


@pytest.fixture(scope="module", params=["local", "ray"])
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, small_data_root: Path
) -> Iterator[Bench]:
    """One launcher for all tests of its kind: Ray takes seconds to start. Closing it leaves nothing."""
    data_root = shutil.copytree(small_data_root, tmp_path_factory.mktemp("data") / "root")  # the trainers write there
    children = set(psutil.Process().children(recursive=True))
    launcher = make(request.param, tmp_path_factory.mktemp("gangs"), data_root)
    try:
        yield Bench(request.param, launcher, data_root)
    finally:
        launcher.close()
        launcher.close()
    left = set(psutil.Process().children(recursive=True)) - children
    assert not psutil.wait_procs(left, timeout=10)[1], "close left processes behind"


@pytest.fixture
def bench(opened: Bench) -> Iterator[Bench]:
    """The launcher, with all its room before the test and after it."""
    first = next(seeds)
    yield opened
    for attempt_id in range(first, next(seeds)):
        opened.launcher.release(attempt_id)
        opened.launcher.release(attempt_id)
    assert opened.launcher.free(ONE) == RANKS


def gone(processes: list[psutil.Process]) -> bool:
    return not psutil.wait_procs(processes, timeout=20)[1]


def test_measurements_arrive_once_and_in_order(bench: Bench) -> None:
    attempt = bench.start("count", ONE, **{"budget.steps": 20})
    seen: list[Measurement] = []
    while True:
        update = bench.poll(attempt, len(seen))
        seen += update.measurements
        if update.ending is not None:
            break
    assert [measurement.number for measurement in seen] == list(range(1, 21))
    assert [measurement.step for measurement in seen] == list(range(1, 21))
    assert seen[4].metrics["total"] == 5
    assert update.phase == "train"


def test_asking_again_with_the_same_cursor_gives_the_same(bench: Bench) -> None:
    attempt = bench.start("count", ONE, **{"budget.steps": 5})
    ended = bench.until(attempt, lambda update: update.ending is not None)
    assert len(ended.measurements) == 5
    assert bench.poll(attempt, 0) == ended
    later = bench.poll(attempt, 3)
    assert later.measurements == ended.measurements[3:]
    assert bench.poll(attempt, 5).measurements == ()
    assert [said.line for said in ended.lines] == ["counts to 5"]
    assert bench.launcher.poll({attempt.attempt_id: 5}, {attempt.attempt_id: 1})[attempt.attempt_id].lines == ()


def test_an_attempt_is_in_phase_start_until_its_trainer_names_another(bench: Bench) -> None:
    attempt = bench.start("until-stopped")
    update = bench.poll(attempt, 9)
    assert (update.phase, update.measurements, update.ending) == ("start", (), None)


def test_an_attempt_that_trains_beats_and_one_that_hangs_does_not(bench: Bench) -> None:
    hanging, training = bench.start("hang"), bench.start("until-stopped")
    first = bench.until(training, lambda update: update.beats > 0)
    said = bench.until(hanging, lambda update: len(update.measurements) == 1)
    bench.until(training, lambda update: update.beats > first.beats)
    assert bench.poll(hanging, 0) == said


def test_waiting_ends_when_an_attempt_does(bench: Bench) -> None:
    attempt = bench.start("count")
    while bench.poll(attempt, 0).ending is None:
        bench.launcher.wait(3600)


def test_starting_an_attempt_twice_starts_it_once(bench: Bench) -> None:
    attempt = bench.start("until-stopped")
    assert bench.give(attempt) == bench.give(attempt)
    assert bench.launcher.free(ONE) == RANKS - 1


@both_shapes
def test_the_artifact_is_what_the_trainer_returned(bench: Bench, gang: GangConfig) -> None:
    attempt = bench.start("count", gang)
    with pytest.raises(KeyError):
        bench.launcher.artifact(attempt.attempt_id)
    ending = bench.ending(attempt)
    assert ending.outcome is Outcome.SUCCEEDED
    assert ending.result is not None
    artifact = bench.launcher.artifact(attempt.attempt_id)
    assert artifact == hashlib.sha256(str(attempt.spec.seed).encode()).digest() * 1000
    assert hashlib.sha256(artifact).hexdigest() == ending.result.artifact_sha256
    bench.launcher.release(attempt.attempt_id)
    with pytest.raises(KeyError):
        bench.launcher.artifact(attempt.attempt_id)


def test_the_ranks_of_a_gang_share_one_process_group_and_a_core_each(bench: Bench) -> None:
    attempt = bench.start("count", TWO)
    ended = bench.until(attempt, lambda update: update.ending is not None)
    assert [measurement.metrics for measurement in ended.measurements] == [
        {"total": 3 * step, "threads": 1} for step in (1, 2, 3)
    ]


@both_shapes
def test_stop_ends_an_attempt_early_with_a_result(bench: Bench, gang: GangConfig) -> None:
    attempt = bench.start("until-stopped", gang)
    bench.until(attempt, lambda update: len(update.measurements) == 1)
    bench.launcher.stop(attempt.attempt_id)
    bench.launcher.stop(attempt.attempt_id)
    ending = bench.ending(attempt)
    assert ending.outcome is Outcome.STOPPED
    assert ending.result is not None
    assert ending.result.stopped
    assert len(bench.launcher.artifact(attempt.attempt_id)) == ending.result.model_bytes


def test_a_rank_that_dies_fails_the_attempt_and_ends_the_gang(bench: Bench) -> None:
    attempt = bench.start("killed", TWO)
    ending = bench.ending(attempt)
    assert (ending.outcome, ending.result, ending.cause) == (Outcome.FAILED, None, Cause.CRASH)
    assert ending.reason.startswith("rank 1 ")
    assert ("was killed by signal 9" if bench.kind == "local" else "died") in ending.reason
    assert gone(bench.processes(attempt))


def test_a_rank_that_fails_fails_the_attempt_and_ends_the_gang(bench: Bench) -> None:
    attempt = bench.start("diverged", TWO)
    ended = bench.until(attempt, lambda update: update.ending is not None)
    assert ended.ending == Ending(
        Outcome.FAILED, "rank 1: FloatingPointError: the loss is nan at step 1", None, Cause.DIVERGED
    )
    assert gone(bench.processes(attempt))
    assert bench.poll(attempt, 0) == ended


@pytest.mark.parametrize(
    ("trainer", "reason", "cause"),
    [
        ("out-of-memory", "MemoryError: no 64 GiB left", Cause.OUT_OF_MEMORY),
        ("exits", "SystemExit: tired", Cause.ERROR),
        ("silent", "TypeError: trainers:run returned no result on rank 0", Cause.ERROR),
        ("bad-data", "data.dataset is 'bad-data'", Cause.BAD_INPUT),
        (
            "unspeakable",
            "Unable to serialize unknown type: <class 'object'>",
            Cause.BAD_INPUT,
        ),
    ],
)
def test_what_a_trainer_raises_is_the_reason_and_its_kind_the_cause(
    bench: Bench, trainer: str, reason: str, cause: Cause
) -> None:
    assert bench.ending(bench.start(trainer)) == Ending(Outcome.FAILED, reason, cause=cause)


def test_a_process_that_vanishes_fails_its_attempt(bench: Bench) -> None:
    ending = bench.ending(bench.start("vanishes"))
    assert ending.outcome is Outcome.FAILED
    assert ending.reason.startswith("rank 0 exited with status 7" if bench.kind == "local" else "rank 0 died: ")
    assert "\n" not in ending.reason


def test_releasing_a_hanging_gang_leaves_no_process_and_gives_its_room_back(bench: Bench) -> None:
    attempt = bench.start("hang", TWO)
    update = bench.until(attempt, lambda update: len(update.measurements) == 1)
    processes = bench.processes(attempt)
    assert len(processes) == 2
    child = psutil.Process(int(update.measurements[0].metrics["child"]))
    bench.launcher.release(attempt.attempt_id)
    assert gone([*processes, child])
    assert bench.launcher.free(ONE) == RANKS


def test_only_the_last_attempts_without_a_result_leave_their_logs(tmp_path: Path) -> None:
    for name in ("notes", "7/rank-0", *map(str, range(100, 100 + KEPT))):  # of a database that was there before
        (tmp_path / name).mkdir(parents=True)
        os.utime(tmp_path / name, ns=(number := int(name) if name.isdigit() else 0, number))
    launcher = make("local", tmp_path, tmp_path)
    for number in (1, 2):
        launcher.start(replace(assignment("hang", ONE), attempt_id=number), "gang")
        launcher.release(number)
    left = {"notes", "7", *map(str, range(102, 100 + KEPT)), "1", "2"}  # in 7 another launcher's gang may run
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == left


def test_an_attempt_that_is_not_known_is_lost(bench: Bench) -> None:
    update = bench.launcher.poll({10**9: 0})[10**9]
    assert update.ending is not None
    assert (update.ending.outcome, update.measurements) == (Outcome.LOST, ())
    bench.launcher.stop(10**9)
    bench.launcher.release(10**9)
    with pytest.raises(KeyError):
        bench.launcher.artifact(10**9)


def test_room_is_counted_in_ranks_and_a_start_without_room_starts_nothing(bench: Bench) -> None:
    assert (bench.launcher.free(ONE), bench.launcher.free(TWO), bench.launcher.free(GangConfig(ranks=4))) == (3, 1, 0)
    first = bench.start("until-stopped")
    assert (bench.launcher.free(ONE), bench.launcher.free(TWO)) == (2, 1)
    bench.start("until-stopped")
    assert (bench.launcher.free(ONE), bench.launcher.free(TWO)) == (1, 0)
    with pytest.raises(NoRoom):
        bench.start("count", TWO)
    bench.start("until-stopped")
    assert bench.launcher.free(ONE) == 0
    refused = assignment("count", ONE)
    with pytest.raises(NoRoom):
        bench.give(refused)
    ending = bench.poll(refused, 0).ending
    assert ending is not None and ending.outcome is Outcome.LOST
    bench.launcher.release(first.attempt_id)
    assert bench.launcher.free(ONE) == 1
    assert not bench.processes(refused)


def test_a_gpu_gang_has_no_room_where_there_is_no_gpu(bench: Bench) -> None:
    if bench.kind == "ray" and ray.cluster_resources().get("GPU"):  # type: ignore[no-untyped-call]
        pytest.skip("this machine has GPUs, which Ray finds")
    assert bench.launcher.free(GangConfig(ranks=1, device="gpu")) == 0
    with pytest.raises(NoRoom):
        bench.start("count", GangConfig(ranks=1, device="gpu"))


def test_the_real_trainer_gives_the_same_bytes_on_a_gang_that_has_run_before(bench: Bench) -> None:
    changes = {
        "model": {"vocab_size": 512, "width": 32, "heads": 4, "kv_heads": 2},
        "data.sequence_length": 64,
        "data.batch_tokens": 512,
        "evaluation": {"validations": 1, "validation_tokens": 512, "batch_sequences": 16},
    }
    artifacts, losses = [], []
    attempt = assignment("topics_sp512", ONE if bench.kind == "local" else TWO, **changes)  # local ones start cold
    for number in (attempt.attempt_id, next(seeds)):
        again = Assignment(number, attempt.spec)
        bench.give(again)
        ended = bench.until(again, lambda update: update.ending is not None)
        assert ended.ending is not None
        assert ended.ending.outcome is Outcome.SUCCEEDED, ended.ending.reason
        assert ended.ending.result is not None
        artifacts.append(bench.launcher.artifact(number))
        losses.append([measurement.metrics.get("train_loss") for measurement in ended.measurements])
        assert hashlib.sha256(artifacts[-1]).hexdigest() == ended.ending.result.artifact_sha256
        bench.launcher.release(number)
    assert artifacts[0] == artifacts[1]
    assert losses[0] == losses[1]
    assert any(loss is not None for loss in losses[0])


@both_shapes
def test_a_warm_gang_is_used_again_and_one_that_died_idle_is_not(bench: Bench, gang: GangConfig) -> None:
    if bench.kind == "local":
        pytest.skip("a local gang is started cold for each attempt")
    processes = []
    for _ in range(3):
        attempt = bench.start("count", gang)
        ending = bench.ending(attempt)
        assert ending.result is not None
        processes.append(psutil.Process(ending.result.diagnostics["process"]))
        bench.launcher.release(attempt.attempt_id)
        if len(processes) == 2:
            processes[1].kill()
            processes[1].wait(timeout=20)
    assert processes[0] == processes[1] != processes[2]


def test_an_idle_gang_gives_way_to_another_shape(bench: Bench) -> None:
    bench.start("until-stopped")
    for gang in (TWO, ONE, TWO):
        attempt = bench.start("count", gang)
        assert bench.ending(attempt).outcome is Outcome.SUCCEEDED
        bench.launcher.release(attempt.attempt_id)
        assert (bench.launcher.free(ONE), bench.launcher.free(TWO)) == (2, 1)


@pytest.fixture
def warm(bench: Bench) -> Bench:
    if bench.kind == "local":
        pytest.skip("a local gang runs one attempt, and is gone")
    return bench


def occupied(bench: Bench, trainer: str, gang: GangConfig) -> tuple[Assignment, str]:
    """An attempt that runs, and the name of its gang."""
    first = assignment(trainer, gang)
    name = bench.give(first)
    bench.until(first, lambda update: len(update.measurements) == 1)
    return first, name


@both_shapes
def test_the_next_attempt_waits_on_the_gang_and_begins_by_itself(warm: Bench, gang: GangConfig) -> None:
    first, name = occupied(warm, "until-stopped", gang)
    second, third = assignment("count", gang), assignment("count", gang)
    assert warm.launcher.start(second, name) == name
    assert warm.until(second, lambda update: update.phase == "queue").measurements == ()
    with pytest.raises(NoRoom):
        warm.launcher.start(third, name)
    warm.launcher.stop(first.attempt_id)
    ended = warm.until(second, lambda update: update.ending is not None)
    assert ended.ending is not None and ended.ending.outcome is Outcome.SUCCEEDED
    assert ended.seconds["queue"] > 0 < ended.seconds["train"]
    assert warm.ending(first).outcome is Outcome.STOPPED, "its result waits to be fetched"
    assert len(warm.launcher.artifact(first.attempt_id)) == 32_000


@both_shapes
def test_an_attempt_that_waits_is_taken_back_and_the_one_that_runs_goes_on(warm: Bench, gang: GangConfig) -> None:
    first, name = occupied(warm, "until-stopped", gang)
    for _ in range(2):
        second = assignment("count", gang)
        warm.launcher.start(second, name)
        warm.launcher.release(second.attempt_id)
        ending = warm.poll(second, 0).ending
        assert ending is not None and ending.outcome is Outcome.LOST
    warm.launcher.stop(first.attempt_id)
    assert warm.ending(first).outcome is Outcome.STOPPED
    warm.launcher.release(first.attempt_id)
    third = assignment("count", gang)
    assert warm.give(third) == name
    assert warm.ending(third).outcome is Outcome.SUCCEEDED


@pytest.mark.parametrize(("trainer", "gang"), [("fails-when-stopped", TWO), ("hang", ONE)])
def test_what_waits_for_a_gang_that_fails_or_is_killed_is_not_charged_for_it(
    warm: Bench, trainer: str, gang: GangConfig
) -> None:
    first, name = occupied(warm, trainer, gang)
    second = assignment("count", gang)
    warm.launcher.start(second, name)
    if trainer == "hang":
        warm.launcher.release(first.attempt_id)
    else:
        warm.launcher.stop(first.attempt_id)
        assert warm.ending(first).cause is Cause.DIVERGED
    assert warm.ending(second).outcome is Outcome.PREEMPTED
    assert gone(warm.processes(first))
    assert not warm.processes(second)
    warm.launcher.release(first.attempt_id)
    warm.launcher.release(second.attempt_id)
    assert warm.launcher.free(ONE) == RANKS


def test_the_data_of_what_waits_is_checked_while_another_trains(warm: Bench) -> None:
    first, name = occupied(warm, "until-stopped", TWO)
    second = assignment("unknown-data", TWO)
    warm.launcher.start(second, name)
    assert warm.ending(second) == Ending(Outcome.FAILED, "there is no unknown-data", cause=Cause.BAD_INPUT)
    warm.launcher.release(second.attempt_id)
    warm.launcher.stop(first.attempt_id)
    assert warm.ending(first).outcome is Outcome.STOPPED


def test_a_gang_takes_its_next_attempt_once_training_is_over_or_where_its_last_one_was_quick(warm: Bench) -> None:
    first, name = occupied(warm, "until-stopped", TWO)
    assert warm.launcher.offer(TWO) is None
    warm.launcher.stop(first.attempt_id)
    assert warm.ending(first).outcome is Outcome.STOPPED
    warm.launcher.release(first.attempt_id)
    second, _ = occupied(warm, "evaluates", TWO)
    warm.until(second, lambda update: update.phase == "evaluate")
    assert warm.launcher.offer(TWO) == Offer(name, behind=True)
    warm.launcher.stop(second.attempt_id)
