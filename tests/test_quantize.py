"""Quantisation: every value within half of its row's step, for rows of any size that fp16 scales can reach."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor

from worker.inventory import TensorClass
from worker.packing import ClassBits, ClassSigmas, QuantisationConfig
from worker.quantize import (
    SMALLEST_SCALE,
    Rows,
    dequantise_rows,
    half_scales,
    largest_symbol,
    pruned,
    quantise,
    row_quantiles,
    row_scales,
    to_half,
    to_symbols,
)

matrices = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=2, max_side=12),
    elements=st.floats(-400_000, 400_000, width=32),  # what 4 bits still reach: 7 · 65504
)


def rounded(weight: Tensor, bits: int = 6, **fields: Any) -> Rows:
    return quantise(weight, TensorClass.MLP, QuantisationConfig(bits=bits, **fields))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(matrices, st.integers(4, 8))
def test_every_value_is_within_half_a_step_of_its_row(weights: np.ndarray, bits: int) -> None:
    weight = torch.from_numpy(weights)
    rows = rounded(weight, bits)
    error = (dequantise_rows(rows).double() - weight.double()).abs()
    assert bool((error <= 0.5001 * rows.scales.double()[:, None]).all())
    assert int(rows.symbols.abs().max()) <= largest_symbol(bits)


@given(matrices.filter(lambda weights: bool(np.abs(weights).max(axis=1).min() > 0.01)), st.integers(4, 8))
def test_a_scale_is_as_small_as_its_row_needs(weights: np.ndarray, bits: int) -> None:
    rows = rounded(torch.from_numpy(weights), bits)
    assert bool((rows.symbols.abs().amax(dim=1) == largest_symbol(bits)).all())


@pytest.mark.parametrize("peak", [1e-7, 1e-6, 5e-5, 1e-3, 0.03, 1.0, 100.0, 2e6])
def test_rows_of_any_size_keep_their_values(peak: float) -> None:
    weight = torch.linspace(-1, 1, 63, dtype=torch.float64).mul(peak).float().repeat(2, 1)
    weight[1] *= 0.5
    error = (dequantise_rows(rounded(weight)).double() - weight.double()).abs().amax(dim=1)
    assert bool((error <= max(peak / 62, SMALLEST_SCALE / 2) * 1.01).all())


def test_small_rows_beside_large_ones_keep_scales_of_their_own() -> None:
    weight = torch.tensor([[31.0, -15.0], [0.0031, 0.0015], [0.0, 0.0], [1e-7, -1e-7]])
    rows = rounded(weight)
    assert rows.symbols.tolist() == [[31, -15], [31, 15], [0, 0], [2, -2]]
    assert rows.scales.dtype == torch.float16
    assert rows.scales.tolist()[2:] == [0.0, SMALLEST_SCALE]
    assert dequantise_rows(rows)[2].tolist() == [0.0, 0.0]


def test_symbols_are_rounded_against_the_scale_that_is_stored() -> None:
    weight = torch.rand(64, 512, generator=torch.Generator().manual_seed(0)) - 0.5
    rows = rounded(weight, 8)
    assert torch.equal(rows.symbols, (weight / rows.scales.float()[:, None]).round().to(torch.int8))


def test_quantising_what_was_dequantised_changes_nothing() -> None:
    rows = rounded(normal(16, 33))
    again = rounded(dequantise_rows(rows))
    assert torch.equal(again.symbols, rows.symbols)
    assert torch.equal(again.scales, rows.scales)
    assert isinstance(again, Rows)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        rounded(torch.tensor([[1.0, bad]]))
    with pytest.raises(ValueError, match="not finite"):
        to_half(torch.tensor([bad]))


def test_values_beyond_the_format_are_refused_with_its_reach() -> None:
    with pytest.raises(ValueError, match=r"holds 3e\+06; 6 bits with an fp16 scale reach 2\.03062e\+06"):
        rounded(torch.tensor([[3e6]]))
    with pytest.raises(ValueError, match="holds 65520; half precision ends at 65504"):
        to_half(torch.tensor([1.0, -65_520.0]))
    assert to_half(torch.tensor([65_504.0])).tolist() == [65_504.0]


def test_the_sources_examples_come_out_but_for_the_floor_of_their_scales(shared: Path) -> None:
    examples = json.loads((shared / "reference" / "expected.json").read_text())["functional_checks"]
    fake, stored = examples["ebls_fake_quant_example"], examples["quantiser_a_example"]
    rows = rounded(torch.tensor(fake["weights"]))
    assert torch.allclose(dequantise_rows(rows), torch.tensor(fake["out"]), atol=1.01e-3)  # its scales are not fp16's
    rows = rounded(torch.tensor(stored["weights"]))
    assert rows.scales[1].item() == pytest.approx(stored["scales_fp16"][1], abs=5e-5)
    assert rows.symbols[1].tolist() == stored["q"][1]
    # Its export gives no row a step below 1/31; ours keeps the step of a row whose maximum is 0.5, as its QAT does.
    assert rows.symbols[0].tolist() == [31, -19, 1]


@given(st.integers(1, 60), st.floats(0.5, 1), st.integers(0, 9))
def test_a_rows_quantile_lies_between_its_neighbours_as_numpys_does(columns: int, quantile: float, seed: int) -> None:
    magnitudes = normal(3, columns, seed=seed).abs()
    expected = np.quantile(magnitudes.double().numpy(), quantile, axis=1)
    assert row_quantiles(magnitudes, quantile).numpy() == pytest.approx(expected, rel=1e-5)


def test_each_clip_lands_on_the_largest_symbol() -> None:
    weight = normal(8, 400)
    magnitudes, quantisation = weight.abs(), QuantisationConfig(bits=5, clip_quantile=0.98, clip_sigmas=2.5)
    clips = {
        "amax": magnitudes.amax(dim=1),
        "quantile": torch.quantile(magnitudes, 0.98, dim=1),
        "sigmas": 2.5 * weight.std(dim=1),
    }
    for clip, expected in clips.items():
        chosen = quantisation.model_copy(update={"clip": clip})
        scales = row_scales(weight, TensorClass.MLP, chosen)
        assert torch.equal(scales, (expected / 15).half().float()), clip
        rows = quantise(weight, TensorClass.MLP, chosen)
        assert torch.equal(rows.scales.float(), scales)
        assert bool((rows.symbols[magnitudes >= expected[:, None]].abs() == 15).all())


def test_the_grid_takes_the_clip_with_the_least_squared_error_over_the_matrix() -> None:
    weight = normal(8, 4_000)
    weight[:, 0] = 12.0  # an outlier a row: what a maximum is wrong for, and a quantile right

    def error(rows: Rows) -> float:
        return float((dequantise_rows(rows) - weight).square().mean())

    quantiles = (0.999, 0.9995, 0.9999, 0.99999, 1.0)
    errors = [error(rounded(weight, clip="quantile", clip_quantile=quantile)) for quantile in quantiles]
    best = error(rounded(weight, clip="grid"))
    assert best == pytest.approx(min(errors))
    assert best < error(rounded(weight)) == pytest.approx(errors[-1])


@pytest.mark.parametrize("clip", ["sigmas", "quantile", "grid"])
def test_rows_that_have_no_spread_keep_their_values(clip: str) -> None:
    assert (
        dequantise_rows(rounded(torch.full((2, 5), 0.5), clip=clip)).tolist()
        == [[pytest.approx(0.5, rel=1e-3)] * 5] * 2
    )
    assert dequantise_rows(rounded(torch.full((2, 1), 0.5), clip=clip)).tolist() == [[pytest.approx(0.5, rel=1e-3)]] * 2
    assert rounded(torch.zeros(2, 5), clip=clip).scales.tolist() == [0.0, 0.0]
    sparse = torch.zeros(1, 4_000)
    sparse[0, 5] = 1.0  # its 0.999 quantile is zero, which is no scale
    assert dequantise_rows(rounded(sparse, clip=clip, clip_quantile=0.999, clip_sigmas=64))[0, 5] > 0.9


def test_bits_and_deviations_are_those_of_the_tensors_class() -> None:
    weight = normal(4, 300)
    quantisation = QuantisationConfig(
        clip="sigmas", clip_sigmas=3, class_bits=ClassBits(embedding=8), class_sigmas=ClassSigmas(attention=6)
    )
    scales = {name: row_scales(weight, name, quantisation) for name in TensorClass}
    for name, bits, sigmas in ((TensorClass.EMBEDDING, 8, 3), (TensorClass.ATTENTION, 6, 6), (TensorClass.MLP, 6, 3)):
        assert torch.equal(scales[name], (sigmas * weight.std(dim=1) / largest_symbol(bits)).half().float())
    assert int(quantise(weight, TensorClass.EMBEDDING, quantisation).symbols.abs().max()) == 127


def test_rows_may_have_a_largest_symbol_each() -> None:
    weight, largest = normal(3, 50), torch.tensor([7, 31, 127])
    scales = half_scales(weight.abs().amax(dim=1), largest)
    symbols = to_symbols(weight, scales, largest)
    assert symbols.abs().amax(dim=1).tolist() == [7, 31, 127]
    for row, one in enumerate(largest.tolist()):
        assert torch.equal(symbols[row : row + 1], to_symbols(weight[row : row + 1], scales[row : row + 1], one))


@given(matrices, st.floats(0, 0.99))
def test_pruning_zeroes_the_smallest_magnitudes_and_touches_nothing_else(weights: np.ndarray, share: float) -> None:
    weight = torch.from_numpy(weights)
    left = pruned(weight, share)
    zeroed = left != weight
    assert bool((left[zeroed] == 0).all())
    assert int(zeroed.sum()) <= share * weight.numel()
    if bool(zeroed.any()) and not bool(zeroed.all()):
        assert weight[zeroed].abs().max() < left[~zeroed].abs()[left[~zeroed] != 0].min()


def test_pruning_comes_before_rounding() -> None:
    weight = normal(40, 50)
    rows = rounded(weight, prune=0.25)
    assert int((rows.symbols == 0).sum()) >= 500
    assert torch.equal(rows.symbols, rounded(pruned(weight, 0.25)).symbols)
    assert int((pruned(weight, 0.25) == 0).sum()) == 500


def test_a_value_that_is_not_finite_spoils_its_row_where_no_one_looks() -> None:
    weight = torch.tensor([[1.0, float("nan")], [1.0, 0.5]])
    scales = row_scales(weight, TensorClass.MLP, QuantisationConfig())
    spoiled = to_symbols(weight, scales, 31) * scales[:, None]
    assert spoiled[0].isnan().all() and spoiled[1].isfinite().all()
