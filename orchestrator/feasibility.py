"""Artifact bytes before a trial runs: arithmetic over the spec's tensors, calibrated on the study's finished trials."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import e, log, log2, sqrt
from statistics import NormalDist, median

from orchestrator.lifecycle import TrialState
from orchestrator.study import Prediction, Trial, Verdict
from worker.inventory import TensorClass, count_parameters, is_quantised, tensor_inventory
from worker.packing import GRID, QuantisationConfig
from worker.source import code_bytes
from worker.spec import TrialSpec

# Compressed by entropy, for Gaussian symbols of so many bits of entropy, one a byte: what Huffman codes, and chance
# matches where a codec takes them too gladly, cost. Measured on 400,000 symbols in rows of 256.
ENTROPIES = (0.8, 1.35, 2.3, 3.3, 4.4, 5.4, 6.4, 7.4)
OVERHEADS = {
    "zstd": (1.226, 1.177, 1.027, 1.016, 1.010, 1.007, 1.006, 1.005),
    "zstd below 16": (1.559, 1.351, 1.207, 1.130, 1.040, 1.006, 1.005, 1.005),
    "zlib": (1.336, 1.249, 1.192, 1.162, 1.126, 1.040, 1.010, 1.008),
    "brotli": (1.299, 1.154, 1.024, 1.013, 1.008, 1.006, 1.004, 1.003),
    "brotli below 10": (1.443, 1.305, 1.207, 1.169, 1.093, 1.016, 1.004, 1.003),
    "lzma": (1.222, 1.154, 1.124, 1.049, 1.033, 1.025, 1.020, 1.016),
    "ans": (1.001,) * 8,
}
SCALE_BYTES = 1.35  # an fp16 scale after the codec: scales are positive and close together
HALF_BYTES = 1.65  # an fp16 value after the codec: only sign and exponent repeat
TABLE_BYTES = 200  # an ans table of frequencies, for matrices of a class
ENVELOPE_BYTES = 48  # magic, version, header length and digest
REST_OF_HEADER_BYTES = 48  # its braces, quotes and commas, the codec, and from which size on matrices are quantised
FINEST_BITS = 8  # of what steps that are solved for can be
MISS = 0.002  # of a target, below it: how close solved steps come
PRIOR_LOW, PRIOR_HIGH = 0.85, 1.10  # of the prior, before any trial finished: heavy tails, and rows trained little
PRIOR_SPREAD = 0.02  # log-ratio within one study that is assumed as if one trial had shown it
RECENT = 100  # finished trials that calibrate; more would change little
QUANTILE = 0.95  # of each side: the interval holds 90%


def predict(spec: TrialSpec, history: Sequence[Trial] = ()) -> Prediction:
    """What the spec's artifact will weigh, code included, with the bounds of a 90% interval, from the trials so far."""
    ratios = [ratio for trial in history if (ratio := ratio_of(trial)) is not None]
    return Predictor.calibrated(ratios).predict(spec)


def judge(prediction: Prediction, cap_bytes: int, target_bytes: int | None = None) -> tuple[Verdict, str | None]:
    """Whether the artifact fits; and, where that is not certain, a sentence with the numbers.

    It fits where even the interval's high end does, cannot fit where even the low end does not, and is grey between. A
    target that no steps can meet, which would fail the trial once it has trained, is a smaller cap.
    """
    if target_bytes is not None and prediction.artifact_bytes_low > target_bytes:
        least = f"at least {prediction.artifact_bytes_low:,} bytes ({prediction.code_bytes:,} of them code)"
        return (
            "cannot_fit",
            f"the artifact is predicted to need {least}: over quantisation.target_bytes, {target_bytes:,}",
        )
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
    def calibrated(cls, ratios: Sequence[float]) -> "Predictor":
        """Calibrated on ratios of actual to prior model bytes, oldest first; the last RECENT count.

        A Student t prediction interval about the median, its scale the median absolute deviation pooled with
        PRIOR_SPREAD as one observation (a scaled inverse χ² prior; Gelman et al., Bayesian Data Analysis, section 3.2):
        one odd artifact moves neither, and the interval narrows as trials agree.
        """
        ratios = ratios[-RECENT:]
        if not ratios:
            return cls(1.0, PRIOR_LOW, PRIOR_HIGH, code_bytes())
        centre, count = median(ratios), len(ratios)
        deviation = 1.4826 * median(abs(log(ratio / centre)) for ratio in ratios)  # of a normal's log-ratio
        spread = sqrt((PRIOR_SPREAD**2 + count * deviation**2) / (1 + count)) * sqrt(1 + 1 / count)
        width = e ** (_student_quantile(1 + count) * spread)
        return cls(centre, centre / width, centre * width, code_bytes())

    def predict(self, spec: TrialSpec) -> Prediction:
        """The spec's artifact bytes under this calibration, never above what incompressible symbols would take.

        Where the spec has a target, steps are solved to meet it: only an artifact that cannot grow to it is smaller,
        and only one that cannot shrink to it is larger.
        """
        prior, most = prior_model_bytes(spec), _largest_model_bytes(spec)
        expected, low, high = (min(prior * factor, most) for factor in (self.factor, self.low, self.high))
        target = spec.quantisation.target_bytes
        if target is not None:
            least, room = _smallest_model_bytes(spec), target - self.code_bytes
            expected = max(least, min(expected, room - target * MISS / 2))
            low = max(least * PRIOR_LOW, min(low, room - target * MISS))
            high = max(least * PRIOR_HIGH, min(high, room))
        return Prediction(
            parameters=count_parameters(spec.model, spec.sharing),
            code_bytes=self.code_bytes,
            artifact_bytes=round(expected) + self.code_bytes,
            artifact_bytes_low=round(low) + self.code_bytes,
            artifact_bytes_high=round(high) + self.code_bytes,
        )


def ratio_of(trial: Trial) -> float | None:
    """Actual by prior model bytes of a trial that trained to the end of its budget, else None. One that met a target
    says nothing about entropy either."""
    if trial.state is not TrialState.COMPLETE or trial.result is None:
        return None
    if trial.spec.quantisation.target_bytes is not None:
        return None
    return trial.result.model_bytes / prior_model_bytes(trial.spec)


def prior_model_bytes(spec: TrialSpec) -> float:
    """Compressed model bytes to expect of a trained model, before any trial has said otherwise.

    With a target, those of the finest steps: what the artifact would have if the target left it room.
    """
    quantisation, stored = spec.quantisation, _Stored.of(spec)
    symbols = _symbol_bytes(quantisation, stored, partial(_entropy, quantisation))
    return _header_bytes(spec) + symbols + stored.scales * SCALE_BYTES + stored.halves * HALF_BYTES


def symbol_entropy(shares: Sequence[float]) -> float:
    """Entropy in bits of one symbol, given the share of zero, then of each pair of a symbol and its negative."""
    zero, *pairs = shares
    return _bits(zero) + sum(2 * _bits(pair / 2) for pair in pairs)


@lru_cache(maxsize=4096)
def symbol_shares(clip: float, bits: int, prune: float = 0.0) -> tuple[float, ...]:
    """Of a Gaussian row, how often each symbol comes: zero, and then each pair of a symbol and its negative.

    The value at `clip` standard deviations gets the largest symbol, and the share `prune` of the values, the smallest,
    became zero first. With fine steps and nothing cut off the entropy is ½·log2(2πe) − log2(clip / largest symbol).
    """
    normal, largest = NormalDist(), 2 ** (bits - 1) - 1
    kept_from = normal.inv_cdf((1 + prune) / 2)
    edges = [max((symbol + 0.5) * clip / largest, kept_from) for symbol in range(largest)]
    above = [2 * normal.cdf(-edge) for edge in edges]  # the share of the values with a larger symbol, of either sign
    return (1 - above[0], *(more - less for more, less in zip(above, [*above[1:], 0.0], strict=True)))


def expected_peak(columns: int, quantile: float = 1.0) -> float:
    """The expected quantile of the magnitudes of so many standard normal values, 1 for their maximum.

    The maximum by the median-like quantile 0.5264^(1/n) of Chen and Tyler (1999).
    """
    share = 0.5264 ** (1 / columns) - (1 - quantile) * (columns - 1) / columns
    return NormalDist().inv_cdf((1 + max(share, 0.0)) / 2)


def _clip(quantisation: QuantisationConfig, tensor_class: TensorClass, columns: int, bits: int) -> float:
    """What lands on the largest symbol of a Gaussian row, in standard deviations."""
    if quantisation.target_bytes is not None:
        return expected_peak(columns)
    if quantisation.clip == "sigmas":
        return quantisation.sigmas_of(tensor_class) * _deviation(quantisation.prune)
    if quantisation.clip == "quantile":
        return expected_peak(columns, quantisation.clip_quantile) or expected_peak(columns)
    if quantisation.clip == "grid":
        return min((expected_peak(columns, q) for q in GRID), key=lambda clip: _squared_error(clip, bits))
    return expected_peak(columns)


def _deviation(prune: float) -> float:
    """The standard deviation of standard normal values of which this share, the smallest, became zero."""
    normal = NormalDist()
    kept_from = normal.inv_cdf((1 + prune) / 2)
    return sqrt(2 * (kept_from * normal.pdf(kept_from) + normal.cdf(-kept_from)))


def _squared_error(clip: float, bits: int) -> float:
    """Of a standard normal value: of rounding, and of cutting off what is above the clip."""
    normal = NormalDist()
    rounding: float = (clip / (2 ** (bits - 1) - 1)) ** 2 / 12
    return rounding + 2 * ((1 + clip**2) * normal.cdf(-clip) - clip * normal.pdf(clip))


def _bits_by_share(quantisation: QuantisationConfig, tensor_class: TensorClass) -> list[tuple[float, int]]:
    """Bits of a symbol, with the share of the rows that have them."""
    if quantisation.target_bytes is not None:
        return [(1.0, FINEST_BITS)]
    high, low = quantisation.high_fraction, quantisation.low_fraction
    shares = [(high, 8), (low, 4), (1 - high - low, quantisation.bits_of(tensor_class))]
    return [(share, bits) for share, bits in shares if share > 0]


def _entropy(quantisation: QuantisationConfig, tensor_class: TensorClass, columns: int) -> float:
    """Of one symbol of a Gaussian matrix; rows of more and of fewer bits lie mixed, as columns are what is stored."""
    mixed = [0.0] * 2 ** (FINEST_BITS - 1)
    for part, bits in _bits_by_share(quantisation, tensor_class):
        clip = _clip(quantisation, tensor_class, columns, bits)
        for symbol, share in enumerate(symbol_shares(clip, bits, quantisation.prune)):
            mixed[symbol] += part * share
    return symbol_entropy(mixed)


def _even_entropy(quantisation: QuantisationConfig, tensor_class: TensorClass, columns: int) -> float:
    """The most that any matrix can have."""
    return log2(2 ** max(bits for _, bits in _bits_by_share(quantisation, tensor_class)) - 1)


def _largest_model_bytes(spec: TrialSpec) -> float:
    """Model bytes where the codec gains nothing but the even use of the symbols."""
    quantisation, stored = spec.quantisation, _Stored.of(spec)
    symbols = _symbol_bytes(quantisation, stored, partial(_even_entropy, quantisation))
    # and what the codec adds to bytes that it cannot compress
    return (_header_bytes(spec) + symbols + 2 * (stored.scales + stored.halves)) * 1.001


def _smallest_model_bytes(spec: TrialSpec) -> float:
    """Model bytes where every symbol is zero, and so every scale alike."""
    return _header_bytes(spec) + _Stored.of(spec).halves * HALF_BYTES


@dataclass(frozen=True)
class _Stored:
    """How many values an artifact holds, by how it stores them."""

    symbols: Mapping[tuple[TensorClass, int], int]
    """Of quantised matrices: how many symbols are in rows of a class and of so many columns."""
    scales: int
    halves: int

    @classmethod
    def of(cls, spec: TrialSpec) -> "_Stored":
        symbols, scales, halves = Counter[tuple[TensorClass, int]](), 0, 0
        for tensor in tensor_inventory(spec.model, spec.sharing):
            if is_quantised(tensor, spec.quantisation.half_below):
                rows, columns = tensor.shape
                symbols[tensor.tensor_class, columns] += tensor.elements
                scales += rows
            else:
                halves += tensor.elements
        return cls(symbols, scales, halves)


def _symbol_bytes(
    quantisation: QuantisationConfig, stored: _Stored, entropy_of: Callable[[TensorClass, int], float]
) -> float:
    """Compressed bytes of all symbols, given the entropy of one in rows of a class and of so many columns."""
    symbols = [(count, entropy_of(*rows)) for rows, count in stored.symbols.items()]
    tables = len(symbols) * TABLE_BYTES

    def compressed(codec: str) -> float:
        bits = sum(count * min(entropy * _overhead(OVERHEADS[codec], entropy), 8) for count, entropy in symbols)
        return bits / 8 + (tables if codec == "ans" else 0)

    return min(compressed(codec) for codec in _measured(quantisation))


def _measured(quantisation: QuantisationConfig) -> tuple[str, ...]:
    """The rows of OVERHEADS that may apply: one, or those of which auto takes the best."""
    if quantisation.codec == "auto":
        return ("ans", "brotli", "lzma", "zlib", "zstd")
    fast = {"zstd": 16, "brotli": 10}.get(quantisation.codec, 0)
    return (f"{quantisation.codec} below {fast}" if quantisation.best_level < fast else quantisation.codec,)


def _overhead(overheads: Sequence[float], entropy: float) -> float:
    """Between the two that were measured nearest, in proportion."""
    for low, high, at_low, at_high in zip(ENTROPIES, ENTROPIES[1:], overheads, overheads[1:], strict=False):
        if entropy <= high:
            return at_low + (at_high - at_low) * max(entropy - low, 0.0) / (high - low)
    return overheads[-1]


def _bits(share: float) -> float:
    return -share * log2(share) if share > 0 else 0.0


def _header_bytes(spec: TrialSpec) -> int:
    """Of an artifact: its envelope, and the JSON in which fields at their defaults are left out."""
    described = {
        name: part.model_dump_json(exclude_defaults=True)
        for name, part in (("model", spec.model), ("sharing", spec.sharing))
    }
    return ENVELOPE_BYTES + sum(len(name) + len(part) for name, part in described.items()) + REST_OF_HEADER_BYTES


def _student_quantile(freedom: int) -> float:
    """The upper QUANTILE of Student's t, by the first terms of its expansion in 1/ν (Fisher and Cornish, 1960)."""
    z = NormalDist().inv_cdf(QUANTILE)
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
