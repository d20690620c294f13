"""The feed-forward half of a block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.projection import project
from worker.shape import ModelConfig


class Mlp(nn.Module):
    """down · φ(up · x), without biases: φ(z) = relu(z)² (So et al., 2021), leaky_relu(z, ½)² or silu(gate · x) ⊙ z."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = config.activation
        if config.activation == "swiglu":
            self.gate = nn.Parameter(torch.empty(config.mlp_width, config.width))
        self.up = nn.Parameter(torch.empty(config.mlp_width, config.width))
        self.down = nn.Parameter(torch.empty(config.width, config.mlp_width))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        return project(self._hidden(x), self.down)

    def _hidden(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, hidden)
        if self.activation == "swiglu":
            gate, up = project(x, self.gate, self.up).chunk(2, dim=-1)
            return F.silu(gate) * up
        up = project(x, self.up)
        return up.relu().square() if self.activation == "relu2" else F.leaky_relu(up, 0.5).square()
