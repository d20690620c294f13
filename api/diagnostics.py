"""What a trained model revealed, as small tables for its page: only those that its diagnostics can fill."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """A few numbers under a title: names down, columns across; empty cells are dashes."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def tables(diagnostics: Mapping[str, Any]) -> list[Table]:
    """Tables of the diagnostics of a result, in the order in which they are read."""
    contraction = diagnostics.get("contraction", {})
    depths = [["–", *_numbers(contraction.get("changes", ()))], _numbers(contraction.get("bpb", ()))]
    recurrence = [(str(cycles), cells) for cycles, cells in enumerate(zip(*depths, strict=False))]
    found = [
        Table("Scores", "By how text is cut into windows.", ("BPB",), _column(diagnostics.get("scores", {}))),
        Table("Averages", "Before quantisation.", ("BPB",), _column(diagnostics.get("averages", {}))),
        Table("Lost to quantisation", "With this class alone quantised.", ("BPB",), _column(_loss(diagnostics))),
        Table("Spread of scales", "Between virtual layers.", ("σ",), _column(diagnostics.get("scale_spread", {}))),
        Table("Extra recurrence", "Each cycle of the tied blocks once more.", ("change", "BPB"), tuple(recurrence)),
    ]
    return [table for table in found if table.rows]


def _loss(diagnostics: Mapping[str, Any]) -> dict[str, float]:
    losses: dict[str, float] = diagnostics.get("quantisation_loss", {})
    return {name.replace("_", " "): loss for name, loss in losses.items()}


def _column(values: Mapping[str, float | None]) -> tuple[tuple[str, tuple[str, ...]], ...]:
    return tuple(zip(values, ((number,) for number in _numbers(list(values.values()))), strict=True))


def _numbers(values: Sequence[float | None]) -> list[str]:
    return ["–" if value is None else f"{value:z.4f}" for value in values]


def layers(tying_map: Sequence[int], diagnostics: Mapping[str, Any]) -> Table | None:
    """What each virtual layer shows of itself: its block, its gates and its influence; None before there is any."""
    gammas: dict[str, list[float]] = diagnostics.get("gammas") or {}
    columns = {f"γ {path}": gates for path, gates in gammas.items()}
    columns["Block Influence"] = list(diagnostics.get("block_influence", ()))
    filled = {name: values for name, values in columns.items() if len(values) == len(tying_map)}
    if not filled:
        return None
    rows = (
        (str(layer), (str(block), *(f"{values[layer]:.4f}" for values in filled.values())))
        for layer, block in enumerate(tying_map)
    )
    return Table("Layers", "", ("block", *filled), tuple(rows))
