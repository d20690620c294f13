"""What a trial will weigh and how long it will take, before it runs; and whether that keeps the caps."""

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import exp, log, log2
from statistics import NormalDist
from typing import Literal

import numpy as np

from orchestrator.caps import Caps
from orchestrator.compression import Prior, prior_of
from orchestrator.lifecycle import TrialState
from orchestrator.pace import Pace
from orchestrator.regression import Forecast, Observation, Regression, Vector
from orchestrator.study import NewStudy, Prediction, Trial, Verdict
from worker.inventory import TensorClass
from worker.packing import LEVELS
from worker.source import code_bytes
from worker.spec import TrialSpec

MISS = 0.002  # of a target, below it: how close solved steps come
PRIOR_LOW, PRIOR_HIGH = 0.85, 1.10  # of the prior, before any trial finished: heavy tails, and rows trained little
SPREAD = 0.015  # log-ratio within one study that is assumed as if a few trials had shown it
SLACK = 0.1  # log-ratio from what others show beyond which an artifact may be odd
RECENT = 150  # finished trials that count, the latest; more would change little
TAIL = 0.05  # of each side: the interval holds 90%
CLASSES = tuple(TensorClass)
CODECS = (*LEVELS, "ans", "auto")

Cap = Literal["target", "bytes", "training", "evaluation"]
"""What a trial has to keep: a target is of its own spec, the others are the study's."""


def predict(spec: TrialSpec, history: Sequence[Trial] = ()) -> Prediction:
    """What the spec will cost, from the trials so far."""
    return Predictor.of(history).predict(spec)


def shares(spec: TrialSpec) -> dict[TensorClass, float]:
    """Each tensor class's share of the artifact's bytes without code, before any trial has shown another."""
    return Predictor().shares(spec)


class Predictor:
    """What the trials of one study say about the next: its artifact's bytes, its seconds, each with a 90% interval.

    Bytes by tensor class are the prior's times what finished artifacts had of it in specs alike. The same trials in any
    order make the same predictor.
    """

    def __init__(self) -> None:
        self.code_bytes = code_bytes()
        self._artifacts: list[tuple[int, Observation]] = []  # by trial number
        self._pace = Pace()
        self._fitted: Regression | None = None

    @classmethod
    def of(cls, history: Sequence[Trial]) -> "Predictor":
        predictor = cls()
        for trial in sorted(history, key=lambda trial: trial.number, reverse=True):  # so that old ones cost nothing
            predictor.learn(trial)
        return predictor

    def learn(self, trial: Trial) -> None:
        """Take in a trial that has ended, once. Fitting waits until something is asked."""
        self._pace.learn(trial)
        if len(self._artifacts) == RECENT and trial.number < self._artifacts[0][0]:
            return
        if (observed := observation_of(trial)) is not None:
            insort(self._artifacts, (trial.number, observed), key=lambda each: each[0])
            del self._artifacts[:-RECENT]
            self._fitted = None

    @property
    def seed_deviation(self) -> float | None:
        """Of the logarithm of model bytes, between seeds of one configuration; None before any trial finished."""
        return self._regression.seed_deviation if self._regression else None

    def predict(self, spec: TrialSpec, spec_hash: str | None = None) -> Prediction:
        """What the spec will cost. Its canonical hash takes a while to make, unless the caller has it."""
        configuration = cache(lambda: spec_hash or spec.canonical_hash)
        weight, timing = self._weight(spec, configuration), self._pace.timing(spec, configuration)
        return Prediction(
            parameters=weight.prior.parameters, code_bytes=self.code_bytes, artifact_bytes=weight.quantile(0.5),
            artifact_bytes_low=weight.quantile(TAIL), artifact_bytes_high=weight.quantile(1 - TAIL),
            step_seconds=timing.step_seconds, steps=timing.steps, train_seconds=timing.train.expected,
            train_seconds_low=timing.train.low, train_seconds_high=timing.train.high,
            evaluate_seconds=timing.evaluate.expected, evaluate_seconds_low=timing.evaluate.low,
            evaluate_seconds_high=timing.evaluate.high,
        )  # fmt: skip

    def shares(self, spec: TrialSpec) -> dict[TensorClass, float]:
        """Each tensor class's share of the artifact's bytes without code. They add up to 1."""
        by_class = self._weight(spec, lambda: spec.canonical_hash).by_class
        return {name: size / sum(by_class.values()) for name, size in by_class.items()}

    def quantile(self, spec: TrialSpec, probability: float) -> int:
        """The artifact bytes that the spec's will not exceed with this probability."""
        return self._weight(spec, lambda: spec.canonical_hash).quantile(probability)

    def _weight(self, spec: TrialSpec, configuration: Callable[[], str]) -> "_Weight":
        prior, fitted = prior_of(spec), self._regression
        forecast = fitted.forecast(_features(spec, prior), configuration) if fitted else None
        return _Weight(prior, forecast, self.code_bytes, spec.quantisation.target_bytes)

    @property
    def _regression(self) -> Regression | None:
        if self._fitted is None and self._artifacts:
            self._fitted = Regression([observed for _, observed in self._artifacts], SPREAD, SLACK)
        return self._fitted


def judge(prediction: Prediction, caps: NewStudy | Caps, spec: TrialSpec) -> tuple[Verdict, str | None]:
    """Whether a trial keeps the caps; and, where that is not certain, a sentence with the numbers.

    It fits where even the high ends of the predictions do, cannot fit where a low end does not, by more than the
    tolerance where it is bytes, and is grey between. A target that no steps can meet, which would fail the trial once
    it has trained, is a smaller cap. Seconds that nothing is known of are no reason.
    """
    found = _judge_each(prediction, caps, spec)
    if found["target"][0] == "cannot_fit":
        return found["target"]
    worst = max((verdict for verdict, _ in found.values()), key=("fits", "grey", "cannot_fit").index)
    return worst, "; ".join(reason for verdict, reason in found.values() if verdict == worst and reason) or None


def missed(prediction: Prediction, caps: NewStudy | Caps, spec: TrialSpec) -> Cap:
    """The first cap that a trial, judged not to fit, is certain to miss."""
    found = _judge_each(prediction, caps, spec)
    return next(cap for cap, (verdict, _) in found.items() if verdict == "cannot_fit")


def _judge_each(prediction: Prediction, caps: NewStudy | Caps, spec: TrialSpec) -> dict[Cap, tuple[Verdict, str]]:
    return {
        "target": _judge_target(prediction, spec.quantisation.target_bytes),
        "bytes": _judge_bytes(prediction, caps),
        "training": _judge_seconds("training", prediction.train_seconds, prediction.train_seconds_low,
                                   prediction.train_seconds_high, caps.cap_train_seconds),
        "evaluation": _judge_seconds("evaluation", prediction.evaluate_seconds, prediction.evaluate_seconds_low,
                                     prediction.evaluate_seconds_high, caps.cap_evaluate_seconds),
    }  # fmt: skip


def _judge_target(prediction: Prediction, target: int | None) -> tuple[Verdict, str]:
    if target is None or prediction.artifact_bytes_low <= target:
        return "fits", ""
    least = f"at least {prediction.artifact_bytes_low:,} bytes ({prediction.code_bytes:,} of them code)"
    return "cannot_fit", f"the artifact is predicted to need {least}: over quantisation.target_bytes, {target:,}"


def _judge_bytes(prediction: Prediction, caps: NewStudy | Caps) -> tuple[Verdict, str]:
    if prediction.artifact_bytes_high <= caps.cap_bytes:
        return "fits", ""
    between = f"{prediction.artifact_bytes_low:,} to {prediction.artifact_bytes_high:,}"
    numbers = f"{prediction.artifact_bytes:,} bytes ({between}, {prediction.code_bytes:,} of them code)"
    if prediction.artifact_bytes_low > caps.cap_bytes + caps.tolerance_bytes:
        tolerated = f" by more than the {caps.tolerance_bytes:,} tolerated" if caps.tolerance_bytes else ""
        return (
            "cannot_fit",
            f"the artifact is predicted at {numbers}: over the cap of {caps.cap_bytes:,} bytes{tolerated}",
        )
    return "grey", f"the artifact is predicted at {numbers}: it may miss the cap of {caps.cap_bytes:,} bytes"


def _judge_seconds(
    what: str, expected: float | None, low: float | None, high: float | None, cap_seconds: float
) -> tuple[Verdict, str]:
    if expected is None or low is None or high is None or high <= cap_seconds:
        return "fits", ""
    numbers = f"{what} is predicted to take {expected:,.0f} s ({low:,.0f} to {high:,.0f})"
    if low > cap_seconds:
        return "cannot_fit", f"{numbers}: over the cap of {cap_seconds:,.0f} s"
    return "grey", f"{numbers}: it may miss the cap of {cap_seconds:,.0f} s"


def observation_of(trial: Trial) -> Observation | None:
    """What a trial's artifact shows: log-ratios of actual to prior bytes, of all and by tensor class.

    None unless it trained here to the end of its budget. One that met a target says nothing about entropy either.
    """
    if trial.state is not TrialState.COMPLETE or trial.result is None or trial.origin == "imported":
        return None
    prior = prior_of(trial.spec)
    actual, expected = trial.result.model_bytes - prior.header_bytes, prior.model_bytes - prior.header_bytes
    if trial.spec.quantisation.target_bytes is not None or actual <= 0:
        return None
    whole, ratios = log(actual / expected), []
    for name in CLASSES:  # a class that is not there takes after the whole
        counted, assumed = trial.result.bytes_by_class.get(name, 0), prior.by_class.get(name, 0.0)
        ratios.append(log(counted / assumed) if counted and assumed else whole)
    return Observation(_features(trial.spec, prior), trial.spec_hash, np.array([whole, *ratios]))


def _features(spec: TrialSpec, prior: Prior) -> Vector:
    """What may move an artifact's bytes away from its prior: where a factor does, its logarithm to base 2."""
    model, sharing, packing, optimizer = spec.model, spec.sharing, spec.quantisation, spec.optimizer
    budget = (spec.budget.steps, spec.budget.seconds, spec.budget.tokens)
    factors = (
        prior.model_bytes, model.width, 1 + sharing.lora.rank, sharing.unique_blocks, sharing.virtual_layers,
        max(1 - prior.half_share, 0.01) ** -2, model.mlp_multiple, optimizer.matrix_lr, optimizer.embedding_lr,
        optimizer.scalar_lr, 0.01 + optimizer.muon_weight_decay, 0.01 + optimizer.adam_weight_decay,
        spec.data.batch_tokens, *(limit or 1 for limit in budget),
    )  # fmt: skip
    linear = (
        prior.symbol_bits, 4 * packing.prune, packing.rounding == "gptq", packing.qat_from is not None,
        spec.averaging.apply != "none", *(packing.codec == name for name in CODECS),
    )  # fmt: skip
    return np.array([*map(log2, factors), *linear], dtype=np.float64)


@dataclass(frozen=True)
class _Weight:
    """The distribution of one spec's artifact bytes."""

    prior: Prior
    forecast: Forecast | None
    code_bytes: int
    target_bytes: int | None

    def quantile(self, probability: float) -> int:
        """The bytes that the artifact will not exceed with this probability; never above incompressible symbols.

        Where there is a target, steps are solved to meet it: only an artifact that cannot grow to it is smaller, and
        only one that cannot shrink to it is larger.
        """
        guess, prior = _guess(probability), self.prior
        spread = guess if self.forecast is None else exp(self.forecast.quantile(probability))
        model_bytes = min(prior.header_bytes + self._content_bytes * spread, prior.most)
        if self.target_bytes is not None:
            short = min(max((1 - TAIL - probability) / (1 - 2 * TAIL), 0.0), 1.0)
            room = self.target_bytes * (1 - MISS * short) - self.code_bytes
            model_bytes = max(prior.least * guess, min(model_bytes, room))
        return round(model_bytes) + self.code_bytes

    @cached_property
    def _content_bytes(self) -> float:
        """Expected, without the header."""
        return sum(self.by_class.values())

    @cached_property
    def by_class(self) -> dict[TensorClass, float]:
        """Expected, without the header."""
        if self.forecast is None:
            return dict(self.prior.by_class)
        ratios = dict(zip(CLASSES, self.forecast.ratios[1:].tolist(), strict=True))
        return {name: expected * exp(ratios[name]) for name, expected in self.prior.by_class.items()}


def _guess(probability: float) -> float:
    """By what the prior is multiplied, before any trial finished, not to be exceeded with this probability."""
    deviations = NormalDist().inv_cdf(probability) / NormalDist().inv_cdf(1 - TAIL)
    return float(PRIOR_HIGH**deviations if deviations > 0 else PRIOR_LOW**-deviations)
