"""How layers share weights: the tying map, its patterns, and the arithmetic of what they cost in parameters."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from math import prod
from typing import Any, Literal

from pydantic import Field, model_validator

from worker.shape import FieldError, Frozen, ModelConfig

TyingMap = tuple[int, ...]  # virtual layer -> block
LoraPath = Literal["attention", "mlp"]
Owner = Literal["block", "layer"]


class TyingConfig(Frozen):
    """Which block each virtual layer applies, by pattern (written here for 6 layers and 3 blocks) or explicitly.

    cycle 012012 · sequence 001122 · palindrome 012210 · loop: blocks `start`..`end` (inclusive) run `passes` times in a
    row, every other block once · tail: the last block but `after` is applied until only `after` layers are left ·
    explicit: `map`. A bare pattern name or a bare list is accepted for the whole.
    """

    pattern: Literal["cycle", "sequence", "palindrome", "loop", "tail", "explicit"] = "cycle"
    start: int | None = Field(default=None, ge=0)
    end: int | None = Field(default=None, ge=0)
    passes: int | None = Field(default=None, ge=2)
    after: int | None = Field(default=None, ge=0)
    map: TyingMap | None = None

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"pattern": data}
        if isinstance(data, list | tuple):
            return {"pattern": "explicit", "map": data}
        return data

    @model_validator(mode="after")
    def _check(self) -> "TyingConfig":
        needed: dict[str, tuple[str, ...]] = {"loop": ("start", "end", "passes"), "explicit": ("map",)}
        allowed = {**needed, "tail": ("after",)}
        for name in ("start", "end", "passes", "after", "map"):
            value = getattr(self, name)
            if value is None and name in needed.get(self.pattern, ()):
                raise FieldError(name, None, f"the pattern {self.pattern!r} needs it")
            if value is not None and name not in allowed.get(self.pattern, ()):
                raise FieldError(name, value, f"the pattern {self.pattern!r} does not take it")
        return self


class LoraConfig(Frozen):
    """Per-virtual-layer low-rank bypasses of whole sub-layers, gated: y = f(x) + σ(logit)·(x·A)·B (EBLS, section 6.3).

    `rank` 0 is a hard tie. The loss gains `penalty` · Σγ over all gates, γ = σ(logit), starting at σ(`gate_init`).
    """

    rank: int = Field(default=0, ge=0)
    paths: tuple[LoraPath, ...] = ("attention", "mlp")
    gate_init: float = Field(default=-2.0, ge=-20, le=20)
    penalty: float = Field(default=0.01, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "LoraConfig":
        if len(set(self.paths)) != len(self.paths):
            raise FieldError("paths", list(self.paths), "must name each path once")
        if self.rank and not self.paths:
            raise FieldError("paths", [], "must name attention, mlp or both when the rank is above 0")
        return self


class SharingConfig(Frozen):
    """Virtual layers over unique blocks. `scales` and `mixes` say whether a block or each virtual layer owns them."""

    virtual_layers: int = Field(default=9, ge=1, le=256)
    unique_blocks: int = Field(default=9, ge=1, le=256)
    tying: TyingConfig = TyingConfig()
    lora: LoraConfig = LoraConfig()
    scales: Owner = "block"
    mixes: Owner = "block"

    @model_validator(mode="after")
    def _check(self) -> "SharingConfig":
        if self.unique_blocks > self.virtual_layers:
            raise FieldError(
                "unique_blocks", self.unique_blocks, f"must be at most virtual_layers, {self.virtual_layers}"
            )
        _expand(self)
        return self

    @property
    def tying_map(self) -> TyingMap:
        """Virtual layer -> block, blocks numbered in the order in which they are first applied."""
        return canonical_map(_expand(self))


def canonical_map(blocks: Iterable[int]) -> TyingMap:
    """The same tying with blocks numbered by first use (a restricted growth string): equal maps share weights alike."""
    names: dict[int, int] = {}
    return tuple(names.setdefault(block, len(names)) for block in blocks)


def _expand(sharing: SharingConfig) -> TyingMap:
    tying, layers, blocks = sharing.tying, sharing.virtual_layers, sharing.unique_blocks
    expanded = _EXPANDERS[tying.pattern](tying, layers, blocks)
    path = "tying.map" if tying.pattern == "explicit" else "tying.pattern"
    value = list(expanded) if tying.pattern == "explicit" else tying.pattern
    if len(expanded) != layers:
        raise FieldError(path, value, f"gives {len(expanded)} layers; virtual_layers says {layers}")
    missing = sorted(set(range(blocks)) - set(expanded))
    if missing:
        raise FieldError(path, value, f"skips block {missing[0]}; every block from 0 to {blocks - 1} must be used")
    outside = sorted(set(expanded) - set(range(blocks)))
    if outside:
        raise FieldError(path, value, f"names block {outside[0]}; blocks run from 0 to {blocks - 1}")
    return expanded


def _palindrome(layers: int, blocks: int) -> TyingMap:
    period = [*range(blocks), *reversed(range(blocks))]
    return tuple(period[i % len(period)] for i in range(layers))


def _loop(tying: TyingConfig, blocks: int) -> TyingMap:
    assert tying.start is not None and tying.end is not None and tying.passes is not None
    if tying.start > tying.end:
        raise FieldError("tying.start", tying.start, f"must be at most tying.end, {tying.end}")
    if tying.end >= blocks:
        raise FieldError("tying.end", tying.end, f"must be below unique_blocks, {blocks}")
    segment = tuple(range(tying.start, tying.end + 1))
    return (*range(tying.start), *segment * tying.passes, *range(tying.end + 1, blocks))


def _tail(tying: TyingConfig, layers: int, blocks: int) -> TyingMap:
    after = tying.after or 0
    if after >= blocks:
        raise FieldError("tying.after", after, f"must be below unique_blocks, {blocks}")
    tied = blocks - 1 - after
    return (*range(tied), *[tied] * (layers - blocks + 1), *range(tied + 1, blocks))


_EXPANDERS: dict[str, Callable[[TyingConfig, int, int], TyingMap]] = {
    "cycle": lambda tying, layers, blocks: tuple(i % blocks for i in range(layers)),
    "sequence": lambda tying, layers, blocks: tuple(i * blocks // layers for i in range(layers)),
    "palindrome": lambda tying, layers, blocks: _palindrome(layers, blocks),
    "loop": lambda tying, layers, blocks: _loop(tying, blocks),
    "tail": lambda tying, layers, blocks: _tail(tying, layers, blocks),
    "explicit": lambda tying, layers, blocks: tying.map or (),
}


class TensorClass(StrEnum):
    """What a tensor is for, which decides how it is stored and how well it compresses."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    MLP = "mlp"
    BIGRAM = "bigram"
    LORA = "lora"
    CONTROL = "control"


@dataclass(frozen=True)
class TensorShape:
    """One stored tensor: its name in the model's state dict, its shape (out, in for matrices) and its class."""

    name: str
    shape: tuple[int, ...]
    tensor_class: TensorClass

    @property
    def elements(self) -> int:
        return prod(self.shape)


def tensor_inventory(model: ModelConfig, sharing: SharingConfig) -> tuple[TensorShape, ...]:
    """Every tensor of the built model, each stored once however many virtual layers apply it. Torch-free arithmetic."""
    d, layers, blocks = model.width, sharing.virtual_layers, sharing.unique_blocks
    tensors = [TensorShape("embedding.weight", (model.vocab_size, d), TensorClass.EMBEDDING)]
    if model.bigram_buckets:
        tensors += [
            TensorShape("bigram.table", (model.bigram_buckets, model.bigram_width), TensorClass.BIGRAM),
            TensorShape("bigram.projection", (d, model.bigram_width), TensorClass.BIGRAM),
        ]
    if model.smear_gate:
        tensors.append(TensorShape("smear.gate", (d,), TensorClass.CONTROL))
    for block in range(blocks):
        tensors += [
            TensorShape(f"blocks.{block}.attention.query", (d, d), TensorClass.ATTENTION),
            TensorShape(f"blocks.{block}.attention.key", (model.kv_width, d), TensorClass.ATTENTION),
            TensorShape(f"blocks.{block}.attention.value", (model.kv_width, d), TensorClass.ATTENTION),
            TensorShape(f"blocks.{block}.attention.output", (d, d), TensorClass.ATTENTION),
            TensorShape(f"blocks.{block}.attention.gain", (model.heads,), TensorClass.CONTROL),
            TensorShape(f"blocks.{block}.mlp.up", (model.mlp_width, d), TensorClass.MLP),
            TensorShape(f"blocks.{block}.mlp.down", (d, model.mlp_width), TensorClass.MLP),
        ]
    scale_owners = blocks if sharing.scales == "block" else layers
    mix_owners = blocks if sharing.mixes == "block" else layers
    tensors += [
        TensorShape("attention_scales", (scale_owners, d), TensorClass.CONTROL),
        TensorShape("mlp_scales", (scale_owners, d), TensorClass.CONTROL),
        TensorShape("residual_mixes", (mix_owners, 2, d), TensorClass.CONTROL),
    ]
    if model.unet_skips and layers > 1:
        tensors.append(TensorShape("skip_weights", (layers // 2, d), TensorClass.CONTROL))
    if sharing.lora.rank:
        for path in sorted(sharing.lora.paths):
            tensors += [
                TensorShape(f"lora.{path}.down", (layers, d, sharing.lora.rank), TensorClass.LORA),
                TensorShape(f"lora.{path}.up", (layers, sharing.lora.rank, d), TensorClass.LORA),
                TensorShape(f"lora.{path}.gate_logits", (layers,), TensorClass.CONTROL),
            ]
    return tuple(tensors)


def count_parameters(model: ModelConfig, sharing: SharingConfig) -> int:
    """Distinct stored values of the model; equals the built model's parameter count."""
    return sum(tensor.elements for tensor in tensor_inventory(model, sharing))
