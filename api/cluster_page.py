"""The page of the cluster: what each gang does, and did, on one axis of time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.responses import HTMLResponse

from api.context import Context, ContextOf, Now
from api.pages import page
from orchestrator.activity import latest_events
from orchestrator.lanes import Cluster, Lane, Segment, read_cluster

WINDOWS = {5: "5 min", 30: "30 min", 180: "3 h", 1440: "24 h", 10_080: "7 days"}
"""Minutes that the page offers, and what it calls them."""
USUAL = 30
WIDTH = 1000.0
"""Of a lane's picture, in its own units: the page stretches it."""
STEPS = (60, 300, 1800, 4 * 3600, 24 * 3600)
"""Seconds between two marks of the axis: the first of these that makes MARKS at the most."""
MARKS = 7
LATEST = 5
"""Attempts that are listed of a lane."""

router = APIRouter(include_in_schema=False)
Minutes = Annotated[int, Query(ge=1, le=10_080, description="The length of the window.")]


@dataclass(frozen=True)
class Stretch:
    """A segment as it is drawn."""

    segment: Segment
    x: float
    width: float


@router.get("/cluster")
def show_cluster(request: Request, context: ContextOf, now: Now, minutes: Minutes = USUAL) -> HTMLResponse:
    """Each gang as a lane."""
    return page(request, "cluster.html", **_facts(context, now, minutes))


@router.get("/cluster/live")
def show_cluster_live(request: Request, context: ContextOf, now: Now, minutes: Minutes = USUAL) -> HTMLResponse:
    """The part of the page that changes."""
    return page(request, "cluster_live.html", **_facts(context, now, minutes))


def _facts(context: Context, now: datetime, minutes: int) -> dict[str, Any]:
    window = timedelta(minutes=minutes)
    with context.database.read() as session:
        seen = next((event.id for event in latest_events(session, None, 1)), 0)
        found = context.kept.get(("cluster", minutes), lambda: read_cluster(session, now, window))
    cluster = found.value
    return {
        "cluster": cluster,
        "lanes": [
            (lane, _drawn(lane.segments, cluster), _drawn(lane.beside, cluster), _latest(lane))
            for lane in cluster.lanes
        ],
        "marks": list(_marks(cluster)),
        "shown": sorted({each.phase for lane in cluster.lanes for each in (*lane.segments, *lane.beside)}),
        "windows": WINDOWS,
        "window": WINDOWS.get(minutes, f"{minutes} min"),
        "minutes": minutes,
        "seen": seen,
        "again": found.seconds_left,
    }


def _drawn(segments: Sequence[Segment], cluster: Cluster) -> list[Stretch]:
    whole = (cluster.until - cluster.since).total_seconds()
    found = []
    for segment in segments:
        x = max((segment.started_at - cluster.since).total_seconds(), 0.0) * WIDTH / whole
        end = min((segment.ended_at - cluster.since).total_seconds(), whole) * WIDTH / whole
        found.append(Stretch(segment, x, max(end - x, 0.5)))
    return found


def _latest(lane: Lane) -> list[list[Segment]]:
    """The lane's latest attempts, the last first, each by what it did: for whoever cannot point at its picture."""
    attempts: dict[int, list[Segment]] = {}
    for segment in lane.segments:
        if segment.attempt_id is not None and segment.trial is not None:
            attempts.setdefault(segment.attempt_id, []).append(segment)
    return [*attempts.values()][: -LATEST - 1 : -1]


def _marks(cluster: Cluster) -> Iterator[tuple[float, str]]:
    """Where the axis has marks, in per cent, and how long ago that was."""
    whole = (cluster.until - cluster.since).total_seconds()
    step = next((seconds for seconds in STEPS if whole / seconds <= MARKS), STEPS[-1])
    for place in range(int(whole / step), 0, -1):
        yield 100 * (1 - place * step / whole), _ago(place * step)
    yield 100.0, "now"


def _ago(seconds: int) -> str:
    for size, unit in ((86_400, "d"), (3600, "h")):
        if seconds % size == 0:
            return f"−{seconds // size} {unit}"
    return f"−{seconds // 60} min"
