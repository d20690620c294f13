"""How layers share weights: the tying map, and what each virtual layer keeps for itself."""

from typing import Literal

from pydantic import Field, model_validator

from worker.shape import FieldError, Frozen
from worker.tying import TyingConfig, TyingMap, canonical_map, expand

LoraPath = Literal["attention", "mlp"]
Owner = Literal["block", "layer"]
Unused = Literal["block_scales", "layer_scales", "adapters", "skips"]


class LoraConfig(Frozen):
    """Per-virtual-layer low-rank bypasses of whole sub-layers: y = f(x) + σ(logit)·(x·A)·B (EBLS, pull request 433).

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


class RepartitionConfig(Frozen):
    """Each virtual layer reads the shared queries and keys in an order of its own (PRISM, pull request 2090).

    fixed: heads, and values within a head, are permuted so that rotated pairs stay pairs. blended: p·q + (1 - p)·q',
    p = σ(w·x + c) per block, and the loss gains `blend_penalty` · (mean p - ½)². The orders follow from `seed` and the
    virtual layer alone. The first `anchor_heads` query heads, and their key heads, stay as they are.
    """

    mode: Literal["none", "fixed", "blended"] = "none"
    seed: int = Field(default=1729, ge=0, lt=2**31)
    heads: bool = True
    values: bool = True
    anchor_heads: int = Field(default=0, ge=0)
    encoder_only: bool = False
    blend_penalty: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> "RepartitionConfig":
        if self.mode != "none" and not self.heads and not self.values:
            raise FieldError("heads", False, "heads, values or both must be permuted")
        return self


class SharingConfig(Frozen):
    """Virtual layers over unique blocks, and what tells apart the virtual layers that share one."""

    virtual_layers: int = Field(default=9, ge=1, le=256)
    unique_blocks: int = Field(default=9, ge=1, le=256)
    tying: TyingConfig = TyingConfig()
    lora: LoraConfig = LoraConfig()
    scales: Owner = "block"
    """Whether a block or each virtual layer owns the scales of its sub-layers' outputs."""
    mixes: Owner = "block"
    """The same for the residual mixes of the stream and the stem."""
    adapters: bool = False
    """Per-virtual-layer factors on the block's scales and gains, and terms on its mix: diagonal adapters (2090)."""
    repartition: RepartitionConfig = RepartitionConfig()
    repeat_embeddings: bool = False
    """A learned vector that each virtual layer adds to its input (167)."""
    bounded_recurrence: float = Field(default=0.0, ge=0, le=1)
    """Above 0: x becomes a softmax blend of itself, the stem and τ times each sub-layer, τ this value (167)."""
    unused: tuple[Unused, ...] = ()
    """Tensors that a source's code allocates and never applies. Stored, counted, never trained: for its count alone."""

    @model_validator(mode="after")
    def _check(self) -> "SharingConfig":
        if self.unique_blocks > self.virtual_layers:
            raise FieldError(
                "unique_blocks", self.unique_blocks, f"must be at most virtual_layers, {self.virtual_layers}"
            )
        expand(self.tying, self.virtual_layers, self.unique_blocks)
        if self.adapters and "layer" in (self.scales, self.mixes):
            raise FieldError("adapters", True, "need scales and mixes owned by blocks, which they change by layer")
        if self.bounded_recurrence:
            if self.adapters:
                raise FieldError("adapters", True, "change scales that bounded_recurrence does without")
            for name, owner in (("scales", self.scales), ("mixes", self.mixes)):
                if owner == "layer":
                    raise FieldError(name, owner, "must be block: bounded_recurrence has neither scales nor mixes")
        self._check_unused()
        return self

    def _check_unused(self) -> None:
        if len(set(self.unused)) != len(self.unused):
            raise FieldError("unused", list(self.unused), "must name each group once")
        by_layer = self.scales == "layer" and self.mixes == "layer"
        used = {
            "block_scales": not by_layer and not self.bounded_recurrence,
            "layer_scales": "layer" in (self.scales, self.mixes),
            "adapters": self.adapters,
        }
        for group in self.unused:
            if used.get(group):
                raise FieldError("unused", list(self.unused), f"{group} are in use here")
        if "skips" in self.unused and self.virtual_layers == 1:
            raise FieldError("unused", list(self.unused), "one virtual layer has no skips")

    @property
    def tying_map(self) -> TyingMap:
        """Virtual layer -> block, blocks numbered in the order in which they are first applied."""
        return canonical_map(expand(self.tying, self.virtual_layers, self.unique_blocks))

    def layers_at(self, fraction: float) -> tuple[int, ...]:
        """The virtual layers that run once `fraction` of the budget is spent, in order.

        All of them from `tying.from_fraction` on; before it the first of each block, with what that layer owns.
        """
        if fraction >= self.tying.from_fraction:
            return tuple(range(self.virtual_layers))
        tying_map = self.tying_map
        return tuple(tying_map.index(block) for block in range(self.unique_blocks))

    def canonical(self) -> "SharingConfig":
        """This sharing with its map written out, and the fields that change nothing at one value each. Equal results
        share in one way."""
        tied, lora, repartition = self.unique_blocks < self.virtual_layers, LoraConfig(), RepartitionConfig()
        late = self.tying.from_fraction if tied else 0.0
        if self.lora.rank:
            lora = self.lora.model_copy(update={"paths": tuple(sorted(self.lora.paths))})
        if self.repartition.mode == "fixed":
            repartition = self.repartition.model_copy(update={"blend_penalty": repartition.blend_penalty})
        elif self.repartition.mode == "blended":
            repartition = self.repartition
        same: dict[str, object] = {
            "tying": TyingConfig(pattern="explicit", map=self.tying_map, from_fraction=late),
            "lora": lora,
            "repartition": repartition,
            "unused": tuple(sorted(self.unused)),
        }
        if not tied:
            same |= {"scales": "block", "mixes": "block"}
        return self.model_copy(update=same)
