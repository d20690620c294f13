"""What virtual layers own where they share a block: gated low-rank bypasses."""

import torch
from torch import Tensor, nn


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
