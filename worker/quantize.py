"""Weights as small symmetric integers with a scale a row, or as half precision; and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-24  # the smallest fp16 above zero
LARGEST_HALF = 65_504.0


@dataclass(frozen=True)
class Rows:
    """A quantised matrix: weight[i, j] = symbols[i, j] · scales[i]."""

    symbols: Tensor  # (rows, columns) int8, from -largest to +largest
    scales: Tensor  # (rows,) fp16, never below zero; zero for a row of zeros


def largest_symbol(bits: int) -> int:
    """The largest of the 2^bits - 1 symbols, which are symmetric about zero: 31 for 6 bits."""
    return (1 << (bits - 1)) - 1


def quantise_rows(weight: Tensor, bits: int) -> Rows:
    """Round a matrix to integers of `bits` bits, each row to a scale of its own that is as small as the row needs.

    Symbols are rounded against the scale as fp16 holds it, so dequantising gives what was meant: every value is off by
    at most half its row's scale. A scale has no floor but fp16's own, 2^-24. Raises ValueError for values that are
    not finite, and for rows too large for an fp16 scale.
    """
    rows, largest = weight.detach().float(), largest_symbol(bits)
    peaks = rows.abs().amax(dim=1)  # (rows,)
    if not bool(peaks.isfinite().all()):
        raise ValueError("holds a value that is not finite")
    if float(peaks.max()) > LARGEST_HALF * largest:
        reach = LARGEST_HALF * largest
        raise ValueError(f"holds {float(peaks.max()):g}; {bits} bits with an fp16 scale reach {reach:g}")
    scales = _scales(peaks, largest)
    divisors = torch.where(scales > 0, scales.float(), 1.0)
    symbols = (rows / divisors[:, None]).round().clamp(-largest, largest)
    return Rows(symbols.to(torch.int8), scales)


def dequantise_rows(rows: Rows) -> Tensor:
    """The matrix that quantised rows stand for. (rows, columns) fp32"""
    return rows.symbols.float() * rows.scales.float()[:, None]


def to_half(tensor: Tensor) -> Tensor:
    """The tensor in fp16. Raises ValueError for values that fp16 cannot hold."""
    values = tensor.detach().float()
    if not bool(values.isfinite().all()):
        raise ValueError("holds a value that is not finite")
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest > LARGEST_HALF:
        raise ValueError(f"holds {largest:g}; half precision ends at {LARGEST_HALF:g}")
    return values.half()


def _scales(peaks: Tensor, largest: int) -> Tensor:
    """fp16 scales: peaks / largest to the nearest, but the next above where that would clip the peak."""
    nearest = (peaks / largest).half()
    clipped = nearest.float() * (largest + 0.5) < peaks  # only where fp16 is coarse: near its subnormal end
    above = (nearest.view(torch.int16) + 1).view(torch.float16)  # the bits of a positive float, counted up by one
    scales = torch.where(clipped, above, nearest)
    return torch.where(peaks > 0, scales.clamp(min=SMALLEST_SCALE), torch.zeros_like(scales))
