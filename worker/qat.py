"""Quantisation-aware training: a step that sees the weights as the artifact will hold them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import Parameter

from worker.inventory import TensorClass, is_quantised, tensor_inventory
from worker.model import Model
from worker.packing import QuantisationConfig
from worker.quantize import largest_symbol, pruned, row_scales, to_symbols


@contextmanager
def fake_quantised(model: Model, quantisation: QuantisationConfig) -> Iterator[None]:
    """Within it every matrix that the artifact quantises holds what the artifact would; after it, its exact values.

    A forward and backward pass within is the straight-through estimator (Bengio et al., 2013): gradients at the rounded
    weights, for the exact ones, with nothing added to the graph. Embeddings and tables are among the matrices: a symbol
    that training never saw is a part of what EBLS lost at export. Rounding is to the nearest and every row has its
    class's bits, whatever packing refines afterwards. Waits for no device.
    """
    matrices = quantised_parameters(model, quantisation.half_below)
    exact = [matrix.data for matrix, _ in matrices]
    try:
        for matrix, tensor_class in matrices:
            matrix.data = rounded(matrix.data, tensor_class, quantisation)
        yield
    finally:
        for (matrix, _), values in zip(matrices, exact, strict=True):
            matrix.data = values


def rounded(weight: Tensor, tensor_class: TensorClass, quantisation: QuantisationConfig) -> Tensor:
    """The matrix that quantising and dequantising give. A value that is not finite spoils its row."""
    matrix = pruned(weight, quantisation.prune)
    scales = row_scales(matrix, tensor_class, quantisation)
    symbols = to_symbols(matrix, scales, largest_symbol(quantisation.bits_of(tensor_class)))
    return torch.mul(symbols, scales[:, None])  # (rows, columns) fp32


def quantised_parameters(model: Model, half_below: int) -> list[tuple[Parameter, TensorClass]]:
    """The matrices that the artifact stores as symbols, each once however often it is applied."""
    parameters = dict(model.named_parameters())
    inventory = tensor_inventory(model.config, model.sharing)
    return [(parameters[each.name], each.tensor_class) for each in inventory if is_quantised(each, half_below)]
