"""The rounding of a whole model: a scale and a largest symbol for every row, then to the nearest symbol or by GPTQ."""

import torch
from torch import Tensor

from worker.calibrate import Calibration, quantised_matrices
from worker.gptq import Factor, factorise, gptq
from worker.inventory import TensorShape
from worker.model import Model
from worker.packing import ClassBits, QuantisationConfig
from worker.quantize import Rows, largest_symbol, pruned, row_scales, to_symbols

HIGH_BITS, LOW_BITS = 8, 4  # of the rows of high_fraction and low_fraction


def round_weights(model: Model, quantisation: QuantisationConfig, calibration: Calibration) -> dict[str, Rows]:
    """Every matrix that is stored quantised, by name, as the spec says it without a target in bytes. On the CPU."""
    bits = row_bits(model, quantisation, calibration)
    factors = Factors(calibration)
    rounded: dict[str, Rows] = {}
    for tensor in quantised_matrices(model, quantisation.half_below):
        matrix = pruned(model.get_parameter(tensor.name).detach().float(), quantisation.prune)
        scales, largest = _scales(matrix, tensor, bits[tensor.name].to(matrix.device), quantisation)
        rounded[tensor.name] = round_rows(matrix, scales, largest, factors.of(tensor.name))
    return rounded


def row_bits(model: Model, quantisation: QuantisationConfig, calibration: Calibration) -> dict[str, Tensor]:
    """Bits of each row, (rows,), by matrix: 8 for `high_fraction` of all rows, 4 for `low_fraction`, else its class's.

    Rows of all matrices are ranked together, by their gradients on calibration data.
    """
    tensors = quantised_matrices(model, quantisation.half_below)
    if not tensors:
        return {}
    bits = torch.cat([torch.full(tensor.shape[:1], quantisation.bits_of(tensor.tensor_class)) for tensor in tensors])
    high, low = int(quantisation.high_fraction * len(bits)), int(quantisation.low_fraction * len(bits))
    if high or low:
        gradients = torch.cat([calibration.row_gradients[tensor.name].cpu() for tensor in tensors])
        order = gradients.argsort(stable=True)
        bits[order[:low]] = LOW_BITS
        bits[order[len(order) - high :]] = HIGH_BITS
    pieces = torch.split(bits, [tensor.shape[0] for tensor in tensors])
    return {tensor.name: piece for tensor, piece in zip(tensors, pieces, strict=True)}


class Factors:
    """GPTQ's factors of a calibration's second moments, each made when it is first asked for, and kept."""

    def __init__(self, calibration: Calibration) -> None:
        self._moments = calibration.moments
        self._made: dict[int, Factor] = {}  # by the moments' identity: several matrices share some

    def of(self, name: str) -> Factor | None:
        """The factor for a matrix; none where it is rounded to the nearest: a table, or no GPTQ asked for."""
        moments = self._moments.get(name)
        if moments is None:
            return None
        if id(moments) not in self._made:
            try:
                self._made[id(moments)] = factorise(moments)
            except ValueError as error:
                raise ValueError(f"tensor {name}: {error}") from None
        return self._made[id(moments)]


def round_rows(matrix: Tensor, scales: Tensor, largest: Tensor, factor: Factor | None) -> Rows:
    """The matrix under fp32 row scales that fp16 holds exactly, symbols within ±largest (rows,). On the CPU."""
    symbols = to_symbols(matrix, scales, largest) if factor is None else gptq(matrix, factor, scales, largest)
    return Rows(symbols.cpu(), scales.half().cpu())


def _scales(
    matrix: Tensor, tensor: TensorShape, bits: Tensor, quantisation: QuantisationConfig
) -> tuple[Tensor, Tensor]:
    """Each row's scale by the spec's clip and its largest symbol, both (rows,), under its own bits."""
    scales = torch.zeros(len(matrix), device=matrix.device)
    largest = torch.zeros(len(matrix), device=matrix.device)
    for count in sorted(set(bits.tolist())):
        same = quantisation.model_copy(update={"bits": count, "class_bits": ClassBits()})
        rows = bits == count
        scales = torch.where(rows, row_scales(matrix, tensor.tensor_class, same), scales)
        largest = torch.where(rows, float(largest_symbol(count)), largest)
    return scales, largest
