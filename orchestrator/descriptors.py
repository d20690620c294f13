"""A spec in numbers that a surrogate can compare: how large it is, how its layers share, where in the space it lies."""

from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from itertools import pairwise
from math import log, log2
from typing import Any

import numpy as np
from numpy.typing import NDArray

from orchestrator.points import Dimension, Domain
from orchestrator.space import as_category
from worker.inventory import count_parameters
from worker.spec import TrialSpec
from worker.tying import TyingMap

COVERED = ("model.width", "sharing.virtual_layers", "sharing.unique_blocks", "sharing.lora.rank", "sharing.tying")
LOOKED_AT = 12  # choices of a parameter up to which each is a direction of its own

Features = NDArray[np.float64]


class Descriptors:
    """Turns specs and points of one space into rows of features. `groups` says what each is about: the size, the
    sharing, the LoRA, or the rest."""

    def __init__(self, domain: Domain) -> None:
        self._dimensions = [each for each in domain.dimensions if not each.name.startswith(COVERED)]
        self._widths = [_width(each) for each in self._dimensions]
        counts = {"size": 2, "sharing": 10, "lora": 2, "rest": sum(self._widths)}
        self.groups = tuple(group for group, count in counts.items() for _ in range(count))

    def row(self, spec: TrialSpec, point: Mapping[str, Any]) -> Features:
        """The features of a spec at its point. The first is its size: log2 of its parameters."""
        model, sharing = spec.model, spec.sharing
        numbers = [log2(count_parameters(model, sharing)), log2(model.width)]
        numbers += _of_map(sharing.tying_map)
        numbers.append(sharing.tying.from_fraction)
        numbers += [log2(1 + sharing.lora.rank), len(sharing.lora.paths) if sharing.lora.rank else 0]
        for dimension, width in zip(self._dimensions, self._widths, strict=True):
            numbers += _of_value(dimension, point.get(dimension.name), dimension.name in point, width)
        return np.array(numbers, dtype=np.float64)


@lru_cache(maxsize=4096)
def _of_map(tying_map: TyingMap) -> tuple[float, ...]:
    """Depth and blocks; how soon, how closely and how often blocks come again; whether the ends are their own."""
    layers, uses = len(tying_map), Counter(tying_map)
    last: dict[int, int] = {}
    distances: list[int] = []
    for layer, block in enumerate(tying_map):
        if block in last:
            distances.append(layer - last[block])
        last[block] = layer
    again = sum(first == second for first, second in pairwise(tying_map))
    first_reuse = next((layer for layer in range(layers) if tying_map[layer] in tying_map[:layer]), layers)
    return (
        log2(layers),
        log2(len(uses)),
        len(uses) / layers,
        sum(distances) / len(distances) / layers if distances else 0.0,
        again / max(layers - 1, 1),
        max(uses.values()) / layers,
        first_reuse / layers,
        float(uses[tying_map[0]] == 1),
        float(uses[tying_map[-1]] == 1),
    )


def _width(dimension: Dimension) -> int:
    choice = dimension.parameter.choice
    if choice is None or _is_numeric(choice):
        return 1
    return len(choice) if len(choice) <= LOOKED_AT else 1


def _of_value(dimension: Dimension, value: Any, active: bool, width: int) -> list[float]:
    """A number by its place between the ends, others each by a direction of its own; in the middle where inactive."""
    parameter = dimension.parameter
    if parameter.choice is not None:
        if width > 1:
            return [float(active and as_category(value) == as_category(each)) for each in parameter.choice]
        if not active:
            return [0.5]
        ordered = (
            sorted(parameter.choice) if _is_numeric(parameter.choice) else list(map(as_category, parameter.choice))
        )
        return [
            ordered.index(value if _is_numeric(parameter.choice) else as_category(value)) / max(len(ordered) - 1, 1)
        ]
    low, high = parameter.low, parameter.high
    assert low is not None and high is not None
    if not active or low == high:
        return [0.5]
    if parameter.log:
        return [log(value / low) / log(high / low)]
    return [float((value - low) / (high - low))]


def _is_numeric(choice: tuple[Any, ...]) -> bool:
    return all(isinstance(each, int | float) and not isinstance(each, bool) for each in choice)
