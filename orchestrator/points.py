"""The points of a study's space: from a point to its spec and back, every one of them, or one at random."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import exp, inf, log, prod
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter

from orchestrator.space import Parameter, Space
from worker.spec import GangConfig, TrialSpec, parse_spec

Point = Mapping[str, Any]
"""A value for each dimension that is active, by its name."""
Fill = Callable[[Callable[[Any], TrialSpec | None], Sequence[Any]], Any]
"""Given the spec with a value (None where that is invalid) and the values, smallest first: the largest that fits."""


@dataclass(frozen=True)
class Dimension:
    """One number or choice of a point: `name` is a path of the spec."""

    name: str
    parameter: Parameter


class Domain:
    """The points that a base and a space make. Immutable; the space is one that `check_space` accepts."""

    def __init__(self, base: Mapping[str, Any], space: Space) -> None:
        self._base = base
        self._spec = parse_spec(base)
        self._aside = {"seed": self._spec.seed, "limits": self._spec.limits}
        self.dimensions = tuple(Dimension(path, parameter) for path, parameter in space.items())
        counts = [parameter.count for parameter in space.values()]
        self.count: int | float = inf if inf in counts else prod(counts)
        self._readers = {path: _Reader(path, parameter) for path, parameter in space.items()}

    def is_active(self, name: str, point: Point) -> bool:
        """Whether the dimension means anything, given the values of those before it."""
        return name in self._readers

    def spec(self, point: Point, gang: GangConfig, fill: Fill | None = None) -> TrialSpec:
        """The base under the point's values, for a gang of this shape; a dimension that it leaves out keeps the base's
        value. Raises InvalidSpec."""
        return parse_spec({**_put(self._base, point), "gang": gang})

    def point(self, spec: TrialSpec) -> dict[str, Any] | None:
        """The canonical point whose spec this is, seed, gang and limits aside; None where there is none."""
        found = self.partial(spec)
        if len(found) < len(self._readers):
            return None
        bare = spec.model_copy(update=self._aside)
        built = self.spec(found, spec.gang)
        return found if built == bare or built.canonical_hash == bare.canonical_hash else None

    def canonical(self, point: Point) -> dict[str, Any]:
        """The one way to write the point: inactive dimensions dropped."""
        return {each.name: point[each.name] for each in self.dimensions if each.name in point}

    def partial(self, spec: TrialSpec) -> dict[str, Any]:
        """The values of a spec that lie in the space, whatever the rest of the spec is. For display."""
        found = {path: reader.read(spec) for path, reader in self._readers.items()}
        return {path: value for path, (value, inside) in found.items() if inside}

    def random(self, rng: random.Random) -> dict[str, Any]:
        """A point, each dimension drawn evenly."""
        return self.canonical({each.name: draw(each.parameter, rng) for each in self.dimensions})

    def points(self) -> Iterator[dict[str, Any]]:
        """Every point, each once, where `count` is finite."""
        names = [each.name for each in self.dimensions]
        for values in product(*(every_value(each.parameter) for each in self.dimensions)):
            yield dict(zip(names, values, strict=True))


def every_value(parameter: Parameter) -> tuple[Any, ...]:
    """Every value of a parameter that takes finitely many."""
    return tuple(parameter.value_at(index) for index in range(int(parameter.count)))


def draw(parameter: Parameter, rng: random.Random) -> Any:
    """A value of the parameter, evenly; where it says so, its logarithm evenly."""
    if parameter.choice is not None:
        return rng.choice(parameter.choice)
    assert parameter.low is not None and parameter.high is not None
    if not parameter.log:
        if parameter.count == inf:
            return rng.uniform(parameter.low, parameter.high)
        return parameter.value_at(rng.randrange(int(parameter.count)))
    around = 0.5 if parameter.whole else 0.0
    value = exp(rng.uniform(log(parameter.low - around), log(parameter.high + around)))
    return min(max(round(value) if parameter.whole else value, parameter.low), parameter.high)


class _Reader:
    """Reads the value that one parameter has in a spec."""

    def __init__(self, path: str, parameter: Parameter) -> None:
        self._names = path.split(".")
        self._parameter = parameter
        self._parsed: tuple[Any, ...] = ()
        if parameter.choice is not None:  # a person may write a value short, such as a tying pattern's bare name
            adapter: TypeAdapter[Any] = TypeAdapter(_type_at(self._names))
            self._parsed = tuple(adapter.validate_python(value) for value in parameter.choice)

    def read(self, spec: TrialSpec) -> tuple[Any, bool]:
        """The value as the parameter has it, and whether it is one of the parameter's."""
        value: Any = spec
        for name in self._names:
            value = getattr(value, name, None)
        if self._parameter.choice is not None:
            place = next((i for i, parsed in enumerate(self._parsed) if parsed == value), None)
            return (None, False) if place is None else (self._parameter.choice[place], True)
        if not self._parameter.contains(value):
            return None, False
        return (int(value) if self._parameter.whole else value), True


def _type_at(names: Sequence[str]) -> Any:
    """The type of a spec's field by its path. Raises KeyError."""
    kind: Any = TrialSpec
    for name in names:
        options = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
        (model,) = [each for each in options if isinstance(each, type) and issubclass(each, BaseModel)]
        kind = model.model_fields[name].annotation
    return kind


def _put(data: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The data with values put in by dotted path; what lies on no path is shared, not copied."""
    changed = dict(data)
    for path, value in values.items():
        *parents, last = path.split(".")
        place = changed
        for name in parents:
            place[name] = dict(place.get(name) or {})
            place = place[name]
        place[last] = value
    return changed
