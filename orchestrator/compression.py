"""What an artifact is expected to weigh before any trial has shown it: arithmetic over the spec's tensors.

The entropy of Gaussian rows under the spec's bits, rounding and clip, and what the codec makes of it, by tensor class.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from math import log2, sqrt
from statistics import NormalDist

from worker.inventory import TensorClass, is_quantised, tensor_inventory
from worker.packing import GRID, QuantisationConfig
from worker.shape import ModelConfig
from worker.sharing import SharingConfig
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
# zstd up to UNSPLIT_BYTES of content codes symbols and half-precision values by one table; above, each part of the
# content gets its own. What that costs, by the share of bytes that are half-precision. Measured on 64,000 of them.
UNSPLIT_BYTES = 65_536
MIXED_SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)
MIXED_OVERHEADS = (1.0, 1.044, 1.058, 1.079, 1.094, 1.098)


@dataclass(frozen=True)
class Prior:
    """Model bytes of one spec, and what they consist of."""

    parameters: int
    header_bytes: int
    by_class: Mapping[TensorClass, float]
    """Expected compressed bytes. With a target, those of the finest steps: what the artifact would have if the target
    left it room."""
    least: float
    """Where every symbol is zero, and so every scale alike."""
    most: float
    """Where the codec gains nothing but the even use of the symbols."""
    symbol_bits: float
    """Expected entropy of a symbol, the mean over all of them."""
    half_share: float
    """Of the bytes before the codec: those of half-precision values and scales."""

    @property
    def model_bytes(self) -> float:
        return self.header_bytes + sum(self.by_class.values())


def prior_of(spec: TrialSpec) -> Prior:
    """The spec's prior. What does not bear on it, its training, is left out of the cache's key."""
    return _prior(spec.model, spec.sharing, spec.quantisation)


@lru_cache(maxsize=2048)
def _prior(model: ModelConfig, sharing: SharingConfig, quantisation: QuantisationConfig) -> Prior:
    stored, header = _Stored.of(model, sharing, quantisation.half_below), _header_bytes(model, sharing)
    even = sum(_by_class(quantisation, stored, partial(_even_entropy, quantisation)).values())
    bits = sum(count * _entropy(quantisation, *rows) for rows, count in stored.symbols.items())
    return Prior(
        parameters=stored.parameters,
        header_bytes=header,
        by_class=_by_class(quantisation, stored, partial(_entropy, quantisation)),
        least=header + stored.halves.total() * HALF_BYTES,
        # scales and halves as they are, and what the codec adds to bytes that it cannot compress
        most=(header + even + stored.scales.total() * (2 - SCALE_BYTES) + stored.halves.total() * (2 - HALF_BYTES))
        * 1.001,
        symbol_bits=bits / max(stored.symbols.total(), 1),
        half_share=stored.half_share,
    )


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


@lru_cache(maxsize=4096)
def _entropy(quantisation: QuantisationConfig, tensor_class: TensorClass, columns: int) -> float:
    """Of one symbol of a Gaussian matrix; rows of more and of fewer bits lie mixed, as columns are what is stored."""
    mixed = [0.0] * 2 ** (FINEST_BITS - 1)
    for part, bits in _bits_by_share(quantisation, tensor_class):
        clip = _clip(quantisation, tensor_class, columns, bits)
        for symbol, share in enumerate(symbol_shares(clip, bits, quantisation.prune)):
            mixed[symbol] += part * share
    return symbol_entropy(mixed)


@lru_cache(maxsize=4096)
def _even_entropy(quantisation: QuantisationConfig, tensor_class: TensorClass, columns: int) -> float:
    """The most that any matrix can have."""
    return log2(2 ** max(bits for _, bits in _bits_by_share(quantisation, tensor_class)) - 1)


@dataclass(frozen=True)
class _Stored:
    """How many values an artifact holds, by how it stores them."""

    parameters: int
    symbols: Counter[tuple[TensorClass, int]]
    """Of quantised matrices: how many symbols are in rows of a class and of so many columns."""
    scales: Counter[TensorClass]
    halves: Counter[TensorClass]

    @classmethod
    def of(cls, model: ModelConfig, sharing: SharingConfig, half_below: int) -> "_Stored":
        symbols, scales, halves = Counter[tuple[TensorClass, int]](), Counter[TensorClass](), Counter[TensorClass]()
        for tensor in tensor_inventory(model, sharing):
            if is_quantised(tensor, half_below):
                rows, columns = tensor.shape
                symbols[tensor.tensor_class, columns] += tensor.elements
                scales[tensor.tensor_class] += rows
            else:
                halves[tensor.tensor_class] += tensor.elements
        return cls(symbols.total() + halves.total(), symbols, scales, halves)

    @property
    def content_bytes(self) -> int:
        return self.symbols.total() + 2 * (self.scales.total() + self.halves.total())

    @property
    def half_share(self) -> float:
        return 1 - self.symbols.total() / self.content_bytes


def _by_class(
    quantisation: QuantisationConfig, stored: _Stored, entropy_of: Callable[[TensorClass, int], float]
) -> dict[TensorClass, float]:
    """Compressed bytes, given the entropy of a symbol in rows of a class and of so many columns."""
    symbols = [(rows[0], count, entropy_of(*rows)) for rows, count in stored.symbols.items()]

    def compressed(codec: str) -> dict[TensorClass, float]:
        found = {name: stored.scales[name] * SCALE_BYTES for name in stored.scales}
        for name, count in stored.halves.items():
            found[name] = found.get(name, 0.0) + count * HALF_BYTES
        for name, count, entropy in symbols:
            found[name] += count * min(entropy * _between(entropy, ENTROPIES, OVERHEADS[codec]), 8) / 8
            found[name] += TABLE_BYTES if codec == "ans" else 0
        if codec == "zstd" and stored.content_bytes <= UNSPLIT_BYTES:
            mixed = _between(stored.half_share, MIXED_SHARES, MIXED_OVERHEADS)
            found = {name: each * mixed for name, each in found.items()}
        return found

    return min(map(compressed, _measured(quantisation)), key=lambda found: sum(found.values()))


def _measured(quantisation: QuantisationConfig) -> tuple[str, ...]:
    """The rows of OVERHEADS that may apply: one, or those of which auto takes the best."""
    if quantisation.codec == "auto":
        return ("ans", "brotli", "lzma", "zlib", "zstd")
    fast = {"zstd": 16, "brotli": 10}.get(quantisation.codec, 0)
    return (f"{quantisation.codec} below {fast}" if quantisation.best_level < fast else quantisation.codec,)


def _between(value: float, measured: Sequence[float], at: Sequence[float]) -> float:
    """Between the two that were measured nearest, in proportion; beyond all of them, the last."""
    for low, high, at_low, at_high in zip(measured, measured[1:], at, at[1:], strict=False):
        if value <= high:
            return at_low + (at_high - at_low) * max(value - low, 0.0) / (high - low)
    return at[-1]


def _bits(share: float) -> float:
    return -share * log2(share) if share > 0 else 0.0


def _header_bytes(model: ModelConfig, sharing: SharingConfig) -> int:
    """Of an artifact: its envelope, and the JSON in which fields at their defaults are left out."""
    described = {
        name: part.model_dump_json(exclude_defaults=True) for name, part in (("model", model), ("sharing", sharing))
    }
    return ENVELOPE_BYTES + sum(len(name) + len(part) for name, part in described.items()) + REST_OF_HEADER_BYTES
