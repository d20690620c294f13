"""TrialSpec: what it refuses, and when two specs are one configuration."""

import json
from collections.abc import Iterator
from datetime import date
from typing import Any, get_args

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from worker.recipes import load_recipe, recipe_names
from worker.shape import Frozen
from worker.spec import InvalidSpec, Problem, TrialSpec, override, parse_spec
from worker.tying import TyingConfig

SMALL: dict[str, Any] = {
    "sharing": {"virtual_layers": 4, "unique_blocks": 2, "tying": "cycle", "lora": {"rank": 2}},
    "model": {"vocab_size": 64, "width": 16, "heads": 4, "kv_heads": 2},
    "data": {"sequence_length": 8, "batch_tokens": 64},
    "budget": {"steps": 10},
}


def small(**changes: Any) -> TrialSpec:
    return parse_spec(override(SMALL, {path.replace("__", "."): value for path, value in changes.items()}))


def problems(**changes: Any) -> tuple[Problem, ...]:
    with pytest.raises(InvalidSpec) as refused:
        small(**changes)
    assert all(problem.field in str(refused.value) for problem in refused.value.problems)
    return refused.value.problems


@pytest.mark.parametrize(
    ("changes", "field", "value", "says"),
    [
        ({"sharing__tying": [0, 0, 0, 0]}, "sharing.tying.map", [0, 0, 0, 0], "skips block 1"),
        ({"sharing__unique_blocks": 9}, "sharing.unique_blocks", 9, "at most virtual_layers, 4"),
        ({"model__heads": 3}, "model.heads", 3, "divide the width, 16"),
        ({"model__heads": 16}, "model.heads", 16, "even head width, not 1"),
        ({"model__kv_heads": 3}, "model.kv_heads", 3, "divide heads, 4"),
        ({"model__mlp_multiple": 0.01}, "model.mlp_multiple", 0.01, "at least one hidden unit"),
        ({"sharing__lora__rank": 17}, "sharing.lora.rank", 17, "at most model.width, 16"),
        ({"data__batch_tokens": 65}, "data.batch_tokens", 65, "multiple of sequence_length, 8"),
        ({"gang__ranks": 8, "data__batch_tokens": 72}, "gang.ranks", 8, "divide the 9 sequences"),
        ({"gang__ranks": 3}, "gang.ranks", 3, "1, 2, 4 or 8"),
        ({"budget": {}}, "budget.steps", None, "at least one of steps, seconds and tokens"),
        ({"schedule": {}}, "schedule.warmdown_steps", None, "exactly one"),
        ({"schedule": {"warmdown_steps": 3, "warmdown_fraction": 0.5}}, "schedule.warmdown_steps", 3, "exactly one"),
        ({"quantisation": {"codec": "zlib", "level": 22}}, "quantisation.level", 22, "1 to 9"),
        ({"seed": -1}, "seed", -1, "greater than or equal to 0"),
        ({"schema_version": 2}, "schema_version", 2, "1"),
        ({"model__width": "wide"}, "model.width", "wide", "integer"),
        ({"optimizer__matrix_lr": float("nan")}, "optimizer.matrix_lr", float("nan"), "finite"),
        ({"model": []}, "model", [], "must be a mapping"),
        ({"sharing.tying": 3}, "sharing.tying", 3, "must be a pattern's name, a list of blocks, or a mapping"),
        ({"seed": True}, "seed", True, "must be a number, and true and false are none"),
        ({"budget": {"steps": False}}, "budget.steps", False, "must be a number"),
        ({"gang.ranks": True}, "gang.ranks", True, "must be a number"),
        ({"model.value_embedding_layers": [True]}, "model.value_embedding_layers", [True], "must be a number"),
        ({"model..width": 8}, "model..width", 8, "is no path: must be names with one dot between"),
        ({".": 8}, ".", 8, "is no path"),
        ({"model__query_rank": 17}, "model.query_rank", 17, "at most the width, 16"),
        ({"model__rope_width": 3}, "model.rope_width", 3, "even and at most the head width, 4"),
        ({"model__rope_width": 6}, "model.rope_width", 6, "even and at most the head width, 4"),
        (
            {"model__rope_train_length": 8, "model__rope_width": 2},
            "model.rope_train_length", 8, "needs a rope_width of at least 4",
        ),
        ({"model__skip_gates": True, "model__unet_skips": False}, "model.skip_gates", True, "needs unet_skips"),
        ({"model__bigram_buckets": 1, "model__bigram_hash": "xor"}, "model.bigram_buckets", 1, "0 or at least 2"),
        ({"model__attention_gate": True, "model__gate_inputs": 17}, "model.gate_inputs", 17, "at most the width, 16"),
        (
            {"model__smear_gate": True, "model__smear_place": "window", "model__gate_inputs": 17},
            "model.gate_inputs", 17, "at most the width, 16",
        ),
        ({"model__value_embedding_width": 4}, "model.value_embedding_layers", [], "exactly when"),
        ({"model__value_embedding_layers": [1]}, "model.value_embedding_layers", [1], "exactly when"),
        (
            {"model__value_embedding_width": 4, "model__value_embedding_layers": [1, 1]},
            "model.value_embedding_layers", [1, 1], "each layer once",
        ),
        (
            {"model__value_embedding_width": 4, "model__value_embedding_layers": [1, 4]},
            "model.value_embedding_layers", 4, "between 0 and sharing.virtual_layers - 1, 3",
        ),
        ({"sharing__unused": ["skips"]}, "sharing.unused", ["skips"], "needs model.unet_skips false"),
        ({"model__lanes_from": 2}, "model.lanes_from", 2, "below sharing.unique_blocks, 2"),
        ({"model__lanes_from": 1}, "model.lanes_from", 1, "no earlier block may be applied after it"),
        (
            {"model__lanes_from": 1, "sharing__tying": "sequence", "sharing__bounded_recurrence": 0.9},
            "model.lanes_from", 1, "needs sharing.bounded_recurrence 0",
        ),
        (
            {"sharing__repartition": {"mode": "fixed", "anchor_heads": 4}},
            "sharing.repartition.anchor_heads", 4, "below model.heads, 4",
        ),
        (
            {"sharing__repartition": {"mode": "blended", "anchor_heads": 1}},
            "sharing.repartition.anchor_heads", 1, "whole groups",
        ),
        (
            {"sharing__repartition": {"mode": "fixed"}, "model__query_rank": 4},
            "sharing.repartition.mode", "fixed", "needs model.query_rank 0",
        ),
        (
            {"optimizer": {"muon_coefficients": "per_iteration", "muon_iterations": 4}},
            "optimizer.muon_iterations", 4, "must be 5",
        ),
        ({"averaging": {"apply": "ema"}}, "averaging.apply", "ema", "needs an ema_decay above 0"),
        ({"averaging": {"apply": "swa"}}, "averaging.apply", "swa", "needs a swa_every above 0"),
        (
            {"averaging": {"swa_every": 2, "swa_from": 0.2}, "schedule": {"warmdown_steps": 3, "min_multiplier": 0.25}},
            "averaging.swa_from", 0.2, "at least 0.25, the least multiplier of the schedule",
        ),
        (
            {"averaging": {"swa_every": 2}, "schedule": {"warmdown_steps": 0}},
            "averaging.swa_from", 0.4, "at least 1, the least multiplier of the schedule",
        ),
        ({"quantisation": {"codec": "ans", "level": 1}}, "quantisation.level", 1, "'ans' has no levels"),
        ({"quantisation": {"codec": "auto", "level": 1}}, "quantisation.level", 1, "'auto' has no levels"),
        ({"quantisation": {"codec": "brotli", "level": 12}}, "quantisation.level", 12, "brotli goes from 0 to 11"),
        ({"quantisation": {"codec": "lzma", "level": 10}}, "quantisation.level", 10, "lzma goes from 0 to 9"),
        ({"quantisation": {"bits": 9}}, "quantisation.bits", 9, "less than or equal to 8"),
        ({"quantisation": {"class_bits": {"mlp": 3}}}, "quantisation.class_bits.mlp", 3, "greater than or equal to 4"),
        ({"quantisation": {"class_bits": {"lora": 6}}}, "quantisation.class_bits.lora", 6, "not a known key"),
        ({"quantisation": {"class_sigmas": {"mlp": 0}}}, "quantisation.class_sigmas.mlp", 0, "greater than 0"),
        (
            {"quantisation": {"high_fraction": 0.6, "low_fraction": 0.5}},
            "quantisation.low_fraction", 0.5, "add up to at most 1",
        ),
        (
            {"quantisation": {"target_bytes": 90_000, "low_fraction": 0.5}},
            "quantisation.target_bytes", 90_000, "needs high_fraction and low_fraction 0",
        ),
        (
            {"quantisation": {"rounding": "gptq", "calibration_tokens": 7}},
            "quantisation.calibration_tokens", 7, "at least a window, data.sequence_length, 8",
        ),
        ({"evaluation": {"stride": 9}}, "evaluation.stride", 9, "at most the window, 8"),
        ({"evaluation": {"stride": 9, "sequence_length": 4}}, "evaluation.stride", 9, "at most the window, 4"),
        (
            {"evaluation": {"ttt": {"chunk_tokens": 15}, "sequence_length": 16}},
            "evaluation.ttt.chunk_tokens", 15, "at least a window, 16",
        ),
    ],
)  # fmt: skip
def test_bad_input_names_the_field_the_value_and_what_is_right(
    changes: dict[str, Any], field: str, value: object, says: str
) -> None:
    (problem,) = problems(**changes)
    assert problem.field == field
    assert repr(problem.value) == repr(value)
    assert says in problem.message


@pytest.mark.parametrize(
    ("path", "right"),
    [
        ("optimiser", "did you mean optimizer?"),
        ("model.widht", "did you mean width?"),
        ("sharing.lora.rang", "did you mean rank?"),
        ("sharing.repartition.anchor_head", "did you mean anchor_heads?"),
        ("evaluation.ttt.lrr", "did you mean lr?"),
        ("budget.nonsense", "must be one of steps, seconds, tokens"),
        ("gang.nonsense", "must be one of ranks, device"),
    ],
)
def test_an_unknown_key_at_any_depth_is_refused_with_what_would_be_right(path: str, right: str) -> None:
    (problem,) = problems(**{path: 1})
    assert (problem.field, problem.value, problem.message) == (path, 1, f"is not a known key: {right}")


def test_a_problem_shows_the_beginning_of_what_is_wrong() -> None:
    (problem,) = problems(nonsense=list(range(1000)))
    assert str(problem).endswith(", 50, 51, 5…)")


def test_every_problem_of_an_input_is_named() -> None:
    found = problems(model__heads=3, budget={}, data__nonsense=True)
    assert {problem.field for problem in found} == {"model.heads", "budget.steps", "data.nonsense"}


@pytest.mark.parametrize("data", [None, 3, "spec", [1, 2]])
def test_input_that_is_no_mapping_is_refused(data: object) -> None:
    with pytest.raises(InvalidSpec) as refused:
        parse_spec(data)
    (problem,) = refused.value.problems
    assert (problem.field, problem.value) == ("spec", data)


UNTIED = {"sharing.unique_blocks": 4}
BIGRAM = {"model.bigram_buckets": 8}
VALUES = {"model.value_embedding_width": 4, "model.value_embedding_layers": [1, 2]}
QUANTISED = {"quantisation.half_below": 0}
SIGMAS = {**QUANTISED, "quantisation.clip": "sigmas"}
SOLVED = {**QUANTISED, "quantisation.target_bytes": 90_000}


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        ({}, {"seed": 99}),
        ({}, {"limits": {"patience_seconds": 9.0, "silence_seconds": 9.0, "attempt_seconds": 99.0}}),
        ({}, {"sharing.tying": [0, 1, 0, 1]}),
        ({}, {"sharing.tying": [1, 0, 1, 0]}),
        ({}, {"sharing.tying": {"pattern": "loop", "start": 0, "end": 1, "passes": 2}}),
        ({"sharing.tying": "sequence"}, {"sharing.tying": "split"}),
        ({"sharing.unique_blocks": 3, "sharing.tying": "tail"}, {"sharing.tying": {"pattern": "tail", "after": 0}}),
        (UNTIED, {"sharing.tying": {"pattern": "cycle", "from_fraction": 0.5}}),
        (UNTIED, {"sharing.scales": "layer"}),
        (UNTIED, {"sharing.mixes": "layer"}),
        ({}, {"sharing.lora.paths": ["mlp", "attention"]}),
        ({"sharing.lora.rank": 0}, {"sharing.lora": {"rank": 0, "gate_init": 1.0, "penalty": 0.5, "paths": ["mlp"]}}),
        ({}, {"sharing.repartition": {"seed": 1, "heads": False, "values": False, "anchor_heads": 3}}),
        ({"sharing.repartition.mode": "fixed"}, {"sharing.repartition.blend_penalty": 2.0}),
        (
            {"model.unet_skips": False, "sharing.unused": ["skips", "adapters"]},
            {"sharing.unused": ["adapters", "skips"]},
        ),
        ({}, {"model.mlp_multiple": 2.01}),
        ({}, {"model.rope_width": 4}),
        ({}, {"model.rope_train_length": 8}),
        ({"model.xsa_last": 4}, {"model.xsa_last": 9}),
        ({"model.ln_scale": "block"}, {"model.ln_scale": "first_layer"}),
        ({**UNTIED, "model.ln_scale": "block"}, {"model.ln_scale": "layer"}),
        ({}, {"model.bigram_width": 7}),
        ({}, {"model.bigram_hash": "xor"}),
        ({}, {"model.smear_place": "window"}),
        ({"model.smear_gate": True}, {"model.gate_inputs": 3}),
        (VALUES, {"model.value_embedding_layers": [2, 1]}),
        ({"sharing.virtual_layers": 1, "sharing.unique_blocks": 1}, {"model.unet_skips": False}),
        ({}, {"optimizer.table_lr": 0.5}),
        (BIGRAM, {"optimizer.table_lr": 0.04}),
        ({}, {"optimizer.embedding_weight_decay": 0.0}),
        ({"optimizer.muon_momentum_warmup_steps": 0}, {"optimizer.muon_momentum_start": 0.5}),
        ({"optimizer.muon_momentum_start": 0.95}, {"optimizer.muon_momentum_warmup_steps": 9}),
        ({"schedule": {"warmdown_steps": 0}}, {"schedule": {"warmdown_fraction": 0.0, "min_multiplier": 0.5}}),
        ({}, {"objective.nuclear_norm_every": 2}),
        ({}, {"averaging.swa_from": 0.5}),
        ({}, {"quantisation.level": 22}),
        ({"quantisation.codec": "brotli"}, {"quantisation.level": 11}),
        (QUANTISED, {"quantisation.class_bits": {"mlp": 6, "bigram": 4}}),
        (
            {**QUANTISED, "quantisation.class_bits": {"embedding": 6, "attention": 6, "mlp": 6}},
            {"quantisation.bits": 4},
        ),
        (QUANTISED, {"quantisation.clip_sigmas": 3.0, "quantisation.class_sigmas": {"mlp": 2.0}}),
        (QUANTISED, {"quantisation.clip_quantile": 0.9}),
        (SIGMAS, {"quantisation.class_sigmas": {"mlp": 12.85, "bigram": 4.0}}),
        (QUANTISED, {"quantisation.calibration_tokens": 99}),
        (SOLVED, {"quantisation.bits": 4, "quantisation.class_bits": {"mlp": 5}}),
        (SOLVED, {"quantisation.clip": "sigmas", "quantisation.clip_sigmas": 3.0}),
        ({}, {"evaluation.sequence_length": 8}),
        ({}, {"evaluation.stride": 8}),
        (UNTIED, {"evaluation.extra_recurrence": 3}),
    ],
)  # fmt: skip
def test_what_trains_the_same_model_the_same_way_hashes_the_same(
    given: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert small(**{**given, **changes}).canonical_hash == small(**given).canonical_hash
    assert small(**{**given, **changes}) != small(**given)


# Every field but the seed: a value that changes what is trained, packed or scored.
MATTERS: dict[str, Any] = {
    "sharing.virtual_layers": 6, "sharing.unique_blocks": 3, "sharing.tying": "sequence",
    "sharing.tying.from_fraction": 0.5,
    "sharing.lora.rank": 3, "sharing.lora.paths": ["mlp"], "sharing.lora.gate_init": 1.0, "sharing.lora.penalty": 0.5,
    "sharing.scales": "layer", "sharing.mixes": "layer", "sharing.adapters": True,
    "sharing.repartition.mode": "fixed", "sharing.repartition.seed": 1, "sharing.repartition.heads": False,
    "sharing.repartition.values": False, "sharing.repartition.anchor_heads": 2,
    "sharing.repartition.encoder_only": True, "sharing.repartition.blend_penalty": 2.0,
    "sharing.repeat_embeddings": True, "sharing.bounded_recurrence": 0.9, "sharing.unused": ["adapters"],
    "model.vocab_size": 32, "model.width": 32, "model.heads": 2, "model.kv_heads": 1, "model.query_rank": 4,
    "model.mlp_multiple": 3.0, "model.activation": "swiglu", "model.rope_base": 100.0, "model.rope_width": 2,
    "model.rope_train_length": 4, "model.qk_gain": 4.0, "model.xsa_last": 3, "model.attention_gate": True,
    "model.ln_scale": "first_layer", "model.logit_softcap": 15.0, "model.embedding_init_std": 0.1,
    "model.init": "orthogonal", "model.unet_skips": False, "model.skip_gates": True, "model.lanes_from": 1,
    "model.bigram_buckets": 5, "model.bigram_width": 7, "model.bigram_hash": "xor", "model.smear_gate": True,
    "model.smear_place": "window", "model.gate_inputs": 3, "model.value_embedding_width": 5,
    "model.value_embedding_layers": [1, 3],
    "optimizer.matrix_lr": 0.01, "optimizer.embedding_lr": 0.01, "optimizer.scalar_lr": 0.01,
    "optimizer.muon_momentum": 0.9, "optimizer.muon_momentum_start": 0.8, "optimizer.muon_momentum_warmup_steps": 9,
    "optimizer.muon_iterations": 4, "optimizer.muon_weight_decay": 0.1,
    "optimizer.muon_coefficients": "per_iteration", "optimizer.row_normalise": True, "optimizer.table_lr": 0.5,
    "optimizer.adam_beta1": 0.8, "optimizer.adam_beta2": 0.9, "optimizer.adam_epsilon": 1e-9,
    "optimizer.adam_weight_decay": 0.1, "optimizer.embedding_weight_decay": 0.1, "optimizer.gradient_clip": 1.0,
    "schedule.warmdown_steps": 7, "schedule.warmdown_fraction": 0.5, "schedule.min_multiplier": 0.1,
    "data.dataset": "other", "data.sequence_length": 16, "data.batch_tokens": 128, "data.micro_batch_sequences": 4,
    "budget.steps": 11, "budget.seconds": 9.0, "budget.tokens": 99,
    "objective.label_smoothing": 0.1, "objective.nuclear_norm": 0.1, "objective.nuclear_norm_every": 9,
    "averaging.ema_decay": 0.9, "averaging.swa_every": 3, "averaging.swa_from": 0.3, "averaging.apply": "ema",
    "quantisation.bits": 5, "quantisation.class_bits.embedding": 8, "quantisation.class_bits.attention": 8,
    "quantisation.class_bits.mlp": 8, "quantisation.class_bits.bigram": 8,
    "quantisation.class_bits.value_embedding": 8, "quantisation.clip": "grid", "quantisation.clip_quantile": 0.9,
    "quantisation.clip_sigmas": 3.0, "quantisation.class_sigmas.embedding": 3.0,
    "quantisation.class_sigmas.attention": 3.0, "quantisation.class_sigmas.mlp": 3.0,
    "quantisation.class_sigmas.bigram": 3.0, "quantisation.class_sigmas.value_embedding": 3.0,
    "quantisation.rounding": "gptq", "quantisation.calibration_tokens": 99, "quantisation.high_fraction": 0.1,
    "quantisation.low_fraction": 0.1, "quantisation.prune": 0.1, "quantisation.qat_from": 0.5,
    "quantisation.codec": "ans", "quantisation.level": 9, "quantisation.half_below": 100,
    "quantisation.target_bytes": 90_000,
    "evaluation.validations": 3, "evaluation.validation_tokens": 99, "evaluation.batch_sequences": 3,
    "evaluation.sequence_length": 16, "evaluation.stride": 4, "evaluation.ttt": {}, "evaluation.ttt.lr": 0.1,
    "evaluation.ttt.epochs": 2, "evaluation.ttt.momentum": 0.5, "evaluation.ttt.chunk_tokens": 99,
    "evaluation.ttt.gradient_clip": 0.5, "evaluation.extra_recurrence": 3,
    "gang.ranks": 2, "gang.device": "gpu",
}  # fmt: skip
TABLES = {**BIGRAM, **VALUES, **QUANTISED}
# Where a value needs others to change anything: by the start of its path.
GIVEN: dict[str, dict[str, Any]] = {
    "sharing.tying.from_fraction": {"sharing.tying": {}},
    "sharing.repartition.": {"sharing.repartition.mode": "blended"},
    "model.bigram_": BIGRAM,
    "model.smear_place": {"model.smear_gate": True},
    "model.gate_inputs": {"model.attention_gate": True},
    "model.value_embedding": VALUES,
    "model.lanes_from": {"sharing.tying": "sequence"},
    "optimizer.table_lr": BIGRAM,
    "schedule.min_multiplier": {"schedule": {"warmdown_steps": 3}},
    "schedule.warmdown_fraction": {"schedule": {"warmdown_fraction": 0.3}},
    "objective.nuclear_norm_every": {"objective.nuclear_norm": 0.1},
    "averaging.swa_from": {"averaging.swa_every": 3},
    "averaging.apply": {"averaging.ema_decay": 0.9},
    "quantisation.": TABLES,
    "quantisation.clip_quantile": {**TABLES, "quantisation.clip": "quantile"},
    "quantisation.clip_sigmas": {**TABLES, "quantisation.clip": "sigmas"},
    "quantisation.class_sigmas.": {**TABLES, "quantisation.clip": "sigmas"},
    "quantisation.calibration_tokens": {**TABLES, "quantisation.rounding": "gptq"},
    "evaluation.ttt.": {"evaluation.ttt": {}},
}


@pytest.mark.parametrize("path", MATTERS)
def test_any_other_change_changes_the_hash(path: str) -> None:
    given = next((GIVEN[start] for start in sorted(GIVEN, reverse=True) if path.startswith(start)), {})
    assert small(**{**given, path: MATTERS[path]}).canonical_hash != small(**given).canonical_hash


def test_a_change_of_every_field_is_tried() -> None:
    assert set(MATTERS) == {
        path for path in fields(TrialSpec) if path.split(".")[0] not in ("seed", "limits", "schema_version")
    }


def fields(model: type[BaseModel], path: str = "") -> Iterator[str]:
    """The dotted paths of a model's fields, parts of parts included. A map is one field, however it is written."""
    for name, field in model.model_fields.items():
        parts = [
            part
            for part in (field.annotation, *get_args(field.annotation))
            if isinstance(part, type) and issubclass(part, Frozen)
        ]
        if field.annotation is TyingConfig:
            yield from (f"{path}{name}", f"{path}{name}.from_fraction")
        elif parts:
            yield from fields(parts[0], f"{path}{name}.")
        if field.annotation is not TyingConfig and (not parts or field.default is None):
            yield f"{path}{name}"


def test_what_qat_sees_matters_where_steps_are_solved_for_too() -> None:
    seen = {**SOLVED, "quantisation.qat_from": 0.5}
    assert small(**seen, **{"quantisation.bits": 4}).canonical_hash != small(**seen).canonical_hash


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        ({"data.sequence_length": 16}, {"model.rope_train_length": 8}),
        ({"evaluation.sequence_length": 16}, {"model.rope_train_length": 8}),
        ({"sharing.tying": "palindrome", "model.ln_scale": "block"}, {"model.ln_scale": "layer"}),
        ({"sharing.tying": [0, 0, 1, 1], "model.ln_scale": "block"}, {"model.ln_scale": "first_layer"}),
        ({"sharing.repartition": {"mode": "blended"}}, {"sharing.repartition.blend_penalty": 2.0}),
        (VALUES, {"optimizer.table_lr": 0.5}),
        ({"quantisation.target_bytes": 90_000}, {"quantisation.calibration_tokens": 99}),
        ({"quantisation.high_fraction": 0.1}, {"quantisation.calibration_tokens": 99}),
    ],
)
def test_what_changes_something_only_beside_others_does_so_there(
    given: dict[str, Any], changes: dict[str, Any]
) -> None:
    assert small(**{**given, **changes}).canonical_hash != small(**given).canonical_hash


@settings(max_examples=40)
@given(
    st.dictionaries(st.sampled_from(sorted(MATTERS)), st.none(), max_size=12),
    st.integers(0, 2**63 - 1),
    st.floats(1e-9, 10.0),
)
def test_a_spec_survives_json(paths: dict[str, None], seed: int, rate: float) -> None:
    changes = {path: MATTERS[path] for path in sorted(paths)}
    try:
        spec = small(**changes, seed=seed, optimizer__matrix_lr=rate)
    except InvalidSpec:
        reject()
    again = parse_spec(json.loads(spec.model_dump_json()))
    assert again == spec
    assert again.canonical_hash == spec.canonical_hash


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_a_spec(name: str) -> None:
    spec = parse_spec(load_recipe(name))
    assert parse_spec(spec.model_dump(mode="json")) == spec


def test_a_recipe_that_does_not_exist_names_those_that_do() -> None:
    with pytest.raises(InvalidSpec) as refused:
        load_recipe("transformer-xxl")
    (problem,) = refused.value.problems
    assert (problem.field, problem.value) == ("recipe", "transformer-xxl")
    assert all(name in problem.message for name in recipe_names())


def test_an_override_leaves_its_input_as_it_was_and_makes_missing_parts() -> None:
    data = {"model": {"width": 8}}
    assert override(data, {"model.width": 16, "gang.ranks": 2}) == {"model": {"width": 16}, "gang": {"ranks": 2}}
    assert data == {"model": {"width": 8}}


@pytest.mark.parametrize(
    ("data", "changes", "parent"),
    [
        ({"sharing": "x"}, {"sharing.lora.rank": 1}, "sharing"),
        ({}, {"sharing": "x", "sharing.lora.rank": 1}, "sharing"),
        ({"sharing": {"lora": [1]}}, {"sharing.lora.rank": 1}, "sharing.lora"),
        ({"sharing": {"tying": "tail"}}, {"sharing.tying.after": 1}, "sharing.tying"),
    ],
)
def test_an_override_through_what_has_no_parts_is_refused_by_the_path_that_has_none(
    data: dict[str, Any], changes: dict[str, Any], parent: str
) -> None:
    with pytest.raises(InvalidSpec) as refused:
        override(data, changes)
    (problem,) = refused.value.problems
    assert problem.field == parent
    assert problem.value in ("x", [1], "tail")
    assert f"give {parent} as a mapping" in problem.message


def test_an_override_makes_the_parts_of_what_is_null() -> None:
    assert override({"gang": None}, {"gang.ranks": 2}) == {"gang": {"ranks": 2}}


def test_a_later_override_goes_into_an_earlier_one_and_changes_neither() -> None:
    changes = {"sharing.lora": {"rank": 1}, "sharing.lora.penalty": 0.5}
    assert override({}, changes) == {"sharing": {"lora": {"rank": 1, "penalty": 0.5}}}
    assert changes["sharing.lora"] == {"rank": 1}


def test_what_json_does_not_have_is_refused_by_its_path() -> None:
    day = date(2026, 3, 1)
    with pytest.raises(InvalidSpec) as refused:
        override({"seed": day, "sharing": {"tying": [0, day]}}, {})
    assert [(problem.field, problem.value) for problem in refused.value.problems] == [
        ("seed", day), ("sharing.tying.1", day)
    ]  # fmt: skip
    assert "not a date" in refused.value.problems[0].message
    with pytest.raises(InvalidSpec, match=r"^model\.width: must be .* not a date"):
        override({}, {"model": {}, "model.width": day})
    with pytest.raises(InvalidSpec, match=r"^spec: must have keys that are text"):
        override({day: 1}, {})  # type: ignore[dict-item]
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(InvalidSpec, match=r"^model: must not contain itself"):
        override({}, {"model": loop})
