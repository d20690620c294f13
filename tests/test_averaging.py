"""Averages of the weights, by their formulas, over weights set by hand."""

import pytest
import torch
from torch import Tensor

from worker.averaging import Averages
from worker.model import Model, initialise
from worker.shape import ModelConfig
from worker.sharing import SharingConfig
from worker.spec import AveragingConfig


@pytest.fixture
def model() -> Model:
    shape = ModelConfig(vocab_size=16, width=8, heads=2, kv_heads=1)
    model = Model(shape, SharingConfig(virtual_layers=2, unique_blocks=1))
    initialise(model, 0)
    return model


def shift(model: Model, amount: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(amount)


def state(model: Model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_shifted(average: dict[str, Tensor], start: dict[str, Tensor], amount: float) -> None:
    torch.testing.assert_close(average, {name: tensor + amount for name, tensor in start.items()})


def test_an_ema_starts_from_the_initial_weights_and_takes_in_every_step(model: Model) -> None:
    averages, start, expected = Averages(model, AveragingConfig(ema_decay=0.75)), state(model), 0.0
    for step in range(1, 5):
        shift(model, 1.0)
        averages.update(step, 1.0)
        expected = 0.75 * expected + 0.25 * step
    assert set(averages.weights()) == {"ema"}
    assert_shifted(averages.weights()["ema"], start, expected)


def test_swa_is_the_mean_of_snapshots_once_the_multiplier_is_low(model: Model) -> None:
    averages, start = Averages(model, AveragingConfig(swa_every=3, swa_from=0.5)), state(model)
    for step in range(1, 14):
        shift(model, 1.0)
        averages.update(step, 1 - step / 14)
        assert ("swa" in averages.weights()) == (step >= 9)  # multiplier 0.5 at step 7, and every third step
    assert_shifted(averages.weights()["swa"], start, (9 + 12) / 2)


def test_without_averages_there_are_none(model: Model) -> None:
    averages = Averages(model, AveragingConfig())
    averages.update(1, 0.0)
    assert averages.weights() == {}


def test_an_average_is_a_state_dict_that_shares_nothing_with_the_model(model: Model) -> None:
    averages, start = Averages(model, AveragingConfig(ema_decay=0.5, swa_every=1, swa_from=1.0)), state(model)
    averages.update(1, 1.0)
    shift(model, 1.0)
    for average in averages.weights().values():
        torch.testing.assert_close(average, start)
        model.load_state_dict(average)
