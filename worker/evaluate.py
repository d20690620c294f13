"""Bits per byte of the validation text, as the parameter-golf challenge defines it."""

import math
from dataclasses import dataclass

import torch

from worker.model import Model
from worker.shape import FieldError
from worker.shards import Dataset, TokenStream
from worker.tokenizer import ByteTable, byte_table, load_tokenizer
from worker.world import World


@dataclass(frozen=True)
class Validation:
    """What a model is scored on: all validation tokens, what they cost in bytes, and the windows they are cut into."""

    stream: TokenStream
    table: ByteTable
    sequence_length: int
    batch_sequences: int

    @property
    def windows(self) -> int:
        """Whole windows. Targets left over at the end, fewer than a window, are not scored, as in the challenge."""
        return (len(self.stream) - 1) // self.sequence_length


@dataclass(frozen=True)
class Score:
    """`loss` is the mean over tokens in nats; `bpb` that loss in bits, times tokens per byte of text."""

    loss: float
    bpb: float
    tokens: int
    bytes: int


def open_validation(dataset: Dataset, vocab_size: int, sequence_length: int, batch_sequences: int) -> Validation:
    """The validation split, every token and the tokenizer checked against the model's vocabulary.

    Raises DataError or FieldError.
    """
    table = byte_table(load_tokenizer(dataset.tokenizer, vocab_size))
    stream = TokenStream(dataset.val, vocab_size)
    stream.check()
    if len(stream) <= sequence_length:
        message = f"must be below the {len(stream)} validation tokens of dataset {dataset.name}"
        raise FieldError("data.sequence_length", sequence_length, message)
    return Validation(stream, table, sequence_length, batch_sequences)


def evaluate(model: Model, validation: Validation, world: World, token_limit: int | None = None) -> Score:
    """Score the model in consecutive windows that do not overlap, each starting without context.

    Rank by rank a contiguous share of the windows, summed in double precision over all ranks: every rank has the score.
    With a `token_limit`, only that many tokens' windows (at least one), spread evenly over the split.
    """
    windows, length = validation.windows, validation.sequence_length
    scored = windows if token_limit is None else min(windows, max(1, token_limit // length))
    mine = range(world.rank * scored // world.ranks, (world.rank + 1) * scored // world.ranks)
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    text_bytes = 0
    training = model.training
    model.eval()
    with torch.inference_mode():
        for first in range(mine.start, mine.stop, validation.batch_sequences):
            batch = range(first, min(first + validation.batch_sequences, mine.stop))
            starts = [window * windows // scored * length for window in batch]
            tokens = torch.stack([torch.from_numpy(validation.stream.read(start, length + 1)) for start in starts])
            inputs, targets = tokens[:, :-1], tokens[:, 1:]  # (B, T)
            text_bytes += int(validation.table.cost(inputs.numpy(), targets.numpy()).sum())
            loss += model.token_losses(inputs.to(world.device), targets.to(world.device)).double().sum()
    model.train(training)
    total_loss, total_bytes = world.total(float(loss), text_bytes)
    tokens_scored = scored * length
    if not total_bytes:
        raise FieldError("data.dataset", "validation", "must have text behind its tokens; these cost no bytes")
    mean = total_loss / tokens_scored
    return Score(mean, mean / math.log(2) * tokens_scored / total_bytes, tokens_scored, int(total_bytes))
