"""Fitting to bytes: the artifact lands just under its target, and is worth more there than any one width of symbols."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from worker.artifact import load, pack
from worker.calibrate import Calibration, calibration_batches, quantised_matrices, second_moments, sensitivities
from worker.evaluate import Validation, evaluate, open_validation
from worker.fit import CURVE, curve, fit, require_reachable
from worker.model import Model, initialise
from worker.packing import QuantisationConfig
from worker.quantize import dequantise_rows
from worker.rounding import round_weights
from worker.shape import FieldError
from worker.shards import open_dataset
from worker.spec import TrialSpec
from worker.world import World

Trained = tuple[Model, TrialSpec]
ALONE = World(0, 1, torch.device("cpu"))
CODE = 10_000


@pytest.fixture(scope="module")
def validation(small_data_root: Path) -> Validation:
    return open_validation(open_dataset(small_data_root, "topics_sp512"), 512, 32, 64)


@pytest.fixture(scope="module")
def by_gptq(trained: Trained, small_data_root: Path) -> Calibration:
    model, spec = trained
    batches = calibration_batches(open_dataset(small_data_root, "topics_sp512"), spec)
    names = [tensor.name for tensor in quantised_matrices(model, spec.quantisation.half_below)]
    return Calibration(second_moments(model, batches, names), {}, sensitivities(model, batches, names, seed=3))


@pytest.fixture(scope="module")
def to_nearest(by_gptq: Calibration) -> Calibration:
    return Calibration(sensitivities=by_gptq.sensitivities)


def packing(trained: Trained, **changes: Any) -> QuantisationConfig:
    return trained[1].quantisation.model_copy(update=changes)


@pytest.mark.parametrize("codec", ["zstd", "brotli", "ans", "zlib"])
@pytest.mark.parametrize("target_bytes", [40_000, 52_345, 75_000])
def test_an_artifact_lands_within_a_five_hundredth_under_its_target(
    trained: Trained, to_nearest: Calibration, codec: str, target_bytes: int
) -> None:
    wanted = packing(trained, codec=codec, target_bytes=target_bytes)
    fitted = fit(trained[0], wanted, to_nearest, CODE)
    assert 0.998 * target_bytes <= len(fitted.packed.data) + CODE <= target_bytes
    assert not fitted.finest


def test_gptq_lands_there_too_and_loses_less(
    trained: Trained, by_gptq: Calibration, to_nearest: Calibration, validation: Validation
) -> None:
    wanted = packing(trained, codec="ans", target_bytes=35_000)
    scores = []
    for calibration in (by_gptq, to_nearest):
        fitted = fit(trained[0], wanted, calibration, CODE)
        assert 0.998 * 35_000 <= len(fitted.packed.data) + CODE <= 35_000
        scores.append(evaluate(load(fitted.packed.data), validation, ALONE).bpb)
    assert scores[0] < scores[1]


@pytest.mark.parametrize("changes", [{"bits": 4}, {"bits": 6, "clip": "sigmas"}])
def test_solved_steps_lose_less_than_one_width_of_symbols_of_the_same_bytes(
    trained: Trained, to_nearest: Calibration, validation: Validation, changes: dict[str, Any]
) -> None:
    model, _ = trained
    uniform = packing(trained, codec="ans", **changes)
    packed = pack(model, uniform, round_weights(model, uniform, Calibration()))
    fitted = fit(model, packing(trained, codec="ans", target_bytes=len(packed.data)), to_nearest, 0)
    before = evaluate(model, validation, ALONE).bpb
    lost = [evaluate(load(each.data), validation, ALONE).bpb - before for each in (packed, fitted.packed)]
    assert lost[1] < lost[0]


def test_the_artifact_holds_the_rows_and_no_value_is_cut_off(trained: Trained, to_nearest: Calibration) -> None:
    model, _ = trained
    fitted = fit(model, packing(trained, codec="ans", target_bytes=60_000), to_nearest, CODE)
    loaded = load(fitted.packed.data)
    for name, rows in fitted.rows.items():
        weight = model.get_parameter(name).detach()
        assert torch.equal(loaded.get_parameter(name), dequantise_rows(rows)), name
        errors = (weight - dequantise_rows(rows)).abs()
        assert bool((errors <= 0.5001 * rows.scales.float()[:, None]).all()), name


def test_steps_are_as_the_inverse_root_of_sensitivities(trained: Trained, to_nearest: Calibration) -> None:
    fitted = fit(trained[0], packing(trained, codec="ans", target_bytes=40_000), to_nearest, CODE)
    products = {
        name: float(rows.scales.float().median()) * to_nearest.sensitivities[name] ** 0.5
        for name, rows in fitted.rows.items()
    }
    assert max(products.values()) == pytest.approx(min(products.values()), rel=2e-3)


def test_a_target_beyond_the_finest_steps_keeps_them_and_says_so(trained: Trained, to_nearest: Calibration) -> None:
    model, _ = trained
    fitted = fit(model, packing(trained, codec="ans", target_bytes=10_000_000), to_nearest, CODE)
    assert fitted.finest
    for name, rows in round_weights(model, packing(trained, bits=8), Calibration()).items():
        assert torch.equal(fitted.rows[name].symbols, rows.symbols), name


def test_a_target_that_cannot_be_reached_is_refused_with_the_least_that_can(
    trained: Trained, to_nearest: Calibration
) -> None:
    model, _ = trained
    with pytest.raises(
        FieldError, match=r"quantisation\.target_bytes is 10100: must be at least 1\d{4}, what this"
    ) as caught:
        fit(model, packing(trained, codec="ans", target_bytes=10_100), to_nearest, CODE)
    least = int(caught.value.expected.split()[4].rstrip(","))
    fitted = fit(model, packing(trained, codec="ans", target_bytes=least), to_nearest, CODE)
    assert len(fitted.packed.data) + CODE <= least


def test_a_target_is_refused_before_training_where_the_untrained_model_is_over_it(trained: Trained) -> None:
    model, spec = trained
    untrained = Model(spec.model, spec.sharing)
    initialise(untrained, spec.seed)
    least: list[int] = []
    for each in (untrained, model):
        with pytest.raises(
            FieldError, match=r"quantisation\.target_bytes is 9999: must be at least \d+, what"
        ) as caught:
            require_reachable(each, packing(trained, codec="auto", target_bytes=9_999), CODE)
        least.append(int(caught.value.expected.split()[4].rstrip(",")))
    assert CODE < least[0] <= least[1], "what training has yet to change takes no more than it will"
    require_reachable(untrained, packing(trained, codec="auto", target_bytes=least[0]), CODE)
    require_reachable(untrained, packing(trained), CODE)


def test_auto_is_fitted_by_the_codec_that_is_smallest_there(trained: Trained, to_nearest: Calibration) -> None:
    model, _ = trained
    wanted = packing(trained, codec="auto", target_bytes=30_000)
    fitted = fit(model, wanted, to_nearest, CODE)
    assert 0.998 * 30_000 <= len(fitted.packed.data) + CODE <= 30_000
    assert pack(model, wanted, fitted.rows).codec == fitted.packed.codec


def test_a_model_without_quantised_matrices_fits_or_is_refused(trained: Trained) -> None:
    model, _ = trained
    halves = packing(trained, half_below=10_000_000, target_bytes=1_000_000)
    fitted = fit(model, halves, Calibration(), CODE)
    assert fitted.finest and not fitted.rows
    with pytest.raises(FieldError, match="must be at least"):
        fit(model, halves.model_copy(update={"target_bytes": 50_000}), Calibration(), CODE)


def test_fitting_repeats_to_the_byte(trained: Trained, by_gptq: Calibration) -> None:
    wanted = packing(trained, target_bytes=45_000)
    first, second = (fit(trained[0], wanted, by_gptq, CODE).packed.data for _ in range(2))
    assert first == second


def test_the_curve_says_what_bytes_are_worth(trained: Trained, to_nearest: Calibration, validation: Validation) -> None:
    wanted = packing(trained, codec="ans", target_bytes=50_000)
    points = curve(trained[0], wanted, to_nearest, CODE, lambda model: evaluate(model, validation, ALONE).bpb)
    assert len(points) == len(CURVE)
    for point, share in zip(points, CURVE, strict=True):
        assert 0.97 * share < (point.artifact_bytes - CODE) / 40_000 <= share or point is points[-1]
    assert all(first.artifact_bytes < second.artifact_bytes for first, second in pairwise(points))
    assert points[0].val_bpb > points[2].val_bpb > points[-1].val_bpb - 1e-3
