"""Families of tying maps, what they say of a spec, and the neighbours of a map."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.families import mutations
from orchestrator.points import Domain
from orchestrator.space import Parameter
from worker.recipes import load_recipe
from worker.spec import GangConfig, InvalidSpec, override, parse_spec
from worker.tying import canonical_map

BASE = load_recipe("laptop")  # six virtual layers on three blocks
LAYERS, BLOCKS, TYING = "sharing.virtual_layers", "sharing.unique_blocks", "sharing.tying"
ONE = GangConfig()


def domain(tying: Any, base: Mapping[str, Any] = BASE, **others: Any) -> Domain:
    """A domain of tying families over the laptop recipe; others by the last part of their path in sharing."""
    space = {TYING: {"families": tying}, **{f"sharing.{name}": each for name, each in others.items()}}
    return Domain(base, {path: Parameter.model_validate(each) for path, each in space.items()})


def at(family: str, *letters: int, **parts: Any) -> dict[str, Any]:
    """A point of one family; letters are those of a free map from its second layer on."""
    free = {str(layer): letter for layer, letter in enumerate(letters, 1)}
    return {
        f"{TYING}.family": family,
        **{f"{TYING}.{family}.{part}": value for part, value in {**free, **parts}.items()},
    }


EVERY = ["cycle", "sequence", "palindrome", "split", "core", "late_loop", "tail", "free"]


@pytest.mark.parametrize(
    ("point", "tying_map", "from_fraction"),
    [
        (at("cycle"), "012012", 0),
        (at("sequence"), "001122", 0),
        (at("palindrome"), "012210", 0),
        (at("split"), "000111", 0),
        (at("core", prelude=1, core=2, coda=1, passes=3), "01212123", 0),
        (at("late_loop", start=1, end=2, passes=2, from_fraction=0.35), "01212", 0.35),
        (at("tail", after=1), "011112", 0),
        (at("free", 1, 0, 0, 2, 1), "010021", 0),
        (at("free", 2, 0, 0, 1, 2), "010021", 0),
    ],
)  # fmt: skip
def test_a_family_says_a_map_its_layers_and_its_blocks(
    point: dict[str, Any], tying_map: str, from_fraction: float
) -> None:
    spec = domain(EVERY).spec(point, ONE)
    assert "".join(map(str, spec.sharing.tying_map)) == tying_map
    assert (spec.sharing.virtual_layers, spec.sharing.unique_blocks) == (len(tying_map), len(set(tying_map)))
    assert spec.sharing.tying.from_fraction == from_fraction
    assert spec.model == parse_spec(BASE).model


def test_what_a_family_sets_is_no_dimension_of_its_points() -> None:
    found = domain(EVERY, virtual_layers={"low": 3, "high": 6}, unique_blocks={"low": 1, "high": 3})
    names = [each.name for each in found.dimensions]
    assert names.index(f"{TYING}.family") < names.index(LAYERS) < names.index(f"{TYING}.free.1")
    active = {family: [name for name in (LAYERS, BLOCKS) if found.is_active(name, at(family))] for family in EVERY}
    assert active == {
        "cycle": [LAYERS, BLOCKS], "sequence": [LAYERS, BLOCKS], "palindrome": [LAYERS, BLOCKS], "split": [LAYERS],
        "core": [], "late_loop": [BLOCKS], "tail": [LAYERS, BLOCKS], "free": [LAYERS],
    }  # fmt: skip
    letters = [f"{TYING}.free.{layer}" for layer in range(1, 6)]
    assert [name for name in letters if found.is_active(name, {**at("free"), LAYERS: 4})] == letters[:3]


@pytest.mark.parametrize(
    ("families", "point", "canonical"),
    [
        (EVERY, at("core", prelude=0, core=3, coda=0, passes=2), at("cycle")),
        (EVERY, at("free", 0, 0, 1, 1, 1), at("split")),
        (["free", "cycle"], at("cycle"), at("free", 1, 2, 0, 1, 2)),
        (["free"], at("free", 2, 2, 0, 1, 0), at("free", 1, 1, 0, 2, 0)),
        (["late_loop", "core"], at("core", prelude=1, core=1, coda=1, passes=3),
         at("core", prelude=1, core=1, coda=1, passes=3)),
        (["tail", "core"], at("core", prelude=1, core=1, coda=1, passes=4), at("tail", after=1)),
    ],
)  # fmt: skip
def test_families_that_say_one_map_are_one_point(
    families: Any, point: dict[str, Any], canonical: dict[str, Any]
) -> None:
    found = domain(families)
    assert found.canonical(point) == canonical
    assert found.point(found.spec(point, ONE)) == canonical


def test_a_late_loop_is_the_core_it_becomes_only_if_it_starts_at_once() -> None:
    found = domain({"core": {}, "late_loop": {"from_fraction": {"low": 0.0, "high": 0.6}}})
    late = {"start": 0, "end": 1, "passes": 2}
    core = at("core", prelude=0, core=2, coda=1, passes=2)
    assert found.canonical(at("late_loop", **late, from_fraction=0.0)) == core
    assert found.canonical(at("late_loop", **late, from_fraction=0.3)) == at("late_loop", **late, from_fraction=0.3)


def test_a_tail_that_ties_nothing_is_written_with_its_smallest_parameter() -> None:
    found = domain(["tail"], unique_blocks={"low": 1, "high": 6})
    assert found.canonical({**at("tail", after=4), BLOCKS: 6}) == {**at("tail", after=0), BLOCKS: 6}


def test_tyings_of_a_plain_choice_that_say_one_map_are_one_point() -> None:
    space = {TYING: Parameter(choice=("sequence", "cycle")), BLOCKS: Parameter(low=1, high=6)}
    found = Domain(BASE, space)
    assert found.canonical({TYING: "cycle", BLOCKS: 6}) == {TYING: "sequence", BLOCKS: 6}
    assert found.canonical({TYING: "cycle", BLOCKS: 3}) == {TYING: "cycle", BLOCKS: 3}
    assert found.count == 12
    assert len(list(found.points())) == 10


@pytest.mark.parametrize(
    ("point", "field"),
    [
        (at("late_loop", start=2, end=1, passes=2, from_fraction=0.3), "sharing.tying.start"),
        (at("tail", after=3), "sharing.tying.after"),
        (at("free", 0, 0, 0, 0, 0), "sharing.tying.free"),
        (at("core", prelude=1, core=1, coda=1), "sharing.tying.core.passes"),
        (at("free", 0, 0), "sharing.tying.free.3"),
    ],
)
def test_parameters_that_do_not_suit_each_other_are_refused_by_name(point: dict[str, Any], field: str) -> None:
    families = {
        "late_loop": {},
        "tail": {"after": {"low": 0, "high": 5}},
        "core": {},
        "free": {"blocks": {"low": 2, "high": 6}},
    }
    with pytest.raises(InvalidSpec) as refused:
        domain(families).spec(point, ONE)
    assert {problem.field for problem in refused.value.problems} == {field}


def test_free_maps_are_counted_once_each() -> None:
    found = domain(["free"])
    assert found.count == len(list(found.points())) == 203  # Bell's number of six
    bounded = domain({"free": {"blocks": {"low": 2, "high": 3}}})
    legal = [point for point in bounded.points() if point != at("free", 0, 0, 0, 0, 0)]
    assert len(legal) == 31 + 90  # Stirling's numbers of six layers on two and three blocks
    assert {bounded.spec(point, ONE).sharing.unique_blocks for point in legal} == {2, 3}


def test_a_condition_reads_what_a_family_sets() -> None:
    found = domain(["cycle", "core"], **{"lora.rank": {"choice": [2, 4], "when": f"{BLOCKS} < 3"}})
    assert f"{TYING}.core.prelude" in [each.name for each in found.dimensions]
    small = {**at("core", prelude=0, core=1, coda=1, passes=3), "sharing.lora.rank": 2}
    large = {**at("core", prelude=1, core=1, coda=1, passes=3), "sharing.lora.rank": 2}
    assert found.canonical(small) == small
    assert "sharing.lora.rank" not in found.canonical(large)
    assert [found.spec(point, ONE).sharing.lora.rank for point in (small, large)] == [2, 4]  # the base's is 4


MAPS = st.lists(st.integers(0, 5), min_size=1, max_size=8).map(canonical_map)


@given(MAPS, st.integers(1, 6))
def test_mutations_are_canonical_each_once_and_never_the_map_itself(tying_map: tuple[int, ...], blocks: int) -> None:
    found = list(mutations(tying_map, blocks))
    assert found == list(mutations(tying_map, blocks))
    assert len(set(found)) == len(found)
    assert tying_map not in found
    assert all(canonical_map(each) == each and len(set(each)) <= blocks for each in found)


def test_mutations_change_a_layer_merge_split_swap_repeat_and_unrepeat() -> None:
    found = ["".join(map(str, each)) for each in mutations((0, 1, 2, 1, 2, 3), 6)]
    ways = {"012103": "changed", "011112": "merged", "012324": "split", "012213": "swapped", "01212123": "repeated",
            "0121233": "repeated", "0123": "unrepeated"}  # fmt: skip
    assert ways.keys() <= set(found)
    assert not {"012123", "01234"} & set(found)


def test_every_mutation_is_a_point_of_free_maps_of_its_depth() -> None:
    found = domain(["free"], virtual_layers={"low": 4, "high": 8})
    deeper = [each for each in mutations((0, 1, 2, 0, 1, 2), 6) if 4 <= len(each) <= 8]
    for tying_map in deeper:
        changes = {LAYERS: len(tying_map), BLOCKS: len(set(tying_map)), TYING: list(tying_map)}
        point = found.point(parse_spec(override(BASE, changes)))
        assert point == {**at("free", *tying_map[1:]), LAYERS: len(tying_map)}
    assert len(deeper) > 30


FILLED = {"fill": {"low": 24, "high": 192, "step": 24}}


def largest_below(limit: int) -> Any:
    """A fill that takes the largest legal value below a limit."""
    return lambda build, values: max(value for value in values if value < limit and build(value) is not None)


def test_a_path_to_fill_is_no_dimension_and_takes_what_the_fill_says() -> None:
    space = {"model.width": FILLED, "sharing.lora.rank": {"choice": [2, 4]}}
    found = Domain(BASE, {path: Parameter.model_validate(each) for path, each in space.items()})
    assert [each.name for each in found.dimensions] == ["sharing.lora.rank"]
    assert (found.fill_path, found.fill.probability if found.fill else None) == ("model.width", 0.9)
    point = {"sharing.lora.rank": 2}
    assert found.spec(point, ONE, largest_below(180)).model.width == 168
    assert found.spec(point, ONE).model.width == 24  # the smallest that is legal
    for width in (24, 168, 192):
        assert found.point(parse_spec(override(BASE, {"model.width": width, "sharing.lora.rank": 2}))) == point
    assert found.point(parse_spec(override(BASE, {"model.width": 102}))) is None


def test_values_to_fill_that_are_not_legal_are_passed_over() -> None:
    values = {"fill": {"low": 92, "high": 99}}
    found = Domain(BASE, {"model.width": Parameter.model_validate(values)})
    assert found.spec({}, ONE).model.width == 96  # three heads of even width
    assert found.spec({}, ONE, largest_below(99)).model.width == 96
    none = Domain(BASE, {"model.width": Parameter.model_validate({"fill": {"low": 97, "high": 99}})})
    with pytest.raises(InvalidSpec) as refused:
        none.spec({}, ONE)
    assert [problem.field for problem in refused.value.problems] == ["model.heads"]


def test_depth_can_be_filled_under_a_family() -> None:
    found = domain(["cycle", "core"], virtual_layers={"fill": {"low": 2, "high": 9}})
    assert found.spec(at("cycle"), ONE, largest_below(8)).sharing.tying_map == (0, 1, 2, 0, 1, 2, 0)
    assert found.spec(at("cycle"), ONE).sharing.virtual_layers == 3
    core = at("core", prelude=0, core=1, coda=1, passes=2)
    assert found.spec(core, ONE, largest_below(8)).sharing.virtual_layers == 3  # which the family sets
