"""Quantisation steps for a size in bytes: `quantisation.target_bytes`, solved for after training.

With an entropy-coded artifact the step is a continuous knob. At high rate a value rounded to steps of Δ has an error of
variance Δ²/12 and costs h - log2(Δ) bits, h its differential entropy (Gersho and Gray, Vector Quantization and Signal
Compression, 1992, chapter 5). The rise of the loss, Σ s·Δ²/24 over all values with sensitivities s, is then least for
given bytes where s·Δ² is the same everywhere (the derivative of each term by Δ, s·Δ/12, in proportion to that of its
bits, 1/Δ): Δ = m/√s with one multiplier m for the whole model. Values that a step dwarfs become zero and cost nothing,
as in reverse water-filling. m is bisected on predicted bytes, and corrected on those of real artifacts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log2, sqrt

import torch
from torch import Tensor

from worker.artifact import Packed, load, pack
from worker.calibrate import Calibration, quantised_matrices
from worker.model import Model
from worker.packing import QuantisationConfig
from worker.quantize import LARGEST_HALF, SMALLEST_SCALE, Rows, half_scales, largest_symbol, pruned, to_symbols
from worker.rounding import Factors, round_rows
from worker.shape import FieldError

LARGEST = largest_symbol(8)
TOLERANCE = 0.002  # of the target: how far below it an artifact may land
MOST_PACKS = 32
TRUSTED = 5  # predictions; then the bracket is halved
# In log2 of a multiplier; 0.01 moves the bytes by about 0.3%.
CLOSEST = 0.002  # two multipliers nearer than this tell a byte compressor's whims apart, no more:
SPREAD = 0.001  # sizes then are looked for about them, this much further off with each trial
LEAST_SENSITIVITY = 1e-6  # of the largest: a matrix that the loss does not mind still gets steps that fp16 holds
GOLDEN = (sqrt(5) - 1) / 2
SAMPLE = 1 << 16  # values of a matrix behind its predicted entropy
CURVE = (0.5, 0.65, 0.8, 1.0, 1.3, 1.7, 2.2)  # of the model's bytes at the target
CURVE_TOLERANCE = 0.02


@dataclass(frozen=True)
class Fitted:
    """A model rounded and packed to a size."""

    packed: Packed
    rows: dict[str, Rows]
    finest: bool
    """Whether even 8 bits for every row need less than the target; they were kept."""


@dataclass(frozen=True)
class Point:
    """What one trained model scores at one size, code included."""

    artifact_bytes: int
    val_bpb: float


def fit(model: Model, quantisation: QuantisationConfig, calibration: Calibration, code_bytes: int) -> Fitted:
    """The model at `quantisation.target_bytes`, `code_bytes` of them code: within 0.2% under it and never over.

    Further under only where the codec's own jumps are larger than that, or at the finest steps there are. Raises
    FieldError for a target below what the model needs with all its quantised values at zero.
    """
    assert quantisation.target_bytes is not None
    target = quantisation.target_bytes - code_bytes
    search = _Search(model, quantisation, _Allocation(model, quantisation, calibration))
    _require(quantisation, search.least + code_bytes)
    if quantisation.codec == "auto":
        search = search.by_smallest(target)
    return search.at_most(target, TOLERANCE * quantisation.target_bytes)


def require_reachable(model: Model, quantisation: QuantisationConfig, code_bytes: int) -> None:
    """Before training: raises FieldError for a `quantisation.target_bytes` below what the untrained model needs.

    With every quantised value at zero, as `fit` would have them last; and with tensors in half precision as they start,
    many of them all alike, which take less than trained ones. Seconds at full size; without a target nothing.
    """
    if quantisation.target_bytes is None:
        return
    rows = {
        tensor.name: Rows(torch.zeros(tensor.shape, dtype=torch.int8), torch.zeros(tensor.shape[0]).half())
        for tensor in quantised_matrices(model, quantisation.half_below)
    }
    _require(quantisation, len(pack(model, quantisation, rows).data) + code_bytes)


def _require(quantisation: QuantisationConfig, least: int) -> None:
    assert quantisation.target_bytes is not None
    if quantisation.target_bytes < least:
        message = f"must be at least {least}, what this model needs with every quantised value at zero"
        raise FieldError("quantisation.target_bytes", quantisation.target_bytes, message)


def curve(
    model: Model,
    quantisation: QuantisationConfig,
    calibration: Calibration,
    code_bytes: int,
    evaluate: Callable[[Model], float],
) -> tuple[Point, ...]:
    """What bytes are worth: the same trained model packed at sizes around the target, each artifact read and scored.

    From the smallest on, with at most one point at the finest steps; sizes below the smallest possible are left out.
    """
    assert quantisation.target_bytes is not None
    search = _Search(model, quantisation, _Allocation(model, quantisation, calibration))
    points: list[Point] = []
    for share in CURVE:
        target = round(share * (quantisation.target_bytes - code_bytes))
        if target < search.least:
            continue
        fitted = search.at_most(target, CURVE_TOLERANCE * target)
        size = len(fitted.packed.data) + code_bytes
        if not points or size > points[-1].artifact_bytes:
            points.append(Point(size, evaluate(load(fitted.packed.data))))
        if fitted.finest:
            break
    return tuple(points)


class _Search:
    """Finds the multiplier for a size, and learns with each artifact how far predictions are off."""

    def __init__(self, model: Model, quantisation: QuantisationConfig, allocation: "_Allocation") -> None:
        self._model, self._quantisation, self._allocation = model, quantisation, allocation
        self.least = len(self._fitted(inf).packed.data)
        self._ratio = 1.0  # of real to predicted bytes of symbols

    def by_smallest(self, target: int) -> "_Search":
        """The search by one codec, of auto's the smallest about this size: all of them at every trial take minutes."""
        used = self._fitted(2.0 ** self._solved(target, *self._allocation.bounds())).packed.codec
        search = _Search(self._model, self._quantisation.model_copy(update={"codec": used}), self._allocation)
        return search if search.least <= target else self

    def at_most(self, target: int, tolerance: float) -> Fitted:
        """The model in at most `target` bytes, if possible not more than `tolerance` below. `target` is reachable."""
        low, high = self._allocation.bounds()  # log2 of a multiplier: too fine, and coarse enough
        best: Fitted | None = None
        for trial in range(MOST_PACKS):
            narrowing = high - low > CLOSEST
            if narrowing:
                inset = min((high - low) / 50, CLOSEST) if trial < TRUSTED else (high - low) / 2
                guess = min(max(self._solved(target - tolerance / 2, low, high), low + inset), high - inset)
            else:
                guess = low + SPREAD * trial * (2 * (trial * GOLDEN % 1) - 1)  # never twice at one place
            fitted = self._fitted(2.0**guess)
            size = len(fitted.packed.data)
            self._ratio *= max(size - self.least, 1) / max(self._predicted(guess) - self.least, 1)
            if narrowing:
                low, high = (guess, high) if size > target else (low, guess)
            if size <= target and (best is None or size > len(best.packed.data)):
                best = fitted
            if target - tolerance <= size <= target or (size <= target and fitted.finest):
                break
        return best or self._fitted(inf)

    def _solved(self, size: float, low: float, high: float) -> float:
        """The multiplier's log2, between the two, whose predicted size is closest to the given one."""
        for _ in range(20):
            middle = (low + high) / 2
            low, high = (middle, high) if self._predicted(middle) > size else (low, middle)
        return high

    def _predicted(self, guess: float) -> float:
        return self.least + self._ratio * self._allocation.symbol_bytes(2.0**guess)

    def _fitted(self, multiplier: float) -> Fitted:
        rows = self._allocation.rows(multiplier)
        packed = pack(self._model, self._quantisation, rows)
        return Fitted(packed, rows, self._allocation.is_finest(multiplier))


class _Allocation:
    """The quantised matrices of a model, each with a step of its own in proportion to a multiplier.

    A row whose largest value would need a symbol beyond ±127 has the smallest step that does without: nothing is cut.
    """

    def __init__(self, model: Model, quantisation: QuantisationConfig, calibration: Calibration) -> None:
        self._factors = Factors(calibration)
        self._matrices: dict[str, Tensor] = {}
        self._finest: dict[str, Tensor] = {}  # (rows,) fp32: scales at which a row's peak has the largest symbol
        self._steps: dict[str, float] = {}  # at multiplier 1
        least = LEAST_SENSITIVITY * max(calibration.sensitivities.values(), default=0.0)
        for tensor in quantised_matrices(model, quantisation.half_below):
            matrix = pruned(model.get_parameter(tensor.name).detach().float(), quantisation.prune)
            self._matrices[tensor.name] = matrix
            self._finest[tensor.name] = half_scales(matrix.abs().amax(dim=1), LARGEST)
            self._steps[tensor.name] = 1 / sqrt(max(calibration.sensitivities[tensor.name], least) or 1.0)

    def bounds(self) -> tuple[float, float]:
        """log2 of two multipliers: with the first steps are the finest there are, with the second all symbols are 0."""
        peaks = [(LARGEST * float(finest.max()), self._steps[name]) for name, finest in self._finest.items()]
        live = [log2(peak / step) for peak, step in peaks if peak > 0] or [0.0]
        return min(live) - 24, max(live) + 2

    def is_finest(self, multiplier: float) -> bool:
        """Whether no row's step would be smaller at a smaller multiplier."""
        return all(torch.equal(self.scales(name, multiplier), self.scales(name, 0.0)) for name in self._finest)

    def scales(self, name: str, multiplier: float) -> Tensor:
        """Of each row, as fp16 holds them. (rows,) fp32"""
        step = min(max(multiplier * self._steps[name], SMALLEST_SCALE), LARGEST_HALF)
        return self._finest[name].clamp(min=float(torch.tensor(step).half()))

    def rows(self, multiplier: float) -> dict[str, Rows]:
        """All matrices rounded."""
        rounded: dict[str, Rows] = {}
        for name, matrix in self._matrices.items():
            largest = torch.full((len(matrix),), float(LARGEST), device=matrix.device)
            rounded[name] = round_rows(matrix, self.scales(name, multiplier), largest, self._factors.of(name))
        return rounded

    def symbol_bytes(self, multiplier: float) -> float:
        """What an ideal code of each matrix's symbols would need, from a sample of them rounded to the nearest."""
        total = 0.0
        for name, matrix in self._matrices.items():
            rows = -(-matrix.numel() // SAMPLE)  # every so many-th
            symbols = to_symbols(matrix[::rows], self.scales(name, multiplier)[::rows], LARGEST)
            counts = torch.bincount(symbols.flatten().int() + LARGEST, minlength=2 * LARGEST + 1).double()
            shares = counts[counts > 0] / counts.sum()
            total -= float((shares * shares.log2()).sum()) / 8 * matrix.numel()
        return total
