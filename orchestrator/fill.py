"""A field left to fill: the largest legal value with which the artifact still fits."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from orchestrator.feasibility import Predictor
from orchestrator.points import Fill
from worker.spec import TrialSpec


class NothingFits(ValueError):
    """No legal value gives a spec that fits."""


def fill_to(predictor: Predictor, cap_bytes: int, probability: float) -> Fill:
    """What solves for a value: the largest that gives an artifact within the cap with this probability.

    It is given what makes a spec of a value, None where that is no valid one, and the values in ascending order, of
    which a larger one is taken never to make a smaller artifact. Raises NothingFits.
    """

    def fill(spec_of: Callable[[Any], TrialSpec | None], values: Sequence[Any]) -> Any:
        @cache
        def bytes_at(index: int) -> int | None:
            spec = spec_of(values[index])
            return None if spec is None else predictor.quantile(spec, probability)

        found, low, high = None, 0, len(values)
        while low < high:
            middle = (low + high) // 2
            sizes = ((index, bytes_at(index)) for index in range(middle, high))
            legal, size = next(((index, size) for index, size in sizes if size is not None), (high, None))
            if size is None or size > cap_bytes:
                high = middle
            else:
                found, low = legal, legal + 1
        if found is None:
            raise NothingFits(f"no value of {len(values)} is legal and fits {cap_bytes:,} bytes")
        return values[found]

    return fill
