"""The points of a space: to a spec and back, each written one way."""

import random
from itertools import islice
from math import inf
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from orchestrator.points import Domain
from orchestrator.space import Parameter
from orchestrator.study import NewStudy
from worker.recipes import load_recipe
from worker.spec import GangConfig, InvalidSpec, override, parse_spec

BASE = load_recipe("laptop")
ONE, TWO = GangConfig(ranks=1), GangConfig(ranks=2)


def domain(base: Any = None, **space: Any) -> Domain:
    """A domain over the laptop recipe, with `__` for the dots of a path."""
    parameters = {path.replace("__", "."): Parameter.model_validate(each) for path, each in space.items()}
    return Domain(base or BASE, parameters)


PLAIN = domain(
    sharing__lora__rank={"choice": [0, 2, 4]},
    sharing__unique_blocks={"low": 1, "high": 7},
    sharing__lora__paths={"choice": [["attention"], ["attention", "mlp"]]},
    optimizer__matrix_lr={"low": 0.001, "high": 0.1, "log": True},
    model__mlp_multiple={"low": 1, "high": 3, "step": 0.5},
)


@given(st.integers(0, 2**32))
def test_a_point_is_that_of_its_own_spec_whatever_seed_gang_and_limits(seed: int) -> None:
    point = PLAIN.random(random.Random(seed))
    assert list(point) == [each.name for each in PLAIN.dimensions]
    if point["sharing.unique_blocks"] == 7:
        with pytest.raises(InvalidSpec):
            PLAIN.spec(point, TWO)
        return
    spec = PLAIN.spec(point, TWO)
    assert spec.gang == TWO
    limits = spec.limits.model_copy(update={"cold": True})
    assert PLAIN.point(spec.model_copy(update={"seed": 7, "gang": ONE, "limits": limits})) == point


def test_a_spec_that_differs_from_the_base_elsewhere_is_no_point() -> None:
    spec = PLAIN.spec(PLAIN.random(random.Random(1)), ONE)
    assert PLAIN.point(spec) is not None
    assert PLAIN.point(parse_spec({**spec.model_dump(), "budget": {"steps": 7}})) is None
    assert PLAIN.point(parse_spec({**spec.model_dump(), "optimizer": {"matrix_lr": 0.2}})) is None


def test_a_finite_space_lists_every_point_once() -> None:
    small = domain(sharing__lora__rank={"choice": [0, 2]}, model__mlp_multiple={"low": 1, "high": 3, "step": 0.5})
    points = list(small.points())
    assert small.count == len(points) == len({tuple(point.values()) for point in points}) == 10
    assert PLAIN.count == inf


ALL = {
    "cycle": {},
    "sequence": {},
    "palindrome": {},
    "split": {},
    "core": {"prelude": {"low": 0, "high": 2}, "core": {"low": 1, "high": 2}, "coda": {"choice": [0, 2]}},
    "late_loop": {"passes": {"low": 2, "high": 3}, "from_fraction": {"choice": [0.0, 0.35]}},
    "tail": {},
    "free": {"blocks": {"low": 2, "high": 4}},
}
LAYERS, BLOCKS = {"low": 3, "high": 6}, {"low": 1, "high": 5}


def domains() -> st.SearchStrategy[Domain]:
    """Finite spaces of tying families, with and without depth, blocks, conditions and other parameters."""
    others: dict[str, st.SearchStrategy[Any]] = {
        "sharing.virtual_layers": st.sampled_from([LAYERS, {**LAYERS, "when": "model.width != 32"}]),
        "sharing.unique_blocks": st.sampled_from([BLOCKS, {**BLOCKS, "when": "model.width > 32"}]),
        "sharing.lora.rank": st.sampled_from([
            {"choice": [1, 4], "when": "sharing.tying.family in [core, sequence]"},
            {"choice": [1, 4], "when": "sharing.unique_blocks < 3"},
            {"choice": [0, 2], "when": "sharing.virtual_layers >= 4 and model.width == 96"},
        ]),
        "model.width": st.sampled_from([
            {"low": 32, "high": 96, "step": 32},
            {"low": 32, "high": 96, "step": 32, "when": "sharing.unique_blocks != 2"},
            {"fill": {"low": 64, "high": 96, "step": 32}},
        ]),
    }  # fmt: skip
    families = st.permutations(list(ALL)).flatmap(lambda names: st.integers(1, len(names)).map(lambda n: names[:n]))
    patterns: list[Any] = [
        "cycle",
        "sequence",
        "palindrome",
        "split",
        {"pattern": "tail", "after": 1},
        [0, 1, 1],
        [0, 1, 2, 0],
    ]
    plain = st.lists(st.sampled_from(patterns), min_size=1, unique_by=str)
    tying = families.map(lambda names: {"families": {name: ALL[name] for name in names}}) | plain.map(
        lambda choice: {"choice": choice}
    )
    tying = st.tuples(tying, st.sampled_from([{}, {}, {"when": "model.width <= 64"}])).map(
        lambda pair: pair[0] | pair[1]
    )
    return st.fixed_dictionaries({"sharing.tying": tying}, optional=others).map(domain_of)


def domain_of(space: dict[str, Any]) -> Domain:
    try:
        study = NewStudy.model_validate({"name": "s", "base": SMALL, "space": space})
    except ValidationError:
        reject()  # such as a condition that cannot hold
    return Domain(study.base, study.space)


SMALL = override(BASE, {"sharing.virtual_layers": 4, "sharing.unique_blocks": 3, "sharing.scales": "block",
                        "sharing.mixes": "block", "model.width": 64, "model.heads": 4,
                        "model.kv_heads": 2})  # fmt: skip


def is_legal(domain: Domain, point: dict[str, Any]) -> bool:
    try:
        domain.spec(point, ONE)
    except InvalidSpec as error:
        return not str(error)
    return True


@given(domains(), st.integers(0, 2**32))
def test_a_random_point_is_canonical_and_that_of_its_spec(domain: Domain, seed: int) -> None:
    point = domain.random(random.Random(seed))
    assert point == domain.random(random.Random(seed))
    assert domain.canonical(point) == point
    assert all(domain.is_active(name, point) for name in point)
    if is_legal(domain, point):
        assert domain.point(domain.spec(point, ONE)) == point


@settings(max_examples=25)
@given(domains())
def test_equal_points_are_equal_configurations_and_unequal_ones_are_not(domain: Domain) -> None:
    points = list(islice(domain.points(), 150))
    assert len(points) <= domain.count
    assert len({tuple(sorted(map(str, point.items()))) for point in points}) == len(points)
    legal = [point for point in points if is_legal(domain, point)]
    hashes = {domain.spec(point, ONE).canonical_hash for point in legal}
    assert len(hashes) == len(legal)


@given(domains(), st.randoms(use_true_random=False))
def test_values_drawn_freely_mean_their_canonical_point(domain: Domain, rng: random.Random) -> None:
    values = {each.name: each.parameter.draw(rng) for each in domain.dimensions}
    try:
        point = domain.canonical(values)
        spec = domain.spec(values, ONE)
    except InvalidSpec:
        return
    assert domain.point(spec) == point
    assert domain.spec(point, ONE).canonical_hash == spec.canonical_hash


@pytest.mark.parametrize("parameter", [{"low": 1, "high": 64, "log": True}, {"low": 0.01, "high": 1.0, "log": True}])
def test_a_draw_by_logarithm_is_even_in_it(parameter: dict[str, Any]) -> None:
    rng, drawn = random.Random(0), Parameter.model_validate(parameter)
    values = [drawn.draw(rng) for _ in range(2000)]
    assert all(drawn.contains(value) for value in values)
    middle = (parameter["low"] * parameter["high"]) ** 0.5
    assert 850 < sum(value < middle for value in values) < 1150
