"""The points of a space: to a spec and back, each written one way."""

import random
from math import inf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.points import Domain, draw
from orchestrator.space import Parameter
from worker.recipes import load_recipe
from worker.spec import GangConfig, InvalidSpec, parse_spec

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


@pytest.mark.parametrize("parameter", [{"low": 1, "high": 64, "log": True}, {"low": 0.01, "high": 1.0, "log": True}])
def test_a_draw_by_logarithm_is_even_in_it(parameter: dict[str, Any]) -> None:
    rng, drawn = random.Random(0), Parameter.model_validate(parameter)
    values = [draw(drawn, rng) for _ in range(2000)]
    assert all(drawn.contains(value) for value in values)
    middle = (parameter["low"] * parameter["high"]) ** 0.5
    assert 850 < sum(value < middle for value in values) < 1150
