"""A search space: dotted paths of a TrialSpec, each with the values it may take. Optuna-free."""

import json
from collections.abc import Mapping
from decimal import Decimal
from fractions import Fraction
from functools import cached_property
from math import exp, inf, log
from random import Random
from typing import Any, Literal, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from orchestrator.condition import Condition, parse_condition
from worker.shape import FieldError, Frozen
from worker.spec import TrialSpec, override, parse_spec

FamilyName = Literal["cycle", "sequence", "palindrome", "split", "core", "late_loop", "tail", "free"]
Scalar = bool | int | float | str | None
LARGEST = 10**12  # above, samplers that work in floats no longer tell the logarithms of neighbours apart
NARROWEST, TINIEST = 1e-12, 1e-100  # continuous ranges: relative to the larger end, and in all
MOST_TO_FILL = 4096
DIGITS = 15  # a decimal of so many is read and written as a float without loss


class FillRange(Frozen):
    """The values, in steps, of which the largest is taken whose artifact is predicted to fit with this probability."""

    probability: float = Field(default=0.9, gt=0, lt=1)
    low: int | float
    high: int | float
    step: int | float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _check(self) -> "FillRange":
        try:
            count = self.range.count
        except ValidationError as error:
            (detail,) = (each.get("ctx", {}).get("error") for each in error.errors()[:1])
            raise detail if isinstance(detail, FieldError) else ValueError(str(error)) from None
        if count > MOST_TO_FILL:
            raise FieldError("step", self.step, f"must leave at most {MOST_TO_FILL} values")
        return self

    @property
    def range(self) -> "Parameter":
        return Parameter(low=self.low, high=self.high, step=self.step)


class Parameter(Frozen):
    """The values of one path: `choice` of any JSON values; or numbers from `low` to `high`, both included; or of
    sharing.tying `families` of maps, each with its parameters; or `fill`, solved for and never sampled.

    Whole numbers are sampled where low, high and step are whole. `log` samples the logarithm evenly. Values in steps
    are exact decimals, low + n · step, the last of them at most high. Where the condition `when` does not hold the path
    keeps the base's value. What is left out of a family has a range that follows from the base.
    """

    choice: tuple[Any, ...] | None = Field(default=None, min_length=1)
    low: int | float | None = None
    high: int | float | None = None
    step: int | float | None = Field(default=None, gt=0)
    log: bool = False
    families: dict[FamilyName, "dict[str, Parameter]"] | None = Field(default=None, min_length=1)
    fill: FillRange | None = None
    when: str | None = None

    @field_validator("families", mode="before")
    @classmethod
    def _listed(cls, families: Any) -> Any:
        if isinstance(families, list | tuple):
            if len(set(map(str, families))) != len(families):
                raise ValueError("must name each family once")
            families = dict.fromkeys(map(str, families))
        if not isinstance(families, Mapping):
            return families
        known = get_args(FamilyName)
        if unknown := next((name for name in families if name not in known), None):
            raise FieldError(str(unknown), unknown, f"must be one of {', '.join(known)}")
        return {name: {} if parameters is None else parameters for name, parameters in families.items()}

    @field_validator("when")
    @classmethod
    def _readable(cls, when: str | None) -> str | None:
        if when is not None:
            parse_condition(when)
        return when

    @model_validator(mode="after")
    def _check(self) -> "Parameter":
        numbers = {"low": self.low, "high": self.high, "step": self.step, "log": self.log or None}
        for name in ("choice", "families", "fill"):
            value = getattr(self, name)
            if value is None:
                continue
            if any(given is not None for given in numbers.values()):
                raise FieldError(name, _written(value), "takes no low, high, step or log beside it")
            if [self.choice, self.families, self.fill].count(None) < 2:
                raise FieldError(name, _written(value), "give one of choice, families and fill")
        if self.families is not None:
            self._check_families(self.families)
        if self.choice is not None and len({as_category(value) for value in self.choice}) != len(self.choice):
            raise FieldError("choice", list(self.choice), "must name each value once")
        if not self.is_sampled or self.choice is not None:
            return self
        if self.low is None or self.high is None:
            raise FieldError("low", self.low, "give either choice, or both low and high")
        if self.low > self.high:
            raise FieldError("low", self.low, f"must be at most high, {self.high}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise FieldError("log", True, "needs low above 0 and no step")
        self._check_size(self.low, self.high)
        return self

    def _check_families(self, families: Mapping[FamilyName, Mapping[str, "Parameter"]]) -> None:
        for name, parameters in families.items():
            for part, parameter in parameters.items():
                if not parameter.is_sampled or parameter.when is not None:
                    path = f"families.{name}.{part}"
                    raise FieldError(path, _written(parameter), "takes a choice, or low and high, and no condition")

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
    def is_sampled(self) -> bool:
        """Whether it is a choice or a range: one dimension of a point."""
        return self.families is None and self.fill is None

    @property
    def condition(self) -> Condition | None:
        return None if self.when is None else parse_condition(self.when)

    @property
    def whole(self) -> bool:
        return isinstance(self.low, int) and isinstance(self.high, int) and not isinstance(self.step, float)

    @cached_property
    def count(self) -> int | float:
        """How many values it can take; infinite where it is continuous."""
        if self.choice is not None:
            return len(self.choice)
        assert self.low is not None
        assert self.high is not None
        if self.low == self.high:
            return 1
        if self.whole:
            return int((self.high - self.low) // (self.step or 1) + 1)
        if self.step is None:
            return inf
        return (_exact(self.high) - _exact(self.low)) // _exact(self.step or 1) + 1

    def value_at(self, index: int) -> Any:
        """Value number `index` of those that `count` counts, where it is finite."""
        if self.choice is not None:
            return self.choice[index]
        assert self.low is not None
        if self.whole:
            return int(self.low + index * (self.step or 1))
        return float(_exact(self.low) + index * _exact(self.step or 1))

    @property
    def values(self) -> tuple[Any, ...]:
        """All of them, where they are finitely many."""
        return tuple(self.value_at(index) for index in range(int(self.count)))

    def draw(self, rng: Random) -> Any:
        """A value at random, evenly; where `log` says so, its logarithm evenly."""
        if self.choice is not None:
            return rng.choice(self.choice)
        assert self.low is not None
        assert self.high is not None
        if not self.log:
            return (
                rng.uniform(self.low, self.high) if self.count == inf else self.value_at(rng.randrange(int(self.count)))
            )
        around = 0.5 if self.whole else 0.0
        value = exp(rng.uniform(log(self.low - around), log(self.high + around)))
        return min(max(round(value) if self.whole else value, self.low), self.high)

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


def as_category(value: Any) -> Scalar:
    """A JSON value as what Optuna takes for a category: itself where scalar, else its canonical JSON text."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return json.dumps(value, sort_keys=True)


def apply(base: Mapping[str, Any], params: Mapping[str, Any]) -> TrialSpec:
    """The base spec with sampled parameters (path -> JSON value) put in. Raises InvalidSpec."""
    return parse_spec(override(base, params))


def _written(value: Any) -> Any:
    """A value of ours as the plain data it was read from."""
    return value.model_dump(exclude_none=True) if isinstance(value, Frozen) else value


def _exact(number: float) -> Fraction:
    """The number as it is written, which is what a step of 0.1 means."""
    return Fraction(number) if isinstance(number, int) else Fraction(str(number))


def _exponent(number: float) -> int:
    """The power of ten of the number's last digit that is not 0; 0 for 0."""
    exponent = Decimal(str(number)).normalize().as_tuple().exponent
    assert isinstance(exponent, int), "a parameter's numbers are finite"
    return exponent
