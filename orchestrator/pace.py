"""How long a trial will take, from what others of its study took on the same kind of device."""

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, exp, inf, log, log2
from typing import NamedTuple

import numpy as np

from orchestrator.lifecycle import TrialState
from orchestrator.regression import Forecast, Observation, Regression, Vector
from orchestrator.study import Trial
from worker.inventory import tensor_inventory
from worker.report import TrialResult
from worker.shape import ModelConfig
from worker.sharing import SharingConfig
from worker.spec import TrialSpec

# Of an H100 in training, before any trial has shown it: the systems of the literature reach 196 to 305 TFLOP/s.
GPU_FLOPS = 220e12
GPU_DEVIATION = 0.6  # of its logarithm: other GPUs are two to three times as slow or as fast
PRIOR_FREEDOM = 30
SPREAD = 0.3  # log-ratio of seconds in one study that is assumed as if a few trials had shown it
SLACK = 0.5  # log-ratio from what others show beyond which seconds may be odd
RECENT = 100  # trials of a kind that count, the latest: machines change
TAIL = 0.05  # of each side: the interval holds 90%


@dataclass(frozen=True)
class Seconds:
    """Expected, with a 90% interval; all None where nothing is known."""

    expected: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Timing:
    """A mean training step, how many of them the budget allows, and what training and scoring take."""

    step_seconds: float | None = None
    steps: int | None = None
    train: Seconds = Seconds()
    evaluate: Seconds = Seconds()


class Pace:
    """The speeds of one study's gangs, by kind of device. The same trials in any order make the same pace."""

    def __init__(self) -> None:
        self._observed: dict[_Kind, list[tuple[int, Observation]]] = {}  # by trial number
        self._latest: dict[str, tuple[int, str]] = {}  # a gang's device -> its last trial's number, and the model
        self._fitted: dict[_Kind, Regression] = {}

    def learn(self, trial: Trial) -> None:
        """Take in a trial that has ended, once."""
        result, spec = trial.result, trial.spec
        if result is None or trial.origin == "imported" or not result.steps or not result.train_seconds:
            return
        device = result.hardware.device if result.hardware else spec.gang.device
        self._latest[spec.gang.device] = max(self._latest.get(spec.gang.device, (-1, "")), (trial.number, device))
        whole = trial.state is TrialState.COMPLETE
        ran = spec if whole else _as_measured(trial, result)
        # One that was stopped may have seen the first tying alone.
        if ran is not None and (whole or not spec.sharing.tying.from_fraction):
            self._put(_Kind(device), trial, ran, result.train_seconds / result.steps, _train_flops)
        if whole and result.evaluate_seconds:
            self._put(_Kind(device, spec.data.dataset), trial, spec, result.evaluate_seconds, _evaluate_flops)

    def timing(self, spec: TrialSpec, configuration: Callable[[], str]) -> Timing:
        """Of a spec, on the model of device that the last trial with its kind of gang ran on."""
        _, device = self._latest.get(spec.gang.device, (-1, ""))
        flops, pace = _train_flops(spec), self._forecast(_Kind(device), spec, configuration)
        if pace is None and spec.gang.device == "gpu":
            pace = Forecast(np.array([-log(GPU_FLOPS)]), GPU_DEVIATION, PRIOR_FREEDOM, 0.0)
        step = _seconds(pace, flops)
        scoring = self._forecast(_Kind(device, spec.data.dataset), spec, configuration)
        return Timing(
            step.expected,
            _steps(spec, step.expected),
            Seconds(*(_train_seconds(spec, each) for each in (step.expected, step.low, step.high))),
            _seconds(scoring, _evaluate_flops(spec)),
        )

    def _put(
        self, kind: "_Kind", trial: Trial, ran: TrialSpec, seconds: float, flops_of: Callable[[TrialSpec], float]
    ) -> None:
        observed = self._observed.setdefault(kind, [])
        if len(observed) == RECENT and trial.number < observed[0][0]:
            return
        ratio = log(seconds / flops_of(ran))
        configuration = trial.spec_hash if ran is trial.spec else ran.canonical_hash
        new = Observation(_features(ran), configuration, np.array([ratio]))
        insort(observed, (trial.number, new), key=lambda each: each[0])
        del observed[:-RECENT]
        self._fitted.pop(kind, None)

    def _forecast(self, kind: "_Kind", spec: TrialSpec, configuration: Callable[[], str]) -> Forecast | None:
        if kind not in self._observed:
            return None
        if kind not in self._fitted:
            self._fitted[kind] = Regression([each for _, each in self._observed[kind]], SPREAD, SLACK)
        return self._fitted[kind].forecast(_features(spec), configuration)


class _Kind(NamedTuple):
    """What seconds are comparable on: a model of device; of scoring, with the text that is scored."""

    device: str
    dataset: str | None = None


def _as_measured(trial: Trial, result: TrialResult) -> TrialSpec | None:
    """The spec of a trial that has not ended whole, on the ranks that its result is of: a cheap rung may have fewer.
    None where they are not known."""
    gang = trial.spec.gang
    ranks = gang.ranks if result.hardware is None else result.hardware.ranks
    if ranks == gang.ranks:
        return None if result.hardware is None and ranks > 1 else trial.spec
    return trial.spec.model_copy(update={"gang": gang.model_copy(update={"ranks": ranks})})


def _seconds(forecast: Forecast | None, flops: float) -> Seconds:
    """Of so many floating-point operations."""
    if forecast is None:
        return Seconds()
    expected = flops * exp(forecast.ratios[0])
    width = exp(forecast.quantile(1 - TAIL))
    return Seconds(expected, expected / width, expected * width)


def _steps(spec: TrialSpec, step_seconds: float | None) -> int | None:
    """Steps until the first limit of the budget; None where that depends on a step's seconds, which are not known."""
    counted = _counted_steps(spec)
    if spec.budget.seconds is None:
        return int(counted)
    return None if step_seconds is None else int(min(counted, ceil(spec.budget.seconds / step_seconds)))


def _train_seconds(spec: TrialSpec, step_seconds: float | None) -> float | None:
    """As long as the budget's first limit takes; its last step's excess aside, which caps forgive."""
    counted, limit = _counted_steps(spec), spec.budget.seconds
    if step_seconds is None:
        return limit if counted == inf else None
    return counted * step_seconds if limit is None else min(counted * step_seconds, limit)


def _counted_steps(spec: TrialSpec) -> float:
    """Steps until the first limit that is not of seconds."""
    by_tokens = inf if spec.budget.tokens is None else ceil(spec.budget.tokens / spec.data.batch_tokens)
    return min(spec.budget.steps or inf, by_tokens)


def _train_flops(spec: TrialSpec) -> float:
    """Of one step, for each rank: a backward pass is two forward ones. Before it switches on, the tying map is not
    repeated."""
    sharing = spec.sharing
    late = sharing.tying.from_fraction
    layers = sharing.unique_blocks * late + sharing.virtual_layers * (1 - late)
    return 3 * _token_flops(spec, layers, spec.data.sequence_length) * spec.data.batch_tokens / spec.gang.ranks


def _evaluate_flops(spec: TrialSpec) -> float:
    """Of all final scores, for each token of the validation text and each rank: plain windows of every average before
    packing and of the artifact, windows that overlap, and those with their training."""
    evaluation, averages = spec.evaluation, spec.averaging
    layers, window = spec.sharing.virtual_layers, spec.evaluated_length
    plain = _token_flops(spec, layers, spec.data.sequence_length)
    long, overlap = _token_flops(spec, layers, window), window / (evaluation.stride or window)
    total = plain * (2 + (averages.ema_decay > 0) + (averages.swa_every > 0))
    if evaluation.stride is not None or window != spec.data.sequence_length:
        total += long * overlap
    if evaluation.ttt is not None:
        total += long * (overlap + 3 * evaluation.ttt.epochs)
    return total / spec.gang.ranks


def _token_flops(spec: TrialSpec, layers: float, length: int) -> float:
    """Of a forward pass, for each token: two for each weight that is applied to it, and causal attention's."""
    block, lora = _weights(spec.model, spec.sharing)
    width = spec.model.width
    head = spec.model.vocab_size * width
    return 2 * (block * layers + lora * layers / spec.sharing.virtual_layers + head) + 2 * length * width * layers


@lru_cache(maxsize=2048)
def _weights(model: ModelConfig, sharing: SharingConfig) -> tuple[float, int]:
    """Matrix values of one block, the mean over all, and of the LoRA of all virtual layers."""
    inventory = tensor_inventory(model, sharing)
    blocks = sum(tensor.elements for tensor in inventory if tensor.tensor_class in ("attention", "mlp"))
    lora = sum(tensor.elements for tensor in inventory if tensor.tensor_class == "lora")
    return blocks / sharing.unique_blocks, lora


def _features(spec: TrialSpec) -> Vector:
    """What may move seconds away from FLOPs: where a factor does, its logarithm to base 2."""
    model, sharing, data = spec.model, spec.sharing, spec.data
    factors = (
        _train_flops(spec), model.width, sharing.virtual_layers, sharing.unique_blocks, 1 + sharing.lora.rank,
        model.vocab_size, data.sequence_length, data.batch_tokens, spec.gang.ranks, data.micro_batch_sequences,
        spec.evaluation.stride or 1,
    )  # fmt: skip
    linear = (
        sharing.tying.from_fraction, sharing.lora.rank > 0, spec.quantisation.qat_from is not None,
        spec.averaging.ema_decay > 0, spec.evaluation.ttt is not None, spec.model.xsa_last > 0,
    )  # fmt: skip
    return np.array([*map(log2, factors), *linear], dtype=np.float64)
