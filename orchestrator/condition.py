"""Conditions: when a parameter of a space applies, as a person writes it, such as `sharing.unique_blocks < 4`."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import yaml

_CLAUSE = re.compile(
    r"""\s*(?P<path>[A-Za-z_][\w.]*)\s*(?P<op><=|>=|==|!=|<|>|\bin\b)\s*"""
    r"""(?P<literal>"(?:[^"\\]|\\.)*"|'(?:[^']|'')*'|\[[^\[\]]*\]|[^\s<>=!"'\[\]]+)\s*(?:$|\s(?P<more>and)\s)"""
)
_FORM = "must be clauses such as `model.width < 512`, joined by `and`; operators are < <= > >= == != in"


@dataclass(frozen=True)
class Clause:
    """One comparison of the value at a path with a literal."""

    path: str
    operator: str
    literal: Any

    def holds(self, value: Any) -> bool:
        """Whether it holds for this value. Order is of numbers alone: nothing else is above or below anything."""
        if self.operator == "in":
            return any(_same(value, each) for each in self.literal)
        if self.operator in ("==", "!="):
            return _same(value, self.literal) == (self.operator == "==")
        if not _is_number(value):
            return False
        if self.operator in ("<", "<="):
            return bool(value < self.literal or (self.operator == "<=" and value == self.literal))
        return bool(value > self.literal or (self.operator == ">=" and value == self.literal))

    @property
    def numbers(self) -> tuple[float, ...]:
        """The numbers that it compares with: where what it says may change."""
        literals = self.literal if isinstance(self.literal, list) else [self.literal]
        return tuple(each for each in literals if _is_number(each))


@dataclass(frozen=True)
class Condition:
    """Clauses that must all hold."""

    text: str
    clauses: tuple[Clause, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        """What it reads, each path once."""
        return tuple(dict.fromkeys(clause.path for clause in self.clauses))

    def of(self, path: str) -> tuple[Clause, ...]:
        """The clauses about one path."""
        return tuple(clause for clause in self.clauses if clause.path == path)

    def holds(self, read: Callable[[str], Any]) -> bool:
        """Whether every clause holds for what `read` gives at its path."""
        return all(clause.holds(read(clause.path)) for clause in self.clauses)


@lru_cache(maxsize=1024)
def parse_condition(text: str) -> Condition:
    """The condition that a text says: PATH OPERATOR LITERAL joined by `and`, literals as in YAML. Raises ValueError."""
    return Condition(text, tuple(_clauses(text)))


def _clauses(text: str) -> Iterator[Clause]:
    place, more = 0, True
    while more:
        match = _CLAUSE.match(text, place)
        if match is None:
            raise ValueError(f"{_FORM}: cannot read {text[place:]!r}")
        yield _clause(match["path"], match["op"], match["literal"])
        place, more = match.end(), match["more"] is not None


def _clause(path: str, operator: str, text: str) -> Clause:
    literal = _literal(text)
    if operator == "in" and not isinstance(literal, list):
        raise ValueError(f"`in` needs a list such as [1, 2], not {text}")
    if operator in ("<", "<=", ">", ">=") and not _is_number(literal):
        raise ValueError(f"{operator} compares numbers, and {text} is none")
    return Clause(path, operator, literal)


def _literal(text: str) -> Any:
    try:
        return json.loads(text)  # first: to YAML 1e-3 is text
    except json.JSONDecodeError:
        pass
    try:
        literal = yaml.safe_load(text)
        json.dumps(literal)
    except (yaml.YAMLError, TypeError):
        raise ValueError(f"{text} is neither a number, text, true, false, null nor a list of them") from None
    return literal


def _same(one: Any, other: Any) -> bool:
    """Equal as JSON: true is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
