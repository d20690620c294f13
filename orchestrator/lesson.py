"""What one trial of a study teaches its search."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from orchestrator.lifecycle import OPEN_TRIALS, TrialState
from orchestrator.points import Domain, Point
from orchestrator.study import NewStudy, Trial

Kind = Literal["scored", "stopped", "refused", "open"]


@dataclass(frozen=True)
class Lesson:
    """A trial at its point of the space. One that is no point of it, failed or was cancelled teaches nothing.

    scored: it trained to its end, `values` are its objectives. stopped: pruned, and they are where it was then.
    refused: nothing fits there. open: its values are to come, and meanwhile others stay away.
    """

    point: Point
    kind: Kind
    trial: Trial
    values: tuple[float, ...] = ()
    feasible: bool = False
    """Scored, and within every cap."""

    @property
    def number(self) -> int:
        return self.trial.number


def lesson_of(trial: Trial, point: Point, study: NewStudy) -> Lesson | None:
    """What the trial teaches at its point; None where nothing."""
    if trial.state in OPEN_TRIALS:
        return Lesson(point, "open", trial)
    if trial.state is TrialState.INFEASIBLE:
        return Lesson(point, "refused", trial)
    if trial.result is None or trial.state not in (TrialState.COMPLETE, TrialState.PRUNED):
        return None
    values = tuple(float(getattr(trial.result, objective)) for objective in study.objectives)
    if trial.state is TrialState.PRUNED:
        return Lesson(point, "stopped", trial, values)
    return Lesson(point, "scored", trial, values, trial.feasible is not False)


def point_of(trial: Trial, domain: Domain) -> Point | None:
    """Where in the space the trial is, whoever made it; None where it only resembles the space."""
    if trial.origin == "proposed":
        return trial.params
    return domain.point(trial.spec)


def key_of(point: Mapping[str, Any]) -> str:
    """The same text for the same point."""
    return json.dumps(point, sort_keys=True)


def front(lessons: Sequence[Lesson]) -> list[Lesson]:
    """Those that no other surpasses in every objective, each of several at one value once."""
    kept: list[Lesson] = []
    least = float("inf")
    for lesson in sorted(lessons, key=lambda each: (each.values, each.number)):
        if lesson.values[-1] < least or not kept:
            kept.append(lesson)
            least = lesson.values[-1]
    return kept
