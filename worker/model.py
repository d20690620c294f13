"""The one composable model: virtual layers over shared blocks. worker.inventory lists its tensors."""

import hashlib
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worker.adapters import Adapters, Bypass
from worker.attention import Reading, Rotation, rms_norm
from worker.embedding import Bigram, Smear, ValueEmbedding, WindowSmear
from worker.inventory import tensor_inventory
from worker.layer import Block, Lanes, LaneWeights, Passage, Scales, VirtualLayer, merged
from worker.projection import observe
from worker.repartition import reorders, repartitioned
from worker.shape import ModelConfig
from worker.sharing import Owner, SharingConfig

ORTHOGONAL_SIDE = 64  # the shortest side of a matrix that starts orthogonal


class Model(nn.Module):
    """A decoder-only transformer. Parameters are fp32, uninitialised until `initialise` or a load.

    On a GPU activations and the operands of matrix products are bf16; positions, norms, logits and losses are fp32
    everywhere, and on a CPU everything is. Names and shapes in the state dict are worker.inventory's.
    """

    def __init__(self, model: ModelConfig, sharing: SharingConfig) -> None:
        super().__init__()
        self.config, self.sharing = model, sharing
        self.tying_map = sharing.tying_map  # Python ints: a tensor would break full-graph compilation
        self.running = sharing.layers_at(1.0)
        layers, blocks, width = sharing.virtual_layers, sharing.unique_blocks, model.width
        repartition = sharing.repartition.mode
        self.embedding = nn.Embedding(model.vocab_size, width, _weight=torch.empty(model.vocab_size, width))
        self.bigram = Bigram(model) if model.bigram_buckets else None
        self.smear = _smear(model) if model.smear_gate else None
        self.value_embedding = ValueEmbedding(model) if model.value_embedding_width else None
        self.blocks = nn.ModuleList([Block(model, repartition == "blended") for _ in range(blocks)])
        self.lanes = LaneWeights(blocks) if model.lanes_from is not None else None
        self.adapters = Adapters(layers, model) if sharing.adapters else None
        if sharing.bounded_recurrence:
            self.recurrence_logits = nn.Parameter(torch.empty(layers, 4))
        else:
            owners = {"block": blocks, "layer": layers}
            self.attention_scales = nn.Parameter(torch.empty(owners[sharing.scales], width))
            self.mlp_scales = nn.Parameter(torch.empty(owners[sharing.scales], width))
            self.residual_mixes = nn.Parameter(torch.empty(owners[sharing.mixes], 2, width))
        self.repeat_embeddings = nn.Parameter(torch.empty(layers, width)) if sharing.repeat_embeddings else None
        self.skips = layers // 2 if model.unet_skips else 0
        if self.skips:
            self.skip_weights = nn.Parameter(torch.empty(self.skips, width))
        self.skip_gates = nn.Parameter(torch.empty(self.skips, width)) if self.skips and model.skip_gates else None
        paths = sorted(sharing.lora.paths) if sharing.lora.rank else []
        self.lora = nn.ModuleDict({path: Bypass(layers, width, sharing.lora.rank) for path in paths})
        self.unused = nn.ParameterDict(
            {
                tensor.name.removeprefix("unused."): nn.Parameter(torch.empty(tensor.shape))
                for tensor in tensor_inventory(model, sharing)
                if tensor.name.startswith("unused.")
            }
        )
        rows = repartitioned(model, sharing) if repartition != "none" else None
        self.register_buffer("rows", rows, persistent=False)

    def forward(self, tokens: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The training loss (a scalar) of `targets` after `tokens`, both (B, T) int64: cross-entropy and penalties."""
        x, passage = self._passed(tokens)
        logits = self._head(x).flatten(0, 1)
        loss = F.cross_entropy(logits, targets.flatten(), label_smoothing=label_smoothing) + self.penalty()
        for share in passage.shares:
            loss = loss + self.sharing.repartition.blend_penalty * (share - 0.5).square()
        return loss

    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy in nats of each target (B, S), those of the last S of the tokens (B, T). (B, S) fp32"""
        x, _ = self._passed(tokens)
        return _token_losses(self._head(x[:, -targets.shape[1] :]), targets)  # a sliding window scores few

    def logits(self, tokens: Tensor) -> Tensor:
        """(B, T) -> (B, T, V), fp32, soft-capped: c·tanh(x/c)."""
        return self._head(self._passed(tokens)[0])

    def states(self, tokens: Tensor) -> list[Tensor]:
        """The stream that enters each running virtual layer, then what leaves the last. L + 1 × (B, T, D)

        A skip counts to the layer that takes it, and two lanes count as their mean.
        """
        states: list[Tensor] = []
        self._passed(tokens, states)
        return states

    def deepened(self, tokens: Tensor, targets: Tensor, cycles: int) -> tuple[Tensor, Tensor]:
        """Run the tied blocks again after the last layer, in order, cycle by cycle, each as the last layer that applies
        it and without skips. The token losses at each depth (cycles + 1, B, T), and rms(Δx) / rms(x) of each cycle
        (cycles,), both fp32. Raises ValueError where no block is tied.
        """
        last = {block: layer for layer, block in enumerate(self.tying_map)}
        tied = [layer for block, layer in last.items() if self.tying_map.count(block) > 1]
        if not tied:
            raise ValueError("no block is applied twice: there is nothing to repeat")
        x, passage = self._passed(tokens)
        losses, changes = [_token_losses(self._head(x), targets)], [x.new_empty(0, dtype=torch.float32)]
        for _ in range(cycles):
            lanes: Lanes = (x,)
            for layer in sorted(tied):
                lanes = passage.layers[layer](passage.layers[layer].enter(lanes), passage)
            before, x = x.float(), merged(lanes)
            changes.append(((x.float() - before).norm() / before.norm())[None])
            losses.append(_token_losses(self._head(x), targets))
        return torch.stack(losses), torch.cat(changes)

    def progress_to(self, fraction: float) -> None:
        """From now on run the virtual layers that run once `fraction` of the budget is spent. A new model runs all."""
        self.running = self.sharing.layers_at(fraction)

    def penalty(self) -> Tensor:
        """λ·Σγ over all gates of all paths, a part of the training loss. Zero without bypasses."""
        gammas = [bypass.gammas().sum() for bypass in self._bypasses().values()]
        return self.sharing.lora.penalty * torch.stack(gammas).sum() if gammas else self.embedding.weight.new_zeros(())

    def gammas(self) -> dict[str, list[float]]:
        """By path (attention, mlp): the gate of each virtual layer, 0 to 1. Empty without bypasses."""
        return {path: bypass.gammas().tolist() for path, bypass in self._bypasses().items()}

    def _head(self, x: Tensor) -> Tensor:  # (B, T, D) -> (B, T, V) fp32
        x = rms_norm(x)
        observe(x, self.embedding.weight)
        head = self.embedding.weight / self.config.logit_softcap  # not the logits, which are more
        return F.linear(x, head.to(x.dtype)).float().tanh() * self.config.logit_softcap

    def _stem(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embedding(tokens)
        if self.bigram is not None:
            x = x + self.bigram(tokens)
        if self.smear is not None and self.config.smear_place != "after_norm":
            x = self.smear(x, tokens)
        x = rms_norm(x)
        if self.smear is not None and self.config.smear_place == "after_norm":
            x = self.smear(x, tokens)
        return x.to(torch.bfloat16) if x.is_cuda else x

    def _passed(self, tokens: Tensor, states: list[Tensor] | None = None) -> tuple[Tensor, Passage]:
        """What leaves the last running layer, (B, T, D). Adds to `states` what enters each and leaves the last."""
        x = self._stem(tokens)
        values = None if self.value_embedding is None else self.value_embedding(tokens).to(x.dtype)
        rotation = Rotation(tokens.shape[1], self.config, x.device)
        passage = Passage(x, rotation, values, self._virtual_layers(x.dtype))
        weights = self.skip_weights.to(x.dtype).unbind() if self.skips else ()
        gates = None if self.skip_gates is None else self.skip_gates.sigmoid().to(x.dtype).unbind()
        half = len(self.running) // 2 if self.skips else 0
        encoded: list[Tensor] = []
        lanes: Lanes = (x,)
        for position, index in enumerate(self.running):
            if states is not None:
                states.append(merged(lanes))
            layer = passage.layers[index]
            lanes = layer.enter(lanes)
            if half <= position < 2 * half:  # U-Net: the decoder takes the encoder's outputs, latest first
                skip = position - half
                entering = _skipped(lanes[0], weights[skip], encoded.pop(), None if gates is None else gates[skip])
                lanes = (entering, *lanes[1:])
            lanes = layer(lanes, passage)
            if position < half:
                encoded.append(lanes[0])
        x = merged(lanes)
        if states is not None:
            states.append(x)
        return x, passage

    def _virtual_layers(self, dtype: torch.dtype) -> list[VirtualLayer]:
        # Unbound once and not indexed layer by layer: the gradient of a whole stack is then put together only once.
        scales, gains, recurrences = self._scales(dtype), self._gains(dtype), self._recurrences(dtype)
        bypasses = {path: bypass.layers(dtype) for path, bypass in self._bypasses().items()}
        repeats = None if self.repeat_embeddings is None else self.repeat_embeddings.to(dtype).unbind()
        lane_weights = None if self.lanes is None else self.lanes.blocks(dtype)
        value_scales: dict[int, Tensor] = {}
        if self.value_embedding is not None:
            of_layers = self.value_embedding.layer_scales.to(dtype).unbind()
            value_scales = dict(zip(self.config.value_embedding_layers, of_layers, strict=True))
        return [
            VirtualLayer(
                block=self.blocks[block],
                reading=Reading(gains[index], self._rows(index), None, index >= len(gains) - self.config.xsa_last),
                input_scale=self._input_scale(index),
                scales=scales[index] if scales else None,
                recurrence=recurrences[index] if recurrences else None,
                attention_bypass=bypasses["attention"][index] if "attention" in bypasses else None,
                mlp_bypass=bypasses["mlp"][index] if "mlp" in bypasses else None,
                value_scale=value_scales.get(index),
                repeat_embedding=repeats[index] if repeats else None,
                lane_weights=lane_weights[block] if lane_weights and self._in_two_lanes(block) else None,
            )
            for index, block in enumerate(self.tying_map)
        ]

    def _scales(self, dtype: torch.dtype) -> list[Scales] | None:
        """By virtual layer. None under bounded recurrence."""
        if self.sharing.bounded_recurrence:
            return None
        stacks: tuple[Tensor, ...] = (self.attention_scales, self.mlp_scales, self.residual_mixes)
        owners: tuple[Owner, ...] = (self.sharing.scales, self.sharing.scales, self.sharing.mixes)
        if self.adapters is not None:
            blocks = [torch.stack(self._of_layers(stack.unbind(), "block")) for stack in stacks]
            stacks, owners = self.adapters.adapted(*blocks), ("layer", "layer", "layer")
        attention, mlp, mixes = (
            self._of_layers(stack.to(dtype).unbind(), owner) for stack, owner in zip(stacks, owners, strict=True)
        )
        return [Scales(a, m, mix.unbind()) for a, m, mix in zip(attention, mlp, mixes, strict=True)]

    def _gains(self, dtype: torch.dtype) -> list[Tensor]:
        """By virtual layer: the gain of each query head. (heads,)"""
        gains = [block.attention.gain for block in self.blocks if isinstance(block, Block)]
        if self.adapters is None:
            return self._of_layers([gain.to(dtype) for gain in gains], "block")
        adapted = self.adapters.adapted_gains(torch.stack(self._of_layers(gains, "block")))
        return list(adapted.to(dtype).unbind())

    def _recurrences(self, dtype: torch.dtype) -> list[tuple[Tensor, ...]] | None:
        """By virtual layer: the shares of stream, stem, attention and MLP. None without bounded recurrence."""
        bound = self.sharing.bounded_recurrence
        if not bound:
            return None
        carry, anchor, attention, mlp = self.recurrence_logits.softmax(dim=-1).to(dtype).unbind(dim=-1)
        stacks = (carry, anchor, bound * attention, bound * mlp)
        return list(zip(*(stack.unbind() for stack in stacks), strict=True))

    def _of_layers(self, owned: Sequence[Tensor], owner: Owner) -> list[Tensor]:
        return [owned[block if owner == "block" else layer] for layer, block in enumerate(self.tying_map)]

    def _rows(self, layer: int) -> Tensor | None:
        rows = self.rows
        return rows[layer] if isinstance(rows, Tensor) and reorders(layer, self.sharing) else None

    def _in_two_lanes(self, block: int) -> bool:
        return self.config.lanes_from is not None and block >= self.config.lanes_from

    def _input_scale(self, layer: int) -> float:
        """1 / √(i + 1), i the layer's block, the first layer of that block, or the layer itself."""
        block = self.tying_map[layer]
        index = {"none": 0, "block": block, "first_layer": self.tying_map.index(block), "layer": layer}
        return 1 / sqrt(index[self.config.ln_scale] + 1)

    def _bypasses(self) -> dict[str, Bypass]:
        return {path: bypass for path, bypass in self.lora.items() if isinstance(bypass, Bypass)}


def _smear(config: ModelConfig) -> Smear | WindowSmear:
    return WindowSmear(config) if config.smear_place == "window" else Smear(config)


def _skipped(x: Tensor, weight: Tensor, skip: Tensor, gate: Tensor | None) -> Tensor:
    return torch.addcmul(x, weight, skip) if gate is None else torch.lerp(weight * skip, x, gate)


def _token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def initialise(model: Model, seed: int) -> None:
    """Fill every parameter as the table says. Each tensor's draws depend on the seed and its own name and shape alone,
    so that configurations compared at one seed start from the same weights wherever they have the same tensors."""
    for name, parameter in model.named_parameters():
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        fill = next(fill for pattern, fill in _INITIALISERS if fnmatchcase(name, pattern))
        with torch.no_grad():
            parameter.copy_(fill(model, parameter.shape, generator))


def _matrix(model: Model, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if model.config.init == "orthogonal" and min(shape) >= ORTHOGONAL_SIDE:
        return _orthogonal(shape, generator)
    return (torch.rand(shape, generator=generator) * 2 - 1) / sqrt(shape[-1])  # ±1/sqrt(fan_in)


def _orthogonal(shape: torch.Size, generator: torch.Generator) -> Tensor:
    return nn.init.orthogonal_(torch.empty(shape), generator=generator)


def _bigram_table(model: Model, shape: torch.Size, generator: torch.Generator) -> Tensor:
    # Either the table or its projection starts at zero. Where both do, as in 167, no gradient ever reaches either.
    if model.config.init == "orthogonal":
        return torch.zeros(shape)
    return torch.randn(shape, generator=generator) * 0.01


def _stem_projection(model: Model, shape: torch.Size, generator: torch.Generator) -> Tensor:
    if model.config.init == "orthogonal":
        return _orthogonal(shape, generator) / sqrt(2 * model.sharing.virtual_layers)
    return torch.zeros(shape)


def _constant(value: float) -> "_Fill":
    return lambda model, shape, generator: torch.full(shape, value)


def _each(*values: float) -> "_Fill":
    """Along the mixes' and the recurrence logits' second dimension."""
    return lambda model, shape, generator: torch.tensor(values).view(-1, *[1] * (len(shape) - 2)).expand(shape)


_Fill = Callable[[Model, torch.Size, torch.Generator], Tensor]
_INITIALISERS: tuple[tuple[str, _Fill], ...] = (  # the first pattern that matches
    ("embedding.weight", lambda model, shape, g: torch.randn(shape, generator=g) * model.config.embedding_init_std),
    ("bigram.table", _bigram_table),
    ("*.projection", _stem_projection),
    ("bigram.scale", _constant(0.05)),
    ("value_embedding.table", lambda model, shape, g: torch.randn(shape, generator=g) * 0.01),
    ("value_embedding.scale", _constant(0.1)),
    (
        "smear.gate",
        lambda model, shape, g: torch.full(shape, 3.0 if model.config.smear_place == "before_norm" else 0.0),
    ),
    ("smear.*", _constant(0)),
    ("lora.*.down", lambda model, shape, g: torch.randn(shape, generator=g) / shape[-1]),  # N(0, 1) / rank
    ("lora.*.up", _constant(0)),
    ("lora.*.gate_logits", lambda model, shape, g: torch.full(shape, model.sharing.lora.gate_init)),
    ("lanes.residual", _constant(1.1)),
    ("lanes.*", _constant(1)),
    ("adapters.residual_mixes", _constant(0)),
    ("unused.adapter_residual_mixes", _constant(0)),
    ("*residual_mixes", _each(1, 0)),
    ("recurrence_logits", _each(2, 0.5, 0, 0)),
    ("repeat_embeddings", _constant(0)),
    ("*gains", _constant(1)),
    ("*.gain", lambda model, shape, g: torch.full(shape, model.config.qk_gain)),
    ("*.blend_*", _constant(0)),
    ("*.head_gate", _constant(0)),
    ("*.output", _constant(0)),
    ("*.down", _constant(0)),
    ("*_scales", _constant(1)),
    ("*skip_weights", _constant(1)),
    ("*skip_gates", _constant(0)),
    ("*", _matrix),
)
