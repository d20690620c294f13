"""The feed-forward half of a block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.shape import ModelConfig


class Mlp(nn.Module):
    """down · relu(up · x)² (So et al., 2021), without biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.empty(config.mlp_width, config.width))
        self.down = nn.Parameter(torch.empty(config.width, config.mlp_width))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return F.linear(F.linear(x, self.up.to(x.dtype)).relu().square(), self.down.to(x.dtype))
