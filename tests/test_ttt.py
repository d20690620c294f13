"""Test-time training learns from text only once that is scored. Run as a program, this file is one rank of two."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from worker.evaluate import Validation, evaluate
from worker.model import Model, initialise
from worker.scoring import TttConfig
from worker.shape import FieldError, ModelConfig
from worker.shards import Tokens, TokenStream
from worker.sharing import SharingConfig
from worker.tokenizer import ByteTable
from worker.ttt import adapt_and_score
from worker.world import World, backends

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
VOCABULARY, LENGTH, CHUNK = 8, 8, 16
TTT = TttConfig(lr=0.3, epochs=2, momentum=0.9, chunk_tokens=CHUNK, gradient_clip=1.0)


class Text(TokenStream):
    """Tokens in memory."""

    def __init__(self, tokens: Tokens) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def read(self, start: int, count: int) -> Tokens:
        assert 0 <= start <= len(self) - count
        return self.tokens[start : start + count]


class Listening(Model):
    """Writes down each loss that it is scored by, and the sum of its weights then, on whatever copy of it."""

    losses: ClassVar[list[Tensor]] = []
    weights: ClassVar[list[str]] = []

    def token_losses(self, tokens: Tensor, targets: Tensor) -> Tensor:
        losses = super().token_losses(tokens, targets)
        if torch.is_inference_mode_enabled():
            self.losses.append(losses)
            self.weights.append(math.fsum(float(weight.double().sum()) for weight in self.parameters()).hex())
        return losses


def make_model() -> Listening:
    model = Listening(
        ModelConfig(vocab_size=VOCABULARY, width=8, heads=2, kv_heads=1, embedding_init_std=0.5),
        SharingConfig(virtual_layers=2, unique_blocks=1),
    )
    initialise(model, 3)
    return model


def make_text(targets: int = 4 * CHUNK) -> Tokens:
    """Steps of 1, and now and then of another number: something to learn."""
    generator = np.random.default_rng(1)
    steps = np.where(generator.random(targets + 1) < 0.8, 1, generator.integers(2, 8, targets + 1))
    return steps.cumsum() % VOCABULARY


def validation_of(tokens: Tokens) -> Validation:
    table = ByteTable(np.ones(VOCABULARY, np.int64), np.zeros(VOCABULARY, np.bool_), np.zeros(VOCABULARY, np.bool_))
    return Validation(Text(tokens), table, LENGTH, 3)


def token_scores(tokens: Tokens, stride: int | None = None) -> Tensor:
    """The nats that each target was scored at, in order, by a model that adapts."""
    Listening.losses.clear()
    score = adapt_and_score(make_model(), validation_of(tokens), ALONE, TTT, stride)
    first, *rest = Listening.losses
    losses = torch.cat([first.flatten(), *(losses[:, -(stride or LENGTH) :].flatten() for losses in rest)])
    assert len(losses) == score.tokens == len(tokens) - 1
    assert score.loss == pytest.approx(float(losses.double().mean()), rel=1e-9)
    return losses


@pytest.mark.parametrize("stride", [None, 4])
@pytest.mark.parametrize("position", [1, CHUNK, CHUNK + 1, 2 * CHUNK + 5, 3 * CHUNK + 1, 4 * CHUNK])
def test_no_score_depends_on_later_text(position: int, stride: int | None) -> None:
    tokens, other = make_text(), make_text()
    other[position:] = (other[position:] + 3) % VOCABULARY
    before, after = token_scores(tokens, stride), token_scores(other, stride)
    assert torch.equal(before[: position - 1], after[: position - 1])
    assert before[position - 1] != after[position - 1]


@pytest.mark.parametrize("position", [1, CHUNK, CHUNK + 1, 2 * CHUNK, 4 * CHUNK])
def test_no_score_depends_on_its_own_token(position: int) -> None:
    probability = 0.0  # of all that the token could be: it is 1 only where the model does not see which it is
    for token in range(VOCABULARY):
        tokens = make_text()
        tokens[position] = token
        probability += math.exp(-float(token_scores(tokens)[position - 1]))
    assert probability == pytest.approx(1, abs=1e-5)


def test_it_is_stochastic_gradient_descent_on_each_chunk_after_its_score() -> None:
    model, text, loss = make_model(), torch.from_numpy(make_text()), 0.0
    momenta = [torch.zeros_like(weight) for weight in model.parameters()]
    for chunk in range(4):
        text_of_chunk = text[chunk * CHUNK : (chunk + 1) * CHUNK + 1]
        tokens, targets = text_of_chunk[:-1].view(2, LENGTH), text_of_chunk[1:].view(2, LENGTH)
        loss += model.token_losses(tokens, targets).sum().item()
        for _ in range(TTT.epochs if chunk < 3 else 0):
            gradients = torch.autograd.grad(model.token_losses(tokens, targets).mean(), list(model.parameters()))
            norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
            lr = TTT.lr * (1 + math.cos(math.pi * chunk / 3)) / 2
            with torch.no_grad():
                for weight, gradient, momentum in zip(model.parameters(), gradients, momenta, strict=True):
                    momentum.mul_(TTT.momentum).add_(gradient * min(1.0, TTT.gradient_clip / float(norm)))
                    weight.sub_(lr * momentum)
    score = adapt_and_score(make_model(), validation_of(make_text()), ALONE, TTT)
    assert score.loss == pytest.approx(loss / (4 * CHUNK), rel=1e-5)


def test_a_model_that_adapts_scores_better_and_stays_as_it_was() -> None:
    model, validation = make_model().train(), validation_of(make_text(32 * CHUNK))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = adapt_and_score(model, validation, ALONE, TTT.model_copy(update={"lr": 0.05}))
    plain = evaluate(model, validation, ALONE)
    assert adapted.loss < 0.8 * plain.loss
    assert (adapted.tokens, adapted.bytes) == (plain.tokens, plain.bytes)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize("stride", [None, 3])
def test_it_is_plain_scoring_where_nothing_is_learned(stride: int | None) -> None:
    model, validation = make_model(), validation_of(make_text())
    plain = evaluate(model, validation, ALONE, stride=stride)
    one_chunk = TTT.model_copy(update={"chunk_tokens": 4 * CHUNK})
    assert adapt_and_score(model, validation, ALONE, one_chunk, stride) == plain
    slow = adapt_and_score(model, validation, ALONE, TTT.model_copy(update={"lr": 1e-20}), stride)
    assert slow.loss == pytest.approx(plain.loss, rel=1e-12)


def test_a_model_that_diverges_is_refused_with_the_learning_rate() -> None:
    wild = TttConfig(lr=1e30, chunk_tokens=CHUNK, gradient_clip=0)
    with pytest.raises(FieldError, match=r"^evaluation\.ttt\.lr is 1e\+30: made the model diverge; a lower one"):
        adapt_and_score(make_model(), validation_of(make_text()), ALONE, wild)


def test_two_ranks_adapt_one_model(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, __file__, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    try:
        assert [rank.wait(timeout=90) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first == second  # the score, and the weights bit for bit
    validation = validation_of(make_text(UNEVEN))
    assert first["plain"] == pytest.approx(evaluate(make_model(), validation, ALONE, stride=3).loss, rel=1e-9)
    assert first["loss"] == pytest.approx(adapt_and_score(make_model(), validation, ALONE, TTT, 3).loss, rel=1e-5)


UNEVEN = 11 * LENGTH  # chunks of windows that two ranks cannot halve


def as_one_rank(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(backends(CPU), init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    world, validation = World(rank, 2, CPU), validation_of(make_text(UNEVEN))
    plain = evaluate(make_model(), validation, world, stride=3)
    score = adapt_and_score(make_model(), validation, world, TTT, 3)
    said = {"plain": plain.loss, "loss": score.loss, "weights": Listening.weights[-1]}
    (folder / f"{rank}.json").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    as_one_rank(Path(sys.argv[1]), int(sys.argv[2]))
