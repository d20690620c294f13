"""What a study's attempts have cost: seconds, GPU-seconds and dollars, by phase and by gang.

A second counts from the claim of an attempt to its end, for every rank of its gang, as the loop saw it: by ticks. What
a gang waits between two attempts is in nobody's account yet.
"""

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import select
from sqlalchemy.orm import Session, defer

from orchestrator.lifecycle import Outcome
from orchestrator.tables import AttemptRow, RunRow, TrialRow

WASTED = frozenset({Outcome.FAILED, Outcome.PREEMPTED, Outcome.LOST})
UNKNOWN = "unknown"
"""The phase of attempts older than the ledger."""


@dataclass(frozen=True)
class Cost:
    """Seconds of attempts; `gpu_seconds` are those of each GPU."""

    seconds: float = 0.0
    gpu_seconds: float = 0.0
    dollars: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.seconds + other.seconds, self.gpu_seconds + other.gpu_seconds, self.dollars + other.dollars)


@dataclass(frozen=True)
class Ledger:
    """`total` is the sum of all phases and of `wasted`: whatever failed, lost or preempted attempts have cost."""

    attempts: int
    phases: dict[str, Cost]
    wasted: Cost
    total: Cost
    gangs: dict[str, Cost]
    """By the gang's name, in all phases; attempts that never reached a gang are left out."""


def ledger(
    session: Session, study_id: int, gpu_hour_dollars: float, now: datetime, *, number: int | None = None
) -> Ledger:
    """The ledger of a study, or of its trial of this number. Open attempts count up to `now`."""
    query = (
        select(AttemptRow, RunRow.ranks, RunRow.device).options(defer(AttemptRow.result, raiseload=True))
        .join(RunRow, RunRow.id == AttemptRow.run_id).join(TrialRow, TrialRow.id == RunRow.trial_id)
        .where(TrialRow.study_id == study_id).order_by(AttemptRow.id)
    )  # fmt: skip
    if number is not None:
        query = query.where(TrialRow.number == number)
    attempts, wasted, total = 0, Cost(), Cost()
    phases: dict[str, Cost] = {}
    gangs: dict[str, Cost] = {}
    for attempt, ranks, device in session.execute(query):
        attempts += 1
        for phase, seconds in seconds_by_phase(attempt, attempt.finished_at or now).items():
            gpu_seconds = seconds * ranks if device == "gpu" else 0.0
            cost = Cost(seconds, gpu_seconds, gpu_seconds * gpu_hour_dollars / 3600)
            total += cost
            if attempt.gang is not None:
                gangs[attempt.gang] = gangs.get(attempt.gang, Cost()) + cost
            if attempt.outcome in WASTED:
                wasted += cost
            else:
                phases[phase] = phases.get(phase, Cost()) + cost
    return Ledger(attempts, phases, wasted, total, gangs)


def seconds_by_phase(attempt: AttemptRow, until: datetime | None) -> dict[str, float]:
    """Seconds of an attempt in each phase, in its last up to `until`; None leaves that one out."""
    seconds: dict[str, float] = dict(attempt.phase_seconds or {})
    if until is not None:
        known = attempt.phase_since is not None
        phase, since = (attempt.phase, attempt.phase_since) if known else (UNKNOWN, attempt.started_at)
        spent = (until - (since or until)).total_seconds()
        seconds[phase] = seconds.get(phase, 0.0) + max(spent, 0.0)  # another machine's clock may be behind
    return seconds
