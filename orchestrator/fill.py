"""A field left to fill: the largest legal value with which the trial still keeps the caps."""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from orchestrator.caps import Caps
from orchestrator.feasibility import Predictor, judge
from orchestrator.points import Fill
from orchestrator.study import NewStudy
from worker.spec import TrialSpec


class NothingFits(ValueError):
    """No legal value gives a spec that keeps the caps."""


def fill_to(predictor: Predictor, caps: NewStudy | Caps, probability: float) -> Fill:
    """What solves for a value: the largest that gives an artifact within the cap with this probability, and that is not
    certain to miss another cap.

    It is given what makes a spec of a value, None where that is no valid one, and the values in ascending order, of
    which a larger one is taken never to make a smaller artifact or to take less time. Raises NothingFits.
    """

    def fits(spec: TrialSpec) -> bool:
        if predictor.quantile(spec, probability) > caps.cap_bytes:
            return False
        return judge(predictor.predict(spec), caps, spec)[0] != "cannot_fit"

    def fill(spec_of: Callable[[Any], TrialSpec | None], values: Sequence[Any]) -> Any:
        @cache
        def fits_at(index: int) -> bool | None:
            spec = spec_of(values[index])
            return None if spec is None else fits(spec)

        found, low, high = None, 0, len(values)
        while low < high:
            middle = (low + high) // 2
            looked = ((index, fits_at(index)) for index in range(middle, high))
            legal, fitting = next(((index, said) for index, said in looked if said is not None), (high, False))
            if fitting:
                found, low = legal, legal + 1
            else:
                high = middle
        if found is None:
            seconds = f"{caps.cap_train_seconds:,.0f} s of training, {caps.cap_evaluate_seconds:,.0f} s of evaluation"
            raise NothingFits(f"no value of {len(values)} is legal and keeps {caps.cap_bytes:,} bytes, {seconds}")
        return values[found]

    return fill
