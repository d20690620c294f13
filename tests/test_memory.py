"""Between jobs a warm rank is as good as new: its memory is back at its floor, and what one job did no other sees."""

import ctypes
import os
import random
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch

from worker.gang import Rank
from worker.mailbox import Closing, FileMailbox, Mailbox, MemoryMailbox
from worker.memory import DEVICE_TOLERANCE_BYTES, MEBIBYTE, WARMING_JOBS, Floor, host_bytes, trim
from worker.recipes import load_recipe, recipe_names
from worker.spec import GangConfig, TrialSpec, override, parse_spec

HERE = Path(__file__).parent
NOISE_BYTES = 8 * MEBIBYTE
"""One mebibyte came after the first few of 200 trials. A tiny trial's model and optimizer would be 1 to 4."""

told = pytest.mark.skipif(host_bytes() is None, reason="this system does not tell what a process holds")


def no_store() -> NoReturn:
    raise AssertionError("a gang of one has no rendezvous")


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rank]:
    monkeypatch.syspath_prepend(HERE)
    yield Rank(0, GangConfig(), no_store, "trainers:run")
    import_module("trainers").HOARD.clear()
    trim()


def spec_for(trainer: str, seed: int = 1) -> TrialSpec:
    return parse_spec(override(load_recipe("laptop"), {"data.dataset": trainer, "budget.steps": 3, "seed": seed}))


def small_spec(recipe: str, **more: object) -> TrialSpec:
    """The recipe with all its components, trained for some steps in about a second."""
    changes: dict[str, object] = {
        "model.vocab_size": 512,
        "data": {"dataset": "topics_sp512", "sequence_length": 64, "batch_tokens": 512, "micro_batch_sequences": 8},
        "budget": {"steps": 4},
        "quantisation.calibration_tokens": 1024,
        "evaluation.validations": 1,
        "evaluation.validation_tokens": 512,
    }
    return parse_spec(override(override(load_recipe(recipe, "tiny"), changes), more))


def closing_of(rank: Rank, spec: TrialSpec, data_root: Path) -> Closing:
    mailbox = MemoryMailbox()
    rank.run(spec, data_root, mailbox)
    closing = mailbox.read(0).closing
    assert closing is not None
    return closing


def levels(data_root: Path, recipes: list[str], trials: int) -> list[int]:
    """What this process holds after each of so many real trials on one rank, the recipes in turn."""
    rank = Rank(0, GangConfig(), no_store)
    held = []
    for number in range(trials):
        closing = closing_of(rank, small_spec(recipes[number % len(recipes)]), data_root)
        assert closing.outcome == "succeeded", closing.reason
        assert rank.worn() == ""
        trim()
        held.append(host_bytes() or 0)
    return held


def test_a_rank_on_which_a_job_has_failed_is_worn(rank: Rank, tmp_path: Path) -> None:
    for trainer, why in (("count", ""), ("bad-data", "a job has failed on it"), ("count", "a job has failed on it")):
        closing_of(rank, spec_for(trainer), tmp_path)
        assert rank.worn() == why


def test_a_rank_that_could_not_even_join_is_worn(tmp_path: Path) -> None:
    rank = Rank(0, GangConfig(), no_store, "worker.job:walk")
    closing_of(rank, spec_for("count"), tmp_path)
    assert rank.worn() == "a job has failed on it"


@told
def test_what_a_job_leaves_behind_wears_its_rank_and_what_it_gives_back_does_not(rank: Rank, tmp_path: Path) -> None:
    for trainer in ("count", "count", "hoards"):
        assert rank.worn() == ""
        closing_of(rank, spec_for(trainer), tmp_path)
    assert rank.worn().startswith(("it keeps 300 MiB of host memory", "it keeps 301 MiB of host memory"))
    import_module("trainers").HOARD.clear()
    closing_of(rank, spec_for("count"), tmp_path)
    assert rank.worn() == ""


@told
def test_what_loads_with_the_first_jobs_belongs_to_the_floor(rank: Rank, tmp_path: Path) -> None:
    for trainer in ("count", "hoards", "count"):
        closing_of(rank, spec_for(trainer), tmp_path)
        assert rank.worn() == ""


@told
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="this malloc keeps what it keeps")
def test_what_malloc_keeps_for_reuse_wears_nothing(rank: Rank, tmp_path: Path) -> None:
    for trainer in ("count", "count", "scatters"):
        closing_of(rank, spec_for(trainer), tmp_path)
    assert rank.worn() == ""


@told
def test_an_artifact_that_is_still_being_stored_wears_nothing(rank: Rank, tmp_path: Path) -> None:
    closed, stored = threading.Event(), import_module("trainers").STORED
    for trainer in ("count", "count"):
        closing_of(rank, spec_for(trainer), tmp_path)
    assert rank.run(spec_for("stores"), tmp_path, MemoryMailbox(), closed.set)
    assert not closed.is_set()
    assert rank.worn() == ""
    stored.set()
    assert closed.wait(60)


def test_tensors_that_stay_on_a_gpu_are_above_the_floor() -> None:
    floor = Floor()
    for held in (0, *[MEBIBYTE] * (WARMING_JOBS - 1), MEBIBYTE + DEVICE_TOLERANCE_BYTES):
        floor.job_ended(held)
        assert floor.excess == ""
    floor.job_ended(2 * MEBIBYTE + DEVICE_TOLERANCE_BYTES)
    assert floor.excess == "it keeps 65 MiB of GPU memory above its floor of 1 MiB"


def test_a_warm_rank_compiles_model_after_model_and_keeps_some(rank: Rank, tmp_path: Path) -> None:
    compiled = []
    for width in (*range(2, 14), 13):
        closing = closing_of(rank, spec_for("compiles", seed=width), tmp_path)
        assert closing.outcome == "succeeded", closing.traceback
        compiled.append(sys.modules["torch._dynamo"].utils.counters["stats"]["unique_graphs"])
    assert max(compiled[:-2]) > 1
    assert compiled[-1] == compiled[-2], "the graph was there"


Trace = tuple[list[dict[str, float]], float, bytes]
"""What a job measured, the score of its artifact, and the artifact."""


def trace(mailbox: Mailbox) -> Trace:
    mail = mailbox.read(0)
    assert mail.closing is not None and mail.closing.result is not None, mail.closing
    return [said.metrics for said in mail.measurements], mail.closing.result.val_bpb, mailbox.artifact()


def cold(spec: TrialSpec, data_root: Path, folder: Path) -> Trace:
    """The job's trace in a process of its own."""
    folder.mkdir()
    (folder / "spec.json").write_text(spec.model_dump_json())
    command = [sys.executable, "-m", "worker.gang", "--rank=0", "--trainer=worker.job:run", f"--data-root={data_root}"]
    command += [f"--{name}={folder / file}" for name, file in (("spec", "spec.json"), ("mailbox", "mailbox"))]
    with subprocess.Popen([*command, f"--rendezvous={folder / 'met'}"], stdin=subprocess.PIPE, cwd=HERE.parent) as run:
        assert run.wait() == 0
    return trace(FileMailbox(folder / "mailbox"))


@pytest.mark.soak
def test_a_job_gives_the_same_bits_on_a_rank_that_has_run_others_and_stopped_some(
    small_data_root: Path, tmp_path: Path
) -> None:
    shared = small_spec("ebls")
    adapting = small_spec("bi-tied-15l", **{"evaluation.ttt": {"chunk_tokens": 512}, "evaluation.batch_sequences": 8})
    others = [(adapting, False), (small_spec("late-loop-3-5", **{"budget.steps": 1000}), True)]
    rank, mailbox = Rank(0, GangConfig(), no_store), MemoryMailbox()
    assert rank.run(shared, small_data_root, mailbox)
    expected = cold(shared, small_data_root, tmp_path / "cold")
    assert trace(mailbox) == expected
    for spec, stopped in others:
        other, mailbox = MemoryMailbox(), MemoryMailbox()
        if stopped:
            other.stop()
        assert rank.run(spec, small_data_root, other)
        closing = other.read(0).closing
        assert closing is not None and closing.outcome == ("stopped" if stopped else "succeeded")
        assert rank.run(shared, small_data_root, mailbox)
        assert trace(mailbox) == expected


def process_state() -> dict[str, object]:
    """What a job could change for all that come after it in its process."""
    return {
        "environment": dict(os.environ),
        "folder": Path.cwd(),
        "warnings": list(warnings.filters),
        "random": random.getstate(),
        "numpy": str(np.random.get_state()),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "gradients": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
    }


@pytest.mark.parametrize("recipe", ["ebls", "late-loop-3-5"])
def test_a_job_changes_nothing_for_its_process_but_torchs_generator(small_data_root: Path, recipe: str) -> None:
    rank = Rank(0, GangConfig(), no_store)
    rank.run(small_spec("laptop"), small_data_root, MemoryMailbox())  # loads, and sets the process's threads
    before = process_state()
    assert rank.run(small_spec(recipe), small_data_root, MemoryMailbox())
    assert process_state() == before


@told
@pytest.mark.soak
def test_real_trials_in_turn_leave_memory_flat(small_data_root: Path) -> None:
    recipes = ["laptop", "ebls", "naive-baseline", "depth-recurrence"]
    held = levels(small_data_root, recipes, trials=16)
    assert max(held[4:]) - held[3] < NOISE_BYTES, held


@told
@pytest.mark.soak
def test_two_hundred_trials_of_every_recipe_leave_memory_flat(small_data_root: Path) -> None:
    recipes = sorted(recipe_names())
    held = levels(small_data_root, recipes, trials=200)
    assert max(held[len(recipes) :]) - held[len(recipes) - 1] < NOISE_BYTES, held
