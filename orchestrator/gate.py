"""Which points may become trials now: valid, new, and not certain to miss a cap."""

from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.feasibility import Cap, judge, missed
from orchestrator.fill import NothingFits, fill_to
from orchestrator.lesson import key_of
from orchestrator.memory import Memory
from orchestrator.points import Fill, Point
from orchestrator.study import Prediction, Verdict
from worker.spec import GangConfig, InvalidSpec, TrialSpec

Refusal = Literal["invalid", "known", "cannot_fit"] | Cap
"""Why a point may not: a cap that it is certain to miss; cannot_fit where nothing that it could be filled with fits."""


@dataclass(frozen=True)
class Passed:
    """A point that may become a trial, with what that would cost."""

    point: Point
    spec: TrialSpec
    prediction: Prediction
    verdict: Verdict
    reason: str | None


class Gate:
    """The check of one proposal, for one shape of gang; it asks nothing twice."""

    def __init__(self, memory: Memory, gang: GangConfig) -> None:
        self.memory, self.gang = memory, gang
        self._definition, self._predictor = memory.study.definition, memory.predictor
        fill = memory.domain.fill
        self._fill: Fill | None = None
        if fill is not None:
            self._fill = fill_to(self._predictor, self._definition, fill.probability)
        self._specs: dict[str, TrialSpec | None] = {}
        self._checked: dict[str, Passed | Refusal] = {}

    def spec(self, point: Point) -> TrialSpec | None:
        """The point as a spec, a path to fill at its smallest; None where it is no valid one."""
        key = key_of(point)
        if key not in self._specs:
            try:
                self._specs[key] = self.memory.domain.spec(point, self.gang)
            except InvalidSpec:
                self._specs[key] = None
        return self._specs[key]

    def check(self, point: Point) -> Passed | Refusal:
        """The point as it may become a trial, or why it may not."""
        key = key_of(point)
        if key not in self._checked:
            self._checked[key] = self._check(dict(point))
        return self._checked[key]

    def _check(self, point: dict[str, Any]) -> Passed | Refusal:
        if self.memory.is_known(point):
            return "known"
        spec = self.spec(point)
        if spec is not None and self._fill is not None:
            try:
                spec = self.memory.domain.spec(point, self.gang, self._fill)
            except NothingFits:
                return "cannot_fit"
        if spec is None:
            return "invalid"
        if self.memory.is_known_spec(spec):
            return "known"
        prediction = self._predictor.predict(spec)
        verdict, reason = judge(prediction, self._definition, spec)
        if verdict == "cannot_fit":
            return missed(prediction, self._definition, spec)
        return Passed(point, spec, prediction, verdict, reason)

    def fits(self, spec: TrialSpec) -> bool:
        """Whether a spec, known or not, may fit."""
        return judge(self._predictor.predict(spec), self._definition, spec)[0] != "cannot_fit"
