"""The stem's parts: hashed bigrams and the smear gate. Both as EBLS has them (parameter-golf pull request 433)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.shape import ModelConfig

BIGRAM_MULTIPLIER = 104_729


class Bigram(nn.Module):
    """A small table indexed by a hash of the previous and the current token, projected to the model's width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(config.bigram_buckets, config.bigram_width))
        self.projection = nn.Parameter(torch.empty(config.width, config.bigram_width))

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
        return F.linear(F.embedding(self.buckets(tokens), self.table), self.projection)

    def buckets(self, tokens: Tensor) -> Tensor:
        """(104729 · previous + current) mod buckets, in int64; the token before the first is 0."""
        previous = F.pad(tokens[:, :-1], (1, 0))
        return (BIGRAM_MULTIPLIER * previous + tokens) % len(self.table)


class Smear(nn.Module):
    """Each position keeps σ(gate) of itself and takes 1 - σ(gate) of the one before it; before the first is zero."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.empty(config.width))

    def forward(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        before = F.pad(x[:, :-1], (0, 0, 1, 0))
        return torch.lerp(before, x, self.gate.sigmoid())
