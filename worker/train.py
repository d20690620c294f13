"""Training: one spec's model on one gang's data until its budget is spent."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor

from worker.averaging import Averages
from worker.checkpoint import Checkpoint, Part
from worker.course import Course, Stopwatch
from worker.curve import Curve
from worker.model import Model
from worker.optim import Optimizer
from worker.qat import fake_quantised
from worker.report import Reporter
from worker.schedule import learning_rate_multiplier
from worker.spec import TrialSpec
from worker.world import World

LAG_STEPS = 3  # how far a GPU's host runs ahead of the losses that it reads


class Diverged(ArithmeticError):
    """Training produced a loss, a score or a weight that is not a finite number. `step` counts from 1."""

    def __init__(self, step: int, loss: float) -> None:
        super().__init__(f"training diverged: the loss is {loss} at step {step}; a lower learning rate may hold")
        self.step = step
        self.loss = loss


class BatchSource(Protocol):
    """Where a rank's data comes from."""

    def batch(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This rank's share of step `step` (from 0): micro-batches of tokens and targets, each (b, T) int64."""
        ...


@dataclass(frozen=True)
class TrainingSummary:
    """What training took, lost attempts included up to the checkpoints that were gone on from.

    Tokens are those of all ranks; seconds exclude validation and the writing of checkpoints.
    """

    steps: int
    tokens: int
    train_seconds: float
    step_seconds: float
    """Median wallclock of a step."""
    stopped: bool
    """True where a directive ended training before the budget did."""
    train_loss: float
    """Of the last step, in nats, penalties included."""
    averages: dict[str, dict[str, Tensor]]
    """By average, "ema" and "swa" where there is one, the state dict that the trained model could load instead."""


def train(
    model: Model,
    spec: TrialSpec,
    data: BatchSource,
    world: World,
    reporter: Reporter,
    validate: Callable[[Model], float],
    clock: Callable[[], float] = time.perf_counter,
    checkpoint: Checkpoint | None = None,
) -> TrainingSummary:
    """Train `model` in place, the same on every rank of `world`. Raises Diverged, within LAG_STEPS, on every rank.

    `validate` gives a score in bits per byte of the layers that run by then, with all ranks taking part; afterwards all
    layers run. Rank 0 alone uses `reporter`, and its `clock` (in seconds) counts. Equal specs, data and initial weights
    give equal losses, bit for bit, on a CPU of one kind wherever the budget is not in seconds, with `checkpoint` too.
    """
    optimizer, averages = Optimizer(model, spec, world), Averages(model, spec.averaging)
    course, curve = Course(spec), Curve(spec, reporter if world.leads else None)
    parts: tuple[Part, ...] = (model, optimizer, averages, course, curve)
    if checkpoint is not None:
        checkpoint.resume(parts)
    losses, watch = _Losses(world.device), Stopwatch(world.device, clock, course.progress.seconds)
    progress, fraction, stopped = course.progress, course.fraction, False
    while fraction < 1 and not stopped:
        multiplier = learning_rate_multiplier(spec, progress)
        loss = _backward(model, spec, fraction, data.batch(progress.steps), world)
        optimizer.step(progress.steps, multiplier)
        averages.update(progress.steps + 1, multiplier)
        losses.add(progress.steps + 1, loss)

        seconds, stop = world.lead(watch.seconds(), curve.told_to_stop())
        progress, fraction = course.advance(seconds), course.fraction
        stopped = bool(stop) and fraction < 1

        metrics: dict[str, float] = {}
        report, validation = curve.due(fraction)
        if report or validation or progress.steps == 1 or stopped:
            # Of a model that has diverged there is no loss, and no score.
            metrics |= {"train_loss": losses.latest(), "lr_multiplier": multiplier, "fraction": min(fraction, 1.0)}
        if validation and not stopped:
            with watch.paused():
                metrics["val_bpb"] = _finite(progress.steps, validate(model))
        curve.add(progress, metrics)
        if checkpoint is not None and not stopped and checkpoint.due(course):
            with watch.paused():
                checkpoint.write(parts)
    model.progress_to(1.0)
    _require_finite(model, progress.steps)
    return TrainingSummary(*course.spent(), stopped, losses.latest(), averages.weights())


def compile_pass(model: Model, spec: TrialSpec, data: BatchSource, world: World) -> None:
    """Compile the pass for a GPU, and run it on both sides of late tying, before any second of the budget counts.

    Changes no weight. The layers that run are Python integers to the compiler, so each side is a graph of its own.
    Tests trace the pass on a CPU; no test has compiled it for a GPU yet.
    """
    model.compile(fullgraph=True, dynamic=False)
    for fraction in (0.0, 1.0):
        _backward(model, spec, fraction, data.batch(0), world)
    for parameter in model.parameters():
        parameter.grad = None


def _backward(
    model: Model, spec: TrialSpec, fraction: float, batch: Iterator[tuple[Tensor, Tensor]], world: World
) -> Tensor:
    """Leave in every parameter the gradient of the global batch's mean loss, and return that loss.

    The share of the budget that is spent says which layers run, and whether they see quantised weights. A micro-batch
    counts by its sequences, so the mean is the same however ranks and micro-batches cut the batch; but a blend's
    penalty is of the mean share in each micro-batch, as in its source.
    """
    share = spec.data.batch_sequences // world.ranks
    total, sequences = torch.zeros((), device=world.device), 0
    model.progress_to(fraction)
    rounds = spec.quantisation.qat_from is not None and fraction >= spec.quantisation.qat_from
    with fake_quantised(model, spec.quantisation) if rounds else nullcontext():
        for tokens, targets in batch:
            tokens, targets = tokens.to(world.device, non_blocking=True), targets.to(world.device, non_blocking=True)
            loss = model(tokens, targets, spec.objective.label_smoothing) * (len(tokens) / share)
            loss.backward()
            total += loss.detach()
            sequences += len(tokens)
    assert sequences == share, f"the data gave {sequences} sequences of {share}"
    world.all_reduce_mean([total, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
    return total


class _Losses:
    """Each step's loss, on a GPU read only LAG_STEPS later, so that the host need not wait for the step just begun."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._unread: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()
        self._latest = float("nan")

    def add(self, step: int, loss: Tensor) -> None:
        """Take a step's loss. Raises Diverged for one that can be read by now and is not finite."""
        host, event = loss.to("cpu", non_blocking=True), None
        if self._device.type == "cuda":
            event = torch.cuda.current_stream(self._device).record_event()
        self._unread.append((step, host, event))
        self._read(LAG_STEPS if event is not None else 0)

    def latest(self) -> float:
        """The last loss taken. Waits for it; raises Diverged if it, or one before it, is not finite."""
        self._read(0)
        return self._latest

    def _read(self, leave: int) -> None:
        while len(self._unread) > leave:
            step, host, event = self._unread.popleft()
            if event is not None:
                event.synchronize()
            self._latest = _finite(step, host.item())


def _finite(step: int, value: float) -> float:
    if not isfinite(value):
        raise Diverged(step, value)
    return value


def _require_finite(model: Model, step: int) -> None:
    """The last update has no loss after it that would show what it did."""
    for parameter in model.parameters():
        _finite(step, float(parameter.detach().sum()))
