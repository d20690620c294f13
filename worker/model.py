"""The one composable model: virtual layers over shared blocks. worker.sharing lists its tensors and what they cost."""

import hashlib
from collections.abc import Callable
from fnmatch import fnmatchcase
from math import sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.adapters import Bypass
from worker.attention import Attention, Rotation, rms_norm
from worker.embedding import Bigram, Smear
from worker.mlp import Mlp
from worker.shape import ModelConfig
from worker.sharing import SharingConfig


class Model(nn.Module):
    """A decoder-only transformer. Parameters are fp32, uninitialised until `initialise` or a load.

    On a GPU activations and the operands of matrix products are bf16; positions, norms, logits and losses are fp32
    everywhere, and on a CPU everything is. Names and shapes in the state dict are worker.sharing.tensor_inventory's.
    """

    def __init__(self, model: ModelConfig, sharing: SharingConfig) -> None:
        super().__init__()
        self.config, self.sharing = model, sharing
        self.tying_map = sharing.tying_map  # Python ints: a tensor would break full-graph compilation
        layers, blocks, width = sharing.virtual_layers, sharing.unique_blocks, model.width
        self.embedding = nn.Embedding(model.vocab_size, width, _weight=torch.empty(model.vocab_size, width))
        self.bigram = Bigram(model) if model.bigram_buckets else None
        self.smear = Smear(model) if model.smear_gate else None
        self.blocks = nn.ModuleList([Block(model) for _ in range(blocks)])
        self.attention_scales = nn.Parameter(torch.empty(blocks if sharing.scales == "block" else layers, width))
        self.mlp_scales = nn.Parameter(torch.empty(blocks if sharing.scales == "block" else layers, width))
        self.residual_mixes = nn.Parameter(torch.empty(blocks if sharing.mixes == "block" else layers, 2, width))
        self.skips = layers // 2 if model.unet_skips else 0
        if self.skips:
            self.skip_weights = nn.Parameter(torch.empty(self.skips, width))
        paths = sorted(sharing.lora.paths) if sharing.lora.rank else []
        self.lora = nn.ModuleDict({path: Bypass(layers, width, sharing.lora.rank) for path in paths})

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats (a scalar, without the penalty) of `targets` after `tokens`, both (B, T) int64."""
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten())

    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of each target in nats. (B, T) fp32"""
        return F.cross_entropy(self.logits(tokens).flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)

    def penalty(self) -> Tensor:
        """λ·Σγ over all gates of all paths: what the training loss gains. Zero without bypasses."""
        gammas = [bypass.gammas().sum() for bypass in self._bypasses().values()]
        return self.sharing.lora.penalty * torch.stack(gammas).sum() if gammas else self.attention_scales.new_zeros(())

    def gammas(self) -> dict[str, list[float]]:
        """By path (attention, mlp): the gate of each virtual layer, 0 to 1. Empty without bypasses."""
        return {path: bypass.gammas().tolist() for path, bypass in self._bypasses().items()}

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V), fp32, soft-capped: c·tanh(x/c)."""
        x = self._layers(self._stem(tokens))
        head = self.embedding.weight / self.config.logit_softcap  # not the logits, which are more
        return F.linear(x, head.to(x.dtype)).float().tanh() * self.config.logit_softcap

    def _stem(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.bigram is not None:
            x = x + self.bigram(tokens)
        if self.smear is not None:
            x = self.smear(x)
        return rms_norm(x).to(torch.bfloat16 if x.is_cuda else x.dtype)

    def _layers(self, x0: Tensor) -> Tensor:  # (B, T, D) -> (B, T, D)
        rotation = Rotation(x0.shape[1], self.config.head_width, self.config.rope_base, x0.device)
        skip_weights = self.skip_weights.to(x0.dtype).unbind() if self.skips else ()
        encoded: list[Tensor] = []
        half, x = self.sharing.virtual_layers // 2, x0
        for position, layer in enumerate(self._virtual_layers(x0.dtype)):
            if half <= position < half + self.skips:  # U-Net: the decoder takes the encoder's outputs, latest first
                x = torch.addcmul(x, skip_weights[position - half], encoded.pop())
            x = layer(x, x0, rotation)
            if position < self.skips:
                encoded.append(x)
        return rms_norm(x)

    def _virtual_layers(self, dtype: torch.dtype) -> list["_VirtualLayer"]:
        # Unbound once and not indexed layer by layer: the gradient of a whole stack is then put together only once.
        attention_scales, mlp_scales = self.attention_scales.to(dtype).unbind(), self.mlp_scales.to(dtype).unbind()
        mixes = [mix.unbind() for mix in self.residual_mixes.to(dtype).unbind()]
        bypasses = {path: bypass.layers(dtype) for path, bypass in self._bypasses().items()}
        layers = []
        for position, block in enumerate(self.tying_map):
            scale = block if self.sharing.scales == "block" else position
            layers.append(
                _VirtualLayer(
                    self.blocks[block],
                    mixes[block if self.sharing.mixes == "block" else position],
                    attention_scales[scale],
                    mlp_scales[scale],
                    bypasses["attention"][position] if "attention" in bypasses else None,
                    bypasses["mlp"][position] if "mlp" in bypasses else None,
                )
            )
        return layers

    def _bypasses(self) -> dict[str, Bypass]:
        return {path: bypass for path, bypass in self.lora.items() if isinstance(bypass, Bypass)}


class Block(nn.Module):
    """One unique block: what the virtual layers tied to it share."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = Mlp(config)


class _VirtualLayer(NamedTuple):
    """One application of a block, with what this application owns, in the dtype of the activations."""

    block: nn.Module
    mix: tuple[Tensor, ...]  # the stream's and the stem's share: 2 × (D,)
    attention_scale: Tensor  # (D,)
    mlp_scale: Tensor  # (D,)
    attention_bypass: tuple[Tensor, Tensor] | None  # (D, r), (r, D)
    mlp_bypass: tuple[Tensor, Tensor] | None

    def __call__(self, x: Tensor, x0: Tensor, rotation: Rotation) -> Tensor:  # (B, T, D) -> (B, T, D)
        assert isinstance(self.block, Block)
        x = torch.addcmul(self.mix[0] * x, self.mix[1], x0)
        normed = rms_norm(x)
        change = _bypassed(self.block.attention(normed, rotation), normed, self.attention_bypass)
        x = torch.addcmul(x, self.attention_scale, change)
        normed = rms_norm(x)
        change = _bypassed(self.block.mlp(normed), normed, self.mlp_bypass)
        return torch.addcmul(x, self.mlp_scale, change)


def _bypassed(change: Tensor, normed: Tensor, bypass: tuple[Tensor, Tensor] | None) -> Tensor:
    if bypass is None:
        return change
    down, up = bypass
    return change + torch.matmul(torch.matmul(normed, down), up)


def initialise(model: Model, seed: int) -> None:
    """Fill every parameter as the table says. Each tensor's values depend on the seed and its own name and shape alone,
    so that configurations compared at one seed start from the same weights wherever they have the same tensors."""
    for name, parameter in model.named_parameters():
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        fill = next(fill for pattern, fill in _INITIALISERS if fnmatchcase(name, pattern))
        with torch.no_grad():
            parameter.copy_(fill(model, parameter.shape, generator))


def _uniform(model: Model, shape: torch.Size, generator: torch.Generator) -> Tensor:
    return (torch.rand(shape, generator=generator) * 2 - 1) / sqrt(shape[-1])  # ±1/sqrt(fan_in)


_Fill = Callable[[Model, torch.Size, torch.Generator], Tensor]
_INITIALISERS: tuple[tuple[str, _Fill], ...] = (  # the first pattern that matches
    ("embedding.weight", lambda model, shape, g: torch.randn(shape, generator=g) * model.config.embedding_init_std),
    ("bigram.table", lambda model, shape, g: torch.randn(shape, generator=g) * 0.01),
    ("bigram.projection", lambda model, shape, g: torch.zeros(shape)),
    ("smear.gate", lambda model, shape, g: torch.full(shape, 3.0)),
    ("lora.*.down", lambda model, shape, g: torch.randn(shape, generator=g) / shape[-1]),  # N(0, 1) / rank
    ("lora.*.up", lambda model, shape, g: torch.zeros(shape)),
    ("lora.*.gate_logits", lambda model, shape, g: torch.full(shape, model.sharing.lora.gate_init)),
    ("*.gain", lambda model, shape, g: torch.full(shape, model.config.qk_gain)),
    ("*.output", lambda model, shape, g: torch.zeros(shape)),
    ("*.down", lambda model, shape, g: torch.zeros(shape)),
    ("residual_mixes", lambda model, shape, g: torch.tensor([[1.0], [0.0]]).expand(shape)),
    ("*_scales", lambda model, shape, g: torch.ones(shape)),
    ("skip_weights", lambda model, shape, g: torch.ones(shape)),
    ("*", _uniform),
)
