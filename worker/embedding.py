"""The stem's parts: hashed bigrams, the smear, and the value embedding. Numbers in brackets are parameter-golf's."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.projection import project
from worker.shape import ModelConfig

BIGRAM_MULTIPLIER = 104_729
XOR_MULTIPLIERS = 36_313, 27_191  # of the current and of the previous token
DOCUMENT_START = 1  # the token before each document, in every tokenizer of the field


class Bigram(nn.Module):
    """A small table indexed by a hash of the previous and the current token, projected to the model's width."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(config.bigram_buckets, config.bigram_width))
        self.projection = nn.Parameter(torch.empty(config.width, config.bigram_width))
        self.scale = nn.Parameter(torch.empty(1)) if config.bigram_hash == "xor" else None

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, D)
        x = project(F.embedding(self.buckets(tokens), self.table), self.projection)
        return x if self.scale is None else x * self.scale

    def buckets(self, tokens: Tensor) -> Tensor:
        """(104729·previous + current) mod S, S buckets, the token before the first being 0 (433); or, with a scale,
        (36313·current xor 27191·previous) mod (S - 1), the first position in bucket S - 1 (857). In int64."""
        if self.scale is None:
            return (BIGRAM_MULTIPLIER * F.pad(tokens[:, :-1], (1, 0)) + tokens) % len(self.table)
        current, previous = XOR_MULTIPLIERS
        hashed = torch.bitwise_xor(current * tokens[:, 1:], previous * tokens[:, :-1]) % (len(self.table) - 1)
        return F.pad(hashed, (1, 0), value=len(self.table) - 1)


class Smear(nn.Module):
    """Each position takes a share of the one before it, value by value; before the first is zero.

    With k = σ(gate): k·x + (1 - k)·x' where it comes before the stem's norm (433), (1 - k)·x + k·x' after it (857).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.keeps = config.smear_place == "before_norm"
        self.gate = nn.Parameter(torch.empty(config.width))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:  # (B, T, D), (B, T) -> (B, T, D)
        ends = (_before(x), x) if self.keeps else (x, _before(x))
        return torch.lerp(*ends, self.gate.sigmoid())


class WindowSmear(nn.Module):
    """x + strength · σ(weight · x[:n]) · x', where x starts no document (1855)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.gate_inputs))
        self.strength = nn.Parameter(torch.empty(1))

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:  # (B, T, D), (B, T) -> (B, T, D)
        share = self.strength * torch.matmul(x[..., : len(self.weight)], self.weight).sigmoid()  # (B, T)
        return torch.addcmul(x, share.masked_fill(tokens == DOCUMENT_START, 0)[..., None], _before(x))


class ValueEmbedding(nn.Module):
    """A second embedding of the tokens, for the values of some virtual layers, each with a scale of its own (857)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(config.vocab_size, config.value_embedding_width))
        self.projection = nn.Parameter(torch.empty(config.kv_width, config.value_embedding_width))
        self.scale = nn.Parameter(torch.empty(1))
        self.layer_scales = nn.Parameter(torch.empty(len(config.value_embedding_layers)))

    def forward(self, tokens: Tensor) -> Tensor:  # (B, T) -> (B, T, kv)
        return project(F.embedding(tokens, self.table), self.projection) * self.scale


def _before(x: Tensor) -> Tensor:
    return F.pad(x[:, :-1], (0, 0, 1, 0))
