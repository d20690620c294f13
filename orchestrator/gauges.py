"""Figures of the whole database for a monitor: what there is in each state now, and what was spent so far by phase."""

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import InstrumentedAttribute, Session

from orchestrator.cost import FREE, IDLE, held_seconds
from orchestrator.lanes import list_waiting
from orchestrator.ledger import seconds_by_phase
from orchestrator.lifecycle import StudyState, TrialState
from orchestrator.tables import AttemptRow, RunRow, StudyRow, TrialRow
from worker.spec import GangConfig

RECENT = timedelta(minutes=10)
"""Of what the idle share is; and by how much the clocks of orchestrators may differ, so that an attempt seems to have
ended before one that was seen to end."""
CHUNK = 500  # ids in one query


@dataclass(frozen=True)
class Figures:
    """`seconds` and `gpu_seconds` are those of attempts that have ended; GPUs are held in every phase but the FREE."""

    studies: dict[str, int]
    trials: dict[str, int]
    queued: dict[GangConfig, int]
    waited_seconds: dict[GangConfig, float]
    """Of the run that has waited longest."""
    gangs: dict[str, int]
    """Open attempts, by phase."""
    attempts: dict[str, int]
    """Ended ones, by outcome."""
    seconds: dict[str, float]
    gpu_seconds: dict[str, float]
    idle_share: float | None
    """What ranks waited before attempts that ended within the last RECENT, of all the time that they were held. A gang
    that has had no work since is not in it."""


@dataclass(frozen=True)
class _Ended:
    at: datetime
    idle_rank_seconds: float
    held_rank_seconds: float


@dataclass
class Gauges:
    """What reads them. Ended attempts are read once each: all of it is cache. For one thread at a time."""

    _attempts: dict[str, int] = field(default_factory=dict)
    _seconds: dict[str, float] = field(default_factory=dict)
    _gpu_seconds: dict[str, float] = field(default_factory=dict)
    _latest: dict[int, _Ended] = field(default_factory=dict)
    """The ended attempts that were read, as far back as RECENT before the last of them."""

    def read(self, session: Session, now: datetime) -> Figures:
        self._take_ended(session)
        queued, waited = Counter[GangConfig](), dict[GangConfig, float]()
        for waiting in list_waiting(session):
            queued[waiting.shape] += waiting.runs
            if waiting.since is not None:
                seconds = max((now - waiting.since).total_seconds(), 0.0)
                waited[waiting.shape] = max(waited.get(waiting.shape, 0.0), seconds)
        open_attempts = select(AttemptRow.phase).where(AttemptRow.outcome.is_(None))
        recent = [ended for ended in self._latest.values() if ended.at > now - RECENT]
        held = sum(ended.held_rank_seconds for ended in recent)
        return Figures(
            studies=_by(session, StudyRow.state, StudyState), trials=_by(session, TrialRow.state, TrialState),
            queued=dict(queued), waited_seconds=waited, gangs=dict(Counter(session.scalars(open_attempts))),
            attempts=dict(self._attempts), seconds=dict(self._seconds), gpu_seconds=dict(self._gpu_seconds),
            idle_share=sum(ended.idle_rank_seconds for ended in recent) / held if held else None,
        )  # fmt: skip

    def _take_ended(self, session: Session) -> None:
        until = max((ended.at for ended in self._latest.values()), default=None)
        ids = select(AttemptRow.id).where(AttemptRow.finished_at.is_not(None))
        if until is not None:  # an index has these; the rows are long
            ids = ids.where(AttemptRow.finished_at > until - RECENT)
            fresh = [attempt_id for attempt_id in session.scalars(ids) if attempt_id not in self._latest]
            for start in range(0, len(fresh), CHUNK):
                self._add(session, AttemptRow.id.in_(fresh[start : start + CHUNK]))
        else:
            self._add(session, AttemptRow.finished_at.is_not(None))
        since = max((ended.at for ended in self._latest.values()), default=None)
        self._latest = {key: ended for key, ended in self._latest.items() if since and ended.at > since - RECENT}

    def _add(self, session: Session, which: ColumnElement[bool]) -> None:
        query = select(
            AttemptRow.id, AttemptRow.outcome, AttemptRow.finished_at, RunRow.ranks, RunRow.device,
            AttemptRow.queued_at, AttemptRow.started_at, AttemptRow.phase, AttemptRow.phase_since,
            AttemptRow.phase_seconds,
        ).join(RunRow, RunRow.id == AttemptRow.run_id).where(which)  # fmt: skip
        for attempt_id, outcome, end, ranks, device, queued, start, phase, since, before in session.execute(query):
            assert outcome is not None and end is not None, "an attempt has both or neither"
            spent = seconds_by_phase(queued, start, phase, since, before, end)
            self._latest[attempt_id] = _Ended(end, ranks * spent.get(IDLE, 0.0), ranks * held_seconds(spent))
            self._attempts[outcome] = self._attempts.get(outcome, 0) + 1
            for name, seconds in spent.items():
                gpu_seconds = seconds * ranks if device == "gpu" and name not in FREE else 0.0
                self._seconds[name] = self._seconds.get(name, 0.0) + seconds
                self._gpu_seconds[name] = self._gpu_seconds.get(name, 0.0) + gpu_seconds


def _by(
    session: Session, column: InstrumentedAttribute[str], states: type[StudyState] | type[TrialState]
) -> dict[str, int]:
    """How many rows are in each state, none of one included."""
    rows = session.execute(select(column.label("state"), func.count().label("rows")).group_by(column))
    return dict.fromkeys((str(state) for state in states), 0) | {row.state: row.rows for row in rows}
