"""Causal grouped-query attention with rotary positions and RMS-normalised queries and keys."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.projection import project
from worker.shape import ModelConfig

RMS_EPSILON = 2.0**-23
"""Machine epsilon of fp32, which torch takes for fp32 input. Explicit, because torch's choice for bf16 input changed in
2.7 from 2^-7, which damps a token embedding of standard deviation 0.005 eighteenfold instead of normalising it."""


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + ε) over the last dimension, without a weight, computed in fp32, in x's dtype."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=RMS_EPSILON).to(x.dtype)


def rotation_base(config: ModelConfig, length: int) -> float:
    """The base of the rotary frequencies for sequences of this length, in tokens."""
    trained, width = config.rope_train_length, config.rotated_width
    if trained is None or length <= trained:
        return config.rope_base
    return float(config.rope_base * (length / trained) ** (width / (width - 2)))


class Rotation:
    """Rotary positions (Su et al., 2021), split-half convention: (a, b) -> (a·cos + b·sin, b·cos - a·sin). In fp32.

    Of the first `rotated_width` values of each head; the rest pass through.
    """

    def __init__(self, length: int, config: ModelConfig, device: torch.device) -> None:
        self._width, self._partial = config.rotated_width, config.rotated_width < config.head_width
        exponents = torch.arange(0, self._width, 2, dtype=torch.float32, device=device) / self._width
        positions = torch.arange(length, dtype=torch.float32, device=device)
        angles = torch.outer(positions, rotation_base(config, length) ** -exponents)[:, None]  # (T, 1, rotated / 2)
        self._cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
        self._sin = torch.cat((angles.sin(), -angles.sin()), dim=-1)

    def __call__(self, x: Tensor) -> Tensor:  # (B, T, heads, head_width)
        if self._partial:
            return torch.cat((self._rotated(x[..., : self._width]), x[..., self._width :]), dim=-1)
        return self._rotated(x)

    def _rotated(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * self._cos + torch.cat((b, a), dim=-1) * self._sin


class Reading(NamedTuple):
    """How one virtual layer uses its block's attention, in the dtype of the activations."""

    gain: Tensor  # (heads,)
    rows: Tensor | None  # (D + 2·kv,): its order of the query, key and value rows, the last of them in place
    values: Tensor | None  # (B, T, kv): what its values gain
    exclusive: bool  # whether heads drop their component along their own position's value


class Attention(nn.Module):
    """Queries and keys: projection, RMS-norm, rotation, then a learned gain per query head. Keys are not scaled."""

    def __init__(self, config: ModelConfig, blended: bool = False) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.kv_width, self.query_rank = config.kv_width, config.query_rank
        if config.query_rank:
            self.query_in = nn.Parameter(torch.empty(config.query_rank, config.width))
            self.query_out = nn.Parameter(torch.empty(config.width, config.query_rank))
        else:
            self.query = nn.Parameter(torch.empty(config.width, config.width))
        self.key = nn.Parameter(torch.empty(config.kv_width, config.width))
        self.value = nn.Parameter(torch.empty(config.kv_width, config.width))
        self.output = nn.Parameter(torch.empty(config.width, config.width))
        self.gain = nn.Parameter(torch.empty(config.heads))
        self.head_gate = nn.Parameter(torch.empty(config.heads, config.gate_inputs)) if config.attention_gate else None
        self.blend_weight = nn.Parameter(torch.empty(1, config.width)) if blended else None
        self.blend_bias = nn.Parameter(torch.empty(1)) if blended else None

    def forward(self, x: Tensor, rotation: Rotation, reading: Reading) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) -> (B, T, D), and the mean share of the block's own order (a scalar) where two orders blend."""
        batch, length, width = x.shape
        projected, share = self._project(x, reading.rows)
        heads = projected.view(batch, length, -1, width // self.heads)
        rotated, value = torch.split(heads, [self.heads + self.kv_heads, self.kv_heads], dim=2)
        rotated = rotation(rms_norm(rotated.float())).to(x.dtype)
        query, key = torch.split(rotated, [self.heads, self.kv_heads], dim=2)
        query = query * reading.gain[:, None]
        if reading.values is not None:
            value = value + reading.values.view_as(value)
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True, enable_gqa=True
        ).transpose(1, 2)  # (B, T, heads, head_width); query head h reads kv head h // (heads / kv_heads)
        if reading.exclusive:
            mixed = _without_own_value(mixed, value)
        if self.head_gate is not None:
            inputs = x[..., : self.head_gate.shape[-1]]
            mixed = mixed * (0.5 * F.linear(inputs, self.head_gate.to(x.dtype))).sigmoid()[..., None]
        return project(mixed.reshape(batch, length, width), self.output), share

    def _project(self, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Queries, keys and values side by side, (B, T, D + 2·kv), and the mean share of a blend."""
        if self.query_rank:
            projected = project(x, self.query_in, self.key, self.value)
            low, rest = torch.split(projected, [self.query_rank, 2 * self.kv_width], dim=-1)
            return torch.cat((project(low, self.query_out), rest), dim=-1), None
        if rows is None or self.blend_weight is None:
            return project(x, self.query, self.key, self.value, rows=rows), None
        projected = project(x, self.query, self.key, self.value)
        own, value = torch.split(projected, [projected.shape[-1] - self.kv_width, self.kv_width], dim=-1)
        share = F.linear(x.float(), self.blend_weight, self.blend_bias).sigmoid()  # (B, T, 1)
        blended = torch.lerp(own.index_select(-1, rows[: own.shape[-1]]), own, share.to(x.dtype))
        return torch.cat((blended, value), dim=-1), share.mean()


def _without_own_value(mixed: Tensor, value: Tensor) -> Tensor:
    """Exclusive self attention (parameter-golf pull request 857): y - (y·v̂)·v̂, v̂ the position's own value, unit length.

    (B, T, heads, head_width), (B, T, kv_heads, head_width) -> (B, T, heads, head_width)
    """
    direction = F.normalize(value.float(), dim=-1, eps=1e-12).to(mixed.dtype)[:, :, :, None]
    grouped = mixed.view(*value.shape[:3], -1, value.shape[3])  # (B, T, kv_heads, heads / kv_heads, head_width)
    along = (grouped * direction).sum(dim=-1, keepdim=True)
    return (grouped - along * direction).flatten(2, 3)
