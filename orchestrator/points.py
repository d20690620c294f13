"""The points of a study's space: from a point to its spec and back, every one of them, or one at random."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from types import MappingProxyType
from typing import Any

from orchestrator.families import BLOCKS, FAMILY, LAYERS, TYING, Spelling, TyingChoices, TyingFamilies
from orchestrator.reader import ABSENT, Reader
from orchestrator.space import FamilyName, FillRange, Parameter, Space
from worker.shape import FieldError
from worker.sharing import SharingConfig
from worker.spec import GangConfig, InvalidSpec, Problem, TrialSpec, override, parse_spec

Point = Mapping[str, Any]
"""A value for each dimension that is active, by its name."""
Fill = Callable[[Callable[[Any], TrialSpec | None], Sequence[Any]], Any]
"""Given the spec with a value (None where that is invalid) and the values, smallest first: the largest that fits."""


@dataclass(frozen=True)
class Dimension:
    """One choice or number of a point, by the name of a path of the spec, of the choice of a family of tyings
    (sharing.tying.family), of a family's parameter (sharing.tying.core.prelude) or of a free map's layer
    (sharing.tying.free.3)."""

    name: str
    parameter: Parameter


class Domain:
    """The points that a base and a space make. Immutable.

    A dimension is active where the condition of its path holds and the point's family of tying maps has it, or does not
    set its path. Elsewhere it is absent, and the path keeps the base's value, or what the family sets. A path to fill
    is no dimension.
    """

    def __init__(self, base: Mapping[str, Any], space: Space) -> None:
        """Raises InvalidSpec for conditions that depend on each other; of all else `check_space` has to be asked."""
        self._base, self._spec = base, parse_spec(base)
        self._data = self._spec.model_dump(mode="json")
        self._aside = {"seed": self._spec.seed, "limits": self._spec.limits}
        self._sampled = {path: parameter for path, parameter in space.items() if parameter.is_sampled}
        self._conditions = {path: each.condition for path, each in space.items() if each.condition is not None}
        self.fill_path: str | None = next((path for path, each in space.items() if each.fill is not None), None)
        self.fill: FillRange | None = None if self.fill_path is None else space[self.fill_path].fill
        self._to_fill = () if self.fill is None else self.fill.range.values
        self._readers = {path: Reader(path, each) for path, each in self._sampled.items()}
        self._at_base = {path: reader.read(self._spec) for path, reader in self._readers.items()}
        self.tying = self._tying_of(space)
        self._owners: dict[str, FamilyName] = {}
        self.dimensions = tuple(self._ordered(self._listed(space)))
        self.count = self._count()

    def is_active(self, name: str, point: Point) -> bool:
        """Whether the dimension means anything, given the values of those before it."""
        owner = self._owners.get(name)
        if owner is not None:
            if point.get(FAMILY) != owner:
                return False
            return owner != "free" or int(name.rpartition(".")[2]) < self._layers(point, None)
        return self._applies(TYING if name == FAMILY else name, point)

    def spec(
        self,
        point: Point,
        gang: GangConfig,
        fill: Fill | None = None,
        changes: Mapping[str, Any] = MappingProxyType({}),
    ) -> TrialSpec:
        """The base under the point's values, and `changes` by path over both, for a gang of this shape.

        A path of the space that the point leaves out keeps the base's value. Without `fill` a path to fill has the
        smallest value that makes a valid spec. Raises InvalidSpec, and what `fill` raises.
        """
        values = self._active(point)
        if self.fill_path is None or not self._applies(self.fill_path, values):
            return self._built(values, gang, None, changes)

        def build(value: Any) -> TrialSpec | None:
            try:
                return self._built(values, gang, value, changes)
            except InvalidSpec:
                return None

        if fill is not None:
            try:
                return self._built(values, gang, fill(build, self._to_fill), changes)
            except ValueError:  # nothing fits; or nothing is legal, which is another matter
                self.spec(point, gang, None, changes)
                raise
        found = next((spec for value in self._to_fill if (spec := build(value)) is not None), None)
        return self._built(values, gang, self._to_fill[0], changes) if found is None else found

    def point(self, spec: TrialSpec) -> dict[str, Any] | None:
        """The canonical point whose spec this is, whatever its seed, gang and limits, and the value of a path to fill
        as long as it is one of those; None where there is none."""
        plain = self._plain(spec)
        for way in (*self._ways_of(spec), {}):
            values = self._whole({**plain, **way})
            if values is not None and self._makes(values, spec):
                return values
        return None

    def canonical(self, point: Point) -> dict[str, Any]:
        """The one way to write the point: inactive dimensions dropped, and tyings that say one map written as the first
        of them that makes the same spec. Where tying or fill is illegal, the point as it is. Raises InvalidSpec where a
        parameter of its family is missing and conditions need it."""
        return self._canonical(self._active(point))

    def _canonical(self, values: dict[str, Any]) -> dict[str, Any]:
        if self.tying is None or self.fill_path in (LAYERS, BLOCKS):
            return values
        try:
            spelling = self._spelling(values, None)
            if spelling is None:
                return values
            tying_map = spelling.map
        except (FieldError, InvalidSpec):
            return values
        from_fraction = spelling.tying.from_fraction if spelling.blocks < spelling.layers else 0.0
        for way in self.tying.ways(tying_map, from_fraction):
            if all(values.get(name) == value for name, value in way.items()):
                return values
            other = self._rewritten(values, way, spelling)
            if other is not None:
                return other
        return values

    def partial(self, spec: TrialSpec) -> dict[str, Any]:
        """The values of a spec that lie in the space, whatever the rest of the spec is. For display."""
        point = self.point(spec)
        if point is not None:
            return point
        return self._active({**self._plain(spec), **next(iter(self._ways_of(spec)), {})})

    def random(self, rng: random.Random) -> dict[str, Any]:
        """A canonical point, each dimension drawn evenly."""
        values: dict[str, Any] = {}
        for each in self.dimensions:
            if self.is_active(each.name, values):
                values[each.name] = each.parameter.draw(rng)
        return self._canonical(values)

    def points(self) -> Iterator[dict[str, Any]]:
        """Every canonical point, each once, where `count` is finite."""
        return (values for values in self._walk(0, {}) if self._canonical(values) == values)

    def _walk(self, place: int, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if place == len(self.dimensions):
            yield values
            return
        each = self.dimensions[place]
        if not self.is_active(each.name, values):
            yield from self._walk(place + 1, values)
            return
        options = each.parameter.values
        if self._owners.get(each.name) == "free":  # a block's number is at most one above those before
            highest = max((v for name, v in values.items() if self._owners.get(name) == "free"), default=0)
            options = options[: highest + 2]
        for value in options:
            yield from self._walk(place + 1, {**values, each.name: value})

    def _active(self, point: Point) -> dict[str, Any]:
        """The point's values of active dimensions, in their order."""
        values: dict[str, Any] = {}
        for each in self.dimensions:
            if each.name in point and self.is_active(each.name, values):
                values[each.name] = point[each.name]
        return values

    def _whole(self, point: Point) -> dict[str, Any] | None:
        """The same, or None where the point leaves one of them out."""
        values: dict[str, Any] = {}
        try:
            for each in self.dimensions:
                if self.is_active(each.name, values):
                    values[each.name] = point[each.name]
        except (KeyError, InvalidSpec):
            return None
        return values

    def _applies(self, path: str, values: Point) -> bool:
        """Whether a path of the space takes a value of its own."""
        if path in (LAYERS, BLOCKS) and values.get(FAMILY) in self.setting(path):
            return False
        condition = self._conditions.get(path)
        return condition is None or condition.holds(lambda name: self._read(name, values))

    def _read(self, path: str, values: Point) -> Any:
        """What a condition reads: the value that the spec will have, or of the families' own, None where absent."""
        if path in values:
            return values[path]
        if path in (LAYERS, BLOCKS) and values.get(FAMILY) in self.setting(path):
            spelling = self._spelling(values, None)
            assert spelling is not None
            return spelling.layers if path == LAYERS else spelling.blocks
        return None if path in self._owners or path == FAMILY else value_at(self._data, path)

    def setting(self, path: str) -> frozenset[FamilyName]:
        """The families of tying maps that set this path, in which a parameter for it means nothing."""
        return self.tying.setting(path) if isinstance(self.tying, TyingFamilies) else frozenset()

    def _layers(self, values: Point, filled: Any) -> int:
        return int(
            values.get(LAYERS, filled if self.fill_path == LAYERS and filled else self._spec.sharing.virtual_layers)
        )

    def _spelling(self, values: Point, filled: Any) -> Spelling | None:
        """What the point says of the tying; None where it leaves that to the base."""
        if self.tying is None or (FAMILY not in values and TYING not in values):
            return None
        blocks = filled if self.fill_path == BLOCKS and filled else self._spec.sharing.unique_blocks
        return self.tying.spell(values, self._layers(values, filled), int(values.get(BLOCKS, blocks)))

    def _built(self, values: Point, gang: GangConfig, filled: Any, changes: Mapping[str, Any]) -> TrialSpec:
        put = {path: value for path, value in values.items() if path in self._sampled}
        if filled is not None and self.fill_path is not None:
            put[self.fill_path] = filled
        if FAMILY in values:
            spelling = self._spelling(values, filled)
            assert spelling is not None and isinstance(self.tying, TyingFamilies)
            self.tying.require(values[FAMILY], spelling)
            tying = spelling.tying.model_dump() if changes else spelling.tying
            put |= {LAYERS: spelling.layers, BLOCKS: spelling.blocks, TYING: tying}
        data = _put(self._base, put)
        if changes:
            return parse_spec(override({**data, "gang": gang.model_dump()}, changes))
        return parse_spec({**data, "gang": gang})

    def _plain(self, spec: TrialSpec) -> dict[str, Any]:
        """The values of a spec at the paths that are dimensions, but for its tying."""
        found = {path: reader.read(spec) for path, reader in self._readers.items() if path != TYING}
        return {path: value for path, value in found.items() if value is not ABSENT}

    def _ways_of(self, spec: TrialSpec) -> tuple[Mapping[str, Any], ...]:
        if self.tying is None:
            return ()
        sharing = spec.sharing
        late = sharing.tying.from_fraction if sharing.unique_blocks < sharing.virtual_layers else 0.0
        return self.tying.ways(sharing.tying_map, late)

    def _makes(self, values: Point, spec: TrialSpec) -> bool:
        """Whether a point's values make this spec, but for what the study's space leaves open."""
        filled = None
        if self.fill_path is not None and self._applies(self.fill_path, values):
            filled = value_at(spec, self.fill_path)
            if filled not in self._to_fill:
                return False
        try:
            built = self._built(values, spec.gang, filled, {})
        except InvalidSpec:
            return False
        update = dict(self._aside)
        if built.sharing.tying != spec.sharing.tying and _says_the_same(built.sharing, spec.sharing):
            update["sharing"] = spec.sharing.model_copy(update={"tying": built.sharing.tying})
        bare = spec.model_copy(update=update)
        return built == bare or built.canonical_hash == bare.canonical_hash

    def _rewritten(self, values: Point, way: Point, spelling: Spelling) -> dict[str, Any] | None:
        """The same spec with its tying said in this way; None where the space does not have it."""
        here = {path: values.get(path, self._at_base[path]) for path in self._sampled if path != TYING}
        here |= {path: n for path, n in ((LAYERS, spelling.layers), (BLOCKS, spelling.blocks)) if path in here}
        other = self._whole({**{path: value for path, value in here.items() if value is not ABSENT}, **way})
        if other is None or any(name not in other for name in way):
            return None
        for path, value in here.items():
            if path in (LAYERS, BLOCKS):
                fits = path not in other or self._sampled[path].contains(value)
            else:
                fits = other.get(path, self._at_base[path]) == value
            if not fits:
                return None
        said = self._spelling(other, None)
        assert said is not None
        return other if (said.layers, said.blocks) == (spelling.layers, spelling.blocks) else None

    def _tying_of(self, space: Space) -> TyingFamilies | TyingChoices | None:
        parameter = space.get(TYING)
        if parameter is None:
            return None
        if parameter.choice is not None:
            return TyingChoices(parameter.choice)
        assert parameter.families is not None
        sharing = self._spec.sharing
        layers, blocks = (
            _most(space.get(LAYERS), sharing.virtual_layers),
            _most(space.get(BLOCKS), sharing.unique_blocks),
        )
        return TyingFamilies(parameter.families, layers, blocks)

    def _listed(self, space: Space) -> dict[str, Dimension]:
        """The dimensions by name, as the space lists them."""
        found: dict[str, Dimension] = {}
        for path, parameter in space.items():
            if path == TYING and isinstance(self.tying, TyingFamilies):
                for name, owner, own in self.tying.dimensions:
                    found[name] = Dimension(name, own)
                    if owner is not None:
                        self._owners[name] = owner
            elif parameter.is_sampled:
                found[path] = Dimension(path, parameter)
        return found

    def _ordered(self, listed: Mapping[str, Dimension]) -> Iterator[Dimension]:
        """Each after those that decide whether it is active, else as listed. Raises InvalidSpec for a cycle."""
        waiting = {name: self._deciding(name) & listed.keys() for name in listed}
        while waiting:
            free = next((name for name, before in waiting.items() if not before & waiting.keys()), None)
            if free is None:
                raise InvalidSpec(tuple(self._cyclic(waiting)))
            del waiting[free]
            yield listed[free]

    def _cyclic(self, waiting: Mapping[str, set[str]]) -> Iterator[Problem]:
        """The conditions that decide on each other, among dimensions with those that each waits for."""
        while idle := waiting.keys() - set().union(*waiting.values()):
            waiting = {name: before for name, before in waiting.items() if name not in idle}
        for path in (TYING if name == FAMILY else name for name in waiting):
            if path in self._conditions:
                message = "depends, through what it reads, on whether it holds itself"
                yield Problem(f"space.{path}.when", self._conditions[path].text, message)

    def _deciding(self, name: str) -> set[str]:
        """The dimensions that decide whether this one is active."""
        owner = self._owners.get(name)
        if owner is not None:
            return {FAMILY, LAYERS} if owner == "free" else {FAMILY}
        found = {FAMILY} if self.setting(name) else set()
        condition = self._conditions.get(TYING if name == FAMILY else name)
        for path in condition.paths if condition is not None else ():
            found |= self.sources(path)
        return found

    def sources(self, path: str) -> set[str]:
        """What decides on the value that a condition reads at this path: dimensions, and a path to fill."""
        setting, found = self.setting(path), {path}
        if setting:
            found |= {FAMILY, *(name for name, owner in self._owners.items() if owner in setting)}
            found |= {LAYERS, BLOCKS} if setting & {"late_loop", "free"} else set()
        return found

    def _count(self) -> int | float:
        """How many points there are, and more where conditions leave some out or tyings say the same."""
        counts = {each.name: each.parameter.count for each in self.dimensions if each.name not in self._owners}
        if not isinstance(self.tying, TyingFamilies):
            return inf if inf in counts.values() else prod(counts.values())
        others = prod((n for name, n in counts.items() if name not in (FAMILY, LAYERS, BLOCKS)), start=1)
        depths = self._sampled[LAYERS].values if LAYERS in counts else (self._spec.sharing.virtual_layers,)
        total: int | float = 0
        for family in self.tying.parameters:
            free_layers = 1 if family == "free" or family in self.setting(LAYERS) else counts.get(LAYERS, 1)
            free_blocks = 1 if family in self.setting(BLOCKS) else counts.get(BLOCKS, 1)
            total += self.tying.count(family, depths) * free_layers * free_blocks
        if TYING in self._conditions:
            total += counts.get(LAYERS, 1) * counts.get(BLOCKS, 1)
        return total * others


def _says_the_same(one: SharingConfig, other: SharingConfig) -> bool:
    return one.canonical().tying == other.canonical().tying


def value_at(data: Any, path: str) -> Any:
    """The value at a path of a spec or of its plain data; None where there is none."""
    for name in path.split("."):
        data = data.get(name) if isinstance(data, Mapping) else getattr(data, name, None)
    return data


def _most(parameter: Parameter | None, at_base: int) -> int:
    """The most that virtual layers or blocks may be."""
    if parameter is None:
        return at_base
    values = parameter.fill.range.values if parameter.fill is not None else parameter.values
    return int(max([*values, at_base]))


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
