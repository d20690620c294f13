"""The small language of conditions."""

import re
from typing import Any

import pytest

from orchestrator.condition import parse_condition

VALUES = {"a": 3, "b.c": "cycle", "d": None, "e": True, "f": 0.5, "g": "x and y"}


@pytest.mark.parametrize(
    ("text", "holds"),
    [
        ("a < 4", True), ("a<3", False), ("a <= 3", True), ("a > 3", False), ("a >= 3", True),
        ("a == 3", True), ("a == 3.0", True), ("a != 3", False), ("a in [1, 3]", True), ("a in [1, 2]", False),
        ("b.c == cycle", True), ("b.c == 'cycle'", True), ('b.c != "split"', True), ("b.c in [tail, cycle]", True),
        ("d == null", True), ("d != null", False), ("d < 4", False), ("d == 0", False),
        ("e == true", True), ("e == 1", False), ("e in [1, 0]", False), ("e > 0", False), ("f < 1e3", True),
        ("f == 5e-1", True),
        ("g == 'x and y'", True), ("a < 4 and b.c == cycle", True), (" a<4  and  b.c==split and e == true ", False),
        ("b.c < 4", False),
    ],
)  # fmt: skip
def test_a_condition_holds_where_all_its_clauses_do(text: str, holds: bool) -> None:
    assert parse_condition(text).holds(VALUES.get) is holds


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "must be clauses"),
        ("a", "must be clauses"),
        ("a <", "must be clauses"),
        ("a = 4", "must be clauses"),
        ("a < 4 or b.c == 1", "must be clauses"),
        ("a < 4 and", "must be clauses"),
        ("a < 4 and and a > 1", "must be clauses"),
        ("__import__('os')", "must be clauses"),
        ("a < b c", "must be clauses"),
        ("a < cycle", "< compares numbers, and cycle is none"),
        ("a in 4", "`in` needs a list"),
        ("a == 2020-01-01", "neither a number"),
    ],
)
def test_what_is_no_condition_is_refused_and_says_why(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        parse_condition(text)


def test_a_condition_names_each_path_it_reads_once() -> None:
    condition = parse_condition("a > 1 and b.c == cycle and a < 4")
    assert condition.paths == ("a", "b.c")
    assert [clause.numbers for clause in condition.of("a")] == [(1,), (4,)]


def test_evaluation_reads_no_more_than_paths() -> None:
    read: list[Any] = []
    parse_condition("a.b.c == 4 and d == 1").holds(read.append)
    assert read == ["a.b.c"]
