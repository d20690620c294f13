"""Checkpoints: training goes on bit for bit, whatever died when. Run as a program, this file is what a test kills."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from worker.checkpoint import KEPT_SECONDS, Checkpoint
from worker.course import Course
from worker.job import run
from worker.model import Model, initialise
from worker.recipes import load_recipe
from worker.report import Directive, TrialResult
from worker.spec import TrialSpec, override, parse_spec
from worker.train import train
from worker.trainer import Job
from worker.trainer import finished as given
from worker.world import World, backends

ALONE = World(0, 1, torch.device("cpu"))
EVERY_STEP = 1e-9
STEPS = 40
TINY = {
    # Halfway the blocks start to repeat and the weights to be rounded; the snapshots come later still.
    "sharing": {"virtual_layers": 4, "unique_blocks": 2, "tying": {"from_fraction": 0.5}, "lora": {"rank": 2}},
    "model": {"vocab_size": 512, "width": 32, "heads": 4, "kv_heads": 2, "mlp_multiple": 2},
    "data": {"dataset": "topics_sp512", "sequence_length": 32, "batch_tokens": 128, "micro_batch_sequences": 2},
    "schedule": {"warmdown_fraction": 0.6},
    "optimizer.muon_momentum_warmup_steps": 9,
    "budget": {"steps": STEPS},
    "averaging": {"ema_decay": 0.8, "swa_every": 1, "swa_from": 0.5, "apply": "swa"},
    "quantisation": {"half_below": 500, "qat_from": 0.5},
    "evaluation": {"validations": 3, "validation_tokens": 512, "batch_sequences": 16},
}


def tiny(every_seconds: float | None = EVERY_STEP, **changes: Any) -> TrialSpec:
    changed = {path.replace("__", "."): value for path, value in changes.items()}
    changed["limits.checkpoint_seconds"] = every_seconds
    return parse_spec(override(override(load_recipe("laptop"), TINY), changed))


class Lost(BaseException):
    """What ends an attempt here, as a kill would elsewhere."""


@dataclass
class Notes:
    """A reporter that keeps what it hears and counts the steps; `at_step[n]` happens in the attempt's n-th step."""

    at_step: dict[int, Callable[[], None]] = field(default_factory=dict)
    stop_at: int | None = None
    steps: int = 0
    heard: list[tuple[int, float, dict[str, float]]] = field(default_factory=list)

    def measure(self, step: int, elapsed_seconds: float, metrics: Mapping[str, float]) -> Directive:
        self.heard.append((step, elapsed_seconds, dict(metrics)))
        return Directive.STOP if step == self.stop_at else Directive.CONTINUE

    def directive(self) -> Directive:
        self.steps += 1
        if self.steps in self.at_step:
            self.at_step[self.steps]()
        return Directive.CONTINUE

    def phase(self, name: str) -> None: ...

    def log(self, text: str) -> None: ...

    @property
    def curve(self) -> list[tuple[int, dict[str, float]]]:
        return [(step, metrics) for step, _, metrics in self.heard]


def lose() -> None:
    raise Lost


@pytest.fixture
def root(small_data_root: Path, tmp_path: Path) -> Path:
    """A data root that may be written to."""
    for path in small_data_root.iterdir():
        (tmp_path / path.name).symlink_to(path)
    return tmp_path


def checkpoints(root: Path) -> list[Path]:
    return sorted((root / "checkpoints").glob("*"))


def finished(spec: TrialSpec, root: Path, notes: Notes) -> tuple[TrialResult, bytes]:
    outcome = given(run(Job(spec, root), notes))
    assert outcome is not None
    return outcome


def same(one: TrialResult, other: TrialResult) -> bool:
    """Whether two results are equal but for the seconds that they took, probes of the hardware among them."""
    took = {"train_seconds", "evaluate_seconds", "pack_seconds", "step_seconds", "hardware"}
    return one.model_dump(exclude=took) == other.model_dump(exclude=took)


def test_an_attempt_that_goes_on_measures_scores_and_packs_the_same_bits(root: Path) -> None:
    uninterrupted = Notes()
    result, artifact = finished(tiny(None), root, uninterrupted)
    assert checkpoints(root) == [], "none was asked for"
    steps, heard = [], []
    for lost_at in (9, 18, 8):  # before both switches, after them, and amid the snapshots; the last does the rest
        notes = Notes({lost_at: lose})
        with pytest.raises(Lost):
            run(Job(tiny(), root), notes)
        assert len(checkpoints(root)) == 1
        heard.append(notes.heard)
        steps.append(lost_at - 1)
    last = Notes()
    resumed, same_artifact = finished(tiny(), root, last)
    assert last.steps == STEPS - sum(steps) == 8
    assert last.curve == uninterrupted.curve
    assert last.heard[: len(heard[-1])] == heard[-1], "told again: the same steps, seconds and values"
    assert same_artifact == artifact
    assert same(resumed, result)
    assert checkpoints(root) == [], "an attempt that has a result leaves none"


def test_an_attempt_told_to_stop_leaves_no_checkpoint(root: Path) -> None:
    seen: list[Path] = []
    result, _ = finished(tiny(), root, Notes({4: lambda: seen.extend(checkpoints(root))}, stop_at=5))
    assert (result.stopped, result.steps) == (True, 6)
    assert len(seen) == 1
    assert checkpoints(root) == []


def test_a_stop_in_answer_to_what_is_told_again_counts(root: Path) -> None:
    with pytest.raises(Lost):
        run(Job(tiny(), root), Notes({6: lose}))
    result, _ = finished(tiny(), root, Notes(stop_at=4))
    assert (result.stopped, result.steps) == (True, 6)


def test_two_ranks_go_on_after_one_was_killed(root: Path) -> None:
    with launched(root, "lost") as ranks:
        assert ranks[0].wait(timeout=100) == -signal.SIGKILL
    assert len(checkpoints(root)) == 1
    with launched(root, "resumed") as ranks:
        assert [rank.wait(timeout=100) for rank in ranks] == [0, 0]
    expected, resumed = (json.loads((root / f"{name}.json").read_text()) for name in ("expected", "resumed"))
    assert (expected.pop("steps"), resumed.pop("steps")) == (16, 3)
    assert resumed == expected
    assert (root / "resumed.bin").read_bytes() == (root / "expected.bin").read_bytes()
    assert checkpoints(root) == []


@dataclass
class Noise:
    """Random tokens, the same in each step of a number. Every step takes a second of a clock."""

    spec: TrialSpec
    seconds: float = 1000.0

    def batch(self, step: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.seconds += 1
        data, generator = self.spec.data, torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 512, (data.batch_sequences, data.sequence_length + 1), generator=generator)
        yield tokens[:, :-1], tokens[:, 1:]


def test_seconds_of_training_carry_over_and_those_of_writing_do_not_count(tmp_path: Path) -> None:
    spec = tiny(2.0, budget={"seconds": 8.0}, data__micro_batch_sequences=4, evaluation__validations=0)
    heard = []
    for lost_at in (6, 9):
        model, data, notes = Model(spec.model, spec.sharing), Noise(spec), Notes({lost_at: lose})
        initialise(model, spec.seed)
        checkpoint = Checkpoint(tmp_path, spec, 2.0, ALONE)

        def clock(data: Noise = data, before: int = len(checkpoints(tmp_path))) -> float:
            return data.seconds + (100.0 if len(checkpoints(tmp_path)) > before else 0.0)  # the first write is slow

        try:
            summary = train(model, spec, data, ALONE, notes, lambda model: 2.0, clock, checkpoint)
        except Lost:
            heard = notes.heard
    assert notes.steps == 4, "the last checkpoint was after 4 s, of 2 and 4"
    assert (summary.steps, summary.train_seconds, summary.step_seconds) == (8, 8.0, 1.0)
    assert notes.heard[:4] == heard[:4]
    assert [seconds for _, seconds, _ in notes.heard] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]


@dataclass
class Counter:
    """The smallest part."""

    count: int = 0

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "tensor": torch.full((100_000,), float(self.count))}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.count = state_dict["count"]
        assert (state_dict["tensor"] == self.count).all()


def written(root: Path, count: int, **changes: Any) -> Path:
    """The only file of a root in which a spec's checkpoint was just written."""
    Checkpoint(root, tiny(**changes), 60.0, ALONE).write([Counter(count)])
    (path,) = checkpoints(root)
    return path


def resumed(root: Path, **changes: Any) -> int:
    counter = Counter(-1)
    Checkpoint(root, tiny(**changes), 60.0, ALONE).resume([counter])
    return counter.count


def test_a_checkpoint_is_its_specs_own_but_for_the_limits(tmp_path: Path) -> None:
    written(tmp_path, 7)
    assert resumed(tmp_path, limits__patience_seconds=5.0) == 7
    for changes in ({"seed": 2}, {"budget__steps": 41}, {"gang__ranks": 2}, {"optimizer__matrix_lr": 0.03}):
        assert resumed(tmp_path, **changes) == -1
    written(tmp_path, 8)
    assert resumed(tmp_path) == 8


def test_it_is_due_whenever_training_has_passed_another_multiple_and_goes_on(tmp_path: Path) -> None:
    spec = tiny(budget={"seconds": 60.0})
    checkpoint, course, due = Checkpoint(tmp_path, spec, 10.0, ALONE), Course(spec), []
    for seconds in (3.0, 9.9, 10.0, 11.0, 45.0, 49.0, 50.5, 60.0):
        course.advance(seconds)
        due += [seconds] if checkpoint.due(course) else []
    assert due == [10.0, 45.0, 50.5]


def test_a_damaged_or_foreign_file_is_ignored_with_a_line_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    foreign = written(tmp_path, 1, seed=2).rename(tmp_path / "foreign").read_bytes()
    path = written(tmp_path, 1)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-200_000] ^= 1
    for damaged in (b"", whole[:20], whole[:-1], bytes(flipped), whole + b"\0", foreign):
        path.write_bytes(damaged)
        assert resumed(tmp_path) == -1
    path.unlink()
    path.mkdir()
    assert resumed(tmp_path) == -1
    assert len(caplog.records) == 7
    assert all("training starts over" in record.message for record in caplog.records)


def test_a_checkpoint_that_cannot_be_written_stops_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    checkpoint = Checkpoint(tmp_path, tiny(), 60.0, ALONE)
    checkpoint.write([Counter(1)])
    assert "no checkpoint was written, training goes on" in caplog.text
    assert resumed(tmp_path) == -1
    checkpoint.remove()


def test_a_writer_killed_at_any_moment_leaves_the_checkpoint_before_or_after(tmp_path: Path) -> None:
    said = 0
    for kills in (1, 2, 3):
        command = [sys.executable, __file__, "write", str(tmp_path)]
        with subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True) as writer:
            assert writer.stdout is not None
            for _ in range(2 * kills):
                said = int(writer.stdout.readline())  # said before the write, in which the kill then comes
            writer.kill()
            later = [int(line) for line in writer.stdout]
        assert resumed(tmp_path) in (said - 1, said, *later)
    Checkpoint(tmp_path, tiny(), 60.0, ALONE).remove()
    assert checkpoints(tmp_path) == [], "nor what the kills left unfinished"


def test_files_untouched_for_a_week_are_removed_by_the_next_that_is_written(tmp_path: Path) -> None:
    old = written(tmp_path, 1, seed=2)
    unfinished = old.with_name(f".{old.name}.1")
    unfinished.write_bytes(b"killed")
    for path in (old, unfinished):
        os.utime(path, (time.time(), time.time() - KEPT_SECONDS - 60))
    young = old.with_name("another")
    young.write_bytes(b"")
    Checkpoint(tmp_path, tiny(), 60.0, ALONE).write([Counter(1)])
    assert len(checkpoints(tmp_path)) == 2
    assert {old, unfinished}.isdisjoint(checkpoints(tmp_path))


def test_an_attempt_that_ends_takes_nothing_from_another_of_its_spec_but_time(tmp_path: Path) -> None:
    one, other = (Checkpoint(tmp_path, tiny(), 60.0, ALONE) for _ in range(2))
    one.write([Counter(1)])
    other.remove()
    one.remove()
    one.write([Counter(2)])
    assert resumed(tmp_path) == 2


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


@contextmanager
def launched(root: Path, name: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Two ranks in processes of their own, gone afterwards."""
    command = [sys.executable, __file__, "rank", str(root), name]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment()) for rank in range(2)]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def as_one_rank(root: Path, name: str, rank: int) -> None:
    """A job without checkpoints, then one lost amid SWA's snapshots; or, by another name, one that goes on."""
    torch.set_num_threads(1)
    dist.init_process_group(backends(ALONE.device), init_method=f"file://{root / name}", rank=rank, world_size=2)

    def finish(spec: TrialSpec, name: str, notes: Notes) -> None:
        outcome = given(run(Job(spec, root, rank, 2), notes))
        if outcome is not None:
            said = {"val_bpb": outcome[0].val_bpb, "curve": notes.curve, "steps": notes.steps}
            (root / f"{name}.json").write_text(json.dumps(said))
            (root / f"{name}.bin").write_bytes(outcome[1])

    changes: dict[str, Any] = {"gang__ranks": 2, "budget__steps": 16}
    if name == "lost":
        finish(tiny(None, **changes), "expected", Notes())
        finish(tiny(**changes), name, Notes({14: lambda: os.kill(os.getpid(), signal.SIGKILL)}))
    finish(tiny(**changes), name, Notes())
    dist.destroy_process_group()


def as_writer(root: Path) -> None:
    """Write one checkpoint after another, each said before it is begun."""
    counter = Counter(resumed(root))
    checkpoint = Checkpoint(root, tiny(), 60.0, ALONE)
    while True:
        counter.count += 1
        print(counter.count, flush=True)
        checkpoint.write([counter])


if __name__ == "__main__":
    if sys.argv[1] == "write":
        as_writer(Path(sys.argv[2]))
    as_one_rank(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
