"""One attempt end to end: data, training, packing, and the score of what the artifact's bytes hold."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from worker.artifact import Content, content_of, read
from worker.calibrate import calibrate, require_window
from worker.checkpoint import Checkpoint
from worker.corpus import DEMO_DATASET, build_demo, has_dataset
from worker.data import Batches
from worker.diagnostics import diagnose, diagnosed_tokens
from worker.evaluate import Score, Validation, evaluate, open_validation
from worker.fit import Point, curve, fit, require_reachable
from worker.hardware import observed
from worker.inventory import count_parameters
from worker.logbook import Logbook
from worker.model import Model, initialise
from worker.report import Hardware, Reporter, TrialResult
from worker.rounding import round_weights
from worker.shape import FieldError
from worker.shards import DataError, Dataset, open_dataset
from worker.source import code_bytes
from worker.spec import TrialSpec
from worker.train import TrainingSummary, compile_pass, train
from worker.trainer import Job, Produced
from worker.ttt import adapt_and_score
from worker.world import World
from worker.writing import Written, begin


def run(job: Job, reporter: Reporter) -> Produced:
    """Train, pack and score the job's spec. Rank 0 gets the result and the artifact's bytes, the other ranks None.

    What is scored is the artifact's content, on all ranks, while rank 0 compresses it in another thread; the bytes are
    then read back, and must give every tensor that was scored, bit for bit. Where the job allows it and compression is
    still going on once everything has its score, rank 0 gets a Finish instead. Only `quantisation.target_bytes` needs
    the bytes first, to choose the steps by.

    With several ranks the caller has joined torch's default process group, and on GPUs has set the current device. Only
    rank 0 uses its reporter. A directive to stop ends training early; the attempt is then packed and scored as it is.
    Raises DataError and FieldError (both ValueError) for data that does not suit the spec, before training; Diverged
    from training; ValueError where the weights cannot be stored, or not in the bytes that the spec asks for; and
    Miswritten where the bytes do not hold what was scored.
    """
    spec, world = job.spec, _world(job)
    book = Logbook(reporter if world.leads else None)
    torch.manual_seed(spec.seed)
    book.phase("data")
    text = _open_text(job, book.say)
    book.data(text.dataset, text.validation.targets)
    book.model(spec, world.ranks, world.device.type)
    batches = Batches(text.dataset, spec.data, spec.model.vocab_size, world)
    model = Model(spec.model, spec.sharing)
    initialise(model, spec.seed)
    require_reachable(model, spec.quantisation, code_bytes())
    _place(model, spec, batches, world, book)
    book.phase("train")
    checkpoint = _checkpoint(job, world)

    def validate(trained: Model) -> float:
        return evaluate(trained, text.plain, world, spec.evaluation.validation_tokens).bpb

    summary, hardware = observed(
        world, lambda: train(model, spec, batches, world, reporter, validate, checkpoint=checkpoint)
    )
    spent = (summary.steps, summary.tokens, summary.train_seconds)
    book.trained(*spent, summary.train_loss, stopped=summary.stopped)
    book.hardware(hardware)
    rest = _conclude(spec, model, summary, text, world, book)
    if rest is None:
        return None
    finish = partial(_finish, rest, hardware, checkpoint, book)
    return finish if job.defer and not rest.written.done() else finish()


def check(job: Job) -> None:
    """Raise what `run` would for the job's data, before any rank is free for it; the demo corpus is there afterwards.

    May be called in another thread while this process trains. What it opens stays open for `run`.
    """
    _open_text(job)


def _world(job: Job) -> World:
    if job.spec.gang.ranks != job.ranks:
        raise FieldError("gang.ranks", job.spec.gang.ranks, f"must be the number of processes that run it, {job.ranks}")
    if job.spec.gang.device == "cpu":
        return World(job.rank, job.ranks, torch.device("cpu"))
    if not torch.cuda.is_available():
        raise FieldError("gang.device", "gpu", "no CUDA device is available here; use cpu")
    return World(job.rank, job.ranks, torch.device("cuda", torch.cuda.current_device()))


def _place(model: Model, spec: TrialSpec, batches: Batches, world: World, book: Logbook) -> None:
    """Put the model where it trains, on a GPU compiled."""
    model.to(world.device)
    if world.device.type == "cuda":
        book.phase("compile")
        began = time.perf_counter()
        compile_pass(model, spec, batches, world)
        book.say(f"compiled in {time.perf_counter() - began:.1f} s")


def _checkpoint(job: Job, world: World) -> Checkpoint | None:
    every_seconds = job.spec.limits.checkpoint_seconds
    return None if every_seconds is None else Checkpoint(job.data_root, job.spec, every_seconds, world)


@dataclass(frozen=True)
class _Text:
    """The spec's dataset, and its validation split in plain windows and in those of the spec's evaluation."""

    dataset: Dataset
    plain: Validation
    validation: Validation


def _open_text(job: Job, say: Callable[[str], None] = lambda line: None) -> _Text:
    """Checked against the spec. The demo corpus is built where it is missing: it needs no download. One that is there
    but damaged is an error: trials may have been scored on it, and another Python's would be other text."""
    spec, root, name = job.spec, job.data_root, job.spec.data.dataset
    length, size = spec.data.sequence_length, spec.evaluation.batch_sequences
    try:
        if name == DEMO_DATASET and not has_dataset(root, name):
            build_demo(root, say)
        dataset = open_dataset(root, name)
        plain = open_validation(dataset, spec.model.vocab_size, length, size)
    except DataError as error:
        from worker.fineweb import command_for  # here: its client of the hub takes a while to load

        raise DataError(f"data.dataset is {name!r}: {error}; put it right with: {command_for(root, name)}") from None
    validation = plain.of_length(spec.evaluated_length)
    require_window(dataset, spec)
    return _Text(dataset, plain, validation)


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
    """The trained model rounded; its artifact, once it is written; and what the model weighs and scores at other sizes,
    to be asked for once it is scored."""

    content: Content
    written: Future[Written]
    curve: Callable[[Callable[[Model], float]], tuple[Point, ...]] | None


@dataclass(frozen=True)
class _Rest:
    """A job that has all its scores, and wants nothing but its artifact's bytes. Holds no tensor."""

    spec: TrialSpec
    summary: TrainingSummary
    before: Score
    scores: dict[str, Score]
    diagnostics: dict[str, Any]
    spent: _Seconds
    written: Future[Written]


def _conclude(
    spec: TrialSpec, model: Model, summary: TrainingSummary, text: _Text, world: World, book: Logbook
) -> _Rest | None:
    """Score the trained model, rounded first, so that its bytes are written meanwhile. None but on rank 0."""
    spent, weights = _Seconds(), _weights(model, summary)
    applied = spec.averaging.apply if spec.averaging.apply in weights else "last"
    model.load_state_dict(weights[applied])
    book.phase("pack")
    with spent.on("pack"):
        packing = _pack(model, text.dataset, spec) if world.leads else None
    book.say(f"the weights are rounded, in {spent.pack:.1f} s; {spec.quantisation.codec} compresses them")
    book.phase("evaluate")
    loaded = _shared(packing.content if packing else None, model, world)
    with spent.on("evaluate"):
        averages = _averaged(model, weights, applied, text.plain, world)
        scores = _scores(loaded, spec, text, world)
    diagnostics = diagnose(model, loaded, spec, text.plain, world)
    if packing is None:
        return None
    bpb = {name: averages[name].bpb for name in weights}
    book.scores(bpb, applied, {name: score.bpb for name, score in scores.items()})
    diagnostics |= {**_compared(text.dataset, scores), **_worth(packing, text.plain, spec, world), "averages": bpb}
    book.phase("pack")
    kept = replace(summary, averages={})
    return _Rest(spec, kept, averages[applied], scores, diagnostics, spent, packing.written)


def _weights(model: Model, summary: TrainingSummary) -> dict[str, dict[str, Tensor]]:
    """The last weights and each average. One that was never taken is not there, as SWA's where training ended early."""
    last = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return {"last": last, **summary.averages}


def _averaged(
    model: Model, weights: dict[str, dict[str, Tensor]], applied: str, validation: Validation, world: World
) -> dict[str, Score]:
    """The score of each of the weights; the model has those applied again afterwards."""
    scores: dict[str, Score] = {}
    for name in sorted(weights, key=lambda name: name == applied):  # the applied one last
        model.load_state_dict(weights[name])
        scores[name] = evaluate(model, validation, world)
    return scores


def _pack(model: Model, dataset: Dataset, spec: TrialSpec) -> _Packing:
    """Round the model, and start to write its artifact: on rank 0 alone, since every rank has the same weights."""
    quantisation, calibration = spec.quantisation, calibrate(model, dataset, spec)
    if quantisation.target_bytes is None:
        content = content_of(model, quantisation, round_weights(model, quantisation, calibration))
        return _Packing(content, begin(content, quantisation), None)
    # By the entropy coder, in seconds: zstd and Brotli take minutes for a curve, and come within 2% of it.
    fast = quantisation.model_copy(update={"codec": "ans", "level": None})
    packed = fit(model, quantisation, calibration, code_bytes()).packed
    written: Future[Written] = Future()
    written.set_result(Written(packed, 0.0))  # what is scored is read from it
    return _Packing(read(packed.data), written, lambda score: curve(model, fast, calibration, code_bytes(), score))


def _shared(content: Content | None, model: Model, world: World) -> Model:
    """Rank 0's content as a model on every rank, the same bits on each."""
    loaded = (content.build() if content else Model(model.config, model.sharing)).to(world.device)
    if world.ranks > 1:
        for tensor in loaded.state_dict().values():
            dist.broadcast(tensor, src=0)
    return loaded


def _scores(loaded: Model, spec: TrialSpec, text: _Text, world: World) -> dict[str, Score]:
    """The artifact's scores by way of scoring; the last is the one that counts."""
    evaluation, plain, validation = spec.evaluation, text.plain, text.validation
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


def _finish(rest: _Rest, hardware: Hardware, checkpoint: Checkpoint | None, book: Logbook) -> tuple[TrialResult, bytes]:
    """The result and the artifact's bytes, once they are written and verified. With its arguments, a Finish."""
    written = rest.written.result()
    packed, summary, final = written.packed, rest.summary, list(rest.scores.values())[-1]
    result = TrialResult(
        val_bpb=final.bpb,
        val_bpb_prequant=rest.before.bpb,
        val_loss=final.loss,
        parameters=count_parameters(rest.spec.model, rest.spec.sharing),
        model_bytes=len(packed.data),
        code_bytes=code_bytes(),
        artifact_bytes=len(packed.data) + code_bytes(),
        artifact_sha256=packed.sha256,
        steps=summary.steps,
        tokens=summary.tokens,
        train_seconds=summary.train_seconds,
        evaluate_seconds=rest.spent.evaluate,
        pack_seconds=rest.spent.pack + written.seconds,
        step_seconds=summary.step_seconds,
        stopped=summary.stopped,
        bytes_by_class=packed.bytes_by_class,
        diagnostics={**rest.diagnostics, "codec": packed.codec},
        hardware=hardware,
    )
    if checkpoint is not None:
        checkpoint.remove()
    book.result(result)
    return result, packed.data


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
