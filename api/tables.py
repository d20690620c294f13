"""Tables that fit the terminal; and where they go no terminal, all of every column, for `grep` and `awk`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

GAPS = (2, 1)
"""Spaces between columns: a narrow terminal gets one, before it loses a column."""
STATE_STYLES = {
    "complete": "green", "running": "cyan", "succeeded": "green", "failed": "red", "infeasible": "yellow",
    "pruned": "dim", "stopped": "dim", "cancelled": "dim",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """Where there is no room, the column of the highest `drop` goes first; one of 0 stays.

    Text that may be cut is cut to no less than `cut` characters; numbers never are.
    """

    name: str
    drop: int = 0
    left: bool = False
    cut: int | None = None


@dataclass(frozen=True)
class Grid:
    """Rows under columns. Printed on a terminal it takes the width there is, whenever it is printed."""

    columns: tuple[Column, ...]
    rows: Sequence[tuple[str, ...]] = ()
    title: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table in the width there is. Its first lines are bold, and states have colours."""
        header = 1 if self.title else 0
        for number, parts in enumerate(self._parts(options.max_width)):
            line = Text(no_wrap=True, overflow="ignore", style="bold" if number <= header else "")
            for part in parts:
                line.append(part, STATE_STYLES.get(part.strip(), "") if number > header else "")
            line.rstrip()
            yield line

    def lines(self, width: int | None = None) -> list[str]:
        """The table as text that is so wide at the most, where its last columns allow it; without a width, whole."""
        return ["".join(parts).rstrip() for parts in self._parts(width)]

    def _parts(self, width: int | None) -> Iterator[list[str]]:
        """Line by line, the cells and the gaps between them."""
        cells = [tuple(plain(cell) for cell in row) for row in self.rows]
        natural = [
            max(cell_len(text) for text in (column.name, *(row[place] for row in cells)))
            for place, column in enumerate(self.columns)
        ]
        shown, gap, widths = self._fit(natural, width)
        if self.title:
            yield [self.title]
        for row in (tuple(column.name for column in self.columns), *cells):
            parts = [_cell(row[place], self.columns[place], widths[place]) for place in shown]
            yield [part for cell in parts for part in (cell, " " * gap)]
        left_out = [column.name for place, column in enumerate(self.columns) if place not in shown]
        if left_out and self.rows:
            yield [f"(no room for {', '.join(left_out)})"]

    def _fit(self, natural: Sequence[int], width: int | None) -> tuple[list[int], int, list[int]]:
        """Which columns are shown, how far apart, and how wide each is."""
        shown = list(range(len(self.columns)))
        if width is None:
            return shown, GAPS[0], list(natural)
        least = [min(each, column.cut or each) for each, column in zip(natural, self.columns, strict=True)]
        while True:
            for gap in GAPS:
                spare = width - sum(least[place] for place in shown) - gap * (len(shown) - 1)
                if spare >= 0:
                    return shown, gap, _shared(natural, least, shown, spare)
            first = max(shown, key=lambda place: self.columns[place].drop)
            if not self.columns[first].drop:
                return shown, GAPS[-1], least
            shown.remove(first)


def plain(text: str) -> str:
    """The text in one line that leaves the terminal alone, whatever a user or a trainer wrote into it."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def _shared(natural: Sequence[int], least: Sequence[int], shown: Sequence[int], spare: int) -> list[int]:
    """Columns that were to be cut, with what room there is to spare."""
    widths = list(least)
    for place in shown:
        more = min(natural[place] - least[place], spare)
        widths[place] += more
        spare -= more
    return widths


def _cell(text: str, column: Column, width: int) -> str:
    if cell_len(text) > width and column.cut is not None:
        return set_cell_size(text, width - 1) + "…"
    room = " " * max(width - cell_len(text), 0)
    return text + room if column.left else room + text
