"""A search space: dotted paths of a TrialSpec, each with the values it may take. Optuna-free."""

import json
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from math import inf
from typing import Any

from pydantic import Field, model_validator

from worker.shape import FieldError, Frozen
from worker.spec import InvalidSpec, Problem, TrialSpec, override, parse_spec

Scalar = bool | int | float | str | None
LARGEST = 10**12  # above, samplers that work in floats no longer tell the logarithms of neighbours apart
NARROWEST, TINIEST = 1e-12, 1e-100  # continuous ranges: relative to the larger end, and in all
DIGITS = 15  # a decimal of so many is read and written as a float without loss


class Parameter(Frozen):
    """The values of one path: `choice` of any JSON values, or numbers from `low` to `high`, both included.

    Whole numbers are sampled where low, high and step are whole. `log` samples the logarithm evenly. Values in steps
    are exact decimals, low + n · step, the last of them at most high.
    """

    choice: tuple[Any, ...] | None = Field(default=None, min_length=1)
    low: int | float | None = None
    high: int | float | None = None
    step: int | float | None = Field(default=None, gt=0)
    log: bool = False

    @model_validator(mode="after")
    def _check(self) -> "Parameter":
        if self.choice is not None:
            if (self.low, self.high, self.step, self.log) != (None, None, None, False):
                raise FieldError("choice", list(self.choice), "takes no low, high, step or log beside it")
            if len({as_category(value) for value in self.choice}) != len(self.choice):
                raise FieldError("choice", list(self.choice), "must name each value once")
            return self
        if self.low is None or self.high is None:
            raise FieldError("low", self.low, "give either choice, or both low and high")
        if self.low > self.high:
            raise FieldError("low", self.low, f"must be at most high, {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise FieldError("log", True, "needs low above 0 and no step")
        self._check_size(self.low, self.high)
        return self

    def _check_size(self, low: float, high: float) -> None:
        """Raises FieldError where the numbers are too large, too close or too fine to be told apart as floats."""
        for name, number in (("low", low), ("high", high), ("step", self.step or 0)):
            if abs(number) > LARGEST:
                raise FieldError(name, number, f"must be from -{LARGEST:.0e} to {LARGEST:.0e}")
        if self.whole:
            return
        if self.step is not None:
            finest = min(_exponent(low), _exponent(self.step))
            largest = Decimal(str(max(abs(low), abs(high)))).adjusted()
            if largest - finest + 1 > DIGITS:
                raise FieldError("step", self.step, f"must be such that every value has at most {DIGITS} digits")
        else:
            least = max(NARROWEST * max(abs(low), abs(high)), TINIEST)
            if 0 < high - low < least:
                raise FieldError("high", high, f"must be low, {low}, or above it by at least {least:.0e}")

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)

    @property
    def count(self) -> int | float:
        """How many values it can take; infinite where it is continuous."""
        if self.choice is not None:
            return len(self.choice)
        assert self.low is not None
        assert self.high is not None
        if self.low == self.high:
            return 1
        if not self.whole and self.step is None:
            return inf
        return (_exact(self.high) - _exact(self.low)) // _exact(self.step or 1) + 1

    def value_at(self, index: int) -> Any:
        """Value number `index` of those that `count` counts, where it is finite."""
        if self.choice is not None:
            return self.choice[index]
        assert self.low is not None
        value = _exact(self.low) + index * _exact(self.step or 1)
        return int(value) if self.whole else float(value)

    def contains(self, value: Any) -> bool:
        """Whether the value is one that this parameter can take."""
        if self.choice is not None:
            return as_category(value) in {as_category(choice) for choice in self.choice}
        assert self.low is not None
        assert self.high is not None
        if isinstance(value, bool) or not isinstance(value, int | float) or not self.low <= value <= self.high:
            return False
        if self.whole and value != int(value):
            return False
        if self.step is None:
            return True
        return abs(self.steps_to(value) - round(self.steps_to(value))) < 1e-6

    def steps_to(self, value: float) -> Fraction:
        """How many steps from low the value lies: a whole number at the values, hardly more at sums of floats."""
        assert self.low is not None
        return (_exact(value) - _exact(self.low)) / _exact(self.step or 1)


Space = Mapping[str, Parameter]
_FIXED = {
    "gang": "the study's gangs say which shapes to propose for",
    "seed": "it is not part of the configuration",
    "limits": "they are not part of the configuration",
    "schema_version": "there is one",
}


def as_category(value: Any) -> Scalar:
    """A JSON value as what Optuna takes for a category: itself where scalar, else its canonical JSON text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value, sort_keys=True)


def apply(base: Mapping[str, Any], params: Mapping[str, Any]) -> TrialSpec:
    """The base spec with sampled parameters (path -> JSON value) put in. Raises InvalidSpec."""
    return parse_spec(override(base, params))


def check_space(base: Mapping[str, Any], space: Space) -> None:
    """Raises InvalidSpec naming, as space.<path>, each path that cannot vary and each value no spec could take."""
    problems: list[Problem] = []
    for path, parameter in space.items():
        problems += _path_problems(path, space) or _value_problems(base, path, parameter)
    if problems:
        raise InvalidSpec(tuple(problems))


def _path_problems(path: str, space: Space) -> list[Problem]:
    if path.split(".")[0] in _FIXED:
        return [Problem(f"space.{path}", path, f"cannot vary: {_FIXED[path.split('.')[0]]}")]
    return [
        Problem(f"space.{path}", path, f"lies inside {other}, which varies too: give one of the two")
        for other in space
        if path.startswith(f"{other}.")
    ]


def _value_problems(base: Mapping[str, Any], path: str, parameter: Parameter) -> list[Problem]:
    """What is wrong with values at their own path; what is wrong between paths depends on the other parameters."""
    problems: list[Problem] = []
    for value in _probes(parameter):
        try:
            apply(base, {path: value})
        except InvalidSpec as error:
            own = [problem for problem in error.problems if problem.kind != "rule"]
            if own and own[0].kind == "unknown":
                return [Problem(f"space.{path}", path, "is not a path of a trial's spec", "unknown")]
            problems += [Problem(f"space.{path}", value, problem.message, "value") for problem in own]
    return problems


def _probes(parameter: Parameter) -> tuple[Any, ...]:
    """Values that stand for all: every choice, or both ends and, of numbers that are not whole, one between them."""
    if parameter.choice is not None:
        return parameter.choice
    low, high = parameter.low, parameter.high
    assert low is not None
    assert high is not None
    between = low + (parameter.step or (high - low) * 0.381966)
    return (low, high) if parameter.whole or between > high else (low, high, between)


def _exact(number: float) -> Fraction:
    """The number as it is written, which is what a step of 0.1 means."""
    return Fraction(str(number))


def _exponent(number: float) -> int:
    """The power of ten of the number's last digit that is not 0; 0 for 0."""
    exponent = Decimal(str(number)).normalize().as_tuple().exponent
    assert isinstance(exponent, int), "a parameter's numbers are finite"
    return exponent
