"""What a space is refused for, by path, before its study exists."""

from typing import Any

import pytest
from pydantic import ValidationError

from orchestrator.check import never_legal_values
from orchestrator.study import NewStudy
from worker.recipes import load_recipe
from worker.spec import Problem, override, problems_of

BASE = load_recipe("laptop")  # six virtual layers on three blocks, width 96
RANK = "sharing.lora.rank"
TYING, LAYERS, BLOCKS = "sharing.tying", "sharing.virtual_layers", "sharing.unique_blocks"
WIDTH: dict[str, Any] = {"fill": {"low": 48, "high": 192, "step": 48}}


def refused(space: dict[str, Any], base: Any = BASE, **fields: Any) -> list[Problem]:
    """The problems for which a study with this space is refused."""
    with pytest.raises(ValidationError) as caught:
        NewStudy.model_validate({"name": "s", "base": base, "space": space, **fields})
    return list(problems_of(caught.value))


def when(text: str) -> dict[str, Any]:
    return {RANK: {"choice": [0, 4], "when": text}}


def families(**parameters: Any) -> dict[str, Any]:
    return {TYING: {"families": parameters}}


@pytest.mark.parametrize(
    ("space", "path", "said"),
    [
        # conditions
        (when("rank is 4"), f"{RANK}.when", "must be clauses"),
        (when("model.breadth < 4"), f"{RANK}.when", "not a path of a trial's spec"),
        (when("seed == 4"), f"{RANK}.when", "not part of the configuration"),
        (when("gang.ranks == 4"), f"{RANK}.when", "not part of the configuration"),
        (when(f"{RANK} > 0"), f"{RANK}.when", "on whether it holds itself"),
        (when("model.width == 64"), f"{RANK}.when", "can never hold"),
        (
            {**when(f"{BLOCKS} > 2 and {BLOCKS} < 3"), BLOCKS: {"low": 1, "high": 6}},
            f"{RANK}.when",
            "can never hold",
        ),
        (
            {**when(f"{BLOCKS} > 6"), BLOCKS: {"low": 1, "high": 6}},
            f"{RANK}.when",
            "can never hold",
        ),
        (
            {**when("optimizer.matrix_lr >= 0.2"), "optimizer.matrix_lr": {"low": 0.01, "high": 0.1}},
            f"{RANK}.when",
            "can never hold",
        ),
        ({**when(f"{TYING}.after == 1"), TYING: {"choice": ["cycle"]}}, f"{RANK}.when", "inside"),
        (when("sharing == 1"), f"{RANK}.when", "a part of it varies"),
        ({**when("model.width > 64"), "model.width": WIDTH}, f"{RANK}.when", "is filled last"),
        # families
        ({RANK: {"families": ["cycle"]}}, f"{RANK}.families", "only sharing.tying"),
        ({TYING: {"families": ["spiral"]}}, f"{TYING}.families.spiral", "cycle, sequence"),
        ({TYING: {"families": ["cycle", "cycle"]}}, f"{TYING}.families", "each family once"),
        ({TYING: {"families": []}}, f"{TYING}.families", "at least 1"),
        ({TYING: {"families": ["cycle"], "choice": ["cycle"]}}, f"{TYING}.choice", "give one of"),
        ({TYING: {"families": ["cycle"], "low": 1}}, f"{TYING}.families", "no low, high"),
        (
            families(core={"depth": {"low": 1, "high": 2}}),
            f"{TYING}.families.core.depth",
            "prelude, core, coda, passes",
        ),
        (families(core={"passes": {"low": 1, "high": 2}}), f"{TYING}.families.core.passes", "from 2 to 256"),
        (families(core={"passes": {"low": 2.5, "high": 3}}), f"{TYING}.families.core.passes", "a whole number"),
        (families(core={"passes": {"low": 3, "high": 2}}), f"{TYING}.families.core.passes.low", "at most high"),
        (families(core={"core": {"choice": ["one"]}}), f"{TYING}.families.core.core", "a whole number"),
        (families(tail={"after": {"fill": {"low": 1, "high": 2}}}), f"{TYING}.families.tail.after", "takes a choice"),
        (
            families(late_loop={"from_fraction": {"low": 0.5, "high": 1.0}}),
            f"{TYING}.families.late_loop.from_fraction",
            "from 0 to 0.999",
        ),
        (families(tail={"after": {"low": 3, "high": 5}}), f"{TYING}.families.tail", "never be legal"),
        (
            families(late_loop={"start": {"low": 2, "high": 2}, "end": {"low": 0, "high": 1}}),
            f"{TYING}.families.late_loop",
            "never be legal",
        ),
        (families(core={"core": {"low": 200, "high": 201}}), f"{TYING}.families.core", "a spec at most 256"),
        (families(free={"blocks": {"low": 7, "high": 9}}), f"{TYING}.families.free", "never be legal"),
        ({**families(cycle={}), f"{TYING}.after": {"low": 0, "high": 1}}, f"{TYING}.after", "lies inside"),
        ({**families(free={}), LAYERS: {"fill": {"low": 3, "high": 9}}}, f"{TYING}.families.free", "cannot be filled"),
        (
            {**families(core={}), **when(f"{TYING}.tail.after == 0")},
            f"{RANK}.when",
            "of tying families there is",
        ),
        ({**families(core={}), **when(f"{TYING} == cycle")}, f"{RANK}.when", "compare sharing.tying.family"),
        ({**families(core={}), **when(f"{TYING}.family == tail")}, f"{RANK}.when", "never hold"),
        ({**families(split={}), **when(f"{BLOCKS} > 2")}, f"{RANK}.when", "never hold"),
        ({**families(split={}), BLOCKS: {"low": 1, "high": 4}}, BLOCKS, "every family of sharing.tying sets it"),
        # fill
        ({RANK: {"fill": {"low": 1, "high": 9}, "low": 1}}, f"{RANK}.fill", "no low, high"),
        ({"model.width": {"fill": {"low": 9, "high": 1}}}, "model.width.fill.low", "at most high"),
        ({"model.width": {"fill": {"low": 1.0, "high": 9.0}}}, "model.width.fill.step", "at most 4096 values"),
        (
            {"model.width": {"fill": {"low": 8, "high": 96, "probability": 1.5}}},
            "model.width.fill.probability",
            "less than 1",
        ),
        ({"model.width": {"fill": {"low": 0, "high": 96}}}, "model.width", "greater than or equal to 8"),
        ({"quantisation.codec": {"fill": {"low": 1, "high": 2}}}, "quantisation.codec", "'auto'"),
        ({"sharing.adapters": {"fill": {"low": 0, "high": 1}}}, "sharing.adapters.fill", "is no number"),
        (
            {"model.width": WIDTH, RANK: {"fill": {"low": 1, "high": 9}}},
            f"{RANK}.fill",
            "model.width is filled already",
        ),
    ],
)
def test_a_space_is_refused_by_the_path_that_is_wrong(space: dict[str, Any], path: str, said: str) -> None:
    problems = refused(space)
    assert {problem.field for problem in problems} == {f"space.{path}"}
    assert said in problems[0].message


def test_conditions_that_wait_for_each_other_are_named_and_others_not() -> None:
    problems = refused({
        RANK: {"choice": [0, 4], "when": "model.width > 64"},
        "model.width": {"choice": [48, 96], "when": f"{BLOCKS} < 3"},
        BLOCKS: {"low": 1, "high": 6, "when": "model.width == 48"},
    })  # fmt: skip
    assert {problem.field for problem in problems} == {"space.model.width.when", f"space.{BLOCKS}.when"}
    depth = {LAYERS: {"low": 3, "high": 6}, TYING: {"families": ["core"], "when": f"{LAYERS} < 5"}}
    assert [problem.field for problem in refused(depth)] == [f"space.{TYING}.when"]


def test_a_family_is_legal_where_what_stands_against_it_varies_too() -> None:
    base = override(BASE, {"model.value_embedding_width": 8, "model.value_embedding_layers": [5]})
    space = families(core={"prelude": {"low": 0, "high": 0}, "core": {"choice": [1]}, "coda": {"choice": [0, 1]}})
    (problem,) = refused(space, base)
    assert problem.field == f"space.{TYING}.families.core"
    assert "value_embedding_layers" in problem.message
    space["model.value_embedding_layers"] = {"choice": [[0], [5]]}
    assert NewStudy.model_validate({"name": "s", "base": base, "space": space}).space.keys() == space.keys()


def test_all_that_is_wrong_is_said_at_once() -> None:
    space = {
        RANK: {"low": 4, "high": 1},
        "model.breadth": {"choice": [1]},
        "model.width": {"choice": [-8, 96], "when": "sharing.breadth < 4"},
        TYING: {"families": {"tail": {"after": {"low": -1, "high": 1}}}},
    }
    problems = refused(space, sampler="luck", gangs=[{"ranks": 3}])
    assert [problem.field for problem in problems] == [
        f"space.{RANK}.low", "sampler", "gangs.0.ranks", "space.model.breadth", "space.model.width",
        f"space.{TYING}.families.tail.after", "space.model.width.when",
    ]  # fmt: skip


def test_a_space_with_conditions_families_and_fill_survives_json() -> None:
    space = {
        TYING: {"families": {"core": {"prelude": {"low": 0, "high": 1}}, "free": {}, "cycle": {}}},
        RANK: {"choice": [0, 4], "when": f"{TYING}.family == core"},
        "model.width": WIDTH,
    }
    study = NewStudy.model_validate({"name": "s", "base": BASE, "space": space})
    again = NewStudy.model_validate_json(study.model_dump_json())
    assert again == study
    assert list(again.space[TYING].families or ()) == ["core", "free", "cycle"]


RATE = {"optimizer.matrix_lr": {"low": 0.01, "high": 0.1}}
WINDOWED = override(BASE, {"model.smear_place": "window", "model.smear_gate": True, "model.attention_gate": True})
GATES = {"model.smear_gate": {"choice": [False, True]}, "model.attention_gate": {"choice": [False, True]}}


@pytest.mark.parametrize(
    ("space", "found"),
    [
        ({RANK: {"choice": [0, 999]}}, "space.sharing.lora.rank: must be at most model.width, 96 (got 999)"),
        ({RANK: {"low": 0, "high": 97}, **RATE}, "space.sharing.lora.rank: must be at most model.width, 96 (got 97)"),
        ({RANK: {"choice": [0, 999]}, **families(core={}, tail={}), **RATE}, "space.sharing.lora.rank: must be at"),
        ({BLOCKS: {"low": 1, "high": 9}}, "space.sharing.unique_blocks: must be at most virtual_layers, 6 (got 9)"),
        ({"model.width": {"choice": [96, 98]}}, "space.model.width: can never be here: model.heads: must divide"),
        ({RANK: {"choice": [0, 128]}, "model.width": {"choice": [96, 192]}}, None),
        ({RANK: {"choice": [0, 128]}, "model.width": WIDTH}, None),
        ({BLOCKS: {"low": 1, "high": 9}, LAYERS: {"low": 1, "high": 9}}, None),
        ({"model.heads": {"choice": [3, 5]}, "model.width": {"low": 60, "high": 96, "step": 6}}, None),
    ],
)
def test_a_value_that_a_rule_forbids_is_named_where_nothing_that_the_rule_reads_varies(
    space: dict[str, Any], found: str | None
) -> None:
    study = NewStudy.model_validate({"name": "s", "base": BASE, "space": space})  # as one that was stored once is
    said = [str(problem) for problem in never_legal_values(study.base, study.space)]
    assert [line[: len(found)] for line in said] == [found] if found else not said


def test_a_rule_that_only_two_paths_together_lift_is_taken_for_one_that_reads_them() -> None:
    space = {"model.gate_inputs": {"choice": [12, 4000]}, **GATES}
    study = NewStudy.model_validate({"name": "s", "base": WINDOWED, "space": space})
    assert not list(never_legal_values(study.base, study.space))
