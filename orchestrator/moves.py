"""Small changes of a point: what exploits a good trial, and what spends the bytes that a change has freed."""

import random
from collections.abc import Mapping, Sequence
from math import exp, inf, log
from typing import Any

from orchestrator.families import mutations
from orchestrator.gate import Gate
from orchestrator.points import Domain, Point
from orchestrator.space import Parameter, as_category
from worker.spec import InvalidSpec, TrialSpec, override, parse_spec
from worker.tying import canonical_map

REACH = 0.15  # of a range: how far a number moves, one standard deviation
SIZES = ("model.width", "model.mlp_multiple")  # dimensions that turn bytes into capacity
TRIED = 16  # values of a continuous size
MAPS = 8  # neighbours of a tying map that are tried until one is a point of the space


def mutate(domain: Domain, point: Point, rng: random.Random) -> dict[str, Any]:
    """A canonical point one to three moves away; what becomes active by them is drawn."""
    moved = dict(point)
    names = [each.name for each in domain.dimensions if each.name in point and each.parameter.count > 1]
    changed = set(rng.sample(names, min(len(names), rng.choice((1, 1, 1, 2, 2, 3)))))
    return complete(domain, moved, rng, changed)


def complete(domain: Domain, point: Point, rng: random.Random, moved: set[str] | None = None) -> dict[str, Any]:
    """The canonical point with these values where they are active, the named ones moved and those that lack drawn."""
    made: dict[str, Any] = {}
    for each in domain.dimensions:
        if not domain.is_active(each.name, made):
            continue
        if each.name not in point:
            made[each.name] = each.parameter.draw(rng)
        elif moved and each.name in moved:
            made[each.name] = _move(each.parameter, point[each.name], rng)
        else:
            made[each.name] = point[each.name]
    return domain.canonical(made)


def _move(parameter: Parameter, value: Any, rng: random.Random) -> Any:
    """Another value: of numbers a near one, of choices any."""
    if parameter.choice is not None:
        return rng.choice([each for each in parameter.choice if as_category(each) != as_category(value)])
    low, high = parameter.low, parameter.high
    assert low is not None and high is not None
    if parameter.log:
        drawn = exp(log(value) + rng.gauss(0, REACH) * log(high / low))
    else:
        drawn = value + rng.gauss(0, REACH) * (high - low)
    drawn = min(max(drawn, low), high)
    if parameter.count == inf:
        return drawn
    index, last = round(parameter.steps_to(value)), int(parameter.count) - 1
    target = min(round(parameter.steps_to(drawn)), last)
    if target == index:
        target = index + (1 if index == 0 or (index < last and rng.random() < 0.5) else -1)
    return parameter.value_at(target)


def retie(domain: Domain, spec: TrialSpec, rng: random.Random) -> dict[str, Any] | None:
    """The point of the spec under a neighbour of its tying map; None where none was found in the space."""
    near = list(mutations(spec.sharing.tying_map, spec.sharing.virtual_layers))
    for tying_map in rng.sample(near, min(MAPS, len(near))):
        if (point := changed(domain, spec, tied_by(tying_map))) is not None:
            return point
    return None


def tied_by(tying_map: Sequence[int]) -> dict[str, Any]:
    """What in a spec makes it tied by this map."""
    canonical = canonical_map(tying_map)
    return {
        "sharing.tying.pattern": "explicit", "sharing.tying.map": list(canonical),
        "sharing.virtual_layers": len(canonical), "sharing.unique_blocks": len(set(canonical)),
    }  # fmt: skip


def changed(domain: Domain, spec: TrialSpec, changes: Mapping[str, Any]) -> dict[str, Any] | None:
    """The spec with other values at some paths, as a point; None where it is no valid spec or no point of the space."""
    data = spec.model_dump(mode="json")
    if "sharing.tying.map" in changes:  # what the pattern of before took means nothing beside it
        data["sharing"]["tying"] = {"from_fraction": data["sharing"]["tying"]["from_fraction"]}
    try:
        return domain.point(parse_spec(override(data, changes)))
    except InvalidSpec:
        return None


def spend(gate: Gate, point: Point) -> dict[str, Any]:
    """The canonical point with its sizes, one after the other, as large as may fit; the point itself where none can
    grow. What becomes active by that has the base's value."""
    domain, grown = gate.memory.domain, dict(point)
    for each in domain.dimensions:
        if each.name not in SIZES or each.name not in grown:
            continue
        larger = _larger(each.parameter, grown[each.name])
        low, high = 0, len(larger)  # larger[:low] fit
        while low < high:
            middle = (low + high) // 2
            spec = gate.spec({**grown, each.name: larger[middle]})
            if spec is not None and gate.fits(spec):
                low = middle + 1
            else:
                high = middle
        best = gate.spec({**grown, each.name: larger[low - 1]}) if low else None
        if best is not None and (whole := domain.point(best)) is not None:
            grown = whole
    return grown


def _larger(parameter: Parameter, now: Any) -> list[Any]:
    """The values above one, of a continuous size some of them."""
    if parameter.count <= 1024:
        values = list(parameter.values)
    else:
        assert parameter.high is not None
        values = [now + (parameter.high - now) * step / TRIED for step in range(1, TRIED + 1)]
        values = [round(value) for value in values] if parameter.whole else values
    return sorted(value for value in values if value > now and parameter.contains(value))
