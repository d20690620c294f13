"""One virtual layer: its block, what it owns, and how the two change the residual stream."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from worker.attention import Attention, Reading, Rotation, rms_norm
from worker.mlp import Mlp
from worker.shape import ModelConfig

Lanes = tuple[Tensor, ...]  # the residual stream, one lane or two: each (B, T, D)


class Block(nn.Module):
    """One unique block: what the virtual layers tied to it share."""

    def __init__(self, config: ModelConfig, blended: bool = False) -> None:
        super().__init__()
        self.attention = Attention(config, blended)
        self.mlp = Mlp(config)


class LaneWeights(nn.Module):
    """How each block, by number, weighs its sub-layers' outputs and the stream in each of two lanes (1855)."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.attention = nn.Parameter(torch.empty(blocks, 2))
        self.mlp = nn.Parameter(torch.empty(blocks, 2))
        self.residual = nn.Parameter(torch.empty(blocks, 2))

    def blocks(self, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
        """By block: the weights of attention, MLP and stream, each (2,)."""
        stacks = (stack.to(dtype).unbind() for stack in (self.attention, self.mlp, self.residual))
        return list(zip(*stacks, strict=True))


@dataclass
class Passage:
    """One forward pass: what every layer reads, and what layers leave for the loss."""

    x0: Tensor  # (B, T, D): the stem's output
    rotation: Rotation
    values: Tensor | None  # (B, T, kv): the value embedding
    layers: list["VirtualLayer"]  # all of them, whichever run
    shares: list[Tensor] = field(default_factory=list)  # of each blend of two orders: the mean share of the first


class Scales(NamedTuple):
    """What a layer multiplies its sub-layers' outputs with, and the shares of stream and stem in its input."""

    attention: Tensor  # (D,)
    mlp: Tensor  # (D,)
    mix: tuple[Tensor, ...]  # 2 × (D,)


class VirtualLayer(NamedTuple):
    """One application of a block, with what this application owns, in the dtype of the activations."""

    block: nn.Module
    reading: Reading
    input_scale: float  # of the normed input of each sub-layer
    scales: Scales | None  # none where recurrence has the layer blend
    recurrence: tuple[Tensor, ...] | None  # shares of stream, stem, attention and MLP: 4 × ()
    attention_bypass: tuple[Tensor, Tensor] | None  # (D, r), (r, D)
    mlp_bypass: tuple[Tensor, Tensor] | None
    value_scale: Tensor | None  # (): of the value embedding
    repeat_embedding: Tensor | None  # (D,)
    lane_weights: tuple[Tensor, Tensor, Tensor] | None  # of attention, MLP and stream: 3 × (2,)

    def enter(self, lanes: Lanes) -> Lanes:
        """The lanes that this layer works on: two of the one where it is the first with two."""
        return lanes * 2 if self.lane_weights is not None and len(lanes) == 1 else lanes

    def __call__(self, lanes: Lanes, passage: Passage) -> Lanes:
        if self.recurrence is not None:
            return (self._recur(lanes[0], self.recurrence, passage),)
        assert self.scales is not None
        if self.repeat_embedding is not None:
            lanes = tuple(lane + self.repeat_embedding for lane in lanes)
        if self.lane_weights is not None:
            return self._in_two_lanes(lanes, self.scales, self.lane_weights, passage)
        return (self._in_one_lane(lanes[0], self.scales, passage),)

    def _in_one_lane(self, x: Tensor, scales: Scales, passage: Passage) -> Tensor:
        x = torch.addcmul(scales.mix[0] * x, scales.mix[1], passage.x0)
        x = torch.addcmul(x, scales.attention, self._attend(x, passage))
        return torch.addcmul(x, scales.mlp, self._feed(x))

    def _in_two_lanes(
        self, lanes: Lanes, scales: Scales, weights: tuple[Tensor, Tensor, Tensor], passage: Passage
    ) -> Lanes:
        """Attention reads lane 0, mixed with the stem, and the MLP lane 1; both lanes gain from both."""
        mixed = torch.addcmul(scales.mix[0] * lanes[0], scales.mix[1], passage.x0)
        attention = scales.attention * self._attend(mixed, passage)
        mlp = scales.mlp * self._feed(lanes[1])
        terms = zip(lanes, *(weight.unbind() for weight in weights), strict=True)
        return tuple(r * lane + p * attention + q * mlp for lane, p, q, r in terms)

    def _recur(self, x: Tensor, shares: tuple[Tensor, ...], passage: Passage) -> Tensor:
        """A blend of stream, stem and sub-layers, none of them larger than its share (parameter-golf 167)."""
        entering = x if self.repeat_embedding is None else x + self.repeat_embedding
        attention = self._attend(entering, passage)
        mlp = self._feed(entering + attention)
        carry, anchor, attention_share, mlp_share = shares
        return carry * x + anchor * passage.x0 + attention_share * attention + mlp_share * mlp

    def _attend(self, x: Tensor, passage: Passage) -> Tensor:
        assert isinstance(self.block, Block)
        reading, normed = self.reading, self._normed(x)
        if self.value_scale is not None and passage.values is not None:
            reading = reading._replace(values=self.value_scale * passage.values)
        change, share = self.block.attention(normed, passage.rotation, reading)
        if share is not None:
            passage.shares.append(share)
        return _bypassed(change, normed, self.attention_bypass)

    def _feed(self, x: Tensor) -> Tensor:
        assert isinstance(self.block, Block)
        normed = self._normed(x)
        return _bypassed(self.block.mlp(normed), normed, self.mlp_bypass)

    def _normed(self, x: Tensor) -> Tensor:
        return rms_norm(x) if self.input_scale == 1 else rms_norm(x) * self.input_scale


def merged(lanes: Lanes) -> Tensor:
    """The mean of the lanes."""
    return lanes[0] if len(lanes) == 1 else (lanes[0] + lanes[1]) / 2


def _bypassed(change: Tensor, normed: Tensor, bypass: tuple[Tensor, Tensor] | None) -> Tensor:
    if bypass is None:
        return change
    down, up = bypass
    return change + torch.matmul(torch.matmul(normed, down), up)
