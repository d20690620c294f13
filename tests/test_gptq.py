"""GPTQ and the rounding of a whole model: less error where it counts, and rows at the bits that the spec gives them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from worker.calibrate import (
    Calibration,
    calibration_batches,
    quantised_matrices,
    row_gradients,
    second_moments,
)
from worker.gptq import BLOCK, factorise, gptq
from worker.model import Model
from worker.packing import QuantisationConfig
from worker.quantize import dequantise_rows, quantise, to_symbols
from worker.rounding import round_weights, row_bits
from worker.shards import open_dataset
from worker.spec import TrialSpec

Trained = tuple[Model, TrialSpec]


@pytest.fixture(scope="module")
def calibration(trained: Trained, small_data_root: Path) -> Calibration:
    model, spec = trained
    batches = calibration_batches(open_dataset(small_data_root, "topics_sp512"), spec)
    names = [tensor.name for tensor in quantised_matrices(model, spec.quantisation.half_below)]
    return Calibration(second_moments(model, batches, names), row_gradients(model, batches, names))


def packing(trained: Trained, **changes: Any) -> QuantisationConfig:
    return trained[1].quantisation.model_copy(update=changes)


def output_error(weight: Tensor, rounded: Tensor, moments: Tensor) -> float:
    """E|(W - Q)·x|² for inputs with these second moments."""
    error = (weight.detach() - rounded).double()
    return float(((error @ moments.double()) * error).sum())


@pytest.mark.parametrize("bits", [4, 6])
def test_every_layers_output_is_closer_than_by_rounding_to_nearest(
    trained: Trained, calibration: Calibration, bits: int
) -> None:
    model, _ = trained
    by_gptq = round_weights(model, packing(trained, bits=bits), calibration)
    nearest = round_weights(model, packing(trained, bits=bits), Calibration())
    gains = []
    for name, moments in calibration.moments.items():
        weight = model.get_parameter(name)
        assert torch.equal(by_gptq[name].scales, nearest[name].scales)
        errors = [output_error(weight, dequantise_rows(rows[name]), moments) for rows in (by_gptq, nearest)]
        assert errors[0] < errors[1], name
        gains.append(errors[0] / errors[1])
    assert sum(gains) / len(gains) < 0.6


def column_by_column(weight: Tensor, moments: Tensor, scales: Tensor, largest: int) -> Tensor:
    """The definition: each column's error is made up for by the best change of the columns after it."""
    damped = moments.double() + torch.eye(len(moments)) * 0.01 * moments.double().diagonal().mean()
    order = moments.diagonal().argsort(descending=True, stable=True)
    left, damped = weight.double()[:, order], damped[order][:, order]
    symbols = torch.zeros_like(left)
    for column in range(left.shape[1]):
        symbols[:, column] = (left[:, column] / scales).round().clamp(-largest, largest)
        error = left[:, column] - symbols[:, column] * scales
        rest = slice(column + 1, None)
        left[:, rest] += error[:, None] * torch.linalg.solve(damped[rest, rest], damped[rest, column])
    return symbols[:, order.argsort()].to(torch.int8)


@pytest.mark.parametrize(("columns", "bits"), [(2, 8), (9, 4), (40, 5), (2 * BLOCK + 7, 6)])
def test_blocks_and_factors_give_what_the_definition_gives(columns: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(columns)
    inputs = torch.randn(600, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight, moments = torch.randn(8, columns, generator=generator), inputs.T @ inputs / 600
    largest = 2 ** (bits - 1) - 1
    scales = (weight.abs().amax(dim=1) / largest).half().float()
    limits = torch.full((8,), float(largest))
    found = gptq(weight, factorise(moments), scales, limits)
    # A tie that fp32 and fp64 break in two ways changes what follows in its row, and in no other.
    assert int((found != column_by_column(weight, moments, scales, largest)).any(dim=1).sum()) <= 2
    symbols = (found, to_symbols(weight, scales, limits))
    errors = [output_error(weight, each * scales[:, None], moments) for each in symbols]
    assert errors[0] < errors[1] or columns == 2


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(6, 30, generator=generator)
    scales, largest = torch.full((6,), 0.2), torch.full((6,), 7.0)
    moments = torch.diag(torch.rand(30, generator=generator) + 0.1)
    assert torch.equal(gptq(weight, factorise(moments), scales, largest), to_symbols(weight, scales, largest))


def test_dead_inputs_get_zero_columns_and_pruned_values_stay_zero() -> None:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(100, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    inputs[:, 5] = 0.0
    weight = torch.randn(4, 12, generator=generator)
    weight[1, 3] = weight[2, 8] = 0.0
    symbols = gptq(weight, factorise(inputs.T @ inputs), torch.full((4,), 0.1), torch.full((4,), 31.0))
    assert not symbols[:, 5].any()
    assert int((symbols == 0).sum(dim=0)[5]) == 4
    assert (int(symbols[1, 3]), int(symbols[2, 8])) == (0, 0)


def test_few_calibration_tokens_only_need_more_damping_and_broken_moments_are_refused() -> None:
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert bool(factorise(inputs.T @ inputs).upper.isfinite().all())
    assert bool(factorise(torch.zeros(4, 4)).upper.isfinite().all())  # inputs that are always zero
    indefinite = torch.tensor([[1.0, 1.5], [1.5, 1.0]])  # no inputs have these; a damping of 0.01 does not mend it
    assert bool(factorise(indefinite).upper.isfinite().all())
    for broken in (torch.full((4, 4), float("nan")), torch.tensor([[1.0, 9.0], [9.0, 1.0]])):
        with pytest.raises(ValueError, match=r"second moments of \d inputs are not positive definite even 1 damped"):
            factorise(broken)


def test_without_moments_the_model_is_rounded_as_the_packer_does_it(trained: Trained) -> None:
    model, _ = trained
    wanted = packing(trained, clip="quantile", clip_quantile=0.99, prune=0.3)
    rounded = round_weights(model, wanted, Calibration())
    for tensor in quantised_matrices(model, wanted.half_below):
        expected = quantise(model.get_parameter(tensor.name), tensor.tensor_class, wanted)
        assert torch.equal(rounded[tensor.name].symbols, expected.symbols), tensor.name
        assert torch.equal(rounded[tensor.name].scales, expected.scales), tensor.name


def test_a_model_that_is_too_small_to_be_quantised_has_nothing_to_round(trained: Trained) -> None:
    assert round_weights(trained[0], packing(trained, half_below=10**9, high_fraction=0.1), Calibration()) == {}


def test_the_rows_with_the_largest_gradients_get_8_bits_and_those_with_the_smallest_4(
    trained: Trained, calibration: Calibration
) -> None:
    model, _ = trained
    wanted = packing(trained, bits=6, high_fraction=0.1, low_fraction=0.2)
    bits = row_bits(model, wanted, calibration)
    by_row = torch.cat([bits[name] for name in calibration.row_gradients])
    gradients = torch.cat(list(calibration.row_gradients.values()))
    assert {count: int((by_row == count).sum()) for count in (4, 6, 8)} == {
        4: int(0.2 * len(by_row)),
        6: len(by_row) - int(0.1 * len(by_row)) - int(0.2 * len(by_row)),
        8: int(0.1 * len(by_row)),
    }
    assert float(gradients[by_row == 4].max()) <= float(gradients[by_row == 6].min())
    assert float(gradients[by_row == 6].max()) <= float(gradients[by_row == 8].min())
    rounded = round_weights(model, wanted, calibration)
    for name, rows in rounded.items():
        peaks = rows.symbols.abs().amax(dim=1)
        assert bool((peaks <= 2 ** (bits[name] - 1) - 1).all()), name
        weight = model.get_parameter(name).detach()
        largest = (2 ** (bits[name] - 1) - 1).float()
        torch.testing.assert_close(rows.scales.float(), weight.abs().amax(dim=1) / largest, rtol=1e-3, atol=1e-7)
