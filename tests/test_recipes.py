"""Recipes: each counts what its source reports, has its knobs, and shrinks to a size for one CPU core."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from worker.__main__ import main
from worker.inventory import TensorClass, count_parameters, is_quantised, tensor_inventory
from worker.model import Model
from worker.recipes import load_recipe, recipe_names
from worker.spec import InvalidSpec, TrialSpec, override, parse_spec

PUBLISHED = {
    "naive-baseline": (17_059_912, "0 1 2 3 4 5 6 7 8"),
    "ebls": (29_566_018, "0 0 0 1 1 1 2 2 2"),
    "prism-standard11": (35_941_464, "0 1 2 3 4 5 6 7 8 9 10"),
    "prism-albert": (7_107_680, "0 0 0 0 0 0 0 0 0 0 0"),
    "prism-naive-shared": (9_993_320, "0 0 0 0 0 1 1 1 1 1 1"),
    "prism-wo": (9_993_320, "0 0 0 0 0 1 1 1 1 1 1"),
    "prism-wt": (9_993_320, "0 0 0 0 0 1 1 1 1 1 1"),
    "prism-adapt": (9_994_346, "0 0 0 0 0 1 1 1 1 1 1"),
    "depth-recurrence": (6_037_528, "0 1 2 0 1 2 0 1 2"),
    "depth-recurrence-stack": (1_452_296, "0 1 0 1 0 1"),
    "bi-tied-15l": (26_994_780, "0 1 2 3 4 5 6 7 8 9 9 9 9 9 10"),
    "loop-4-5": (35_943_512, "0 1 2 3 4 5 4 5 4 5 6 7 8 9 10"),
    "late-loop-3-5": (35_945_671, "0 1 2 3 4 5 3 4 5 3 4 5 6 7 8 9 10"),
}

DEEPER = {"sharing.virtual_layers": 12}
BY_LAYER = {"sharing.scales": "layer", "sharing.mixes": "layer", "sharing.unused": ["block_scales"]}
A100 = {"model.mlp_multiple": 3, "data.batch_tokens": 65_536, "quantisation.bits": 6}  # its experiments, on one A100
PAIRS = {"model.bigram_buckets": 4096, "model.bigram_hash": "xor", "model.smear_gate": True}
BOUNDED = {
    "sharing.bounded_recurrence": 0.9,
    "sharing.scales": "block",
    "sharing.mixes": "block",
    "sharing.unused": ["block_scales", "layer_scales"],
}


def layers(count: int) -> dict[str, Any]:
    return {"sharing.virtual_layers": count, "sharing.unique_blocks": count, "sharing.tying": "sequence"}


VARIANTS: list[tuple[str, str, dict[str, Any], int]] = [
    ("pr167/record_u0", "depth-recurrence", layers(9), 17_059_912),
    ("pr167/record_u3", "depth-recurrence", {}, 6_037_528),
    (
        "pr167/record_u3_768d_12L",
        "depth-recurrence",
        {"model.width": 768, "model.heads": 12, **DEEPER},
        12_596_772,
    ),
    ("pr167/record_u3_mlp3_12L", "depth-recurrence", {"model.mlp_multiple": 3, **DEEPER}, 7_611_416),
    ("pr167/submission_u3_per_layer_scales", "depth-recurrence", BY_LAYER, 6_055_960),
    ("pr167/exp1_9L", "depth-recurrence", {**A100, **layers(9)}, 21_778_504),
    ("pr167/exp2_u3_9L", "depth-recurrence", A100, 7_610_392),
    ("pr167/exp_u3_9L_per_layer_scales", "depth-recurrence", {**A100, **BY_LAYER}, 7_628_824),
    ("pr167/expA_9L_bigram_smear", "depth-recurrence", {**A100, **layers(9), **PAIRS}, 22_368_841),
    ("pr167/expG_9L_bigram_smear_zstd", "depth-recurrence", {**A100, **layers(9), **PAIRS}, 22_368_841),
    (
        "pr167/recommended_11L_q192",
        "depth-recurrence",
        {**A100, **layers(11), **PAIRS, "model.bigram_buckets": 10_240, "model.query_rank": 192},
        27_157_593,
    ),
    (
        "pr167, config B",
        "depth-recurrence",
        {"model.width": 640, "model.heads": 10, "model.kv_heads": 2, **DEEPER},
        8_531_230,
    ),
    ("pr167, ten layers", "depth-recurrence", {**A100, **layers(10), **PAIRS}, 24_730_705),
    ("pr167, low-rank queries", "depth-recurrence", {**A100, **layers(9), "model.query_rank": 192}, 21_188_680),
    ("pr167, full queries", "depth-recurrence-stack", {"model.query_rank": 0}, 1_452_296),
    ("pr167, two MLP matrices", "depth-recurrence-stack", {"model.activation": "relu2"}, 1_452_296),
    ("pr167, bounded recurrence", "depth-recurrence-stack", BOUNDED, 1_452_320),
    ("pr857/base_11L_untied", "bi-tied-15l", layers(11), 26_993_756),
    ("pr857, fifteen blocks", "bi-tied-15l", layers(15), 36_440_188),
    ("prism/prism_adapt_partial4", "prism-adapt", {"sharing.repartition.anchor_heads": 4}, 9_994_346),
]

SYSTEMS: dict[str, tuple[str, dict[str, Any]]] = {
    "baseline": ("naive-baseline", {}),
    "ebls": ("ebls", {}),
    "prism/standard11": ("prism-standard11", {}),
    "prism/albert": ("prism-albert", {}),
    "prism/naive_shared": ("prism-naive-shared", {}),
    "prism/prism_wo": ("prism-wo", {}),
    "prism/prism_wt": ("prism-wt", {}),
    "prism/prism_adapt_v3": ("prism-adapt", {}),
    "pr857/head": ("bi-tied-15l", {}),
    "pr857/first_commit_illegal_ttt": ("bi-tied-15l", {}),
    "pr1394": ("loop-4-5", {}),
    **{name: (recipe, changes) for name, recipe, changes, _ in VARIANTS if "/" in name},
}

KNOBS = {  # as the sources' table names them -> a path in a spec
    "vocab": "model.vocab_size",
    "width": "model.width",
    "heads": "model.heads",
    "kv_heads": "model.kv_heads",
    "mlp_mult": "model.mlp_multiple",
    "q_rank": "model.query_rank",
    "rope_base": "model.rope_base",
    "qk_gain": "model.qk_gain",
    "softcap": "model.logit_softcap",
    "bigram_buckets": "model.bigram_buckets",
    "bigram_dim": "model.bigram_width",
    "value_embedding_dim": "model.value_embedding_width",
    "virtual_layers": "sharing.virtual_layers",
    "virtual_passes": "sharing.virtual_layers",
    "unique_blocks": "sharing.unique_blocks",
    "lora_rank": "sharing.lora.rank",
    "gamma_init_logit": "sharing.lora.gate_init",
    "shrinkage_lambda": "sharing.lora.penalty",
    "loop_from_fraction": "sharing.tying.from_fraction",
    "seq_len": "data.sequence_length",
    "batch_tokens": "data.batch_tokens",
    "muon_lr": "optimizer.matrix_lr",
    "muon_momentum": "optimizer.muon_momentum",
    "muon_wd": "optimizer.muon_weight_decay",
    "muon_row_normalize": "optimizer.row_normalise",
    "tok_lr": "optimizer.embedding_lr",
    "embed_wd": "optimizer.embedding_weight_decay",
    "scalar_lr": "optimizer.scalar_lr",
    "adam_wd": "optimizer.adam_weight_decay",
    "grad_clip": "optimizer.gradient_clip",
    "warmdown_frac": "schedule.warmdown_fraction",
    "warmdown_iters": "schedule.warmdown_steps",
    "warmdown_iters_script_default": "schedule.warmdown_steps",
    "iterations": "budget.steps",
    "ema": "averaging.ema_decay",
    "swa_every": "averaging.swa_every",
    "swa_start_frac": "averaging.swa_from",
    "quant_bits": "quantisation.bits",
}


def spec_of(recipe: str, changes: dict[str, Any] | None = None, size: str = "full") -> TrialSpec:
    return parse_spec(override(load_recipe(recipe, size), changes or {}))


def built_parameters(spec: TrialSpec) -> int:
    with torch.device("meta"):
        model = Model(spec.model, spec.sharing)
    return sum(parameter.numel() for parameter in model.parameters())


def at(spec: TrialSpec, path: str) -> Any:
    value: Any = spec
    for name in path.split("."):
        value = getattr(value, name)
    return value


@pytest.mark.parametrize(("recipe", "parameters", "tying_map"), [(name, *rest) for name, rest in PUBLISHED.items()])
def test_a_recipe_counts_and_ties_what_its_source_reports(recipe: str, parameters: int, tying_map: str) -> None:
    spec = spec_of(recipe)
    assert count_parameters(spec.model, spec.sharing) == parameters
    assert built_parameters(spec) == parameters
    assert " ".join(map(str, spec.sharing.tying_map)) == tying_map


def test_every_recipe_but_ours_is_published() -> None:
    assert {*PUBLISHED, "laptop"} == set(recipe_names())


@pytest.mark.parametrize(
    ("recipe", "changes", "parameters"), [row[1:] for row in VARIANTS], ids=[row[0] for row in VARIANTS]
)
def test_a_published_variant_is_a_recipe_with_overrides(recipe: str, changes: dict[str, Any], parameters: int) -> None:
    spec = spec_of(recipe, changes)
    assert count_parameters(spec.model, spec.sharing) == parameters
    assert built_parameters(spec) == parameters


def test_every_system_of_the_reference_has_its_parameters_map_and_knobs(shared: Path) -> None:
    systems = json.loads((shared / "reference" / "expected.json").read_text())["systems"]
    assert {system["name"] for system in systems} == set(SYSTEMS)
    for system in systems:
        spec = spec_of(*SYSTEMS[system["name"]])
        assert count_parameters(spec.model, spec.sharing) == system["expected_params"], system["name"]
        if system.get("tying_map") is not None:
            assert spec.sharing.tying_map == tuple(system["tying_map"]), system["name"]
        for knob in KNOBS.keys() & system["config"].keys():
            assert at(spec, KNOBS[knob]) == system["config"][knob], (system["name"], knob)
        if "rope_dims" in system["config"]:
            assert spec.model.rotated_width == system["config"]["rope_dims"], system["name"]


@pytest.mark.parametrize(
    ("recipe", "control_bytes", "payload"),
    [
        ("naive-baseline", 4, 17_178_912),
        ("ebls", 4, 30_051_592),
        ("prism-standard11", 2, 36_075_696),
        ("prism-albert", 2, 7_162_048),
        ("prism-naive-shared", 2, 10_057_936),
        ("prism-wo", 2, 10_057_936),
        ("prism-wt", 2, 10_057_936),
        ("prism-adapt", 2, 10_059_988),
        ("bi-tied-15l", 2, 27_206_840),
    ],
)
def test_the_bytes_before_compression_are_those_of_the_source(recipe: str, control_bytes: int, payload: int) -> None:
    """A byte a symbol and two a row's scale; small tensors two bytes a value, or four where a source keeps float32."""
    spec, total = spec_of(recipe), 0
    for tensor in tensor_inventory(spec.model, spec.sharing):
        if is_quantised(tensor, spec.quantisation.half_below):
            total += tensor.elements + 2 * tensor.shape[0]
        else:
            total += tensor.elements * (control_bytes if tensor.tensor_class is TensorClass.CONTROL else 2)
    assert total == payload


def test_a_loop_begins_at_its_share_of_training() -> None:
    assert [spec_of(name).sharing.tying.from_fraction for name in ("loop-4-5", "late-loop-3-5")] == [0.5, 0.35]
    late = spec_of("late-loop-3-5").sharing
    assert [late.tying_map[layer] for layer in late.layers_at(0.34)] == list(range(11))
    assert late.layers_at(0.35) == tuple(range(17))


WIDTHS = {"vocab_size", "width", "heads", "kv_heads", "query_rank", "rope_width", "rope_train_length"}
TABLES = {"embedding_init_std", "bigram_buckets", "bigram_width", "value_embedding_width"}


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_tiny_recipe_keeps_its_sharing_and_its_components(recipe: str) -> None:
    full, tiny = spec_of(recipe), spec_of(recipe, size="tiny")
    assert tiny.sharing == full.sharing
    assert tiny.objective == full.objective
    assert tiny.model.model_dump(exclude=WIDTHS | TABLES) == full.model.model_dump(exclude=WIDTHS | TABLES)
    for name in ("query_rank", "bigram_buckets", "value_embedding_width", "rope_train_length"):
        assert bool(getattr(tiny.model, name)) == bool(getattr(full.model, name)), name
    assert tiny.model.heads * full.model.kv_heads == tiny.model.kv_heads * full.model.heads
    for part in ("rounding", "clip", "codec", "qat_from", "class_bits", "bits", "high_fraction", "low_fraction"):
        assert getattr(tiny.quantisation, part) == getattr(full.quantisation, part), part
    assert tiny.averaging.apply == full.averaging.apply
    assert (tiny.evaluation.stride is None) == (full.evaluation.stride is None)
    assert (tiny.gang.ranks, tiny.gang.device, tiny.budget.seconds) == (1, "cpu", None)
    assert count_parameters(tiny.model, tiny.sharing) < 600_000


SHORT = {
    "model.vocab_size": 512,
    "data": {"dataset": "topics_sp512", "sequence_length": 64, "batch_tokens": 128},
    "budget": {"steps": 2},
    "evaluation.stride": 64,
    "evaluation.validations": 0,
    "evaluation.validation_tokens": 256,
    "quantisation.calibration_tokens": 128,
}


# Between them they have every component of the others; benchmarks/recipes.py runs all of them, for longer.
@pytest.mark.parametrize(
    "recipe", ["ebls", "prism-albert", "prism-adapt", "depth-recurrence-stack", "bi-tied-15l", "late-loop-3-5"]
)
def test_a_recipe_trains_packs_and_scores(
    recipe: str, small_data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = trained(recipe, small_data_root, capsys)
    assert result["steps"] == 2
    assert result["val_bpb"] == pytest.approx(result["val_bpb_prequant"], abs=0.05)
    assert len(result["diagnostics"]["block_influence"]) == spec_of(recipe).sharing.virtual_layers


def test_the_tiny_ebls_loses_less_than_a_hundredth_of_a_bit_to_packing(
    small_data_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its source lost 0.134 BPB."""
    result = trained("ebls", small_data_root, capsys, {"data.batch_tokens": 512, "budget": {"steps": 40}})
    assert result["val_bpb_prequant"] < 3.8, "it has learned something that could be lost"
    assert result["diagnostics"]["scores"]["plain"] - result["val_bpb_prequant"] < 0.01


def trained(
    recipe: str, data_root: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The result of the tiny recipe, shortened, through the command line."""
    words = [
        word for path, value in (SHORT | (changes or {})).items() for word in ("--set", f"{path}={json.dumps(value)}")
    ]
    assert main(["--recipe", recipe, "--size", "tiny", "--data", str(data_root), "--json", *words]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)["result"]
    return result


def test_a_recipe_for_a_cpu_is_tiny_as_it_is() -> None:
    assert load_recipe("laptop", "tiny") == load_recipe("laptop")


def test_a_size_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(InvalidSpec) as caught:
        load_recipe("ebls", "huge")
    assert str(caught.value) == "size: must be one of full, tiny (got 'huge')"
