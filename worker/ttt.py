"""Score-first test-time training: a model that learns from validation text, but only from what it was scored on."""

import copy
from dataclasses import dataclass
from itertools import pairwise
from math import cos, isfinite, pi

import torch
from torch import Tensor, nn

from worker.evaluate import Score, Validation, Window, score, scored, share
from worker.model import Model
from worker.scoring import TttConfig
from worker.shape import FieldError
from worker.world import World


def adapt_and_score(
    model: Model, validation: Validation, world: World, ttt: TttConfig, stride: int | None = None
) -> Score:
    """Score a copy of the model chunk by chunk, and let it learn from each chunk once that is scored.

    The windows are those of `evaluate`, and the model stays as it is. Each rank scores a contiguous share of a chunk's
    windows and learns from a share of its text; every rank has the same weights and the score. Raises FieldError where
    the model diverges.
    """
    pupil = _Pupil(model, validation, world, ttt)
    chunks = _chunks(validation.windows(stride), ttt.chunk_tokens)
    loss, text_bytes = torch.zeros((), dtype=torch.float64, device=world.device), 0
    for index, windows in enumerate(chunks):
        chunk = pupil.scored(windows)
        loss += chunk.loss
        text_bytes += chunk.bytes
        if index + 1 < len(chunks):
            pupil.learn(chunk, ttt.lr * (1 + cos(pi * index / (len(chunks) - 1))) / 2)
    total = score(loss, text_bytes, validation.targets, world)
    if not isfinite(total.loss):
        raise FieldError("evaluation.ttt.lr", ttt.lr, "made the model diverge; a lower one may hold")
    return total


@dataclass(frozen=True)
class _Scored:
    """A chunk that has its score: made by `_Pupil.scored` alone, and all that `_Pupil.learn` takes."""

    targets: range  # positions of the split, from 0 for the token after the first
    loss: Tensor  # of this rank's share, as `evaluate.scored` gives it
    bytes: int


class _Pupil:
    """A copy of the model, and the optimizer whose momentum it keeps from chunk to chunk."""

    def __init__(self, model: Model, validation: Validation, world: World, ttt: TttConfig) -> None:
        self._validation, self._world, self._ttt = validation, world, ttt
        self._model = copy.deepcopy(model).eval()
        self._parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        for parameter in self._parameters:  # always there, so that the ranks exchange the same whatever they learn from
            parameter.grad = torch.zeros_like(parameter)
        self._optimizer = torch.optim.SGD(self._parameters, ttt.lr, ttt.momentum)

    def scored(self, windows: list[Window]) -> _Scored:
        """What consecutive windows cost the model as it is."""
        length = self._validation.sequence_length
        targets = range(windows[0].start + length - windows[0].scored, windows[-1].start + length)
        mine = share(windows, self._world)
        return _Scored(targets, *scored(self._model, self._validation, mine, self._world.device))

    def learn(self, chunk: _Scored, lr: float) -> None:
        """Pass so many `epochs` over the chunk, each one step of SGD on the mean loss of its sequences.

        They do not overlap, and see nothing before them. What is left of the chunk, less than a sequence, is not
        learned from.
        """
        length = self._validation.sequence_length
        starts = range(chunk.targets.start, chunk.targets.stop - length + 1, length)
        sequences = [Window(start, length) for start in starts]
        self._optimizer.param_groups[0]["lr"] = lr
        for _ in range(self._ttt.epochs):
            self._optimizer.zero_grad(set_to_none=False)
            self._backward(sequences)
            if self._ttt.gradient_clip:
                nn.utils.clip_grad_norm_(self._parameters, self._ttt.gradient_clip)
            self._optimizer.step()

    def _backward(self, sequences: list[Window]) -> None:
        """Leave the gradient of the sequences' mean loss in every parameter, the same on every rank."""
        world, mine, size = self._world, share(sequences, self._world), self._validation.batch_sequences
        for first in range(0, len(mine), size):
            tokens, targets = (part.to(world.device) for part in self._validation.read(mine[first : first + size]))
            losses = self._model.token_losses(tokens, targets)  # (B, T)
            torch.autograd.backward(losses.sum() / (len(sequences) * losses.shape[1]))
        world.all_reduce_sum([parameter.grad for parameter in self._parameters if parameter.grad is not None])


def _chunks(windows: list[Window], chunk_tokens: int) -> list[list[Window]]:
    """The windows in runs that score at least `chunk_tokens` targets each, the last run what is left."""
    edges, targets = [0], 0
    for index, window in enumerate(windows):
        if targets >= chunk_tokens:
            edges.append(index)
            targets = 0
        targets += window.scored
    return [windows[first:end] for first, end in pairwise([*edges, len(windows)])]
