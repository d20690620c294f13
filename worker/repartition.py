"""The orders in which virtual layers read the queries and keys that they share (PRISM, parameter-golf 2090)."""

import torch
from torch import Tensor

from worker.shape import ModelConfig
from worker.sharing import SharingConfig

SEED_STRIDE = 1009  # between the seeds of one virtual layer and the next


def repartitioned(model: ModelConfig, sharing: SharingConfig) -> Tensor:
    """By virtual layer the order of the query, key and value rows; the values' is unchanged. (L, D + 2·kv) int64

    Never on the meta device: the orders are constants of the configuration, not values to be loaded.
    """
    rows = [_rows(layer, model, sharing) for layer in range(sharing.virtual_layers)]
    return torch.tensor(rows, dtype=torch.int64, device="cpu")


def reorders(layer: int, sharing: SharingConfig) -> bool:
    """Whether this virtual layer has an order of its own."""
    encodes = layer < sharing.virtual_layers // 2
    return sharing.repartition.mode != "none" and (encodes or not sharing.repartition.encoder_only)


def _rows(layer: int, model: ModelConfig, sharing: SharingConfig) -> list[int]:
    width, rotated, config = model.head_width, model.rotated_width, sharing.repartition
    generator = torch.Generator().manual_seed(config.seed + SEED_STRIDE * layer)

    def draw(count: int) -> list[int]:
        drawn: list[int] = torch.randperm(count, generator=generator, device="cpu").tolist()
        return drawn

    # Drawn in this order, and all of them whatever is used, so that equal seeds give equal orders.
    pairs, rest = draw(rotated // 2), draw(width - rotated)
    anchored_keys = config.anchor_heads * model.kv_heads // model.heads
    values = [*pairs, *(pair + rotated // 2 for pair in pairs), *(value + rotated for value in rest)]
    if not config.values:
        values = list(range(width))
    rows: list[int] = []
    for heads, anchored in ((model.heads, config.anchor_heads), (model.kv_heads, anchored_keys)):
        order = [anchored + head for head in draw(heads - anchored)]
        moved = order if config.heads else range(anchored, heads)
        offset = len(rows)
        rows += [offset + row for row in range(anchored * width)]
        rows += [offset + head * width + value for head in moved for value in values]
    return [*rows, *range(len(rows), len(rows) + model.kv_width)]
