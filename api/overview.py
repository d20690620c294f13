"""What a study's page says of all its trials together: read once for many readers, and cut to what a page can show."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy.orm import Session

from api.standings import VerdictOut
from api.verdicts import verdict_of
from orchestrator import pareto, seeds
from orchestrator.arms import Record, arms
from orchestrator.bests import Course, course
from orchestrator.errors import IllegalMove
from orchestrator.importance import Importance, importance
from orchestrator.ledger import Ledger, ledger_of, list_spent
from orchestrator.pareto import Point
from orchestrator.savings import Savings, savings
from orchestrator.standing import ranked
from orchestrator.stopping import Regret, regret
from orchestrator.study import Study

LEADERS = 3
"""How many of the best are held to the rule of a record."""
BEST, MOST = 100, 1500
"""Of the points of the chart: so many of the best, and so many in all, besides the Pareto set."""


@dataclass(frozen=True)
class Overview:
    """All of it as of one moment."""

    arms: tuple[Record, ...]
    rules: tuple[Record, ...]
    costs: Ledger
    savings: Savings
    course: Course
    points: tuple[Point, ...]
    front: tuple[Point, ...]
    over: tuple[Point, ...]
    importance: Importance
    stopping: Regret | None
    verdicts: tuple[VerdictOut, ...]

    def chart(self) -> dict[str, Any]:
        """What the charts draw, in columns."""
        bests = self.course.bests
        return {
            "fits": _columns(self.points), "over": _columns(self.over), "front": _columns(self.front),
            "course": {
                "number": [one.number for one in bests], "bpb": [one.val_bpb for one in bests],
                "trials": [one.trials for one in bests], "gpu_seconds": [round(one.gpu_seconds, 1) for one in bests],
            },
            "trials": self.course.trials, "gpu_seconds": round(self.course.gpu_seconds, 1),
        }  # fmt: skip


def overview(session: Session, study: Study, gpu_hour_dollars: float, now: datetime) -> Overview:
    """The overview of a study."""
    by_arm, by_rule = arms(session, study.id)
    spent = list_spent(session, study.id, now)
    points = pareto.scored(session, study.id)
    fit = {point.number for point in points}
    over = [point for point in pareto.missed(session, study.id) if point.number not in fit]
    return Overview(
        arms=by_arm, rules=by_rule, costs=ledger_of(spent, gpu_hour_dollars),
        savings=savings(session, study.id, gpu_hour_dollars), course=course(session, study.id, spent),
        points=tuple(_some(points)), front=tuple(pareto.front(points)),
        over=tuple(_even(over, MOST // 5)), importance=importance(session, study.id),
        stopping=regret(session, study) if study.definition.stopping else None,
        verdicts=tuple(_verdicts(session, study)),
    )  # fmt: skip


def _verdicts(session: Session, study: Study) -> list[VerdictOut]:
    """On the leader against the next, and on the next ones against the leader."""
    best = [one.number for one in ranked(seeds.list_standings(session, study.id, LEADERS)) if one.bpb][:LEADERS]
    found = []
    for number in best if len(best) > 1 else ():
        try:
            found.append(verdict_of(session, study, number, best[1] if number == best[0] else best[0]))
        except IllegalMove:  # it was taken back meanwhile
            continue
    return found


def _some(points: Sequence[Point]) -> list[Point]:
    """The best, and of the others as many as there is room for, evenly by number."""
    best = sorted(points, key=lambda point: point.val_bpb)[:BEST]
    chosen = {point.number: point for point in (*best, *_even(points, MOST - BEST))}
    return [chosen[number] for number in sorted(chosen)]


def _even(points: Sequence[Point], most: int) -> Sequence[Point]:
    step = max(len(points) / most, 1.0)
    return [points[int(place * step)] for place in range(min(len(points), most))]


def _columns(points: Sequence[Point]) -> dict[str, list[float]]:
    return {
        "number": [point.number for point in points], "bpb": [round(point.val_bpb, 5) for point in points],
        "bytes": [point.artifact_bytes for point in points], "seeds": [point.seeds for point in points],
    }  # fmt: skip
