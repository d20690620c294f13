"""Where specs differ, by dotted path."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from worker.spec import TrialSpec, parse_spec


def flat(spec: TrialSpec) -> dict[str, Any]:
    """A spec's values by dotted path, in its own order; a part that may be absent, and is, is a None of its own."""
    return dict(_leaves(spec.model_dump(mode="json"), ""))


def differences(base: Mapping[str, Any], spec: TrialSpec) -> dict[str, Any]:
    """Where a spec is not the one that a study's base says: path -> the spec's value."""
    before = flat(parse_spec(base))
    return {path: value for path, value in flat(spec).items() if before.get(path) != value}


@dataclass(frozen=True)
class Line:
    """One path with the value that each of some specs has there; None also where a spec has no such part."""

    path: str
    values: tuple[Any, ...]

    @property
    def differs(self) -> bool:
        return any(value != self.values[0] for value in self.values[1:])


def side_by_side(specs: Sequence[TrialSpec]) -> list[Line]:
    """Every path of the specs, in their order."""
    each = [flat(spec) for spec in specs]
    paths = dict.fromkeys(path for values in each for path in values)
    return [Line(path, tuple(values.get(path) for values in each)) for path in paths]


def _leaves(data: Mapping[str, Any], path: str) -> Iterator[tuple[str, Any]]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}.")
        else:
            yield f"{path}{name}", value
