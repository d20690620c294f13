"""TrialSpec: what it refuses, and when two specs are one configuration."""

import json
from datetime import date
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.recipes import load_recipe, recipe_names
from worker.spec import InvalidSpec, Problem, TrialSpec, override, parse_spec

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
        ({"model": []}, "model", [], "valid dictionary"),
    ],
)
def test_bad_input_names_the_field_the_value_and_what_is_right(
    changes: dict[str, Any], field: str, value: object, says: str
) -> None:
    (problem,) = problems(**changes)
    assert problem.field == field
    assert repr(problem.value) == repr(value)
    assert says in problem.message


@pytest.mark.parametrize(
    "path",
    ["nonsense", "model.nonsense", "sharing.nonsense", "sharing.lora.nonsense", "budget.nonsense", "gang.nonsense"],
)
def test_an_unknown_key_is_refused_at_any_depth(path: str) -> None:
    (problem,) = problems(**{path: 1})
    assert (problem.field, problem.value, problem.message) == (path, 1, "is not a known key")


def test_an_unknown_key_inside_the_tying_is_refused() -> None:
    (problem,) = problems(sharing__tying={"pattern": "cycle", "nonsense": 1})
    assert (problem.field, problem.value, problem.message) == ("sharing.tying.nonsense", 1, "is not a known key")


def test_every_problem_of_an_input_is_named() -> None:
    found = problems(model__heads=3, budget={}, data__nonsense=True)
    assert {problem.field for problem in found} == {"model.heads", "budget.steps", "data.nonsense"}


@pytest.mark.parametrize("data", [None, 3, "spec", [1, 2]])
def test_input_that_is_no_mapping_is_refused(data: object) -> None:
    with pytest.raises(InvalidSpec) as refused:
        parse_spec(data)
    (problem,) = refused.value.problems
    assert (problem.field, problem.value) == ("spec", data)


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 99},
        {"sharing__tying": [0, 1, 0, 1]},
        {"sharing__tying": [1, 0, 1, 0]},
        {"sharing__tying": {"pattern": "loop", "start": 0, "end": 1, "passes": 2}},
        {"sharing__lora__paths": ["mlp", "attention"]},
        {"model__bigram_width": 7},
    ],
)
def test_what_trains_the_same_model_the_same_way_hashes_the_same(changes: dict[str, Any]) -> None:
    assert small(**changes).canonical_hash == small().canonical_hash
    assert small(**changes) != small()


def test_a_hard_tie_hashes_the_same_whatever_its_unused_bypasses_say() -> None:
    one = small(sharing__lora={"rank": 0, "gate_init": 1.0, "penalty": 0.5, "paths": ["mlp"]})
    assert one.canonical_hash == small(sharing__lora={"rank": 0}).canonical_hash


def test_owners_do_not_matter_where_every_layer_has_its_own_block() -> None:
    untied = {"sharing__unique_blocks": 4, "sharing__tying": "cycle"}
    assert small(**untied, sharing__scales="layer").canonical_hash == small(**untied).canonical_hash


@pytest.mark.parametrize(
    "changes",
    [
        {"sharing__tying": "sequence"},
        {"sharing__lora__rank": 3},
        {"sharing__lora__paths": ["mlp"]},
        {"sharing__lora__penalty": 0.5},
        {"sharing__scales": "layer"},
        {"model__width": 32},
        {"model__bigram_buckets": 5},
        {"optimizer__matrix_lr": 0.01},
        {"schedule": {"warmdown_steps": 7}},
        {"data__batch_tokens": 128},
        {"budget__steps": 11},
        {"quantisation__bits": 5},
        {"evaluation__validations": 3},
        {"gang__ranks": 2},
    ],
)
def test_any_other_change_changes_the_hash(changes: dict[str, Any]) -> None:
    assert small(**changes).canonical_hash != small().canonical_hash


@settings(max_examples=50)
@given(st.integers(1, 8).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))), st.integers(0, 4), st.data())
def test_a_spec_survives_json(shape: tuple[int, int], rank: int, data: st.DataObject) -> None:
    layers, blocks = shape
    spec = small(
        sharing__virtual_layers=layers,
        sharing__unique_blocks=blocks,
        sharing__tying=data.draw(st.sampled_from(("cycle", "sequence", "palindrome", "tail"))),
        sharing__lora__rank=rank,
        seed=data.draw(st.integers(0, 2**63 - 1)),
        optimizer__matrix_lr=data.draw(st.floats(1e-9, 10.0)),
    )
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
