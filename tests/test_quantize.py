"""Quantisation: every value within half of its row's step, for rows of any size that fp16 scales can reach."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from worker.quantize import SMALLEST_SCALE, Rows, dequantise_rows, largest_symbol, quantise_rows, to_half

matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(-400_000, 400_000, width=32),  # what 4 bits still reach: 7 · 65504
)


@given(matrices, st.integers(4, 8))
def test_every_value_is_within_half_a_step_of_its_row(weights: np.ndarray, bits: int) -> None:
    weight = torch.from_numpy(weights)
    rows = quantise_rows(weight, bits)
    error = (dequantise_rows(rows).double() - weight.double()).abs()
    assert bool((error <= 0.5001 * rows.scales.double()[:, None]).all())
    assert int(rows.symbols.abs().max()) <= largest_symbol(bits)


@given(matrices.filter(lambda weights: bool(np.abs(weights).max(axis=1).min() > 0.01)), st.integers(4, 8))
def test_a_scale_is_as_small_as_its_row_needs(weights: np.ndarray, bits: int) -> None:
    rows = quantise_rows(torch.from_numpy(weights), bits)
    assert bool((rows.symbols.abs().amax(dim=1) == largest_symbol(bits)).all())


@pytest.mark.parametrize("peak", [1e-7, 1e-6, 5e-5, 1e-3, 0.03, 1.0, 100.0, 2e6])
def test_rows_of_any_size_keep_their_values(peak: float) -> None:
    weight = torch.linspace(-1, 1, 63, dtype=torch.float64).mul(peak).float().repeat(2, 1)
    weight[1] *= 0.5
    error = (dequantise_rows(quantise_rows(weight, 6)).double() - weight.double()).abs().amax(dim=1)
    assert bool((error <= max(peak / 62, SMALLEST_SCALE / 2) * 1.01).all())


def test_small_rows_beside_large_ones_keep_scales_of_their_own() -> None:
    weight = torch.tensor([[31.0, -15.0], [0.0031, 0.0015], [0.0, 0.0], [1e-7, -1e-7]])
    rows = quantise_rows(weight, 6)
    assert rows.symbols.tolist() == [[31, -15], [31, 15], [0, 0], [2, -2]]
    assert rows.scales.dtype == torch.float16
    assert rows.scales.tolist()[2:] == [0.0, SMALLEST_SCALE]
    assert dequantise_rows(rows)[2].tolist() == [0.0, 0.0]


def test_symbols_are_rounded_against_the_scale_that_is_stored() -> None:
    weight = torch.rand(64, 512, generator=torch.Generator().manual_seed(0)) - 0.5
    rows = quantise_rows(weight, 8)
    assert torch.equal(rows.symbols, (weight / rows.scales.float()[:, None]).round().to(torch.int8))


def test_quantising_what_was_dequantised_changes_nothing() -> None:
    rows = quantise_rows(torch.randn(16, 33, generator=torch.Generator().manual_seed(1)), 6)
    again = quantise_rows(dequantise_rows(rows), 6)
    assert torch.equal(again.symbols, rows.symbols)
    assert torch.equal(again.scales, rows.scales)
    assert isinstance(again, Rows)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        quantise_rows(torch.tensor([[1.0, bad]]), 6)
    with pytest.raises(ValueError, match="not finite"):
        to_half(torch.tensor([bad]))


def test_values_beyond_the_format_are_refused_with_its_reach() -> None:
    with pytest.raises(ValueError, match=r"holds 3e\+06; 6 bits with an fp16 scale reach 2\.03062e\+06"):
        quantise_rows(torch.tensor([[3e6]]), 6)
    with pytest.raises(ValueError, match="holds 65520; half precision ends at 65504"):
        to_half(torch.tensor([1.0, -65_520.0]))
    assert to_half(torch.tensor([65_504.0])).tolist() == [65_504.0]
