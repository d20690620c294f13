"""Calibration reads training data alone, and what it says of a matrix is what that data does there."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from worker.calibrate import (
    Calibration,
    calibrate,
    calibration_batches,
    quantised_matrices,
    require_window,
    row_gradients,
    second_moments,
    sensitivities,
)
from worker.model import Model
from worker.projection import observing
from worker.shape import FieldError
from worker.shards import Dataset, TokenStream, open_dataset, write_shard
from worker.spec import TrialSpec, parse_spec

Trained = tuple[Model, TrialSpec]


@pytest.fixture(scope="module")
def dataset(small_data_root: Path) -> Dataset:
    return open_dataset(small_data_root, "topics_sp512")


def with_packing(spec: TrialSpec, **changes: Any) -> TrialSpec:
    plain = spec.model_dump(mode="json")
    return parse_spec({**plain, "quantisation": {**plain["quantisation"], **changes}})


def names_of(trained: Trained) -> list[str]:
    model, spec = trained
    return [tensor.name for tensor in quantised_matrices(model, spec.quantisation.half_below)]


def counting_dataset(folder: Path, tokens: int) -> Dataset:
    """Training tokens 0, 1, 2, … and validation data that cannot be read."""
    shard = write_shard(folder / "toy_train_000000.bin", np.arange(tokens))
    return Dataset("toy", (shard,), (), folder / "none.model", {})


def test_windows_are_spread_over_the_training_split_and_do_not_overlap(tmp_path: Path) -> None:
    data = {"sequence_length": 16, "batch_tokens": 64, "micro_batch_sequences": 3}
    spec = parse_spec({"data": data, "quantisation": {"rounding": "gptq", "calibration_tokens": 16 * 5 + 3}})
    batches = calibration_batches(counting_dataset(tmp_path, 1000), spec)
    assert [tokens.shape for tokens, _ in batches] == [(3, 16), (2, 16)]
    tokens, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    windows = (1000 - 1) // 16
    assert tokens[:, 0].tolist() == [window * windows // 5 * 16 for window in range(5)]
    assert torch.equal(tokens, tokens[:, :1] + torch.arange(16))
    assert torch.equal(targets, tokens + 1)


def test_a_short_split_is_read_once_and_one_without_a_window_is_refused(tmp_path: Path) -> None:
    spec = parse_spec({"data": {"sequence_length": 16, "batch_tokens": 64}, "quantisation": {"rounding": "gptq"}})
    [(tokens, _)] = calibration_batches(counting_dataset(tmp_path, 50), spec)
    assert tokens[:, 0].tolist() == [0, 16, 32]
    require_window(counting_dataset(tmp_path, 17), spec)
    short = counting_dataset(tmp_path, 16)
    for read in (calibration_batches, require_window):
        with pytest.raises(FieldError, match=r"quantisation\.calibration_tokens is 65536: the 16 training tokens of"):
            read(short, spec)
    require_window(short, with_packing(spec, rounding="nearest"))


def test_second_moments_are_those_of_all_inputs_of_all_virtual_layers(trained: Trained, dataset: Dataset) -> None:
    model, spec = trained
    batches = calibration_batches(dataset, spec)
    inputs: dict[int, list[Tensor]] = {}
    with torch.no_grad(), observing(lambda weight, x: inputs.setdefault(id(weight), []).append(x.flatten(0, -2))):
        for tokens, targets in batches:
            model.token_losses(tokens, targets)
    moments = second_moments(model, batches, names_of(trained))
    assert set(moments) == set(names_of(trained))  # the embedding too: it is the head
    count = sum(tokens.numel() for tokens, _ in batches)
    for name, found in moments.items():
        x = torch.cat(inputs[id(model.get_parameter(name))]).double()
        assert len(x) == count * (1 if name == "embedding.weight" else 2)  # a block is applied twice
        torch.testing.assert_close(found.double(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)


def test_matrices_with_one_input_share_its_moments(trained: Trained, dataset: Dataset) -> None:
    model, spec = trained
    moments = second_moments(model, calibration_batches(dataset, spec), names_of(trained))
    query, key, value, output = (moments[f"blocks.0.attention.{role}"] for role in ("query", "key", "value", "output"))
    assert query is key is value
    assert output is not query
    assert len({id(matrix) for matrix in moments.values()}) == 1 + 2 * 4


def test_a_rows_gradient_is_the_mean_norm_over_batches(trained: Trained, dataset: Dataset) -> None:
    model, spec = trained
    batches = calibration_batches(dataset, spec)[:3]
    name = "blocks.1.mlp.down"
    expected = torch.zeros(64)
    for tokens, targets in batches:
        loss = model.token_losses(tokens, targets).mean()
        (gradient,) = torch.autograd.grad(loss, [model.get_parameter(name)])
        expected += gradient.norm(dim=1) / 3
    torch.testing.assert_close(row_gradients(model, batches, [name])[name], expected)


def test_sensitivities_foretell_what_an_error_costs(trained: Trained, dataset: Dataset) -> None:
    # Noise of variance v in a matrix of n values moves the predictions by a divergence of n · v · sensitivity / 2.
    model, spec = trained
    batches = calibration_batches(dataset, spec)
    found = sensitivities(model, batches, names_of(trained), seed=3)
    tokens = torch.cat([tokens for tokens, _ in batches])
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        before = model.logits(tokens).log_softmax(-1)
        for name in ("embedding.weight", "blocks.0.attention.output", "blocks.1.mlp.up"):
            weight = model.get_parameter(name)
            kept, scale = weight.clone(), 0.05 * float(weight.std())
            rises = []
            for _ in range(4):
                weight.copy_(kept + scale * torch.randn(weight.shape, generator=generator))
                after = model.logits(tokens).log_softmax(-1)
                rises.append(float((before.exp() * (before - after)).sum(-1).mean()))
            weight.copy_(kept)
            assert sum(rises) / 4 == pytest.approx(weight.numel() * scale**2 * found[name] / 2, rel=0.3)


def test_calibration_repeats_to_the_bit_and_leaves_the_model_as_it_was(trained: Trained, dataset: Dataset) -> None:
    model, spec = trained
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = with_packing(spec, rounding="gptq", target_bytes=200_000)
    first, second = calibrate(model, dataset, wanted), calibrate(model, dataset, wanted)
    assert first.sensitivities == second.sensitivities
    assert all(torch.equal(first.moments[name], second.moments[name]) for name in names_of(trained))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "filled"),
    [
        ({}, set()),
        ({"rounding": "gptq", "target_bytes": 200_000, "half_below": 10**9}, set()),
        ({"rounding": "gptq"}, {"moments"}),
        ({"high_fraction": 0.1}, {"row_gradients"}),
        ({"target_bytes": 200_000}, {"sensitivities"}),
    ],
)
def test_only_what_the_spec_reads_is_measured(
    trained: Trained, dataset: Dataset, changes: dict[str, Any], filled: set[str]
) -> None:
    model, spec = trained
    found = calibrate(model, dataset, with_packing(spec, **changes))
    assert {name for name in Calibration.__dataclass_fields__ if getattr(found, name)} == filled


def test_validation_tokens_are_never_read(trained: Trained, dataset: Dataset, tmp_path: Path) -> None:
    model, spec = trained
    wanted = with_packing(spec, rounding="gptq")
    hidden = Dataset(dataset.name, dataset.train, (), tmp_path / "none.model", {})
    assert len(TokenStream(dataset.train, 512)) > wanted.quantisation.calibration_tokens
    found, expected = calibrate(model, hidden, wanted).moments, calibrate(model, dataset, wanted).moments
    assert all(torch.equal(found[name], expected[name]) for name in names_of(trained))
