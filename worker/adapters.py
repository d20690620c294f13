"""What virtual layers own where they share a block: gated low-rank bypasses and diagonal adapters."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.shape import ModelConfig

FLOOR = 1e-4  # of an adapted scale or gain


class Bypass(nn.Module):
    """For every virtual layer i a path around one sub-layer of its block: x -> γ_i · (x · down_i) · up_i, γ = σ(logit).

    A bypass of the whole sub-layer, not a change to its matrices (EBLS, parameter-golf pull request 433).
    """

    def __init__(self, layers: int, width: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(layers, width, rank))
        self.up = nn.Parameter(torch.empty(layers, rank, width))
        self.gate_logits = nn.Parameter(torch.empty(layers))

    def gammas(self) -> Tensor:
        """The gates' openings γ by virtual layer, each between 0 and 1. (L,)"""
        return self.gate_logits.sigmoid()

    def layers(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        """By virtual layer: down (D, r), and up (r, D) already multiplied by γ."""
        gated = self.gammas()[:, None, None] * self.up
        return list(zip(self.down.to(dtype).unbind(), gated.to(dtype).unbind(), strict=True))


class Adapters(nn.Module):
    """Diagonal changes by virtual layer to what its block owns, each a stack of L (PRISM, parameter-golf 2090).

    Scales and gains are multiplied and kept above zero, mixes are added to.
    """

    def __init__(self, layers: int, config: ModelConfig) -> None:
        super().__init__()
        self.attention_scales = nn.Parameter(torch.empty(layers, config.width))
        self.mlp_scales = nn.Parameter(torch.empty(layers, config.width))
        self.residual_mixes = nn.Parameter(torch.empty(layers, 2, config.width))
        self.gains = nn.Parameter(torch.empty(layers, config.heads))

    def adapted(self, attention: Tensor, mlp: Tensor, mixes: Tensor) -> tuple[Tensor, ...]:
        """The scales of both sub-layers and the mixes. Stacks of L -> stacks of L"""
        return _scaled(attention, self.attention_scales), _scaled(mlp, self.mlp_scales), mixes + self.residual_mixes

    def adapted_gains(self, gains: Tensor) -> Tensor:
        """max(softplus(g ⊙ κ), ε), with softplus at β = 4. (L, heads) -> (L, heads)"""
        return F.softplus(gains * self.gains, beta=4).clamp_min(FLOOR)


def _scaled(scales: Tensor, factors: Tensor) -> Tensor:
    """elu(a ⊙ α - 1) + 1 + ε, which is above ε."""
    return F.elu(scales * factors - 1) + 1 + FLOOR
