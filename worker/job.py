"""One attempt end to end: data, training, packing, and the score of what the artifact's bytes hold."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from worker.artifact import Packed, load, pack
from worker.corpus import DEMO_DATASET, build_demo
from worker.data import Batches
from worker.evaluate import Score, Validation, evaluate, open_validation
from worker.model import Model, initialise
from worker.report import Reporter, TrialResult
from worker.shape import FieldError
from worker.shards import Dataset, open_dataset
from worker.sharing import count_parameters
from worker.source import code_bytes
from worker.spec import TrialSpec
from worker.train import TrainingSummary, train
from worker.world import World


@dataclass(frozen=True)
class Job:
    """One attempt, as one rank of its gang sees it."""

    spec: TrialSpec
    data_root: Path
    rank: int = 0
    ranks: int = 1


def run(job: Job, reporter: Reporter) -> tuple[TrialResult, bytes] | None:
    """Train, pack and score the job's spec. Rank 0 gets the result and the artifact's bytes, the other ranks None.

    With several ranks the caller has joined torch's default process group, and on GPUs has set the current device. Only
    rank 0 uses its reporter. A directive to stop ends training early; the attempt is then packed and scored as it is.
    Raises DataError and FieldError (both ValueError) for data that does not suit the spec, before training; Diverged
    from training; and ValueError where the weights cannot be stored.
    """
    spec, world = job.spec, _world(job)
    phase = reporter.phase if world.leads else _silent
    torch.manual_seed(spec.seed)
    phase("data")
    dataset = _open_data(job)
    vocab_size = spec.model.vocab_size
    validation = open_validation(dataset, vocab_size, spec.data.sequence_length, spec.evaluation.batch_sequences)
    batches = Batches(dataset, spec.data, vocab_size, world)
    phase("train")
    model = Model(spec.model, spec.sharing)
    initialise(model, spec.seed)
    model.to(world.device)

    def validate(trained: Model) -> float:
        return evaluate(trained, validation, world, spec.evaluation.validation_tokens).bpb

    summary = train(model, spec, batches, world, reporter, validate)
    phase("evaluate")
    before, before_seconds = _scored(model, validation, world)
    phase("pack")
    packed, pack_seconds = _packed(model, spec, world)
    gammas = model.gammas()
    del model
    phase("evaluate")
    data = _broadcast(packed.data if packed else b"", world)
    after, after_seconds = _scored(load(data).to(world.device), validation, world)
    if packed is None:
        return None
    seconds = (before_seconds + after_seconds, pack_seconds)
    return _result(spec, summary, (before, after), packed, seconds, _diagnostics(dataset, after, gammas)), data


def _world(job: Job) -> World:
    if job.spec.gang.ranks != job.ranks:
        raise FieldError("gang.ranks", job.spec.gang.ranks, f"must be the number of processes that run it, {job.ranks}")
    if job.spec.gang.device == "cpu":
        return World(job.rank, job.ranks, torch.device("cpu"))
    if not torch.cuda.is_available():
        raise FieldError("gang.device", "gpu", "no CUDA device is available here; use cpu")
    return World(job.rank, job.ranks, torch.device("cuda", torch.cuda.current_device()))


def _open_data(job: Job) -> Dataset:
    """The spec's dataset. The demo corpus is built where it is missing: it needs no download."""
    if job.spec.data.dataset == DEMO_DATASET:
        build_demo(job.data_root)
    return open_dataset(job.data_root, job.spec.data.dataset)


def _scored(model: Model, validation: Validation, world: World) -> tuple[Score, float]:
    started = time.perf_counter()
    score = evaluate(model, validation, world)
    return score, time.perf_counter() - started


def _packed(model: Model, spec: TrialSpec, world: World) -> tuple[Packed | None, float]:
    """The artifact and the seconds it took: on rank 0 alone, since every rank has the same weights."""
    if not world.leads:
        return None, 0.0
    started = time.perf_counter()
    packed = pack(model, spec.quantisation)
    return packed, time.perf_counter() - started


def _broadcast(data: bytes, world: World) -> bytes:
    """Rank 0's bytes on every rank. Travels between the hosts, as the world's other messages do."""
    if world.ranks == 1:
        return data
    (size,) = world.lead(len(data))
    message = torch.frombuffer(bytearray(data or bytes(int(size))), dtype=torch.uint8)
    dist.broadcast(message, src=0)
    return message.numpy().tobytes()


def _result(
    spec: TrialSpec,
    summary: TrainingSummary,
    scores: tuple[Score, Score],
    packed: Packed,
    seconds: tuple[float, float],
    diagnostics: dict[str, Any],
) -> TrialResult:
    before, after = scores
    code = code_bytes()
    return TrialResult(
        val_bpb=after.bpb,
        val_bpb_prequant=before.bpb,
        val_loss=after.loss,
        parameters=count_parameters(spec.model, spec.sharing),
        model_bytes=len(packed.data),
        code_bytes=code,
        artifact_bytes=len(packed.data) + code,
        artifact_sha256=packed.sha256,
        steps=summary.steps,
        tokens=summary.tokens,
        train_seconds=summary.train_seconds,
        evaluate_seconds=seconds[0],
        pack_seconds=seconds[1],
        step_seconds=summary.step_seconds,
        stopped=summary.stopped,
        bytes_by_class=packed.bytes_by_class,
        diagnostics=diagnostics,
    )


def _diagnostics(dataset: Dataset, score: Score, gammas: dict[str, list[float]]) -> dict[str, Any]:
    """Gates by path and virtual layer, and what the score is measured against."""
    return {
        "gammas": gammas,
        "val_tokens": score.tokens,
        "val_bytes": score.bytes,
        "order0_bpb": dataset.stats.get("val_order0_bits_per_byte"),
        "torch": torch.__version__,
    }


def _silent(name: str) -> None:
    """What a rank that does not speak says."""
