"""Search spaces and study definitions: what they refuse, and parameters there and back."""

from fractions import Fraction
from math import inf
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, reject, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.points import Domain
from orchestrator.space import Parameter, apply, as_category
from orchestrator.study import CAP_BYTES, NewStudy
from worker.recipes import load_recipe
from worker.spec import GangConfig, InvalidSpec, Problem, override, parse_spec, problems_of
from worker.tying import TyingConfig

BASE = load_recipe("laptop")
RANK = {"choice": [0, 4]}


def refusal(**fields: Any) -> list[Problem]:
    """The problems for which a study is refused."""
    with pytest.raises(ValidationError) as refused:
        NewStudy.model_validate({"name": "s", "base": BASE, **fields})
    return list(problems_of(refused.value))


def test_a_study_needs_only_a_name_and_a_base() -> None:
    study = NewStudy(name="a.b-c_9", base=BASE)
    assert (study.space, study.sampler, study.max_trials, study.cap_bytes) == ({}, "caddie", 100, CAP_BYTES)
    assert study.shapes == (GangConfig(),)


def test_a_study_proposes_for_the_shapes_of_gang_it_names() -> None:
    study = NewStudy.model_validate({"name": "s", "base": BASE, "gangs": [{"ranks": 2}, {"ranks": 1}]})
    assert study.shapes == (GangConfig(ranks=2), GangConfig(ranks=1))


@pytest.mark.parametrize(
    ("fields", "path", "said"),
    [
        ({"name": "Über"}, "name", "pattern"),
        ({"name": "a" * 65}, "name", "pattern"),
        ({"colour": "red"}, "colour", "not a known key"),
        ({"max_trials": -1}, "max_trials", "greater than or equal to 0"),
        ({"sampler": "luck"}, "sampler", "'caddie', 'tpe'"),
        ({"base": []}, "base", "must be a mapping"),
        ({"base": override(BASE, {"model.heads": 5})}, "base.model.heads", "must divide the width"),
        ({"base": override(BASE, {"model.head": 4})}, "base.model.head", "not a known key"),
        ({"gangs": [{"ranks": 3}]}, "gangs.0.ranks", "1, 2, 4 or 8"),
        ({"gangs": [{"ranks": 1}, {"ranks": 1}]}, "gangs", "each shape once"),
        (
            {"base": override(BASE, {"data.batch_tokens": 128}), "gangs": [{"ranks": 1}, {"ranks": 2}]},
            "gangs.1.ranks",
            "must divide the 1 sequences",
        ),
        ({"space": {"model.breadth": RANK}}, "space.model.breadth", "not a path"),
        ({"space": {"shape.width": {"low": 1, "high": 2}}}, "space.shape.width", "not a path"),
        ({"space": {"": RANK}}, "space.", "not a path"),
        ({"space": {"gang.ranks": {"choice": [1, 2]}}}, "space.gang.ranks", "gangs"),
        ({"space": {"gang": {"choice": [{"ranks": 1}]}}}, "space.gang", "gangs"),
        ({"space": {"seed": {"low": 0, "high": 9}}}, "space.seed", "not part of the configuration"),
        (
            {"space": {"limits.patience_seconds": RANK}},
            "space.limits.patience_seconds",
            "not part of the configuration",
        ),
        (
            {"space": {"sharing.lora": {"choice": [{}]}, "sharing.lora.rank": RANK}},
            "space.sharing.lora.rank",
            "lies inside",
        ),
        ({"space": {"sharing.lora.rank": {"choice": [0, "four"]}}}, "space.sharing.lora.rank", "valid integer"),
        (
            {"space": {"sharing.lora.rank": {"choice": [0, -1]}}},
            "space.sharing.lora.rank",
            "greater than or equal to 0",
        ),
        (
            {"space": {"sharing.lora.rank": {"low": -1, "high": 4}}},
            "space.sharing.lora.rank",
            "greater than or equal to 0",
        ),
        ({"space": {"sharing.lora.rank": {"low": 0.0, "high": 4.0}}}, "space.sharing.lora.rank", "fractional"),
        ({"space": {"sharing.lora.rank": {"low": 0, "high": 4, "step": 0.5}}}, "space.sharing.lora.rank", "fractional"),
        ({"space": {"sharing.tying": {"choice": ["cycle", "spiral"]}}}, "space.sharing.tying", "'cycle', 'sequence'"),
        ({"space": {"quantisation.codec": {"low": 1, "high": 2}}}, "space.quantisation.codec", "'ans' or 'auto'"),
        ({"space": {"seed.deep": RANK}}, "space.seed.deep", "cannot vary"),
        ({"space": {"model.width.deep": RANK}}, "space.model.width.deep", "has no parts"),
        ({"space": {"sharing.tying.after": RANK}}, "space.sharing.tying.after", "give sharing.tying as a mapping"),
    ],
)
def test_a_study_is_refused_by_the_path_that_is_wrong(fields: dict[str, Any], path: str, said: str) -> None:
    problems = refusal(**fields)
    assert {problem.field for problem in problems} == {path}
    assert said in problems[0].message


@pytest.mark.parametrize(
    ("parameter", "path", "said"),
    [
        ({"low": 4, "high": 1}, "low", "at most high, 1"),
        ({"low": 1}, "low", "both low and high"),
        ({}, "low", "either choice, or both"),
        ({"low": 0, "high": 1, "log": True}, "log", "low above 0"),
        ({"low": -1.5, "high": 1, "log": True}, "log", "low above 0"),
        ({"low": 1, "high": 9, "log": True, "step": 2}, "log", "no step"),
        ({"low": 1, "high": 9, "step": 0}, "step", "greater than 0"),
        ({"choice": []}, "choice", "at least 1"),
        ({"choice": [1, 1]}, "choice", "each value once"),
        ({"choice": [[0, 1], [0, 1]]}, "choice", "each value once"),
        ({"choice": [1], "low": 0}, "choice", "no low, high"),
        ({"low": 1, "high": 2, "kind": "int"}, "kind", "not a known key"),
        ({"low": 0, "high": 10**30}, "high", "from -1e+12 to 1e+12"),
        ({"low": -(10**12) - 1, "high": 0}, "low", "from -1e+12 to 1e+12"),
        ({"low": 0, "high": 10, "step": 10**30}, "step", "from -1e+12 to 1e+12"),
        ({"low": 0.0, "high": 1.0, "step": 1e-300}, "step", "at most 15 digits"),
        ({"low": 10, "high": 20, "step": 1e-14}, "step", "at most 15 digits"),
        ({"low": 1.0, "high": 1.0 + 2**-52}, "high", "at least 1e-12"),
        ({"low": 0.0, "high": 5e-324}, "high", "at least 1e-100"),
    ],
)
def test_a_parameter_is_refused_by_the_field_that_is_wrong(parameter: dict[str, Any], path: str, said: str) -> None:
    (problem,) = [p for p in refusal(space={"sharing.lora.rank": parameter}) if said in p.message]
    assert problem.field == f"space.sharing.lora.rank.{path}"


def test_an_unknown_path_is_named_once_however_many_values_it_has() -> None:
    assert len(refusal(space={"model.breadth": {"choice": [1, 2, 3]}})) == 1


def test_every_value_that_is_wrong_is_named() -> None:
    problems = refusal(space={"sharing.lora.rank": {"choice": [-1, 0, -2]}, "model.widht": RANK})
    assert [problem.value for problem in problems] == [-1, -2, "model.widht"]


def test_values_that_only_clash_with_other_parameters_are_allowed() -> None:
    # Six blocks need the six layers of the base; four heads do not divide a width of 90.
    space = {"sharing.unique_blocks": {"low": 1, "high": 9}, "model.width": {"choice": [90, 96]}}
    assert NewStudy.model_validate({"name": "s", "base": BASE, "space": space}).space.keys() == space.keys()


@pytest.mark.parametrize(
    ("parameter", "inside", "outside"),
    [
        (Parameter(low=1, high=9, step=2), [1, 3, 9, 3.0], [0, 2, 11, 3.5, "3", True, None]),
        (Parameter(low=1e-5, high=1e-4, step=1e-5), [1e-5, 3e-5, 1e-4], [1.5e-5, 0, 2e-4]),
        (Parameter(low=0.0, high=1.0), [0, 1, 0.3], [-0.1, 1.1]),
        (Parameter(low=0, high=1e-9, step=1e-20), [0, 1e-20, 9.99999e-10], [5e-21, 2e-9]),
        (Parameter(low=1, high=4), [1, 4, 2.0], [2.5, 5]),
        (Parameter(choice=("a", [1, 2], None)), ["a", [1, 2], None], ["b", [2, 1], "[1, 2, 3]"]),
    ],
)
def test_a_parameter_contains_the_values_it_can_take(
    parameter: Parameter, inside: list[Any], outside: list[Any]
) -> None:
    assert [value for value in inside if not parameter.contains(value)] == []
    assert [value for value in outside if parameter.contains(value)] == []


WILD = st.one_of(
    st.integers(-20, 20), st.integers(-(10**31), 10**31), st.sampled_from([0.01, 0.1, 0.25, 0.5, 1e-5, 0.3, 2.5]),
    st.decimals(-50, 50, places=3).map(float), st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip


@settings(suppress_health_check=[HealthCheck.filter_too_much])  # many a wild range is refused
@example(ends=(-1, -2e-33), step=1, log=False)
@given(ends=st.tuples(WILD, WILD), step=st.none() | WILD.map(abs), log=st.booleans())
def test_the_values_of_an_accepted_parameter_can_be_counted_and_told_apart(
    ends: tuple[float, float], step: float | None, log: bool
) -> None:
    low, high = sorted(ends)
    try:
        parameter = Parameter(low=low, high=high, step=step, log=log)
    except ValidationError:
        reject()
    if parameter.count == inf:
        assert step is None
        assert low < (low + high) / 2 < high
        return
    count = int(parameter.count)
    assert 1 <= count <= 2**53
    places = sorted({0, 1 % count, count // 2, count - 1})
    values = [parameter.value_at(place) for place in places]
    exact = [Fraction(str(low)) + place * Fraction(str(step or 1)) for place in places]
    assert [Fraction(str(value)) for value in values] == exact
    assert sorted(set(values)) == values
    assert all(parameter.contains(value) for value in values)
    assert low == values[0]
    if low != high:
        assert exact[-1] <= Fraction(str(high)) < exact[-1] + Fraction(str(step or 1))


def test_a_category_is_a_scalar_whatever_the_value() -> None:
    assert [as_category(value) for value in (1, None, "a", [1, 2], {"b": 1, "a": 2})] == [
        1, None, "a", "[1, 2]", '{"a": 2, "b": 1}'
    ]  # fmt: skip


SPACE = {
    "sharing.lora.rank": Parameter(choice=(0, 2, 4)),
    "sharing.unique_blocks": Parameter(low=1, high=6),
    "sharing.tying": Parameter(
        choice=("cycle", "sequence", [0, 1, 2, 2, 1, 0], {"pattern": "tail", "after": 1}, {"pattern": "tail"})
    ),
    "sharing.lora.paths": Parameter(choice=(["attention"], ["mlp"], ["attention", "mlp"])),
    "model.mlp_multiple": Parameter(low=1, high=4),
    "model.unet_skips": Parameter(choice=(True, False)),
    "optimizer.matrix_lr": Parameter(low=1e-3, high=1e-1, log=True),
    "optimizer.muon_momentum": Parameter(low=0.8, high=0.95, step=0.05),
    "evaluation.validation_tokens": Parameter(choice=(None, 4096)),
}


def values_of(parameter: Parameter) -> st.SearchStrategy[Any]:
    if parameter.choice is not None:
        return st.sampled_from(parameter.choice)
    assert parameter.low is not None
    assert parameter.high is not None
    if parameter.whole:
        return st.integers(int(parameter.low), int(parameter.high))
    if parameter.step is not None:
        low, high, step = parameter.low, parameter.high, parameter.step
        return st.integers(0, round((high - low) / step)).map(lambda n: min(low + n * step, high))
    return st.floats(parameter.low, parameter.high)


@given(st.fixed_dictionaries({path: values_of(parameter) for path, parameter in SPACE.items()}))
def test_the_parameters_of_a_spec_are_those_it_was_made_with_written_one_way(params: dict[str, Any]) -> None:
    try:
        spec = apply(BASE, params)
    except InvalidSpec:  # a tying that its number of unique blocks does not allow
        reject()
    domain = Domain(BASE, SPACE)
    assert domain.partial(spec) == domain.canonical(params)
    assert apply(spec.model_dump(mode="json"), params) == spec


def test_a_spec_outside_the_space_has_no_parameter_there() -> None:
    space = {path: SPACE[path] for path in ("sharing.lora.rank", "sharing.tying", "model.mlp_multiple")}
    outside = {"sharing.lora.rank": 3, "sharing.tying": [0, 1, 1, 2, 2, 0], "model.mlp_multiple": 2.5}
    for path, value in outside.items():
        inside = {"sharing.lora.rank": 4, "sharing.tying": "cycle", "model.mlp_multiple": 3}
        del inside[path]
        assert Domain(BASE, space).partial(apply(BASE, {**inside, path: value})) == inside


def test_a_choice_is_recognised_however_the_spec_writes_it() -> None:
    space = {"sharing.tying": Parameter(choice=("sequence", "cycle"))}
    for written in ("cycle", {"pattern": "cycle"}, TyingConfig().model_dump()):
        assert Domain(BASE, space).partial(parse_spec(override(BASE, {"sharing.tying": written}))) == {
            "sharing.tying": "cycle"
        }


def test_putting_parameters_in_leaves_the_base_as_it_was() -> None:
    base = load_recipe("laptop")
    spec = apply(base, {"sharing.lora.rank": 2})
    assert spec.sharing.lora.rank == 2
    assert base == BASE


def test_a_study_survives_json() -> None:
    base = override(BASE, {"schedule.warmdown_steps": None})
    space = {
        "sharing.tying": {"choice": ["cycle", {"pattern": "tail", "after": None}]},
        "model.width": {"choice": [96]},
    }
    study = NewStudy.model_validate({"name": "s", "base": base, "space": space, "gangs": [{"ranks": 2}]})
    assert NewStudy.model_validate_json(study.model_dump_json()) == study
