"""The tensors of a model, as plain arithmetic over its shape and its sharing: what it stores, and how much that is."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from math import prod

from worker.shape import FieldError, ModelConfig
from worker.sharing import SharingConfig


class TensorClass(StrEnum):
    """What a tensor is for, which decides how it is stored and how well it compresses."""

    EMBEDDING = "embedding"
    ATTENTION = "attention"
    MLP = "mlp"
    BIGRAM = "bigram"
    VALUE_EMBEDDING = "value_embedding"
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


@lru_cache(maxsize=256)
def tensor_inventory(model: ModelConfig, sharing: SharingConfig) -> tuple[TensorShape, ...]:
    """Every tensor of the built model, each stored once however many virtual layers apply it. Torch-free arithmetic."""
    return (*_stem(model), *_blocks(model, sharing), *_layers(model, sharing), *_unused(model, sharing))


def count_parameters(model: ModelConfig, sharing: SharingConfig) -> int:
    """Distinct stored values of the model; equals the built model's parameter count."""
    return sum(tensor.elements for tensor in tensor_inventory(model, sharing))


def is_quantised(tensor: TensorShape, half_below: int) -> bool:
    """Whether a tensor is stored as small integers: matrices with more than `half_below` values, controls aside."""
    matrix = len(tensor.shape) == 2 and tensor.tensor_class is not TensorClass.CONTROL
    return matrix and tensor.elements > half_below


def require_compatible(model: ModelConfig, sharing: SharingConfig) -> None:
    """Raises FieldError, with a path in a spec, for a model and a sharing that do not go together."""
    layers, tying_map = sharing.virtual_layers, sharing.tying_map
    if sharing.lora.rank > model.width:
        raise FieldError("sharing.lora.rank", sharing.lora.rank, f"must be at most model.width, {model.width}")
    outside = [layer for layer in model.value_embedding_layers if not 0 <= layer < layers]
    if outside:
        message = f"must lie between 0 and sharing.virtual_layers - 1, {layers - 1}"
        raise FieldError("model.value_embedding_layers", outside[0], message)
    if model.unet_skips and "skips" in sharing.unused:
        raise FieldError("sharing.unused", list(sharing.unused), "skips are in use here: needs model.unet_skips false")
    repartition = sharing.repartition
    if repartition.mode != "none":
        if repartition.anchor_heads >= model.heads or repartition.anchor_heads % (model.heads // model.kv_heads):
            message = f"must be below model.heads, {model.heads}, and whole groups of a key head's query heads"
            raise FieldError("sharing.repartition.anchor_heads", repartition.anchor_heads, message)
        if model.query_rank:
            raise FieldError(
                "sharing.repartition.mode",
                repartition.mode,
                "orders the rows of one query matrix: needs model.query_rank 0",
            )
    if model.lanes_from is not None:
        _require_lanes(model.lanes_from, sharing, tying_map)


def _require_lanes(lanes_from: int, sharing: SharingConfig, tying_map: tuple[int, ...]) -> None:
    if lanes_from >= sharing.unique_blocks:
        message = f"must be below sharing.unique_blocks, {sharing.unique_blocks}"
        raise FieldError("model.lanes_from", lanes_from, message)
    first = tying_map.index(lanes_from)
    if any(block < lanes_from for block in tying_map[first:]):
        raise FieldError("model.lanes_from", lanes_from, "no earlier block may be applied after it")
    if sharing.bounded_recurrence:
        raise FieldError("model.lanes_from", lanes_from, "needs sharing.bounded_recurrence 0")


def _stem(model: ModelConfig) -> Iterator[TensorShape]:
    width = model.width
    yield TensorShape("embedding.weight", (model.vocab_size, width), TensorClass.EMBEDDING)
    if model.bigram_buckets:
        yield TensorShape("bigram.table", (model.bigram_buckets, model.bigram_width), TensorClass.BIGRAM)
        yield TensorShape("bigram.projection", (width, model.bigram_width), TensorClass.BIGRAM)
        if model.bigram_hash == "xor":
            yield TensorShape("bigram.scale", (1,), TensorClass.CONTROL)
    if model.smear_gate and model.smear_place == "window":
        yield TensorShape("smear.weight", (model.gate_inputs,), TensorClass.CONTROL)
        yield TensorShape("smear.strength", (1,), TensorClass.CONTROL)
    elif model.smear_gate:
        yield TensorShape("smear.gate", (width,), TensorClass.CONTROL)
    if model.value_embedding_width:
        table = (model.vocab_size, model.value_embedding_width)
        projection = (model.kv_width, model.value_embedding_width)
        yield TensorShape("value_embedding.table", table, TensorClass.VALUE_EMBEDDING)
        yield TensorShape("value_embedding.projection", projection, TensorClass.VALUE_EMBEDDING)
        yield TensorShape("value_embedding.scale", (1,), TensorClass.CONTROL)
        layers = (len(model.value_embedding_layers),)
        yield TensorShape("value_embedding.layer_scales", layers, TensorClass.CONTROL)


def _blocks(model: ModelConfig, sharing: SharingConfig) -> Iterator[TensorShape]:
    width = model.width
    attention: list[tuple[str, tuple[int, ...]]] = [("query", (width, width))]
    if model.query_rank:
        attention = [("query_in", (model.query_rank, width)), ("query_out", (width, model.query_rank))]
    attention += [("key", (model.kv_width, width)), ("value", (model.kv_width, width)), ("output", (width, width))]
    mlp = [("up", (model.mlp_width, width)), ("down", (width, model.mlp_width))]
    if model.activation == "swiglu":
        mlp = [("gate", (model.mlp_width, width)), *mlp]
    control: list[tuple[str, tuple[int, ...]]] = [("gain", (model.heads,))]
    if model.attention_gate:
        control.append(("head_gate", (model.heads, model.gate_inputs)))
    if sharing.repartition.mode == "blended":
        control += [("blend_weight", (1, width)), ("blend_bias", (1,))]
    for block in range(sharing.unique_blocks):
        for name, shape in attention:
            yield TensorShape(f"blocks.{block}.attention.{name}", shape, TensorClass.ATTENTION)
        for name, shape in control:
            yield TensorShape(f"blocks.{block}.attention.{name}", shape, TensorClass.CONTROL)
        for name, shape in mlp:
            yield TensorShape(f"blocks.{block}.mlp.{name}", shape, TensorClass.MLP)
    if model.lanes_from is not None:
        for name in ("lanes.attention", "lanes.mlp", "lanes.residual"):
            yield TensorShape(name, (sharing.unique_blocks, 2), TensorClass.CONTROL)


def _layers(model: ModelConfig, sharing: SharingConfig) -> Iterator[TensorShape]:
    width, layers, blocks = model.width, sharing.virtual_layers, sharing.unique_blocks
    control: list[tuple[str, tuple[int, ...]]] = []
    if not sharing.bounded_recurrence:
        scale_owners = blocks if sharing.scales == "block" else layers
        mix_owners = blocks if sharing.mixes == "block" else layers
        control += _scales("", scale_owners, mix_owners, width)
    else:
        control.append(("recurrence_logits", (layers, 4)))
    if sharing.adapters:
        control += [*_scales("adapters.", layers, layers, width), ("adapters.gains", (layers, model.heads))]
    if sharing.repeat_embeddings:
        control.append(("repeat_embeddings", (layers, width)))
    if model.unet_skips and layers > 1:
        control.append(("skip_weights", (layers // 2, width)))
        if model.skip_gates:
            control.append(("skip_gates", (layers // 2, width)))
    for name, shape in control:
        yield TensorShape(name, shape, TensorClass.CONTROL)
    for path in sorted(sharing.lora.paths) if sharing.lora.rank else ():
        yield TensorShape(f"lora.{path}.down", (layers, width, sharing.lora.rank), TensorClass.LORA)
        yield TensorShape(f"lora.{path}.up", (layers, sharing.lora.rank, width), TensorClass.LORA)
        yield TensorShape(f"lora.{path}.gate_logits", (layers,), TensorClass.CONTROL)


def _unused(model: ModelConfig, sharing: SharingConfig) -> Iterator[TensorShape]:
    width, layers, blocks = model.width, sharing.virtual_layers, sharing.unique_blocks
    groups: dict[str, list[tuple[str, tuple[int, ...]]]] = {
        "block_scales": _scales("block_", blocks, blocks, width),
        "layer_scales": _scales("layer_", layers, layers, width),
        "adapters": [*_scales("adapter_", layers, layers, width), ("adapter_gains", (layers, model.heads))],
        "skips": [("skip_weights", (layers // 2, width)), ("skip_gates", (layers // 2, width))],
    }
    for group in sorted(sharing.unused):
        for name, shape in groups[group]:
            yield TensorShape(f"unused.{name}", shape, TensorClass.CONTROL)


def _scales(prefix: str, scale_owners: int, mix_owners: int, width: int) -> list[tuple[str, tuple[int, ...]]]:
    return [
        (f"{prefix}attention_scales", (scale_owners, width)),
        (f"{prefix}mlp_scales", (scale_owners, width)),
        (f"{prefix}residual_mixes", (mix_owners, 2, width)),
    ]
