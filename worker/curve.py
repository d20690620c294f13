"""The curve of one training: what is measured, when, and what rank 0 is answered."""

from typing import Any

from worker.logbook import of_step
from worker.report import Directive, Reporter
from worker.schedule import Progress
from worker.spec import TrialSpec

REPORTS = 25  # points of the training curve, at equal fractions of the budget


class Curve:
    """Every measurement of a training. Rank 0 tells them to its reporter; the others, without one, hear nothing.

    Where training goes on from a checkpoint, what was measured before is told again: an attempt's curve is whole.
    Each measurement is logged as well, once.
    """

    def __init__(self, spec: TrialSpec, reporter: Reporter | None) -> None:
        self._reporter, self._stop, self._budget = reporter, False, spec.budget
        self._reports, self._validations = _Milestones(REPORTS), _Milestones(spec.evaluation.validations)
        self._logged = Progress()
        self._fraction = 0.0
        self._measurements: list[tuple[int, float, dict[str, float]]] = []

    def told_to_stop(self) -> bool:
        """Whether the reporter has ever answered so, now included."""
        if self._reporter is not None:
            self._hear(self._reporter.directive())
        return self._stop

    def due(self, fraction: float) -> tuple[bool, bool]:
        """Whether the share of the budget that is spent has now come to another report, and to another validation."""
        self._fraction = fraction
        return self._reports.reached(fraction), self._validations.reached(fraction)

    def add(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Keep and tell what was measured after a step, if anything was."""
        if metrics:
            self._measurements.append((progress.steps, progress.seconds, metrics))
            self._log(progress, metrics)
            self._tell(*self._measurements[-1])

    def state_dict(self) -> dict[str, Any]:
        return {"fraction": self._fraction, "measurements": self._measurements}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.due(state_dict["fraction"])
        self._measurements = state_dict["measurements"]
        if self._reporter is not None:
            self._reporter.log(f"goes on from a checkpoint, {state_dict['fraction']:.0%} of the budget spent")
        for measurement in self._measurements:
            self._tell(*measurement)

    def _log(self, progress: Progress, metrics: dict[str, float]) -> None:
        if self._reporter is not None:
            seconds, tokens = progress.seconds - self._logged.seconds, progress.tokens - self._logged.tokens
            self._reporter.log(of_step(progress.steps, self._budget, metrics, seconds, tokens))
        self._logged = progress

    def _tell(self, step: int, seconds: float, metrics: dict[str, float]) -> None:
        if self._reporter is not None:
            self._hear(self._reporter.measure(step, seconds, metrics))

    def _hear(self, directive: Directive) -> None:
        self._stop = self._stop or directive is Directive.STOP


class _Milestones:
    """`count` equal fractions of a whole, the last of them 1."""

    def __init__(self, count: int) -> None:
        self._count, self._passed = count, 0

    def reached(self, fraction: float) -> bool:
        """Whether `fraction` has passed a milestone that no earlier call had passed."""
        before, self._passed = self._passed, min(int(fraction * self._count + 1e-9), self._count)
        return self._passed > before
