"""Bits per byte of the validation text, as the parameter-golf challenge defines it."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from worker.model import Model
from worker.shape import FieldError
from worker.shards import Dataset, TokenStream, open_stream
from worker.tokenizer import ByteTable, open_table, require_its_own
from worker.world import World


class Window(NamedTuple):
    """Tokens that a model sees together, from `start` of the stream on. Its last `scored` targets count."""

    start: int
    scored: int


@dataclass(frozen=True)
class Validation:
    """What a model is scored on: all validation tokens, what they cost in bytes, and the length of a window."""

    stream: TokenStream
    table: ByteTable
    sequence_length: int
    batch_sequences: int

    @property
    def targets(self) -> int:
        """How many targets count, the same for every stride: those of whole windows without overlap. What is left at
        the end, fewer than a window, is not scored, as in the challenge."""
        return (len(self.stream) - 1) // self.sequence_length * self.sequence_length

    def windows(self, stride: int | None = None, token_limit: int | None = None) -> list[Window]:
        """Windows `stride` apart that score each target once, in order; without a stride they do not overlap.

        The first scores all its targets, each other one its last `stride`, which see at least sequence_length - stride
        tokens before them (pull request 1394). Where the stride does not divide the text the last window starts less
        far on, so that it ends with the last target, and scores the fewer that are left. With a `token_limit`, only
        windows that score so many tokens (at least one), spread evenly over the split.
        """
        length = self.sequence_length
        stride = length if stride is None else stride
        assert 1 <= stride <= length, "TrialSpec checks it"
        whole = 1 + -(-(self.targets - length) // stride)
        count = whole if token_limit is None else min(whole, 1 + max(0, token_limit - length) // stride)
        return [self._window(chosen * whole // count, stride) for chosen in range(count)]

    def of_length(self, sequence_length: int) -> "Validation":
        """The same text in windows of `evaluation.sequence_length` tokens. Raises FieldError where none is whole."""
        _require_window(self.stream, "evaluation.sequence_length", sequence_length)
        return replace(self, sequence_length=sequence_length)

    def read(self, windows: Sequence[Window]) -> tuple[Tensor, Tensor]:
        """The windows' tokens and targets, each (B, T) int64 on the host. Raises DataError."""
        rows = [torch.from_numpy(self.stream.read(window.start, self.sequence_length + 1)) for window in windows]
        tokens = torch.stack(rows)
        return tokens[:, :-1], tokens[:, 1:]

    def _window(self, index: int, stride: int) -> Window:
        seen = self.sequence_length + (index - 1) * stride  # targets that earlier windows score
        end = min(seen + stride, self.targets)
        return Window(end - self.sequence_length, end - seen if index else end)


@dataclass(frozen=True)
class Score:
    """`loss` is the mean over tokens in nats; `bpb` that loss in bits, times tokens per byte of text."""

    loss: float
    bpb: float
    tokens: int
    bytes: int


def open_validation(dataset: Dataset, vocab_size: int, sequence_length: int, batch_sequences: int) -> Validation:
    """The validation split, every token and the tokenizer checked against the model's vocabulary and each other.

    `sequence_length` is the spec's `data.sequence_length`. Raises DataError or FieldError.
    """
    table = open_table(dataset.tokenizer, vocab_size)
    stream = open_stream(dataset.val, vocab_size)
    stream.check()
    require_its_own(dataset, stream, table)
    _require_window(stream, "data.sequence_length", sequence_length)
    return Validation(stream, table, sequence_length, batch_sequences)


def evaluate(
    model: Model, validation: Validation, world: World, token_limit: int | None = None, stride: int | None = None
) -> Score:
    """Score the model in the validation's windows, each seen by itself (`Validation.windows`).

    Rank by rank a contiguous share of the windows, summed in double precision over all ranks: every rank has the score.
    """
    windows = validation.windows(stride, token_limit)
    loss, text_bytes = scored(model, validation, share(windows, world), world.device)
    return score(loss, text_bytes, sum(window.scored for window in windows), world)


def scored(model: Model, validation: Validation, windows: Sequence[Window], device: torch.device) -> tuple[Tensor, int]:
    """What the targets that the windows score cost: nats (a scalar, fp64, on the device) and bytes of text."""
    loss = torch.zeros((), dtype=torch.float64, device=device)
    text_bytes = 0
    with scoring(model):
        for batch in _batches(windows, validation.batch_sequences):
            tokens, targets = validation.read(batch)  # (B, T)
            last = slice(-batch[0].scored, None)
            losses = model.token_losses(_moved(tokens, device), _moved(targets[:, last], device))
            loss += losses.double().sum()
            text_bytes += int(validation.table.cost(tokens[:, last].numpy(), targets[:, last].numpy()).sum())
    return loss, text_bytes


@contextmanager
def scoring(model: Model) -> Iterator[None]:
    """While it is open the model is in evaluation mode, and nothing is kept for gradients."""
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(training)


def score(loss: Tensor, text_bytes: int, tokens: int, world: World) -> Score:
    """The score of so many tokens from what each rank's share of them costs. Raises FieldError for text of no bytes."""
    total_loss, total_bytes = world.total(float(loss), text_bytes)
    if not total_bytes:
        raise FieldError("data.dataset", "validation", "must have text behind its tokens; these cost no bytes")
    mean = total_loss / tokens
    return Score(mean, mean / math.log(2) * tokens / total_bytes, tokens, int(total_bytes))


def share(windows: Sequence[Window], world: World) -> Sequence[Window]:
    """This rank's part of the windows: contiguous, and with the other ranks' all of them."""
    count = len(windows)
    return windows[world.rank * count // world.ranks : (world.rank + 1) * count // world.ranks]


def _require_window(stream: TokenStream, field: str, sequence_length: int) -> None:
    if len(stream) <= sequence_length:
        raise FieldError(field, sequence_length, f"must be below the {len(stream)} validation tokens of the dataset")


def _batches(windows: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """At most `size` windows at a time, in order, which score equally many targets."""
    for _, group in groupby(windows, key=lambda window: window.scored):
        alike = list(group)
        for first in range(0, len(alike), size):
            yield alike[first : first + size]


def _moved(tokens: Tensor, device: torch.device) -> Tensor:
    if device.type != "cuda":
        return tokens
    return tokens.contiguous().pin_memory().to(device, non_blocking=True)  # the host reads on while the GPU computes
