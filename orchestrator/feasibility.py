"""Artifact bytes before a trial runs: arithmetic over the spec's tensors, calibrated on the study's finished trials."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import e, log, log2, pi, sqrt
from statistics import NormalDist, median

from orchestrator.lifecycle import TrialState
from orchestrator.study import Prediction, Trial, Verdict
from worker.sharing import count_parameters, tensor_inventory
from worker.source import code_bytes
from worker.spec import QuantisationConfig, TrialSpec

# Compressed by entropy, for Gaussian symbols of 4 to 8 bits, one a byte: what Huffman codes, and chance matches where a
# codec takes them too gladly, cost. Measured on 400,000 symbols in rows of 256.
OVERHEADS = {
    "zstd": (1.015, 1.010, 1.007, 1.006, 1.005),
    "zstd below 16": (1.135, 1.040, 1.006, 1.005, 1.005),
    "zlib": (1.165, 1.125, 1.040, 1.010, 1.008),
}
SCALE_BYTES = 1.35  # an fp16 scale after the codec: scales are positive and close together
HALF_BYTES = 1.65  # an fp16 value after the codec: only sign and exponent repeat
ENVELOPE_BYTES = 48  # magic, version, header length and digest
PRIOR_LOW, PRIOR_HIGH = 0.85, 1.10  # of the prior, before any trial finished: heavy tails, and rows trained little
PRIOR_SPREAD = 0.02  # log-ratio within one study that is assumed as if one trial had shown it
RECENT = 100  # finished trials that calibrate; more would change little
QUANTILE = 0.95  # of each side: the interval holds 90%


def predict(spec: TrialSpec, history: Sequence[Trial] = ()) -> Prediction:
    """What the spec's artifact will weigh, code included, with the bounds of a 90% interval, from the trials so far."""
    return Predictor.of(history).predict(spec)


def judge(prediction: Prediction, cap_bytes: int) -> tuple[Verdict, str | None]:
    """Whether the artifact fits; and, where that is not certain, a sentence with the numbers.

    It fits where even the interval's high end does, cannot fit where even the low end does not, and is grey between.
    """
    if prediction.artifact_bytes_high <= cap_bytes:
        return "fits", None
    between = f"{prediction.artifact_bytes_low:,} to {prediction.artifact_bytes_high:,}"
    numbers = f"{prediction.artifact_bytes:,} bytes ({between}, {prediction.code_bytes:,} of them code)"
    if prediction.artifact_bytes_low > cap_bytes:
        return "cannot_fit", f"the artifact is predicted at {numbers}: over the cap of {cap_bytes:,} bytes"
    return "grey", f"the artifact is predicted at {numbers}: it may miss the cap of {cap_bytes:,} bytes"


@dataclass(frozen=True)
class Predictor:
    """The prior with its calibration: `factor` on model bytes is expected, `low` to `high` holds nine of ten."""

    factor: float
    low: float
    high: float
    code_bytes: int

    @classmethod
    def of(cls, history: Sequence[Trial]) -> "Predictor":
        """Calibrated on the last RECENT trials of the history that trained to the end of their budget."""
        finished = [trial for trial in history if trial.state is TrialState.COMPLETE and trial.result is not None]
        return cls.calibrated([ratio_of(trial) for trial in finished[-RECENT:]])

    @classmethod
    def calibrated(cls, ratios: Sequence[float]) -> "Predictor":
        """Calibrated on ratios of actual to prior model bytes.

        A Student t prediction interval about the median, its scale the median absolute deviation pooled with
        PRIOR_SPREAD as one observation (a scaled inverse χ² prior; Gelman et al., Bayesian Data Analysis, section 3.2):
        one odd artifact moves neither, and the interval narrows as trials agree.
        """
        if not ratios:
            return cls(1.0, PRIOR_LOW, PRIOR_HIGH, code_bytes())
        centre, count = median(ratios), len(ratios)
        deviation = 1.4826 * median(abs(log(ratio / centre)) for ratio in ratios)  # of a normal's log-ratio
        spread = sqrt((PRIOR_SPREAD**2 + count * deviation**2) / (1 + count)) * sqrt(1 + 1 / count)
        width = e ** (_student_quantile(1 + count) * spread)
        return cls(centre, centre / width, centre * width, code_bytes())

    def predict(self, spec: TrialSpec) -> Prediction:
        """The spec's artifact bytes under this calibration, never above what incompressible symbols would take."""
        prior, most = prior_model_bytes(spec), _largest_model_bytes(spec)
        expected, low, high = (min(prior * factor, most) for factor in (self.factor, self.low, self.high))
        return Prediction(
            parameters=count_parameters(spec.model, spec.sharing),
            code_bytes=self.code_bytes,
            artifact_bytes=round(expected) + self.code_bytes,
            artifact_bytes_low=round(low) + self.code_bytes,
            artifact_bytes_high=round(high) + self.code_bytes,
        )


def ratio_of(trial: Trial) -> float:
    """Actual by prior model bytes of a trial that has a result."""
    assert trial.result is not None
    return trial.result.model_bytes / prior_model_bytes(trial.spec)


def prior_model_bytes(spec: TrialSpec) -> float:
    """Compressed model bytes to expect of a trained model, before any trial has said otherwise."""
    stored, bits, overhead = _Stored.of(spec), spec.quantisation.bits, _overhead(spec.quantisation)
    symbols = sum(count * min(symbol_entropy(columns, bits) * overhead, 8) for columns, count in stored.symbols)
    return _header_bytes(spec) + symbols / 8 + stored.scales * SCALE_BYTES + stored.halves * HALF_BYTES


def symbol_entropy(columns: int, bits: int) -> float:
    """Entropy in bits of one symbol of a Gaussian row whose largest value lands on the largest symbol.

    H = ½·log2(2πe) − log2(c / (2^(b−1) − 1)) with c, in standard deviations, the expected maximum of `columns` values
    |N(0, 1)|, by the median-like quantile 0.5264^(1/n) of Chen and Tyler (1999). At most that of evenly used symbols.
    """
    largest = 2 ** (bits - 1) - 1
    peak = NormalDist().inv_cdf((1 + 0.5264 ** (1 / columns)) / 2)
    entropy = 0.5 * log2(2 * pi * e) - log2(peak / largest)
    return max(0.0, min(entropy, _even_entropy(bits)))


def _largest_model_bytes(spec: TrialSpec) -> float:
    """Model bytes where the codec gains nothing but the even use of the symbols."""
    stored = _Stored.of(spec)
    bits = min(_even_entropy(spec.quantisation.bits) * _overhead(spec.quantisation), 8)
    symbols = sum(count for _, count in stored.symbols) * bits / 8
    # and what the codec adds to bytes that it cannot compress
    return (_header_bytes(spec) + symbols + 2 * (stored.scales + stored.halves)) * 1.001


@dataclass(frozen=True)
class _Stored:
    """How many values an artifact holds, by how it stores them."""

    symbols: tuple[tuple[int, int], ...]
    """Of quantised matrices: columns, and how many symbols are in rows of that many."""
    scales: int
    halves: int

    @classmethod
    def of(cls, spec: TrialSpec) -> "_Stored":
        symbols, scales, halves = Counter[int](), 0, 0
        for tensor in tensor_inventory(spec.model, spec.sharing):
            if len(tensor.shape) == 2 and tensor.elements > spec.quantisation.half_below:
                rows, columns = tensor.shape
                symbols[columns] += tensor.elements
                scales += rows
            else:
                halves += tensor.elements
        return cls(tuple(symbols.items()), scales, halves)


def _overhead(quantisation: QuantisationConfig) -> float:
    fast = quantisation.codec == "zstd" and quantisation.level < 16
    return OVERHEADS["zstd below 16" if fast else quantisation.codec][quantisation.bits - 4]


def _even_entropy(bits: int) -> float:
    return log2(2**bits - 1)


def _header_bytes(spec: TrialSpec) -> int:
    described = {"model": spec.model.model_dump(mode="json"), "sharing": spec.sharing.model_dump(mode="json")}
    described |= spec.quantisation.model_dump(mode="json", exclude={"level"})
    return ENVELOPE_BYTES + len(json.dumps(described, separators=(",", ":")))


def _student_quantile(freedom: int) -> float:
    """The upper QUANTILE of Student's t, by the first terms of its expansion in 1/ν (Fisher and Cornish, 1960)."""
    z = NormalDist().inv_cdf(QUANTILE)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
