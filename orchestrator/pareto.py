"""The trade-off of score and size: every scored trial of a study, and those that no other beats in both."""

from collections.abc import Iterable
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from orchestrator.lifecycle import TrialState
from orchestrator.seeds import list_standings
from orchestrator.tables import TRIALS


@dataclass(frozen=True)
class Point:
    """A complete trial that keeps every cap."""

    number: int
    val_bpb: float
    """The mean of its seeds that keep every cap."""
    seeds: int
    """How many the mean is of."""
    artifact_bytes: int
    """Of the run that completed it."""


def scored(session: Session, study_id: int) -> list[Point]:
    """The study's complete trials that keep every cap, by number."""
    weights = select(TRIALS.c.id, TRIALS.c.artifact_bytes).where(
        TRIALS.c.study_id == study_id, TRIALS.c.state == TrialState.COMPLETE
    )
    bytes_of = {row.id: row.artifact_bytes for row in session.execute(weights)}
    points = [
        Point(standing.number, standing.sample.mean, standing.sample.count, bytes_of[standing.trial_id])
        for standing in list_standings(session, study_id)
        if standing.sample is not None
    ]
    return sorted(points, key=lambda point: point.number)


def front(points: Iterable[Point]) -> list[Point]:
    """The Pareto set, smallest first: whoever is smaller scores worse. Of equals the lowest number stands for all."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.artifact_bytes, point.val_bpb, point.number)):
        if not found or point.val_bpb < found[-1].val_bpb:
            found.append(point)
    return found


def missed(session: Session, study_id: int) -> list[Point]:
    """The study's complete trials that miss a cap by the run that completed them, by number."""
    query = (
        select(TRIALS.c.number, TRIALS.c.val_bpb, TRIALS.c.artifact_bytes)
        .where(TRIALS.c.study_id == study_id, TRIALS.c.state == TrialState.COMPLETE, TRIALS.c.feasible.is_(False))
        .order_by(TRIALS.c.number)
    )
    return [Point(number, bpb, 1, size) for number, bpb, size in session.execute(query)]
