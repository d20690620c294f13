"""Weights as small symmetric integers with a scale a row, or as half precision; and back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from worker.inventory import TensorClass
from worker.packing import GRID, QuantisationConfig

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


def quantise(weight: Tensor, tensor_class: TensorClass, quantisation: QuantisationConfig) -> Rows:
    """The matrix with its smallest values pruned, and each value rounded to the nearest symbol of its row's scale.

    Raises ValueError for values that are not finite, and for rows too large for an fp16 scale.
    """
    matrix = pruned(weight.detach().float(), quantisation.prune)
    if not bool(matrix.isfinite().all()):
        raise ValueError("holds a value that is not finite")
    bits = quantisation.bits_of(tensor_class)
    scales = row_scales(matrix, tensor_class, quantisation)
    if not bool(scales.isfinite().all()):
        peak, reach = float(matrix.abs().max()), LARGEST_HALF * largest_symbol(bits)
        raise ValueError(f"holds {peak:g}; {bits} bits with an fp16 scale reach {reach:g}")
    return Rows(to_symbols(matrix, scales, largest_symbol(bits)), scales.half())


def row_scales(weight: Tensor, tensor_class: TensorClass, quantisation: QuantisationConfig) -> Tensor:
    """Each row's scale by `quantisation.clip`: what lands on its largest symbol, over that symbol. (rows,) fp32

    Exactly as fp16 holds them, so rounding against them and dequantising agree. They have no floor but fp16's own,
    2^-24; only rows of zeros get 0, and rows beyond fp16's range infinity. Waits for no device: QAT asks every step.
    """
    magnitudes, largest = weight.detach().float().abs(), largest_symbol(quantisation.bits_of(tensor_class))
    if quantisation.clip == "grid":
        return _best_scales(weight.detach().float(), magnitudes, largest)
    peaks = magnitudes.amax(dim=1)  # (rows,)
    if quantisation.clip == "quantile":
        clips = row_quantiles(magnitudes, quantisation.clip_quantile)
    elif quantisation.clip == "sigmas" and weight.shape[1] > 1:
        clips = quantisation.sigmas_of(tensor_class) * weight.detach().float().std(dim=1)
    else:
        clips = peaks
    return half_scales(torch.where(clips > 0, clips, peaks), largest)  # a row of equal values has no deviation


def half_scales(clips: Tensor, largest: int | Tensor) -> Tensor:
    """clips / largest to the nearest fp16, but the next above where that would cut off the clip. (rows,) fp32"""
    nearest = (clips / largest).half()
    cut = nearest.float() * (largest + 0.5) < clips  # only where fp16 is coarse: near its subnormal end
    above = (nearest.view(torch.int16) + 1).view(torch.float16)  # the bits of a positive float, counted up by one
    scales = torch.where(cut, above, nearest).clamp(min=SMALLEST_SCALE)
    return torch.where(clips == 0, torch.zeros_like(scales), scales).float()


def to_symbols(weight: Tensor, scales: Tensor, largest: int | Tensor) -> Tensor:
    """The nearest symbols under fp32 row scales; `largest` is one for all rows or one a row. (rows, columns) int8"""
    steps = (weight / torch.where(scales > 0, scales, 1.0)[:, None]).round()
    if isinstance(largest, Tensor):
        return steps.clamp(-largest[:, None], largest[:, None]).to(torch.int8)
    return steps.clamp(-largest, largest).to(torch.int8)


def dequantise_rows(rows: Rows) -> Tensor:
    """The matrix that quantised rows stand for. (rows, columns) fp32"""
    return rows.symbols.float() * rows.scales.float()[:, None]


def row_quantiles(magnitudes: Tensor, quantile: float) -> Tensor:
    """Each row's quantile, between its neighbours by linear interpolation. (rows,)

    By selection from the top, where clips lie: torch.quantile sorts, and refuses more than 2^24 values.
    """
    place = quantile * (magnitudes.shape[1] - 1)
    below = int(place)
    top = magnitudes.topk(magnitudes.shape[1] - below, dim=1).values  # (rows, few), descending
    lower, upper = top[:, -1], top[:, max(top.shape[1] - 2, 0)]
    return torch.lerp(lower, upper, place - below)


def pruned(weight: Tensor, share: float) -> Tensor:
    """The matrix with at most this share of its values, the smallest magnitudes, at zero; equal ones stay together."""
    count = int(share * weight.numel())
    if not count:
        return weight
    magnitudes = weight.abs()
    return weight.masked_fill(magnitudes < magnitudes.flatten().kthvalue(count + 1).values, 0.0)


def to_half(tensor: Tensor) -> Tensor:
    """The tensor in fp16. Raises ValueError for values that fp16 cannot hold."""
    values = tensor.detach().float()
    if not bool(values.isfinite().all()):
        raise ValueError("holds a value that is not finite")
    largest = float(values.abs().max()) if values.numel() else 0.0
    if largest > LARGEST_HALF:
        raise ValueError(f"holds {largest:g}; half precision ends at {LARGEST_HALF:g}")
    return values.half()


def _best_scales(weight: Tensor, magnitudes: Tensor, largest: int) -> Tensor:
    """The scales, of those by GRID's quantiles, that give the whole matrix the least squared error. (rows,) fp32"""
    peaks = magnitudes.amax(dim=1)
    clips = [row_quantiles(magnitudes, quantile) for quantile in GRID]
    candidates = torch.stack([half_scales(torch.where(clip > 0, clip, peaks), largest) for clip in clips])
    errors = [(to_symbols(weight, scales, largest) * scales[:, None] - weight).square().sum() for scales in candidates]
    best = torch.stack(errors).argmin().view(1)  # as a tensor: an index read by the host would wait for the device
    return candidates.index_select(0, best)[0]
