"""One attempt end to end: the result is about the bytes, the bytes are all there is, and equal jobs give equal ones."""

import gc
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from worker.artifact import load
from worker.evaluate import evaluate, open_validation
from worker.inventory import tensor_inventory
from worker.job import check, run
from worker.model import Model
from worker.recipes import load_recipe
from worker.report import Directive, TrialResult
from worker.shape import FieldError
from worker.shards import DataError, open_dataset, write_shard
from worker.source import MODULES, archive, code_bytes
from worker.spec import TrialSpec, override, parse_spec
from worker.trainer import Job, find_check, find_trainer, finished
from worker.world import World

TINY = {
    "model": {"vocab_size": 512, "width": 32, "heads": 4, "kv_heads": 2, "mlp_multiple": 2},
    "data.dataset": "topics_sp512",
    "data.sequence_length": 64,
    "data.batch_tokens": 512,
    "budget": {"steps": 12},
    "quantisation.half_below": 500,
    "evaluation": {"validations": 2, "validation_tokens": 512, "batch_sequences": 16},
}


def tiny_spec(**changes: object) -> TrialSpec:
    return parse_spec(override(override(load_recipe("laptop"), TINY), changes))


class Notes:
    """A reporter that keeps what it is told, and asks to stop from a step on."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.stop_at = stop_at
        self.phases: list[str] = []
        self.measurements: list[tuple[int, dict[str, float]]] = []
        self.lines: list[str] = []

    def measure(self, step: int, elapsed_seconds: float, metrics: Mapping[str, float]) -> Directive:
        self.measurements.append((step, dict(metrics)))
        return Directive.STOP if self.stop_at is not None and step >= self.stop_at else Directive.CONTINUE

    def directive(self) -> Directive:
        return Directive.CONTINUE

    def phase(self, name: str) -> None:
        self.phases.append(name)

    def log(self, text: str) -> None:
        self.lines.append(text)


Finished = tuple[TrialSpec, TrialResult, bytes, Notes]


@pytest.fixture(scope="module")
def finished_job(small_data_root: Path) -> Finished:
    notes, spec = Notes(), tiny_spec()
    outcome = finished(run(Job(spec, small_data_root), notes))
    assert outcome is not None
    return spec, *outcome, notes


def test_a_job_logs_what_it_finds_each_step_that_it_measures_and_its_result(finished_job: Finished) -> None:
    _spec, result, _artifact, notes = finished_job
    topics = [line.split(":")[0].split(" (")[0].split(" in ")[0] for line in notes.lines if "warning" not in line]
    assert topics[:3] == ["data", "model", "budget"]
    assert [topic for topic in topics if topic.startswith("step")][-1] == "step 12 of 12"
    assert f"result: {result.val_bpb:.4f} BPB" in notes.lines[-1]
    assert f"artifact: {result.artifact_bytes:,} bytes" in "\n".join(notes.lines)


def test_the_results_fields_agree(finished_job: Finished) -> None:
    spec, result, artifact, notes = finished_job
    assert result.artifact_bytes == result.model_bytes + result.code_bytes
    assert (result.model_bytes, result.code_bytes) == (len(artifact), code_bytes())
    assert (result.steps, result.tokens, result.stopped) == (12, 12 * 512, False)
    assert result.parameters == sum(tensor.elements for tensor in tensor_inventory(spec.model, spec.sharing))
    assert result.parameters == sum(parameter.numel() for parameter in load(artifact).parameters())
    assert sum(result.bytes_by_class.values()) > result.model_bytes / 2
    assert result.val_bpb == pytest.approx(result.val_bpb_prequant, rel=0.05)
    assert result.val_bpb != result.val_bpb_prequant
    assert min(result.train_seconds, result.evaluate_seconds, result.pack_seconds, result.step_seconds) > 0
    assert [len(gammas) for gammas in result.diagnostics["gammas"].values()] == [6, 6]
    hardware = result.hardware
    assert hardware is not None
    assert (hardware.node_devices, hardware.ranks, len(hardware.probe_seconds)) == (os.cpu_count(), 1, 1)
    assert hardware.slowest_probe_seconds >= hardware.probe_after_seconds[0] > 0
    assert TrialResult.model_validate_json(result.model_dump_json()) == result
    assert notes.phases == ["data", "train", "pack", "evaluate", "pack"]
    assert [step for step, metrics in notes.measurements if "val_bpb" in metrics] == [6, 12]


def test_training_makes_the_text_cheaper(finished_job: Finished) -> None:
    _, result, _, notes = finished_job
    losses = [metrics["train_loss"] for _, metrics in notes.measurements if "train_loss" in metrics]
    assert losses[-1] < losses[0] - 0.5
    assert result.val_bpb < 9 * result.diagnostics["val_tokens"] / result.diagnostics["val_bytes"]  # log2(512) a token


def test_the_score_is_that_of_the_artifacts_bytes(finished_job: Finished, small_data_root: Path) -> None:
    spec, result, artifact, _ = finished_job
    validation = open_validation(open_dataset(small_data_root, spec.data.dataset), 512, 64, 16)
    score = evaluate(load(artifact), validation, World(0, 1, torch.device("cpu")))
    assert (score.bpb, score.loss) == (result.val_bpb, result.val_loss)


def test_equal_jobs_give_bit_identical_artifacts(finished_job: Finished, small_data_root: Path) -> None:
    spec, result, artifact, _ = finished_job
    outcome = finished(run(Job(spec, small_data_root), Notes()))
    assert outcome is not None
    assert outcome[1] == artifact
    assert outcome[0].artifact_sha256 == result.artifact_sha256
    assert outcome[0].val_bpb == result.val_bpb
    other = finished(run(Job(spec.model_copy(update={"seed": 2}), small_data_root), Notes()))
    assert other is not None
    assert other[1] != artifact


def test_a_directive_to_stop_still_ends_with_a_score(small_data_root: Path) -> None:
    outcome = finished(run(Job(tiny_spec(**{"budget.steps": 1000}), small_data_root), Notes(stop_at=3)))
    assert outcome is not None
    result, artifact = outcome
    assert result.stopped
    assert 3 <= result.steps <= 100
    assert result.val_bpb > 0
    assert len(artifact) == result.model_bytes


def test_code_bytes_are_an_archive_that_scores_an_artifact_alone(
    finished_job: Finished, small_data_root: Path, tmp_path: Path
) -> None:
    spec, result, artifact, _ = finished_job
    (tmp_path / "code.zip").write_bytes(archive())
    (tmp_path / "model.bin").write_bytes(artifact)
    (tmp_path / "score.py").write_text(_SCORE)
    command = [sys.executable, "-W", "error", "score.py", str(small_data_root), spec.data.dataset]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["bpb"] == result.val_bpb
    assert answer["modules"] == sorted(["worker", *(f"worker.{module}" for module in MODULES if module != "__init__")])
    assert (tmp_path / "code.zip").stat().st_size == result.code_bytes


_SCORE = """
import json, os, sys
from pathlib import Path
here = Path(__file__).resolve().parent
sys.path.insert(0, str(here / "code.zip"))
import torch
torch.set_num_threads(1)
import worker
import worker.ttt
from worker.artifact import load
from worker.evaluate import evaluate, open_validation
from worker.shards import open_dataset
from worker.world import World

assert Path(worker.__file__).parent == here / "code.zip" / "worker"
model = load((here / "model.bin").read_bytes())
validation = open_validation(open_dataset(Path(sys.argv[1]), sys.argv[2]), model.config.vocab_size, 64, 16)
score = evaluate(model, validation, World(0, 1, torch.device("cpu")))
names = sorted(name for name in sys.modules if name.split(".")[0] == "worker")
print(json.dumps({"bpb": score.bpb, "modules": names}))
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.vocab_size": 1024}, r"model\.vocab_size is 1024: must be 512"),
        (
            {"data.dataset": "nothing"},
            r"data\.dataset is 'nothing': .* lists topics_sp512; .*: caddie data build --data .* --name nothing --text",
        ),
        (
            {"data.sequence_length": 65_536, "data.batch_tokens": 65_536},
            r"data\.sequence_length is 65536: must be below",
        ),
        (
            {"data.sequence_length": 65_536, "data.batch_tokens": 65_536, "evaluation.sequence_length": 64},
            r"data\.sequence_length is 65536: must be below",
        ),
        ({"evaluation.sequence_length": 65_536}, r"evaluation\.sequence_length is 65536: must be below"),
    ],
)
def test_data_that_do_not_suit_the_spec_are_refused_before_training_and_before_a_rank_is_free(
    small_data_root: Path, changes: dict[str, object], message: str
) -> None:
    job, notes = Job(tiny_spec(**changes), small_data_root), Notes()
    with pytest.raises((FieldError, DataError), match=message):
        check(job)
    with pytest.raises((FieldError, DataError), match=message):
        run(job, notes)
    assert "train" not in notes.phases


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gang.ranks": 2}, r"gang\.ranks is 2: must be the number of processes that run it, 1"),
        ({"quantisation.target_bytes": 1_000}, r"quantisation\.target_bytes is 1000: must be at least \d+, what this"),
    ],
)
def test_a_spec_that_cannot_be_run_or_packed_is_refused_before_training(
    small_data_root: Path, changes: dict[str, object], message: str
) -> None:
    notes = Notes()
    with pytest.raises(FieldError, match=message):
        run(Job(tiny_spec(**changes), small_data_root), notes)
    assert "train" not in notes.phases


def test_data_that_change_between_two_jobs_are_checked_again(small_data_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(small_data_root, root)
    job = Job(tiny_spec(), root)
    check(job)
    (shard,) = open_dataset(root, job.spec.data.dataset).val
    tokens = shard.mapped().copy()
    tokens[7] = 512
    while write_shard(shard.path, tokens).changed_ns == shard.changed_ns:
        pass  # until the file system's clock has ticked
    with pytest.raises(DataError, match="holds token 512"):
        check(job)


def test_what_needs_no_rank_is_left_to_another_thread_while_the_next_job_runs(
    finished_job: Finished, small_data_root: Path
) -> None:
    # A table that is costly to compress, and cheap to score.
    spec = tiny_spec(**{"model.bigram_buckets": 20_000, "model.bigram_width": 48, "quantisation.codec": "brotli"})
    in_place = finished(run(Job(spec, small_data_root), Notes()))
    models = count_models()
    left = run(Job(spec, small_data_root, defer=True), Notes())
    assert callable(left) and in_place is not None
    assert count_models() == models, "what is left holds no model"
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(left)
        between = finished(run(Job(finished_job[0], small_data_root), Notes()))
        result, artifact = done.result()
    assert artifact == in_place[1]
    assert untimed(result) == untimed(in_place[0])
    assert between is not None and between[1] == finished_job[2]
    assert untimed(between[0]) == untimed(finished_job[1])


def test_where_nothing_is_left_the_result_is_there_at_once(small_data_root: Path) -> None:
    spec = tiny_spec(**{"quantisation.target_bytes": 90_000, "quantisation.codec": "ans"})
    produced = run(Job(spec, small_data_root, defer=True), Notes())
    assert isinstance(produced, tuple)
    assert produced[0].artifact_bytes <= 90_000


def test_a_trainers_check_is_found_beside_it() -> None:
    assert find_trainer("worker.job:run") is run
    assert find_check("worker.job:run") is check
    assert find_check("worker.train:train") is None


def count_models() -> int:
    gc.collect()
    return sum(type(each) is Model for each in gc.get_objects())


def untimed(result: TrialResult) -> TrialResult:
    seconds = ("train_seconds", "evaluate_seconds", "pack_seconds", "step_seconds")
    return result.model_copy(update={**dict.fromkeys(seconds, 0.0), "hardware": None})


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there_is_refused(small_data_root: Path) -> None:
    with pytest.raises(FieldError, match=r"gang\.device is 'gpu': no CUDA device is available here; use cpu"):
        run(Job(tiny_spec(**{"gang.device": "gpu"}), small_data_root), Notes())


def test_the_demo_corpus_is_built_where_it_is_missing_and_not_where_it_is_damaged(tmp_path: Path) -> None:
    smallest = {
        "sharing": {"virtual_layers": 1, "unique_blocks": 1},
        "model": {"width": 16, "heads": 2, "kv_heads": 1, "mlp_multiple": 1},
        "data.dataset": "stdlib_sp1024",
        "data.batch_tokens": 512,
        "budget": {"steps": 2},
        "evaluation.validations": 0,
    }
    job, notes = Job(parse_spec(override(load_recipe("laptop"), smallest)), tmp_path / "data"), Notes()
    outcome = finished(run(job, notes))
    assert outcome is not None
    assert "stdlib_sp1024: training a tokenizer of 1,024 pieces" in notes.lines, "it takes a while"
    assert 4.0 < outcome[0].diagnostics["order0_bpb"] < 5.5
    dataset = open_dataset(tmp_path / "data", "stdlib_sp1024")
    assert dataset.stats["val_bytes"] >= outcome[0].diagnostics["val_bytes"]
    dataset.train[0].path.unlink()
    with pytest.raises(DataError, match=r"data\.dataset is 'stdlib_sp1024': .* no train shard.*: caddie data build"):
        check(job)
