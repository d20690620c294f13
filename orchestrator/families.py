"""Families of tying maps: named ways to tie layers, each with few parameters; and the neighbours of one map."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from math import comb, factorial, inf, prod
from typing import Any

from orchestrator.space import FamilyName, Parameter
from worker.spec import InvalidSpec, Problem
from worker.tying import TyingConfig, TyingMap, canonical_map, expand

TYING, LAYERS, BLOCKS = "sharing.tying", "sharing.virtual_layers", "sharing.unique_blocks"
FAMILY = f"{TYING}.family"


@dataclass(frozen=True)
class Family:
    """One family: its parameters with the values that can be legal, and what of a spec it sets beside the tying."""

    parameters: Mapping[str, tuple[float, float]]
    sets: frozenset[str] = frozenset()


DEEPEST = 256  # virtual layers and blocks of a spec
_ANY, _LAST = (0, DEEPEST), (0, DEEPEST - 1)
FAMILIES: Mapping[FamilyName, Family] = {
    "cycle": Family({}),
    "sequence": Family({}),
    "palindrome": Family({}),
    "split": Family({}, frozenset({BLOCKS})),
    "core": Family(
        {"prelude": _ANY, "core": (1, DEEPEST), "coda": _ANY, "passes": (2, DEEPEST)}, frozenset({LAYERS, BLOCKS})
    ),
    "late_loop": Family(
        {"start": _LAST, "end": _LAST, "passes": (2, DEEPEST), "from_fraction": (0, 0.999)}, frozenset({LAYERS})
    ),
    "tail": Family({"after": _LAST}),
    "free": Family({"blocks": (1, DEEPEST)}, frozenset({BLOCKS})),
}


@dataclass(frozen=True)
class Spelling:
    """What a point says of the tying: the config, with the virtual layers and blocks that go with it."""

    layers: int
    blocks: int
    tying: TyingConfig

    @property
    def map(self) -> TyingMap:
        """Raises FieldError where layers and blocks do not suit the tying."""
        return canonical_map(expand(self.tying, self.layers, self.blocks))


class TyingFamilies:
    """The families of one space with their parameters: from values to a spelling, and from a map back to values."""

    def __init__(self, families: Mapping[FamilyName, Mapping[str, Parameter]], layers: int, blocks: int) -> None:
        """`layers` and `blocks` are the most that the space has for specs whose families do not set them."""
        self._layers, self._blocks = layers, blocks
        self.parameters = {name: {**self._defaults(name), **given} for name, given in families.items()}
        self.ways = lru_cache(maxsize=16_384)(self._ways)
        """Values that say a canonical map from a fraction on, the first family first: of each the smallest that do."""

    def _defaults(self, name: FamilyName) -> dict[str, Parameter]:
        """The ranges of what a person left out."""
        ends = Parameter(low=0, high=max(1, self._layers // 4))
        passes, last = Parameter(low=2, high=4), Parameter(low=0, high=self._blocks - 1)
        defaults: Mapping[str, dict[str, Parameter]] = {
            "core": {
                "prelude": ends,
                "core": Parameter(low=1, high=max(1, self._layers // 2)),
                "coda": ends,
                "passes": passes,
            },
            "late_loop": {
                "start": last,
                "end": last,
                "passes": passes,
                "from_fraction": Parameter(low=0.2, high=0.6),
            },
            "tail": {"after": last},
            "free": {"blocks": Parameter(low=1, high=self._layers)},
        }
        return defaults.get(name, {})

    @property
    def dimensions(self) -> Iterator[tuple[str, FamilyName | None, Parameter]]:
        """By name: the choice of a family, and its parameters. Of a free map one letter a layer: which block it
        applies; the first layer applies block 0."""
        yield FAMILY, None, Parameter(choice=tuple(self.parameters))
        for family, parameters in self.parameters.items():
            if family == "free":
                most = _ends(parameters["blocks"])[1]
                for layer in range(1, self._layers):
                    yield _name("free", layer), family, Parameter(low=0, high=min(layer, int(most) - 1))
            else:
                for part, parameter in parameters.items():
                    yield _name(family, part), family, parameter

    def setting(self, path: str) -> frozenset[FamilyName]:
        """The families of the space that set this path, virtual layers or blocks."""
        return frozenset(name for name in self.parameters if path in FAMILIES[name].sets)

    def reach(self, path: str) -> Iterator[Parameter]:
        """Of each family that sets virtual layers or blocks, whole numbers among which are all that it sets."""
        for family in self.setting(path):
            low, high = ({part: _ends(each)[end] for part, each in self.parameters[family].items()} for end in (0, 1))
            if family == "free":
                yield Parameter(low=int(low["blocks"]), high=int(high["blocks"]))
            elif family == "late_loop":
                longest = max(high["end"] - low["start"] + 1, 1) * (high["passes"] - 1)
                yield Parameter(low=1, high=int(self._blocks + longest))
            else:
                ends = [spell(family, each, self._layers, self._blocks) for each in (low, high)]
                numbers = [spelling.layers if path == LAYERS else spelling.blocks for spelling in ends]
                yield Parameter(low=numbers[0], high=numbers[1])

    def spell(self, values: Mapping[str, Any], layers: int, blocks: int) -> Spelling:
        """What values by dimension say, with the layers and blocks that hold where the family sets none.

        Raises InvalidSpec where a value is missing.
        """
        family: FamilyName = values[FAMILY]
        if family == "free":
            return self._free(values, layers)
        return spell(
            family, {part: _given(values, _name(family, part)) for part in self.parameters[family]}, layers, blocks
        )

    def _free(self, values: Mapping[str, Any], layers: int) -> Spelling:
        letters = (_given(values, _name("free", layer)) for layer in range(1, layers))
        tying_map = canonical_map((0, *letters))
        return Spelling(layers, max(tying_map) + 1, TyingConfig(pattern="explicit", map=tying_map))

    def require(self, family: FamilyName, spelling: Spelling) -> None:
        """Raises InvalidSpec where a free map has fewer blocks than it may have."""
        if family == "free" and spelling.blocks < (low := _ends(self.parameters["free"]["blocks"])[0]):
            message = f"applies {spelling.blocks} blocks; this family has at least {low:g}"
            raise InvalidSpec((Problem(f"{TYING}.free", list(spelling.tying.map or ()), message),))

    def examples(self, family: FamilyName) -> Iterator[dict[str, Any]]:
        """Parameters that between them make every kind of map that the family has, legal or not."""
        parameters = self.parameters[family]
        values = (
            parameter.values if parameter.count < inf else _ends(parameter)[:1] for parameter in parameters.values()
        )
        return (dict(zip(parameters, parts, strict=True)) for parts in product(*values))

    def _ways(self, tying_map: TyingMap, from_fraction: float) -> tuple[Mapping[str, Any], ...]:
        found: list[dict[str, Any]] = []
        for family, parameters in self.parameters.items():
            if family != "late_loop" and from_fraction:
                continue
            parts = self._parts(family, parameters, tying_map, from_fraction)
            if parts is not None:
                found.append({FAMILY: family, **{_name(family, part): value for part, value in parts.items()}})
        return tuple(found)

    def _parts(
        self, family: FamilyName, parameters: Mapping[str, Parameter], tying_map: TyingMap, from_fraction: float
    ) -> dict[str, Any] | None:
        layers, blocks = len(tying_map), max(tying_map) + 1
        if family == "free":
            fits = layers <= self._layers and parameters["blocks"].contains(blocks)
            return {str(layer): tying_map[layer] for layer in range(1, layers)} if fits else None
        for parts in _solutions(family, parameters, tying_map, from_fraction):
            if all(parameters[part].contains(value) for part, value in parts.items()):
                spelling = spell(family, parts, layers, blocks)
                if (spelling.layers, spelling.blocks) == (layers, blocks) and spelling.map == tying_map:
                    return parts
        return None

    def count(self, family: FamilyName, layers: tuple[int, ...]) -> int | float:
        """How many maps its parameters say at the most, of free ones for all these numbers of layers together."""
        parameters = self.parameters[family]
        if family == "free":
            most = int(_ends(parameters["blocks"])[1])
            return sum(_partitions(each, blocks) for each in layers for blocks in range(1, min(most, each) + 1))
        return prod((parameter.count for parameter in parameters.values()), start=1)


class TyingChoices:
    """A plain choice of tyings, in which some may say one map: the first of them stands for all."""

    def __init__(self, choices: tuple[Any, ...]) -> None:
        self._choices = tuple((choice, TyingConfig.model_validate(choice)) for choice in choices)
        self.ways = lru_cache(maxsize=16_384)(self._ways)

    def spell(self, values: Mapping[str, Any], layers: int, blocks: int) -> Spelling:
        return Spelling(layers, blocks, TyingConfig.model_validate(values[TYING]))

    def _ways(self, tying_map: TyingMap, from_fraction: float) -> tuple[Mapping[str, Any], ...]:
        layers, blocks = len(tying_map), max(tying_map) + 1
        return tuple(
            {TYING: choice}
            for choice, tying in self._choices
            if (blocks == layers or tying.from_fraction == from_fraction)
            and _map_of(Spelling(layers, blocks, tying)) == tying_map
        )


def _map_of(spelling: Spelling) -> TyingMap | None:
    try:
        return spelling.map
    except ValueError:
        return None


def spell(family: FamilyName, parts: Mapping[str, Any], layers: int, blocks: int) -> Spelling:
    """What a family says with these parameters, and the layers and blocks that hold where it sets none; of a free map,
    which has letters instead, one with as many blocks as it says."""
    match family:
        case "split":
            return Spelling(layers, 2, TyingConfig(pattern="split"))
        case "tail":
            return Spelling(layers, blocks, TyingConfig(pattern="tail", after=int(parts["after"])))
        case "core":
            prelude, core, coda, passes = (int(parts[part]) for part in ("prelude", "core", "coda", "passes"))
            tying = TyingConfig(pattern="loop", start=prelude, end=prelude + core - 1, passes=passes)
            return Spelling(prelude + core * passes + coda, prelude + core + coda, tying)
        case "late_loop":
            start, end, passes = (int(parts[part]) for part in ("start", "end", "passes"))
            late = float(parts["from_fraction"])
            tying = TyingConfig(pattern="loop", start=start, end=end, passes=passes, from_fraction=late)
            return Spelling(blocks + max(end - start + 1, 0) * (passes - 1), blocks, tying)
        case "free":
            tying_map = tuple(min(layer, int(parts["blocks"]) - 1) for layer in range(layers))
            return Spelling(layers, int(parts["blocks"]), TyingConfig(pattern="explicit", map=tying_map))
    return Spelling(layers, blocks, TyingConfig(pattern=family))


def _solutions(
    family: FamilyName, parameters: Mapping[str, Parameter], tying_map: TyingMap, from_fraction: float
) -> Iterator[dict[str, Any]]:
    """Parameters that may say the map, smallest first. Where a map repeats, its first repeated layer tells them."""
    layers, blocks = len(tying_map), max(tying_map) + 1
    if not parameters:
        yield {}
        return
    repeated = next((layer for layer, block in enumerate(tying_map) if block < layer), None)
    if family == "tail":
        unrepeated = range(blocks)  # of an untied map any is as good
        yield from ({"after": after} for after in (unrepeated if repeated is None else [blocks - repeated]))
    elif repeated is not None:
        start, size = tying_map[repeated], repeated - tying_map[repeated]
        passes = (layers - blocks) // size + 1
        if family == "core":
            yield {"prelude": start, "core": size, "coda": blocks - start - size, "passes": passes}
        else:
            yield {"start": start, "end": repeated - 1, "passes": passes, "from_fraction": from_fraction}


def mutations(tying_map: TyingMap, blocks: int) -> Iterator[TyingMap]:
    """Neighbours of a map with at most so many blocks: canonical, each once, never the map itself, in a fixed order.

    One layer applies another block or one of its own; two blocks become one; a block's layers are split in two, early
    and late; two layers swap; a run of layers is repeated, or one repetition of it is taken out.
    """
    seen = {canonical_map(tying_map)}
    for neighbour in _neighbours(canonical_map(tying_map)):
        mutated = canonical_map(neighbour)
        if mutated not in seen and max(mutated) < blocks and len(mutated) <= DEEPEST:
            seen.add(mutated)
            yield mutated


def _neighbours(tying_map: TyingMap) -> Iterator[TyingMap]:
    layers, blocks = len(tying_map), max(tying_map) + 1
    for layer in range(layers):
        for block in range(blocks + 1):
            yield (*tying_map[:layer], block, *tying_map[layer + 1 :])
    for one in range(blocks):
        for other in range(one + 1, blocks):
            yield tuple(one if block == other else block for block in tying_map)
    for split in range(blocks):
        places = [layer for layer, block in enumerate(tying_map) if block == split]
        for first in places[1:]:
            yield tuple(blocks if layer in places and layer >= first else b for layer, b in enumerate(tying_map))
    for one in range(layers):
        for other in range(one + 1, layers):
            swapped = list(tying_map)
            swapped[one], swapped[other] = swapped[other], swapped[one]
            yield tuple(swapped)
    yield from _loops(tying_map)


def _loops(tying_map: TyingMap) -> Iterator[TyingMap]:
    layers = len(tying_map)
    for start in range(layers):
        for end in range(start + 1, layers + 1):
            run = tying_map[start:end]
            yield (*tying_map[:end], *run, *tying_map[end:])
            if tying_map[end : end + len(run)] == run:
                yield (*tying_map[:end], *tying_map[end + len(run) :])


def _partitions(layers: int, blocks: int) -> int:
    """In how many ways layers can share exactly so many blocks: a Stirling number of the second kind."""
    onto = sum((1 - (blocks - used) % 2 * 2) * comb(blocks, used) * int(used**layers) for used in range(blocks + 1))
    return onto // factorial(blocks)


def _name(family: str, part: object) -> str:
    return f"{TYING}.{family}.{part}"


def _given(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise InvalidSpec((Problem(name, None, "is missing: this family of tying maps needs it"),))
    return values[name]


def _ends(parameter: Parameter) -> tuple[float, float]:
    """The smallest and the largest value of a parameter of numbers."""
    if parameter.choice is not None:
        return min(parameter.choice), max(parameter.choice)
    assert parameter.low is not None and parameter.high is not None
    return parameter.low, parameter.high
