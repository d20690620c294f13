"""Tying maps: which block each virtual layer applies, and the patterns that make them."""

from collections.abc import Callable, Iterable
from typing import Any, Literal

from pydantic import Field, model_validator

from worker.shape import FieldError, Frozen

TyingMap = tuple[int, ...]  # virtual layer -> block


class TyingConfig(Frozen):
    """Which block each virtual layer applies, by pattern (written here for 6 layers and 3 blocks) or explicitly.

    cycle 012012 · sequence 001122 · palindrome 012210 · loop: blocks `start`..`end` (inclusive) run `passes` times in a
    row, every other block once · tail: the last block but `after` is applied until only `after` layers are left ·
    split: block 0 for the first half, rounded down, block 1 for the rest · explicit: `map`. A bare pattern name or a
    bare list is accepted for the whole.

    Before `from_fraction` of the budget is spent every block is applied once: the tying map is a function of progress
    (parameter-golf pull requests 1394 and 1855).
    """

    pattern: Literal["cycle", "sequence", "palindrome", "loop", "tail", "split", "explicit"] = "cycle"
    start: int | None = Field(default=None, ge=0)
    end: int | None = Field(default=None, ge=0)
    passes: int | None = Field(default=None, ge=2, le=256)
    after: int | None = Field(default=None, ge=0)
    map: TyingMap | None = None
    from_fraction: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"pattern": data}
        if isinstance(data, list | tuple):
            return {"pattern": "explicit", "map": data}
        if not isinstance(data, dict | TyingConfig):
            raise ValueError("must be a pattern's name, a list of blocks, or a mapping with a pattern")
        return data

    @model_validator(mode="after")
    def _check(self) -> "TyingConfig":
        needed: dict[str, tuple[str, ...]] = {"loop": ("start", "end", "passes"), "explicit": ("map",)}
        allowed = {**needed, "tail": ("after",)}
        for name in ("start", "end", "passes", "after", "map"):
            value = getattr(self, name)
            if value is None and name in needed.get(self.pattern, ()):
                raise FieldError(name, None, f"the pattern {self.pattern!r} needs it")
            if value is not None and name not in allowed.get(self.pattern, ()):
                raise FieldError(name, value, f"the pattern {self.pattern!r} does not take it")
        return self


def canonical_map(blocks: Iterable[int]) -> TyingMap:
    """The same tying with blocks numbered by first use (a restricted growth string): equal maps share weights alike."""
    names: dict[int, int] = {}
    return tuple(names.setdefault(block, len(names)) for block in blocks)


def expand(tying: TyingConfig, layers: int, blocks: int) -> TyingMap:
    """The map that a tying gives, blocks numbered as it says. Raises FieldError where layers and blocks do not suit."""
    expanded = _EXPANDERS[tying.pattern](tying, layers, blocks)
    path = "tying.map" if tying.pattern == "explicit" else "tying.pattern"
    value = list(expanded) if tying.pattern == "explicit" else tying.pattern
    if len(expanded) != layers:
        raise FieldError(path, value, f"gives {len(expanded)} layers; virtual_layers says {layers}")
    missing = sorted(set(range(blocks)) - set(expanded))
    if missing:
        raise FieldError(path, value, f"skips block {missing[0]}; every block from 0 to {blocks - 1} must be used")
    outside = sorted(set(expanded) - set(range(blocks)))
    if outside:
        raise FieldError(path, value, f"names block {outside[0]}; blocks run from 0 to {blocks - 1}")
    return expanded


def _palindrome(layers: int, blocks: int) -> TyingMap:
    period = [*range(blocks), *reversed(range(blocks))]
    return tuple(period[i % len(period)] for i in range(layers))


def _loop(tying: TyingConfig, blocks: int) -> TyingMap:
    assert tying.start is not None and tying.end is not None and tying.passes is not None
    if tying.start > tying.end:
        raise FieldError("tying.start", tying.start, f"must be at most tying.end, {tying.end}")
    if tying.end >= blocks:
        raise FieldError("tying.end", tying.end, f"must be below unique_blocks, {blocks}")
    segment = tuple(range(tying.start, tying.end + 1))
    return (*range(tying.start), *segment * tying.passes, *range(tying.end + 1, blocks))


def _tail(tying: TyingConfig, layers: int, blocks: int) -> TyingMap:
    after = tying.after or 0
    if after >= blocks:
        raise FieldError("tying.after", after, f"must be below unique_blocks, {blocks}")
    tied = blocks - 1 - after
    return (*range(tied), *[tied] * (layers - blocks + 1), *range(tied + 1, blocks))


_EXPANDERS: dict[str, Callable[[TyingConfig, int, int], TyingMap]] = {
    "cycle": lambda tying, layers, blocks: tuple(i % blocks for i in range(layers)),
    "sequence": lambda tying, layers, blocks: tuple(i * blocks // layers for i in range(layers)),
    "palindrome": lambda tying, layers, blocks: _palindrome(layers, blocks),
    "loop": lambda tying, layers, blocks: _loop(tying, blocks),
    "tail": lambda tying, layers, blocks: _tail(tying, layers, blocks),
    "split": lambda tying, layers, blocks: tuple(int(i >= layers // 2) for i in range(layers)),
    "explicit": lambda tying, layers, blocks: tying.map or (),
}
