"""Samplers that walk: scrambled Halton points, and every point of a grid. Where they are stands in the history."""

import random
from collections.abc import Iterator
from itertools import count, islice
from math import ceil, exp, floor, inf, log, prod
from typing import Any

from orchestrator.points import Domain
from orchestrator.space import Parameter

PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97)
DIGITS = 40  # of a base-2 fraction that are told apart; fewer in larger bases
LISTED = 4096  # points of a grid up to which they are listed and shuffled
ROUNDS = 4  # of a Feistel network, from which on its order passes for random


class Halton:
    """Points spread evenly, by position from 0 (Halton, 1960), digits permuted by the seed (Owen, 2017).

    Dimensions after the 25th, whose bases would be too coarse, are drawn at random by position.
    """

    def __init__(self, domain: Domain, seed: int) -> None:
        self._domain, self._seed = domain, seed
        rng = random.Random(f"halton {seed}")
        self._permutations = [
            [rng.sample(range(base), base) for _ in range(ceil(DIGITS * log(2) / log(base)))] for base in PRIMES
        ]

    def at(self, position: int) -> dict[str, Any]:
        """The canonical point at a position."""
        rng, point = random.Random(f"halton {self._seed} {position}"), dict[str, Any]()
        for place, dimension in enumerate(self._domain.dimensions):
            if self._domain.is_active(dimension.name, point):
                share = self._share(position, place) if place < len(PRIMES) else rng.random()
                point[dimension.name] = value_at(dimension.parameter, share)
        return self._domain.canonical(point)

    def _share(self, position: int, place: int) -> float:
        base, left, share, scale = PRIMES[place], position, 0.0, 1.0
        for permutation in self._permutations[place]:
            left, digit = divmod(left, base)
            scale /= base
            share += permutation[digit] * scale
        return min(share, 1 - 2**-53)


class Grid:
    """Every point of a finite space, by position from 0, in an order of the seed.

    Where they are many, each combination of values has a position, so that points which conditions make equal, or the
    spelling of a tying, come again.
    """

    def __init__(self, domain: Domain, seed: int) -> None:
        self._domain, self._seed = domain, seed
        self._size = prod(int(each.parameter.count) for each in domain.dimensions)
        self._points: list[dict[str, Any]] | None = None
        if domain.count <= LISTED:
            self._points = list(domain.points())
            self._size = len(self._points)
            random.Random(f"grid {seed}").shuffle(self._points)

    def at(self, position: int) -> dict[str, Any] | None:
        """The canonical point at a position; None after the last."""
        if position >= self._size:
            return None
        if self._points is not None:
            return self._points[position]
        left, point = shuffled(position, self._size, f"grid {self._seed}"), dict[str, Any]()
        for dimension in self._domain.dimensions:
            left, index = divmod(left, int(dimension.parameter.count))
            if self._domain.is_active(dimension.name, point):
                point[dimension.name] = dimension.parameter.value_at(index)
        return self._domain.canonical(point)


def shuffled(position: int, size: int, seed: str) -> int:
    """What comes at a position when the numbers below `size` are shuffled, without shuffling them: a Feistel network,
    gone through until it ends below `size` (Black and Rogaway, 2002)."""
    half = (size.bit_length() + 1) // 2
    while True:
        left, right = position >> half, position % 2**half
        for turn in range(ROUNDS):
            left, right = right, left ^ random.Random(f"{seed} {turn} {right}").getrandbits(half)
        position = left << half | right
        if position < size:
            return position


def walk(sequence: Halton | Grid, start: int, most: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """At most so many points from a position on, each with its own."""
    for position in islice(count(start), most):
        point = sequence.at(position)
        if point is None:
            return
        yield position, point


def value_at(parameter: Parameter, share: float) -> Any:
    """The value below which this share, from 0 and below 1, of the parameter's values lies."""
    if parameter.choice is not None:
        return parameter.choice[floor(share * len(parameter.choice))]
    low, high = parameter.low, parameter.high
    assert low is not None and high is not None
    if parameter.log:
        around = 0.5 if parameter.whole else 0.0
        value = exp(log(low - around) + share * (log(high + around) - log(low - around)))
        return min(max(round(value) if parameter.whole else value, low), high)
    if parameter.count == inf:
        return min(low + share * (high - low), high)
    return parameter.value_at(floor(share * int(parameter.count)))
