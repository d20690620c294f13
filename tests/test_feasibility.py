"""Predicted artifact bytes: close to what is really packed, calibrated by finished trials, honest about the rest."""

import json
import random
from dataclasses import replace
from datetime import UTC, datetime
from math import exp
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.feasibility import Predictor, judge, predict, prior_model_bytes, symbol_entropy
from orchestrator.lifecycle import TrialState
from orchestrator.study import Prediction, Trial
from worker.artifact import pack
from worker.model import Model
from worker.recipes import load_recipe
from worker.report import TrialResult
from worker.sharing import count_parameters
from worker.source import code_bytes
from worker.spec import TrialSpec, override, parse_spec

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def laptop(**changes: object) -> TrialSpec:
    """A small spec with fields replaced: model__width for model.width."""
    paths: dict[str, object] = {"model.heads": 4, "model.kv_heads": 2, "model.width": 96}
    paths |= {name.replace("__", "."): value for name, value in changes.items()}
    return parse_spec(override(load_recipe("laptop"), paths))


def packed_bytes(spec: TrialSpec, *, gaussian: bool) -> int:
    """Model bytes of weights drawn as a long training leaves them (Gaussian), or as they start (uniform)."""
    model, generator = Model(spec.model, spec.sharing), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if gaussian:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.uniform_(-0.1, 0.1, generator=generator)
    return len(pack(model, spec.quantisation).data)


def finished(number: int, spec: TrialSpec, ratio: float, state: TrialState = TrialState.COMPLETE) -> Trial:
    model_bytes = round(prior_model_bytes(spec) * ratio)
    result = TrialResult(
        val_bpb=1.5, val_bpb_prequant=1.4, val_loss=2.5, parameters=1, model_bytes=model_bytes, code_bytes=code_bytes(),
        artifact_bytes=model_bytes + code_bytes(), artifact_sha256="0" * 64, steps=10, tokens=1000, train_seconds=1.0,
        evaluate_seconds=1.0, pack_seconds=1.0, step_seconds=0.1, stopped=False, bytes_by_class={}, diagnostics={},
    )  # fmt: skip
    return Trial(
        number + 1, 1, number, state, "proposed", spec, spec.canonical_hash, {}, predict(spec), "fits", None, result,
        NOW, NOW, NOW,
    )  # fmt: skip


def small(width: int, blocks: int, rank: int, bits: int, codec: tuple[str, int]) -> TrialSpec:
    return laptop(
        model__width=width, sharing__unique_blocks=blocks, sharing__lora__rank=rank,
        quantisation__bits=bits, quantisation__codec=codec[0], quantisation__level=codec[1],
    )  # fmt: skip


WIDTHS, BLOCKS, RANKS = st.sampled_from([96, 128]), st.integers(2, 3), st.sampled_from([0, 2])


@settings(max_examples=10)
@given(WIDTHS, BLOCKS, RANKS, st.integers(6, 8), st.sampled_from([("zstd", 22), ("zlib", 9)]))
def test_the_prior_is_within_3_percent_of_packed_gaussian_weights(
    width: int, blocks: int, rank: int, bits: int, codec: tuple[str, int]
) -> None:
    spec = small(width, blocks, rank, bits, codec)
    assert packed_bytes(spec, gaussian=True) == pytest.approx(prior_model_bytes(spec), rel=0.03)


@settings(max_examples=10)
@given(WIDTHS, BLOCKS, RANKS, st.integers(4, 5), st.sampled_from([("zstd", 22), ("zstd", 9), ("zlib", 9)]))
def test_the_first_interval_holds_packed_gaussian_weights_of_few_bits_too(
    width: int, blocks: int, rank: int, bits: int, codec: tuple[str, int]
) -> None:
    spec = small(width, blocks, rank, bits, codec)
    prediction, actual = predict(spec), packed_bytes(spec, gaussian=True) + code_bytes()
    assert prediction.artifact_bytes_low <= actual <= prediction.artifact_bytes_high


def test_the_prior_is_within_half_a_percent_of_six_million_packed_gaussian_weights() -> None:
    spec = parse_spec(load_recipe("depth-recurrence"))
    assert packed_bytes(spec, gaussian=True) == pytest.approx(prior_model_bytes(spec), rel=0.005)


@settings(max_examples=8)
@given(width=st.sampled_from([48, 96]), rank=st.sampled_from([0, 8]), bits=st.integers(4, 8))
def test_no_prediction_is_above_what_evenly_used_symbols_take(width: int, rank: int, bits: int) -> None:
    spec = laptop(model__width=width, sharing__lora__rank=rank, quantisation__bits=bits)
    most = Predictor(factor=9.0, low=9.0, high=9.0, code_bytes=0).predict(spec).artifact_bytes_high
    actual = packed_bytes(spec, gaussian=False)
    assert actual <= most
    assert most == pytest.approx(actual, rel=0.1)


def test_the_prior_meets_the_published_baseline_within_1_percent(shared: Path) -> None:
    systems = json.loads((shared / "reference" / "expected.json").read_text())
    baseline = parse_spec(load_recipe("naive-baseline"))
    published = _find(systems, "expected_artifact_bytes", 15_863_489)["expected_model_bytes"]
    assert prior_model_bytes(baseline) == pytest.approx(published, rel=0.01)


def _find(tree: object, key: str, value: int) -> dict[str, int]:
    """The object that has this value at this key, anywhere in a JSON tree."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            if node.get(key) == value:
                return node
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node
    raise AssertionError(f"no object has {key} {value}")


def test_a_prediction_counts_parameters_and_code_exactly() -> None:
    spec = laptop()
    prediction = predict(spec)
    assert prediction.parameters == count_parameters(spec.model, spec.sharing)
    assert prediction.code_bytes == code_bytes()
    assert prediction.artifact_bytes == pytest.approx(prior_model_bytes(spec) + code_bytes(), abs=1)
    assert prediction.artifact_bytes_low < prediction.artifact_bytes < prediction.artifact_bytes_high


def test_a_tied_layer_costs_no_second_copy() -> None:
    tied = predict(laptop(sharing__virtual_layers=6, sharing__unique_blocks=1, sharing__lora__rank=0))
    deeper = predict(laptop(sharing__virtual_layers=12, sharing__unique_blocks=1, sharing__lora__rank=0))
    untied = predict(laptop(sharing__virtual_layers=6, sharing__unique_blocks=6, sharing__lora__rank=0))
    assert deeper.artifact_bytes - tied.artifact_bytes < 0.05 * (untied.artifact_bytes - tied.artifact_bytes)


@pytest.mark.parametrize("columns", [64, 512, 4096])
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_symbol_entropy_is_that_of_simulated_gaussian_rows(columns: int, bits: int) -> None:
    rows = torch.randn(200_000 // columns, columns, generator=torch.Generator().manual_seed(1))
    symbols = (rows / rows.abs().amax(dim=1, keepdim=True) * (2 ** (bits - 1) - 1)).round()
    shares = torch.unique(symbols, return_counts=True)[1] / symbols.numel()
    assert symbol_entropy(columns, bits) == pytest.approx(float(-(shares * shares.log2()).sum()), abs=0.06)


def test_calibration_follows_the_finished_trials_and_narrows() -> None:
    spec = laptop()
    ratios = [0.93 + 0.004 * (number % 5) for number in range(40)]
    history = [finished(number, spec, ratio) for number, ratio in enumerate(ratios)]
    widths = []
    for count in (0, 1, 3, 10, 40):
        prediction = predict(spec, history[:count])
        widths.append(prediction.artifact_bytes_high - prediction.artifact_bytes_low)
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == len(widths)
    expected = 0.938 * prior_model_bytes(spec) + code_bytes()
    assert predict(spec, history).artifact_bytes == pytest.approx(expected, rel=0.001)


def test_after_20_trials_the_interval_holds_nine_of_ten_within_2_percent_on_average() -> None:
    noise, tries = random.Random(0), 500
    held, width = 0, 0.0
    for _ in range(tries):
        *ratios, following = (0.96 * exp(noise.gauss(0, 0.008)) for _ in range(21))
        predictor = Predictor.calibrated(ratios)
        held += predictor.low <= following <= predictor.high
        width += predictor.high / predictor.factor - 1
    assert 0.85 < held / tries < 0.97
    assert width / tries < 0.02


def test_one_odd_artifact_moves_nothing() -> None:
    agreeing = [0.95, 0.952, 0.948, 0.951, 0.949, 0.95, 0.953, 0.947]
    usual, odd = Predictor.calibrated(agreeing), Predictor.calibrated([*agreeing, 3.0])
    assert odd.factor == pytest.approx(usual.factor, rel=0.002)
    assert odd.high == pytest.approx(usual.high, rel=0.01)


@pytest.mark.parametrize("state", [state for state in TrialState if state is not TrialState.COMPLETE])
def test_only_complete_trials_calibrate(state: TrialState) -> None:
    spec = laptop()
    assert predict(spec, [finished(0, spec, 0.5, state)]) == predict(spec)


def test_the_verdict_is_grey_exactly_where_the_interval_holds_the_cap() -> None:
    prediction = Prediction(
        parameters=1, code_bytes=70, artifact_bytes=1000, artifact_bytes_low=900, artifact_bytes_high=1100
    )
    assert [judge(prediction, cap)[0] for cap in (899, 900, 1000, 1099, 1100)] == [
        "cannot_fit", "grey", "grey", "grey", "fits",
    ]  # fmt: skip


def test_a_verdict_that_is_not_certain_names_the_numbers() -> None:
    prediction = Prediction(1, 70_000, 17_000_000, 16_500_000, 17_500_000)
    assert judge(prediction, 20_000_000) == ("fits", None)
    for cap, low in ((16_000_000, 16_500_000), (17_000_000, 16_500_000)):
        _, reason = judge(replace(prediction, artifact_bytes_low=low), cap)
        assert reason is not None
        for number in ("17,000,000", "16,500,000", "17,500,000", "70,000", f"{cap:,}"):
            assert number in reason
