"""What the API answers about gangs: what each did and does, how much of it was idle, and what waits."""

from datetime import datetime
from typing import TYPE_CHECKING

from pydantic import BaseModel

from orchestrator.lifecycle import Outcome
from worker.spec import GangConfig

if TYPE_CHECKING:  # SQLAlchemy comes with these, and clients read answers without it
    from orchestrator.lanes import Cluster, Lane, Segment, Waiting


class SegmentOut(BaseModel):
    """A stretch of a lane: an attempt in one phase, or idle. Of several attempts that were joined, none is named."""

    phase: str
    started_at: datetime
    ended_at: datetime
    study: str | None
    trial: int | None
    attempt_id: int | None
    outcome: Outcome | None

    @classmethod
    def of(cls, segment: "Segment") -> "SegmentOut":
        return cls(**vars(segment))


class LaneOut(BaseModel):
    """One place for a gang of a shape. `segments` follow one another; `beside` held no GPU: queued there, or stored.

    Gangs of one owner and shape that came after one another share it; `gang` is the latest.
    """

    gang: str
    gangs: int
    owner: str
    shape: GangConfig
    device: str | None
    node: str | None
    phase: str | None
    """What it does now; null where it does nothing."""
    attempts: int
    busy_seconds: float
    idle_seconds: float
    idle_share: float | None
    segments: list[SegmentOut]
    beside: list[SegmentOut]

    @classmethod
    def of(cls, lane: "Lane") -> "LaneOut":
        stretches = {
            "segments": [SegmentOut.of(segment) for segment in lane.segments],
            "beside": [SegmentOut.of(segment) for segment in lane.beside],
        }
        return cls(**{**vars(lane), **stretches}, idle_share=lane.idle_share)


class WaitingOut(BaseModel):
    """Runs of a study that wait for a gang of one shape, and since when the longest of them has waited."""

    study: str
    shape: GangConfig
    runs: int
    since: datetime | None
    waited_seconds: float | None

    @classmethod
    def of(cls, waiting: "Waiting", now: datetime) -> "WaitingOut":
        waited = None if waiting.since is None else max((now - waiting.since).total_seconds(), 0.0)
        return cls(**vars(waiting), waited_seconds=waited)


class ClusterOut(BaseModel):
    """Every gang's lane in a window that ends now. `idle_share` is idle over idle and busy, of all lanes' seconds
    times their ranks, without what follows an orchestrator's last attempt: nobody knows whether its gangs were kept.

    A window with too many attempts begins later than asked for, and is `truncated`; stretches shorter than
    `joined_seconds` are joined to their neighbours.
    """

    since: datetime
    until: datetime
    truncated: bool
    joined_seconds: float
    attempts: int
    lanes: list[LaneOut]
    lanes_left_out: int
    busy_seconds: float
    idle_seconds: float
    idle_share: float | None
    ranks_in_use: dict[str, int]
    """By kind of device: GPUs, or CPU ranks."""
    queue: list[WaitingOut]

    @classmethod
    def of(cls, cluster: "Cluster") -> "ClusterOut":
        return cls(
            since=cluster.since, until=cluster.until, truncated=cluster.truncated,
            joined_seconds=cluster.joined_seconds, attempts=cluster.attempts,
            lanes=[LaneOut.of(lane) for lane in cluster.lanes], lanes_left_out=cluster.lanes_left_out,
            busy_seconds=cluster.busy_seconds, idle_seconds=cluster.idle_seconds, idle_share=cluster.idle_share,
            ranks_in_use=cluster.ranks_in_use, queue=[WaitingOut.of(each, cluster.until) for each in cluster.queue],
        )  # fmt: skip
