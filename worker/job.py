"""One attempt end to end: data, training, packing, and the score of what the artifact's bytes hold."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from worker.artifact import Packed, load, pack
from worker.calibrate import calibrate, require_window
from worker.checkpoint import Checkpoint
from worker.corpus import DEMO_DATASET, build_demo
from worker.data import Batches
from worker.diagnostics import diagnose, diagnosed_tokens
from worker.evaluate import Score, Validation, evaluate, open_validation
from worker.fit import Point, curve, fit, require_reachable
from worker.hardware import observed
from worker.inventory import count_parameters
from worker.model import Model, initialise
from worker.report import Reporter, TrialResult
from worker.rounding import round_weights
from worker.shape import FieldError
from worker.shards import Dataset, open_dataset
from worker.source import code_bytes
from worker.spec import TrialSpec
from worker.train import TrainingSummary, compile_pass, train
from worker.trainer import Job
from worker.ttt import adapt_and_score
from worker.world import World


def run(job: Job, reporter: Reporter) -> tuple[TrialResult, bytes] | None:
    """Train, pack and score the job's spec. Rank 0 gets the result and the artifact's bytes, the other ranks None.

    With several ranks the caller has joined torch's default process group, and on GPUs has set the current device. Only
    rank 0 uses its reporter. A directive to stop ends training early; the attempt is then packed and scored as it is.
    Raises DataError and FieldError (both ValueError) for data that does not suit the spec, before training; Diverged
    from training; and ValueError where the weights cannot be stored, or not in the bytes that the spec asks for.
    """
    spec, world = job.spec, _world(job)
    phase = reporter.phase if world.leads else _silent
    torch.manual_seed(spec.seed)
    phase("data")
    dataset = _open_data(job)
    vocab_size = spec.model.vocab_size
    plain = open_validation(dataset, vocab_size, spec.data.sequence_length, spec.evaluation.batch_sequences)
    validation = plain.of_length(spec.evaluated_length)
    require_window(dataset, spec)
    batches = Batches(dataset, spec.data, vocab_size, world)
    model = Model(spec.model, spec.sharing)
    initialise(model, spec.seed)
    require_reachable(model, spec.quantisation, code_bytes())
    _place(model, spec, batches, world, phase)
    phase("train")
    checkpoint = _checkpoint(job, world)

    def validate(trained: Model) -> float:
        return evaluate(trained, plain, world, spec.evaluation.validation_tokens).bpb

    summary, hardware = observed(
        world, lambda: train(model, spec, batches, world, reporter, validate, checkpoint=checkpoint)
    )
    spent = _Seconds()
    phase("evaluate")
    with spent.on("evaluate"):
        averages, before = _averaged(model, spec, summary, plain, world)
    phase("pack")
    with spent.on("pack"):
        packing = _pack(model, dataset, spec) if world.leads else None
    phase("evaluate")
    data = world.lead_bytes(packing.packed.data if packing else b"")
    loaded = load(data).to(world.device)
    with spent.on("evaluate"):
        scores = _scores(loaded, spec, plain, validation, world)
    diagnostics = diagnose(model, loaded, spec, plain, world)
    if packing is None:
        return None
    worth = _worth(packing, plain, spec, world)
    diagnostics |= {**_compared(dataset, scores), **worth, "averages": averages, "codec": packing.packed.codec}
    if checkpoint is not None:
        checkpoint.remove()
    result = _result(spec, summary, before, scores, packing.packed, spent, diagnostics)
    return result.model_copy(update={"hardware": hardware}), data


def _world(job: Job) -> World:
    if job.spec.gang.ranks != job.ranks:
        raise FieldError("gang.ranks", job.spec.gang.ranks, f"must be the number of processes that run it, {job.ranks}")
    if job.spec.gang.device == "cpu":
        return World(job.rank, job.ranks, torch.device("cpu"))
    if not torch.cuda.is_available():
        raise FieldError("gang.device", "gpu", "no CUDA device is available here; use cpu")
    return World(job.rank, job.ranks, torch.device("cuda", torch.cuda.current_device()))


def _place(model: Model, spec: TrialSpec, batches: Batches, world: World, phase: Callable[[str], None]) -> None:
    """Put the model where it trains, on a GPU compiled."""
    model.to(world.device)
    if world.device.type == "cuda":
        phase("compile")
        compile_pass(model, spec, batches, world)


def _checkpoint(job: Job, world: World) -> Checkpoint | None:
    every_seconds = job.spec.limits.checkpoint_seconds
    return None if every_seconds is None else Checkpoint(job.data_root, job.spec, every_seconds, world)


def _open_data(job: Job) -> Dataset:
    """The spec's dataset. The demo corpus is built where it is missing: it needs no download."""
    if job.spec.data.dataset == DEMO_DATASET:
        build_demo(job.data_root)
    return open_dataset(job.data_root, job.spec.data.dataset)


@dataclass
class _Seconds:
    """Wallclock by phase, summed over its parts."""

    evaluate: float = 0.0
    pack: float = 0.0

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """Count what happens inside for the phase."""
        started = time.perf_counter()
        yield
        setattr(self, name, getattr(self, name) + time.perf_counter() - started)


@dataclass(frozen=True)
class _Packing:
    """The artifact, and what the trained model weighs and scores at other sizes, to be asked for once it is scored."""

    packed: Packed
    curve: Callable[[Callable[[Model], float]], tuple[Point, ...]] | None


def _averaged(
    model: Model, spec: TrialSpec, summary: TrainingSummary, validation: Validation, world: World
) -> tuple[dict[str, float], Score]:
    """BPB of the last weights and of each average, and the score of those that the spec applies, now in the model.

    An average that was never taken, such as SWA's where training ended early, leaves the last weights.
    """
    last = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = {"last": last, **summary.averages}
    applied = spec.averaging.apply if spec.averaging.apply in weights else "last"
    scores: dict[str, Score] = {}
    for name in sorted(weights, key=lambda name: name == applied):  # the applied one last
        model.load_state_dict(weights[name])
        scores[name] = evaluate(model, validation, world)
    return {name: scores[name].bpb for name in weights}, scores[applied]


def _pack(model: Model, dataset: Dataset, spec: TrialSpec) -> _Packing:
    """The artifact: on rank 0 alone, since every rank has the same weights."""
    quantisation, calibration = spec.quantisation, calibrate(model, dataset, spec)
    if quantisation.target_bytes is None:
        return _Packing(pack(model, quantisation, round_weights(model, quantisation, calibration)), None)
    # By the entropy coder, in seconds: zstd and Brotli take minutes for a curve, and come within 2% of it.
    fast = quantisation.model_copy(update={"codec": "ans", "level": None})
    return _Packing(
        fit(model, quantisation, calibration, code_bytes()).packed,
        lambda score: curve(model, fast, calibration, code_bytes(), score),
    )


def _scores(
    loaded: Model, spec: TrialSpec, plain: Validation, validation: Validation, world: World
) -> dict[str, Score]:
    """The artifact's scores by way of scoring; the last is the one that counts."""
    evaluation = spec.evaluation
    scores = {"plain": evaluate(loaded, plain, world)}
    if evaluation.stride is not None or validation.sequence_length != plain.sequence_length:
        scores["sliding" if evaluation.stride is not None else "long"] = evaluate(
            loaded, validation, world, stride=evaluation.stride
        )
    if evaluation.ttt is not None:
        scores["ttt"] = adapt_and_score(loaded, validation, world, evaluation.ttt, evaluation.stride)
    return scores


def _worth(packing: _Packing, validation: Validation, spec: TrialSpec, world: World) -> dict[str, Any]:
    """What a byte is worth: the trained model's BPB by artifact bytes, on as much text as other diagnostics."""
    if packing.curve is None:
        return {}
    alone = World(0, 1, world.device)
    limit = diagnosed_tokens(spec)
    points = packing.curve(lambda model: evaluate(model.to(world.device), validation, alone, limit).bpb)
    return {"bytes_curve": [asdict(point) for point in points]}


def _result(
    spec: TrialSpec,
    summary: TrainingSummary,
    before: Score,
    scores: dict[str, Score],
    packed: Packed,
    spent: _Seconds,
    diagnostics: dict[str, Any],
) -> TrialResult:
    code, final = code_bytes(), list(scores.values())[-1]
    return TrialResult(
        val_bpb=final.bpb,
        val_bpb_prequant=before.bpb,
        val_loss=final.loss,
        parameters=count_parameters(spec.model, spec.sharing),
        model_bytes=len(packed.data),
        code_bytes=code,
        artifact_bytes=len(packed.data) + code,
        artifact_sha256=packed.sha256,
        steps=summary.steps,
        tokens=summary.tokens,
        train_seconds=summary.train_seconds,
        evaluate_seconds=spent.evaluate,
        pack_seconds=spent.pack,
        step_seconds=summary.step_seconds,
        stopped=summary.stopped,
        bytes_by_class=packed.bytes_by_class,
        diagnostics=diagnostics,
    )


def _compared(dataset: Dataset, scores: dict[str, Score]) -> dict[str, Any]:
    """The scores by way of scoring, and what they are measured against."""
    final = list(scores.values())[-1]
    return {
        "scores": {name: score.bpb for name, score in scores.items()},
        "val_tokens": final.tokens,
        "val_bytes": final.bytes,
        "order0_bpb": dataset.stats.get("val_order0_bits_per_byte"),
        "torch": torch.__version__,
    }


def _silent(name: str) -> None:
    """What a rank that does not speak says."""
