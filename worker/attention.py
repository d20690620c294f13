"""Causal grouped-query attention with rotary positions and RMS-normalised queries and keys."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.shape import ModelConfig

RMS_EPSILON = 2.0**-23
"""Machine epsilon of fp32, which torch takes for fp32 input. Explicit, because torch's choice for bf16 input changed in
2.7 from 2^-7, which damps a token embedding of standard deviation 0.005 eighteenfold instead of normalising it."""


def rms_norm(x: Tensor) -> Tensor:
    """x / sqrt(mean(x²) + ε) over the last dimension, without a weight, computed in fp32, in x's dtype."""
    return F.rms_norm(x.float(), x.shape[-1:], eps=RMS_EPSILON).to(x.dtype)


class Rotation:
    """Rotary positions (Su et al., 2021), split-half convention: (a, b) -> (a·cos + b·sin, b·cos - a·sin). In fp32."""

    def __init__(self, length: int, head_width: int, base: float, device: torch.device) -> None:
        exponents = torch.arange(0, head_width, 2, dtype=torch.float32, device=device) / head_width
        positions = torch.arange(length, dtype=torch.float32, device=device)
        angles = torch.outer(positions, base**-exponents)[:, None]  # (T, 1, head_width / 2)
        self.cos = torch.cat((angles.cos(), angles.cos()), dim=-1)
        self.sin = torch.cat((angles.sin(), -angles.sin()), dim=-1)

    def __call__(self, x: Tensor) -> Tensor:  # (B, T, heads, head_width)
        a, b = x.chunk(2, dim=-1)
        return x * self.cos + torch.cat((b, a), dim=-1) * self.sin


class Attention(nn.Module):
    """Queries and keys: projection, RMS-norm, rotation, then a learned gain per query head. Keys are not scaled."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.query = nn.Parameter(torch.empty(config.width, config.width))
        self.key = nn.Parameter(torch.empty(config.kv_width, config.width))
        self.value = nn.Parameter(torch.empty(config.kv_width, config.width))
        self.output = nn.Parameter(torch.empty(config.width, config.width))
        self.gain = nn.Parameter(torch.empty(config.heads))

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:  # (B, T, D) -> (B, T, D)
        batch, length, width = x.shape
        projection = torch.cat((self.query, self.key, self.value)).to(x.dtype)
        heads = F.linear(x, projection).view(batch, length, -1, width // self.heads)
        rotated, value = torch.split(heads, [self.heads + self.kv_heads, self.kv_heads], dim=2)
        rotated = rotation(rms_norm(rotated.float())).to(x.dtype)
        query, key = torch.split(rotated, [self.heads, self.kv_heads], dim=2)
        query = query * self.gain.to(x.dtype)[:, None]
        mixed = F.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True, enable_gqa=True
        )  # (B, heads, T, head_width); query head h reads kv head h // (heads / kv_heads)
        return F.linear(mixed.transpose(1, 2).reshape(batch, length, width), self.output.to(x.dtype))
