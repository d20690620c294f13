"""GPTQ: rounding that lets the columns not yet rounded make up for the errors of those that are.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022. A matrix W is
rounded for inputs x with second moments H = E[x·xᵀ], so that the output's error, E|(W - Q)·x|², and not the matrix's
comes out small. Row scales are fixed before.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128  # columns whose errors are carried on one by one; to those after them, all at once
DAMPINGS = (0.01, 0.1, 1.0)  # of the moments' mean diagonal: the first that leaves them positive definite


@dataclass(frozen=True)
class Factor:
    """What GPTQ needs of second moments: made once, used for every matrix with these inputs and at any scales."""

    order: Tensor  # (in,): columns by falling moment
    live: Tensor  # (in,) bool, in that order: whether the input was ever other than zero
    upper: Tensor  # (in, in) fp32, in that order: Rᵀ·R = H⁻¹


def factorise(moments: Tensor) -> Factor:
    """The factor of second moments (in, in). Raises ValueError where they are not finite or not positive."""
    damped = moments.double().clone()
    diagonal = damped.diagonal()
    dead = diagonal == 0
    diagonal[dead] = 1.0
    order = diagonal.argsort(descending=True, stable=True)
    damped = damped[order][:, order]
    mean = diagonal.mean()
    for damping in DAMPINGS:
        matrix = damped + torch.eye(len(damped), dtype=damped.dtype, device=damped.device) * (damping * mean)
        lower, failed = torch.linalg.cholesky_ex(matrix)
        if int(failed) or not bool(lower.isfinite().all()):
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not int(failed) and bool(upper.isfinite().all()):
            return Factor(order, ~dead[order], upper.float())
    raise ValueError(f"second moments of {len(moments)} inputs are not positive definite even {DAMPINGS[-1]:g} damped")


def gptq(weight: Tensor, factor: Factor, scales: Tensor, largest: Tensor) -> Tensor:
    """Symbols for a matrix under fp32 row scales (rows,), within ±largest (rows,). (rows, columns) int8

    Columns of inputs that are always zero become zero, and values that are exactly zero stay it: pruning survives.
    """
    columns = weight.detach().float().T[factor.order]  # (in, rows): what is left to round, a column a line
    columns[~factor.live] = 0.0
    kept = columns != 0
    divisors = torch.where(scales > 0, scales, 1.0)
    symbols = torch.empty_like(columns)
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        block, upper = columns[start:stop], factor.upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for column in range(stop - start):
            rounded = (block[column] / divisors).round().clamp(-largest, largest) * kept[start + column]
            symbols[start + column] = rounded
            errors[column] = (block[column] - rounded * scales) / upper[column, column]
            block[column:].addr_(upper[column, column:], errors[column], alpha=-1.0)
        columns[stop:].addmm_(factor.upper[start:stop, stop:].T, errors, alpha=-1.0)
    restored = torch.empty_like(symbols)
    restored[factor.order] = symbols
    return restored.T.contiguous().to(torch.int8)
