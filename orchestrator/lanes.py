"""The cluster over time: each gang as a lane of what it did and does, how much of that was idle, and what waits.

It is put together from attempts alone, whoever ran them: several orchestrators, on Ray or not, and executors.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import pairwise

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from orchestrator.cost import FREE, IDLE, QUEUE
from orchestrator.ledger import place_of, seconds_by_phase
from orchestrator.lifecycle import Outcome, RunState, StudyState
from orchestrator.rows import gang_of
from orchestrator.tables import AttemptRow, RunRow, StudyRow, TrialRow
from worker.report import Hardware
from worker.spec import GangConfig

MAX_ATTEMPTS = 1000
MAX_SEGMENTS = 1000
"""Of all lanes together: with more, neighbours are joined until so many are left."""
MAX_LANES = 256
FINEST = 1000
"""What takes less than this part of the window is too short to see, and joined to its neighbours."""

SCORED = frozenset({Outcome.SUCCEEDED, Outcome.STOPPED, Outcome.VOID})


@dataclass(frozen=True)
class Segment:
    """A stretch of a lane: an attempt in one phase, or idle between two.

    `phase` is that of the longest part where short ones were joined; what they were not all of is then None.
    """

    phase: str
    started_at: datetime
    ended_at: datetime
    study: str | None = None
    trial: int | None = None
    attempt_id: int | None = None
    outcome: Outcome | None = None
    """How its attempt ended."""

    @property
    def seconds(self) -> float:
        return (self.ended_at - self.started_at).total_seconds()


@dataclass(frozen=True)
class Lane:
    """A place for one gang of a shape. Gangs of one owner and shape that came after one another share it.

    `segments` follow one another; `beside` is what held no GPU meanwhile: attempts that waited in the gang's queue, or
    were stored behind the next one.
    """

    gang: str
    """The latest one's name."""
    gangs: int
    owner: str
    shape: GangConfig
    device: str | None
    """The model of its GPUs or processor, and the host: None before its first result."""
    node: str | None
    phase: str | None
    """What it does now; None where no attempt is open."""
    attempts: int
    busy_seconds: float
    idle_seconds: float
    """Between attempts, and after the last while others of its owner's are open."""
    segments: tuple[Segment, ...]
    beside: tuple[Segment, ...]

    @property
    def idle_share(self) -> float | None:
        return _share(self.idle_seconds, self.busy_seconds)


@dataclass(frozen=True)
class Waiting:
    """Runs of a study that wait for a gang of one shape, and since when the longest of them has."""

    study: str
    shape: GangConfig
    runs: int
    since: datetime | None


@dataclass(frozen=True)
class Cluster:
    """The lanes within a window, busiest shapes first. All seconds count within it alone."""

    since: datetime
    """Where the window begins: later than asked for where there were more than MAX_ATTEMPTS attempts."""
    until: datetime
    lanes: tuple[Lane, ...]
    lanes_left_out: int
    attempts: int
    truncated: bool
    """Whether the window begins later than was asked for."""
    joined_seconds: float
    """Stretches shorter than this may have been joined to their neighbours."""
    busy_seconds: float
    """Of all lanes, whatever their ranks; so are the idle ones."""
    idle_seconds: float
    idle_share: float | None
    """Of the ranks' time: a gang of eight counts as much as eight of one."""
    ranks_in_use: dict[str, int]
    """By kind of device."""
    queue: tuple[Waiting, ...]


@dataclass(frozen=True)
class _Stay:
    """An attempt on its gang, within the window: the segments that held the gang, and those that did not."""

    attempt_id: int
    owner: str
    gang: str
    shape: GangConfig
    held: tuple[Segment, ...]
    beside: tuple[Segment, ...]
    started_at: datetime
    """When it had its gang for itself."""
    ended_at: datetime
    open: bool
    scored: bool


def read_cluster(session: Session, now: datetime, window: timedelta) -> Cluster:
    """What every gang did within the window before `now`, and what waits at `now`."""
    stays, since = _stays(session, now, now - window)
    live = {stay.owner for stay in stays if stay.open}
    places = _places(stays)
    known = _hardware(session, places[:MAX_LANES])
    lanes = [_lane(place, now, live, known) for place in places]
    shown, least_seconds = _joined(lanes[:MAX_LANES], (now - since).total_seconds() / FINEST)
    in_use = Counter[str]()
    for lane in lanes:
        in_use[lane.shape.device] += lane.shape.ranks if lane.phase is not None else 0
    return Cluster(
        since=since, until=now, lanes=tuple(shown), lanes_left_out=len(lanes) - len(shown), attempts=len(stays),
        truncated=since > now - window, joined_seconds=least_seconds,
        busy_seconds=sum(lane.busy_seconds for lane in lanes), idle_seconds=sum(lane.idle_seconds for lane in lanes),
        idle_share=_share(
            sum(lane.idle_seconds * lane.shape.ranks for lane in lanes),
            sum(lane.busy_seconds * lane.shape.ranks for lane in lanes),
        ),
        ranks_in_use=dict(in_use), queue=list_waiting(session),
    )  # fmt: skip


def list_waiting(session: Session) -> tuple[Waiting, ...]:
    """The queue of the studies that run, by study and shape; what has waited longest comes first."""
    since = func.min(RunRow.queued_at)
    query = (
        select(StudyRow.name, RunRow.ranks, RunRow.device, func.count(), since)
        .join(TrialRow, TrialRow.id == RunRow.trial_id).join(StudyRow, StudyRow.id == TrialRow.study_id)
        .where(RunRow.state == RunState.QUEUED, StudyRow.state == StudyState.RUNNING)
        .group_by(StudyRow.name, RunRow.ranks, RunRow.device).order_by(since, StudyRow.name)
    )  # fmt: skip
    rows = session.execute(query)
    return tuple(Waiting(study, gang_of(ranks, device), runs, at) for study, ranks, device, runs, at in rows)


def _stays(session: Session, now: datetime, since: datetime) -> tuple[list[_Stay], datetime]:
    """The attempts on gangs that were open after `since`, and where the window begins if they were too many."""
    query = (
        select(
            AttemptRow.id, AttemptRow.owner, AttemptRow.gang, RunRow.ranks, RunRow.device, AttemptRow.started_at,
            AttemptRow.finished_at, AttemptRow.outcome, AttemptRow.phase, AttemptRow.phase_since,
            AttemptRow.phase_seconds, StudyRow.name, TrialRow.number,
        )
        .join(RunRow, RunRow.id == AttemptRow.run_id).join(TrialRow, TrialRow.id == RunRow.trial_id)
        .join(StudyRow, StudyRow.id == TrialRow.study_id).where(AttemptRow.gang.is_not(None))
    )  # fmt: skip
    ended = query.where(AttemptRow.finished_at >= since).order_by(AttemptRow.finished_at.desc(), AttemptRow.id.desc())
    latest = session.execute(ended.limit(MAX_ATTEMPTS + 1)).all()
    if len(latest) > MAX_ATTEMPTS:
        since = latest[-1].finished_at or since
    stays = []
    for row in (
        *session.execute(query.where(AttemptRow.outcome.is_(None)).order_by(AttemptRow.id)),
        *latest[:MAX_ATTEMPTS],
    ):
        attempt_id, owner, gang, ranks, device, start, end, outcome, phase, phase_since, before, study, trial = row
        assert gang is not None
        spent = seconds_by_phase(None, start, phase, phase_since, before, end or now)
        how = None if outcome is None else Outcome(outcome)
        laid = list(_laid(spent, phase, start, end or now))
        segments = [Segment(name, max(a, since), b, study, trial, attempt_id, how) for name, a, b in laid if b > since]
        held = tuple(segment for segment in segments if segment.phase not in FREE)
        began, left = (held[0].started_at, held[-1].ended_at) if held else (end or now, end or now)
        stays.append(
            _Stay(
                attempt_id, owner, gang, gang_of(ranks, device), held,
                tuple(segment for segment in segments if segment.phase in FREE), began, left,
                outcome is None and phase not in FREE, outcome in SCORED,
            )
        )  # fmt: skip
    return sorted(stays, key=lambda stay: (stay.started_at, stay.attempt_id)), since


def _laid(
    spent: dict[str, float], phase: str, start: datetime, end: datetime
) -> Iterator[tuple[str, datetime, datetime]]:
    """An attempt's phases one after the other, the last that it entered last, as far as its end."""
    at = start
    for name in sorted(spent, key=lambda name: (name == phase and name != QUEUE, place_of(name))):
        until = min(at + timedelta(seconds=spent[name]), end)
        if name != IDLE and until > at:  # the gang's wait lies before its attempt, where the lane has its gap
            yield name, at, until
            at = until


def _places(stays: Sequence[_Stay]) -> list[list[_Stay]]:
    """Stays by place: each gang's are together, with those of gangs of its owner and shape that it came after."""
    gangs: dict[tuple[str, str, GangConfig], list[_Stay]] = {}
    for stay in stays:
        gangs.setdefault((stay.owner, stay.gang, stay.shape), []).append(stay)
    places: dict[tuple[str, GangConfig], list[list[_Stay]]] = {}
    for (owner, _gang, shape), own in gangs.items():
        there = places.setdefault((owner, shape), [])
        free = [place for place in there if place[-1].ended_at <= own[0].started_at and not place[-1].open]
        if free:
            max(free, key=lambda place: place[-1].ended_at).extend(own)
        else:
            there.append(list(own))
    found = [place for own in places.values() for place in own if any(stay.held or stay.beside for stay in place)]
    return sorted(found, key=lambda place: (place[0].shape.device, -place[0].shape.ranks, place[0].owner))


def _hardware(session: Session, places: Sequence[Sequence[_Stay]]) -> dict[int, Hardware]:
    """What each place's latest result was made on, by attempt."""
    scored = [[stay.attempt_id for stay in place if stay.scored][-1:] for place in places]
    ids = [attempt_id for latest in scored for attempt_id in latest]
    query = select(AttemptRow.id, AttemptRow.hardware).where(AttemptRow.id.in_(ids))
    rows = session.execute(query).all() if ids else ()
    return {row.id: Hardware.model_validate(row.hardware) for row in rows if row.hardware is not None}


def _lane(place: Sequence[_Stay], now: datetime, live: set[str], known: dict[int, Hardware]) -> Lane:
    last, segments, busy, idle = place[-1], list[Segment](), 0.0, 0.0
    for held in (segment for stay in place for segment in stay.held):
        since = segments[-1].ended_at if segments else held.started_at
        if held.started_at > since:
            segments.append(Segment(IDLE, since, held.started_at))
            idle += segments[-1].seconds
        if held.ended_at > since:
            segments.append(replace(held, started_at=since) if held.started_at < since else held)
            busy += segments[-1].seconds
    doing = next((stay.held[-1].phase for stay in reversed(place) if stay.open and stay.held), None)
    if doing is None and last.owner in live and segments and segments[-1].ended_at < now:
        segments.append(Segment(IDLE, segments[-1].ended_at, now))
        idle += segments[-1].seconds
    hardware = next((known[stay.attempt_id] for stay in reversed(place) if stay.attempt_id in known), None)
    return Lane(
        gang=last.gang, gangs=len({stay.gang for stay in place}), owner=last.owner, shape=last.shape,
        device=None if hardware is None else hardware.device, node=None if hardware is None else hardware.node,
        phase=doing,
        attempts=len(place), busy_seconds=busy, idle_seconds=idle, segments=tuple(segments),
        beside=tuple(segment for stay in place for segment in stay.beside),
    )  # fmt: skip


def _joined(lanes: Sequence[Lane], least_seconds: float) -> tuple[list[Lane], float]:
    """The lanes with what is too short to see joined to its neighbours, and how short that was."""
    lengths = [[segment.seconds for segment in lane.segments] for lane in lanes]
    beside = [segment.seconds for lane in lanes for segment in lane.beside]
    while (
        sum(len(_cuts(own, least_seconds)) for own in lengths) + sum(s >= least_seconds for s in beside) > MAX_SEGMENTS
    ):
        least_seconds *= 1.5
    coarser = [
        replace(
            lane,
            segments=tuple(_one(lane.segments[a:b]) for a, b in pairwise([0, *_cuts(own, least_seconds)])),
            beside=tuple(segment for segment in lane.beside if segment.seconds >= least_seconds),
        )
        for lane, own in zip(lanes, lengths, strict=True)
    ]  # fmt: skip
    return coarser, least_seconds


def _cuts(lengths: Sequence[float], least_seconds: float) -> list[int]:
    """Where neighbours end that are joined because each is shorter than this; what is as long stays alone."""
    cuts, short = [], 0.0
    for place, seconds in enumerate(lengths):
        if seconds >= least_seconds:
            if short:
                cuts.append(place)
            cuts.append(place + 1)
            short = 0.0
        else:
            short += seconds
            if short >= least_seconds:
                cuts.append(place + 1)
                short = 0.0
    return [*cuts, len(lengths)] if short else cuts


def _one(segments: Sequence[Segment]) -> Segment:
    """Neighbours as one segment."""
    if len(segments) == 1:
        return segments[0]
    longest = max(segments, key=lambda segment: segment.seconds)
    same = len({segment.attempt_id for segment in segments}) == 1
    whole = longest if same else Segment(longest.phase, longest.started_at, longest.ended_at)
    return replace(whole, started_at=segments[0].started_at, ended_at=segments[-1].ended_at)


def _share(idle_seconds: float, busy_seconds: float) -> float | None:
    whole = idle_seconds + busy_seconds
    return idle_seconds / whole if whole else None
