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

from api.preview import preview
from orchestrator.caps import Caps
from orchestrator.compression import expected_peak, prior_of, symbol_entropy, symbol_shares
from orchestrator.feasibility import Predictor, judge, predict
from orchestrator.lifecycle import TrialState
from orchestrator.study import Prediction, Trial
from worker.artifact import pack
from worker.inventory import count_parameters, is_quantised, tensor_inventory
from worker.model import Model
from worker.quantize import Rows, half_scales, to_symbols
from worker.recipes import load_recipe
from worker.report import TrialResult
from worker.source import code_bytes
from worker.spec import TrialSpec, override, parse_spec

NOW = datetime(2026, 3, 1, tzinfo=UTC)


def laptop(**changes: object) -> TrialSpec:
    """A small spec with fields replaced: model__width for model.width."""
    paths: dict[str, object] = {"model.heads": 4, "model.kv_heads": 2, "model.width": 96}
    paths |= {name.replace("__", "."): value for name, value in changes.items()}
    return parse_spec(override(load_recipe("laptop"), paths))


def drawn(spec: TrialSpec, *, gaussian: bool) -> Model:
    """A model with weights drawn as a long training leaves them (Gaussian), or as they start (uniform)."""
    model, generator = Model(spec.model, spec.sharing), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if gaussian:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.uniform_(-0.1, 0.1, generator=generator)
    return model


def packed_bytes(spec: TrialSpec, *, gaussian: bool) -> int:
    return len(pack(drawn(spec, gaussian=gaussian), spec.quantisation).data)


def finished(number: int, spec: TrialSpec, ratio: float, state: TrialState = TrialState.COMPLETE) -> Trial:
    model_bytes = round(prior_bytes(spec) * ratio)
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


def prior_bytes(spec: TrialSpec) -> float:
    return prior_of(spec).model_bytes


def sizes(prediction: Prediction) -> tuple[int, int, int]:
    return prediction.artifact_bytes_low, prediction.artifact_bytes, prediction.artifact_bytes_high


WIDTHS, BLOCKS, RANKS = st.sampled_from([96, 128]), st.integers(2, 3), st.sampled_from([0, 2])


@settings(max_examples=6)
@given(WIDTHS, BLOCKS, RANKS, st.integers(6, 8), st.sampled_from([("zstd", 22), ("zlib", 9)]))
def test_the_prior_is_within_3_percent_of_packed_gaussian_weights(
    width: int, blocks: int, rank: int, bits: int, codec: tuple[str, int]
) -> None:
    spec = small(width, blocks, rank, bits, codec)
    assert packed_bytes(spec, gaussian=True) == pytest.approx(prior_bytes(spec), rel=0.03)


@settings(max_examples=6)
@given(WIDTHS, BLOCKS, RANKS, st.integers(4, 5), st.sampled_from([("zstd", 22), ("zstd", 9), ("zlib", 9)]))
def test_the_first_interval_holds_packed_gaussian_weights_of_few_bits_too(
    width: int, blocks: int, rank: int, bits: int, codec: tuple[str, int]
) -> None:
    spec = small(width, blocks, rank, bits, codec)
    prediction, actual = predict(spec), packed_bytes(spec, gaussian=True) + code_bytes()
    assert prediction.artifact_bytes_low <= actual <= prediction.artifact_bytes_high


@pytest.fixture(scope="module")
def gaussian() -> Model:
    return drawn(laptop(), gaussian=True)


SIGMAS: dict[str, object] = {"clip": "sigmas"}
MIXED: dict[str, object] = {"class_bits": {"embedding": 8, "mlp": 5}}
ANS: tuple[dict[str, object], ...] = (
    SIGMAS, MIXED, {"clip": "sigmas", "bits": 4}, {"clip": "sigmas", "class_sigmas": {"embedding": 5.0}},
    {"clip": "quantile", "clip_quantile": 0.99}, {"clip": "grid", "bits": 4}, {"prune": 0.3, "clip": "sigmas"},
)  # fmt: skip


@pytest.mark.parametrize(
    ("codec", "packing", "error"),
    [
        *(("ans", packing, 0.01) for packing in ANS),
        ("brotli", SIGMAS, 0.015), ("brotli", MIXED, 0.025), ("lzma", SIGMAS, 0.015), ("zstd", SIGMAS, 0.045),
        ("zlib", SIGMAS, 0.025), ("zlib", MIXED, 0.025),
    ],
)  # fmt: skip
def test_the_prior_knows_every_clip_and_codec(
    gaussian: Model, codec: str, packing: dict[str, object], error: float
) -> None:
    spec = laptop(quantisation={"half_below": 4096, "codec": codec, **packing})
    actual = len(pack(gaussian, spec.quantisation).data)
    assert actual == pytest.approx(prior_bytes(spec), rel=error)


def test_the_prior_of_auto_is_that_of_its_best_codec() -> None:
    for clip in ("amax", "sigmas"):
        priors = {
            codec: prior_bytes(laptop(quantisation={"half_below": 4096, "clip": clip, "codec": codec}))
            for codec in ("zlib", "zstd", "brotli", "lzma", "ans", "auto")
        }
        best = priors.pop("auto")
        assert best == pytest.approx(min(priors.values()), abs=2)  # the header names the codec


def test_the_prior_knows_rows_of_more_and_of_fewer_bits(gaussian: Model) -> None:
    spec = laptop(
        quantisation={"half_below": 4096, "codec": "ans", "high_fraction": 0.2, "low_fraction": 0.4, "bits": 6}
    )
    rows = {}
    for tensor in tensor_inventory(spec.model, spec.sharing):
        if is_quantised(tensor, spec.quantisation.half_below):
            weight = gaussian.get_parameter(tensor.name).detach()
            chance = torch.rand(len(weight), generator=torch.Generator().manual_seed(2))
            largest = torch.full((len(weight),), 31.0).where(chance >= 0.4, 7.0).where(chance < 0.8, 127.0)
            scales = half_scales(weight.abs().amax(dim=1), largest)
            rows[tensor.name] = Rows(to_symbols(weight, scales, largest), scales.half())
    actual = len(pack(gaussian, spec.quantisation, rows).data)
    assert actual == pytest.approx(prior_bytes(spec), rel=0.02)


@pytest.mark.parametrize(("width", "rank"), [(32, 0), (32, 4), (32, 16), (40, 0), (40, 8)])
def test_the_prior_knows_what_zstd_loses_on_little_content(width: int, rank: int) -> None:
    spec = laptop(model__width=width, sharing__lora__rank=rank, quantisation__half_below=512)
    assert packed_bytes(spec, gaussian=True) == pytest.approx(prior_bytes(spec), rel=0.05)


def test_a_target_is_what_is_predicted_wherever_steps_can_meet_it() -> None:
    def solved(target: int) -> Prediction:
        return predict(laptop(quantisation={"half_below": 4096, "target_bytes": target, "codec": "ans"}))

    code, eight_bits = code_bytes(), laptop(quantisation={"half_below": 4096, "bits": 8, "codec": "ans"})
    met = solved(code + 150_000)
    assert met.artifact_bytes_low < met.artifact_bytes < met.artifact_bytes_high == code + 150_000
    assert met.artifact_bytes_low == pytest.approx(0.998 * met.artifact_bytes_high, abs=1)
    assert judge(met, Caps(code + 150_000), laptop())[0] == "fits"
    roomy = solved(code + 10_000_000)
    assert roomy.artifact_bytes == predict(eight_bits).artifact_bytes
    assert roomy.artifact_bytes_high < code + 500_000
    tight = solved(code)
    assert code + 10_000 < tight.artifact_bytes_low < tight.artifact_bytes < tight.artifact_bytes_high
    assert judge(tight, Caps(code), laptop())[0] == "cannot_fit"


def test_a_target_that_no_steps_can_meet_cannot_fit_whatever_the_cap() -> None:
    target = code_bytes() + 5_000
    spec = laptop(quantisation={"half_below": 4096, "target_bytes": target})
    prediction = predict(spec)
    verdict, reason = judge(prediction, Caps(), spec)
    assert (verdict, reason is not None and f"over quantisation.target_bytes, {target:,}" in reason) == (
        "cannot_fit",
        True,
    )
    larger = laptop(quantisation={"half_below": 4096, "target_bytes": target + 50_000})
    assert judge(prediction, Caps(), larger) == ("fits", None)


def test_no_target_is_predicted_below_what_zeros_take(gaussian: Model) -> None:
    spec = laptop(quantisation={"half_below": 4096, "target_bytes": 1, "codec": "ans"})
    rows = {
        tensor.name: Rows(torch.zeros(tensor.shape, dtype=torch.int8), torch.ones(tensor.shape[0]).half())
        for tensor in tensor_inventory(spec.model, spec.sharing)
        if is_quantised(tensor, spec.quantisation.half_below)
    }
    actual = len(pack(gaussian, spec.quantisation, rows).data)
    assert 0.8 * actual < predict(spec).artifact_bytes - code_bytes() <= actual


def test_trials_that_met_a_target_calibrate_nothing() -> None:
    met = laptop(quantisation={"half_below": 4096, "target_bytes": code_bytes() + 150_000})
    spec = laptop()
    assert sizes(predict(spec, [finished(number, met, 0.5) for number in range(5)])) == sizes(predict(spec))


def test_the_prior_is_within_half_a_percent_of_six_million_packed_gaussian_weights() -> None:
    spec = parse_spec(load_recipe("depth-recurrence"))
    assert packed_bytes(spec, gaussian=True) == pytest.approx(prior_bytes(spec), rel=0.005)


@settings(max_examples=5)
@given(width=st.sampled_from([48, 96]), rank=st.sampled_from([0, 8]), bits=st.integers(4, 8))
def test_no_prediction_is_above_what_evenly_used_symbols_take(width: int, rank: int, bits: int) -> None:
    spec = laptop(model__width=width, sharing__lora__rank=rank, quantisation__bits=bits)
    most = Predictor().quantile(spec, 1 - 1e-9) - code_bytes()
    actual = packed_bytes(spec, gaussian=False)
    assert actual <= most
    assert most == pytest.approx(actual, rel=0.1)


@pytest.mark.parametrize(
    ("recipe", "artifact_bytes", "error"),
    [
        ("naive-baseline", 15_863_489, 0.01), ("prism-standard11", 16_064_751, 0.01), ("prism-albert", 3_792_735, 0.02),
        ("prism-wt", 5_063_749, 0.01), ("prism-adapt", 5_077_436, 0.01), ("loop-4-5", 15_987_547, 0.01),
    ],
)  # fmt: skip
def test_the_prior_meets_the_published_sizes(shared: Path, recipe: str, artifact_bytes: int, error: float) -> None:
    systems = json.loads((shared / "reference" / "expected.json").read_text())
    published = _find(systems, "expected_artifact_bytes", artifact_bytes)["expected_model_bytes"]
    assert prior_bytes(parse_spec(load_recipe(recipe))) == pytest.approx(published, rel=error)


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
    assert prediction.artifact_bytes == pytest.approx(prior_bytes(spec) + code_bytes(), abs=1)
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
    expected = symbol_entropy(symbol_shares(expected_peak(columns), bits))
    assert expected == pytest.approx(float(-(shares * shares.log2()).sum()), abs=0.06)


def test_symbol_shares_are_those_of_simulated_rows_clipped_and_pruned() -> None:
    values = torch.randn(400_000, generator=torch.Generator().manual_seed(1))
    values[values.abs() < values.abs().quantile(0.25)] = 0
    symbols = (values / 2.0 * 7).round().clamp(-7, 7).abs()
    shares = symbol_shares(2.0, 4, 0.25)
    assert sum(shares) == pytest.approx(1)
    for symbol, share in enumerate(shares):
        assert share == pytest.approx(float((symbols == symbol).float().mean()), abs=0.003)


def test_calibration_follows_the_finished_trials_and_narrows() -> None:
    specs = [laptop(model__width=width) for width in (64, 128, 80, 112)]
    history = [finished(number, specs[number % 4], 0.936 + 0.001 * (number % 5)) for number in range(40)]
    widths = []
    for count in (0, 1, 4, 12, 40):
        low, _, high = sizes(predict(laptop(), history[:count]))
        widths.append(high - low)
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == len(widths)
    expected = 0.938 * prior_bytes(laptop()) + code_bytes()
    assert predict(laptop(), history).artifact_bytes == pytest.approx(expected, rel=0.001)


def test_after_20_trials_the_interval_holds_nine_of_ten_within_2_percent_on_average() -> None:
    noise, spec, tries = random.Random(0), laptop(), 100
    held, width = 0, 0.0
    for _ in range(tries):
        *ratios, following = (0.96 * exp(noise.gauss(0, 0.008)) for _ in range(21))
        found = predict(spec, [finished(number, spec, ratio) for number, ratio in enumerate(ratios)])
        low, high = found.artifact_bytes_low - code_bytes(), found.artifact_bytes_high - code_bytes()
        held += low <= following * prior_bytes(spec) <= high
        width += (high - low) / 2 / (found.artifact_bytes - code_bytes())
    assert 0.85 <= held / tries <= 0.97
    assert width / tries < 0.02


def test_an_artifact_without_any_quantised_matrix_teaches_and_is_predicted() -> None:
    halves = laptop(quantisation__half_below=10**6)
    low, middle, high = sizes(predict(halves, [finished(0, laptop(), 0.95), finished(1, halves, 0.97)]))
    assert low < middle < high
    assert middle - code_bytes() == pytest.approx(0.97 * prior_bytes(halves), rel=0.03)


def test_one_odd_artifact_moves_nothing() -> None:
    agreeing = [0.95, 0.952, 0.948, 0.951, 0.949, 0.95, 0.953, 0.947]
    history = [finished(number, laptop(), ratio) for number, ratio in enumerate(agreeing)]
    usual, odd = predict(laptop(), history), predict(laptop(), [*history, finished(8, laptop(), 3.0)])
    assert odd.artifact_bytes == pytest.approx(usual.artifact_bytes, rel=0.002)
    assert odd.artifact_bytes_high == pytest.approx(usual.artifact_bytes_high, rel=0.01)


@pytest.mark.parametrize("state", [state for state in TrialState if state is not TrialState.COMPLETE])
def test_only_complete_trials_calibrate(state: TrialState) -> None:
    spec = laptop()
    assert sizes(predict(spec, [finished(0, spec, 0.5, state)])) == sizes(predict(spec))


BYTES = Prediction(parameters=1, code_bytes=70, artifact_bytes=1000, artifact_bytes_low=900, artifact_bytes_high=1100)


def test_the_verdict_is_grey_exactly_where_the_interval_holds_the_cap() -> None:
    assert [judge(BYTES, Caps(cap), laptop())[0] for cap in (899, 900, 1000, 1099, 1100)] == [
        "cannot_fit", "grey", "grey", "grey", "fits",
    ]  # fmt: skip


def test_a_trial_is_refused_only_where_its_low_end_is_above_cap_and_tolerance() -> None:
    assert [judge(BYTES, Caps(800, tolerance), laptop())[0] for tolerance in (99, 100)] == ["cannot_fit", "grey"]
    _, reason = judge(BYTES, Caps(800, 50), laptop())
    assert reason is not None and reason.endswith("over the cap of 800 bytes by more than the 50 tolerated")


def test_a_verdict_that_is_not_certain_names_the_numbers() -> None:
    prediction = Prediction(1, 70_000, 17_000_000, 16_500_000, 17_500_000)
    assert judge(prediction, Caps(20_000_000), laptop()) == ("fits", None)
    for cap, low in ((16_000_000, 16_500_000), (17_000_000, 16_500_000)):
        _, reason = judge(replace(prediction, artifact_bytes_low=low), Caps(cap), laptop())
        assert reason is not None
        for number in ("17,000,000", "16,500,000", "17,500,000", "70,000", f"{cap:,}"):
            assert number in reason


def test_classes_share_out_what_the_artifact_is_predicted_to_have() -> None:
    spec = parse_spec(load_recipe("laptop"))
    found, predicted = preview(spec, Caps()), predict(spec)
    for end in ("expected", "low", "high"):
        whole = predicted.artifact_bytes if end == "expected" else getattr(predicted, f"artifact_bytes_{end}")
        classes = sum(getattr(size, end) for size in found.bytes_by_class.values())
        assert classes == pytest.approx(whole - predicted.code_bytes, abs=len(found.bytes_by_class))
    assert found.bytes_by_class.keys() == found.parameters_by_class.keys()
