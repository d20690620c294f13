"""Tables fit their terminal: text is cut, the least of columns goes, and a number is always whole."""

import io

import pytest
from rich.console import Console

from api.tables import Column, Grid, plain

COLUMNS = (
    Column("name", left=True, cut=6), Column("state", left=True), Column("bytes"), Column("params", 2),
    Column("sec", 1),
)  # fmt: skip
ROWS = [("a-long-name", "running", "15,999,000", "411,392,676", "9.0"), ("b", "complete", "7", "1", "600.0")]


def test_without_a_width_a_table_is_whole() -> None:
    assert Grid(COLUMNS, ROWS, "Title").lines() == [
        "Title",
        "name         state          bytes       params    sec",
        "a-long-name  running   15,999,000  411,392,676    9.0",
        "b            complete           7            1  600.0",
    ]


@pytest.mark.parametrize("width", range(24, 60))
def test_a_table_keeps_to_its_width_and_its_numbers_stay_whole(width: int) -> None:
    grid = Grid(COLUMNS, ROWS)
    header, first, second, *rest = grid.lines(width)
    least = len("a-lon… running  15,999,000")
    assert max(map(len, (header, first, second))) <= max(width, least)
    assert first.split()[2] == "15,999,000"
    missing = [column.name for column in COLUMNS if column.name not in header]
    assert missing == [name for name in ("params", "sec") if name in missing]
    assert "sec" not in missing or "params" in missing  # what matters least goes first
    assert rest == ([f"(no room for {', '.join(missing)})"] if missing else [])


def test_a_wide_terminal_cuts_nothing() -> None:
    assert Grid(COLUMNS, ROWS).lines(200) == Grid(COLUMNS, ROWS).lines()


def test_wide_letters_count_as_two() -> None:
    lines = Grid((Column("a", left=True), Column("b")), [("学習", "1"), ("x", "2")]).lines()
    assert lines == ["a     b", "学習  1", "x     2"]


def test_a_terminal_shows_states_in_colour_unless_it_is_asked_not_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def printed() -> str:
        out = io.StringIO()
        Console(file=out, force_terminal=True, width=80, color_system="standard").print(Grid(COLUMNS, ROWS))
        return out.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32mcomplete" in printed()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[32m" not in printed()


def test_what_a_user_wrote_cannot_speak_to_the_terminal() -> None:
    assert plain("a\x1b[31mred\x07\r\nb\x9bc ü–±") == r"a\x1b[31mred\x07\r\nb\x9bc ü–±"
