"""What attempts have cost: seconds, GPU-seconds and dollars, by phase, and by the gangs and trials that cost most.

An attempt's seconds count for every rank of its gang, from the gang's wait before it to its end. It holds no GPU in the
queue, neither before the claim nor behind another attempt in its gang, nor while it is stored behind the next one. The
price of a GPU-hour is one setting, applied on reading: after a change of price the past is reckoned at the new one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Generic, TypeVar

from sqlalchemy import select
from sqlalchemy.orm import Session

from orchestrator.cost import FREE, IDLE, QUEUE, STORE, Cost, held_seconds
from orchestrator.lifecycle import Outcome
from orchestrator.tables import AttemptRow, RunRow, TrialRow

WAITS = frozenset({QUEUE, IDLE})
"""What came before the attempt had its gang: not wasted, whatever came of it."""
WASTED = frozenset({Outcome.FAILED, Outcome.PREEMPTED, Outcome.LOST, Outcome.VOID})
UNKNOWN = "unknown"
"""The phase of attempts older than the ledger."""
PHASES = (QUEUE, IDLE, "start", "data", "compile", "train", "evaluate", "pack", STORE)
"""In the order in which an attempt goes through them; others come after."""
MOST = 10

Key = TypeVar("Key")


@dataclass(frozen=True)
class Ledger:
    """`total` is the sum of all phases and of `wasted`: what failed, lost, preempted and void attempts have cost.

    What an attempt waited lies in its phases, `queue` and `idle`, even where the rest was wasted. `gangs` (by name) and
    `trials` (by number) are the MOST that cost most, the first of them most, with the sums of the others.
    """

    attempts: int
    phases: dict[str, Cost]
    wasted: Cost
    void: Cost
    """Of `wasted`: successes whose timing did not count."""
    total: Cost
    gangs: dict[str, Cost]
    """Attempts that never reached a gang are left out."""
    other_gangs: Cost
    trials: dict[int, Cost]
    other_trials: Cost


@dataclass(frozen=True, slots=True)
class Spent:
    """What one attempt has spent so far."""

    outcome: str | None
    gang: str | None
    trial: int
    gpus: int
    ranks: int
    by_phase: dict[str, float]
    """Seconds."""
    finished_at: datetime | None


def ledger(
    session: Session, study_id: int, gpu_hour_dollars: float, now: datetime, *, number: int | None = None
) -> Ledger:
    """The ledger of a study, or of its trial of this number. Open attempts count up to `now`."""
    return ledger_of(list_spent(session, study_id, now, number=number), gpu_hour_dollars)


def list_spent(session: Session, study_id: int, now: datetime, *, number: int | None = None) -> list[Spent]:
    """What each attempt of a study, or of its trial of this number, has spent up to `now`."""
    query = (
        select(
            AttemptRow.outcome, AttemptRow.gang, TrialRow.number, RunRow.ranks, RunRow.device, AttemptRow.finished_at,
            AttemptRow.queued_at, AttemptRow.started_at, AttemptRow.phase, AttemptRow.phase_since,
            AttemptRow.phase_seconds,
        )
        .join(RunRow, RunRow.id == AttemptRow.run_id).join(TrialRow, TrialRow.id == RunRow.trial_id)
        .where(TrialRow.study_id == study_id).order_by(AttemptRow.id)
    )  # fmt: skip
    if number is not None:
        query = query.where(TrialRow.number == number)
    return [
        Spent(
            outcome, gang, trial, ranks if device == "gpu" else 0, ranks,
            seconds_by_phase(queued_at, start, last, since, before, end or now), end,
        )
        for outcome, gang, trial, ranks, device, end, queued_at, start, last, since, before in session.execute(query)
    ]  # fmt: skip


def ledger_of(attempts: Sequence[Spent], gpu_hour_dollars: float) -> Ledger:
    """The ledger of these attempts."""
    gangs, trials = _Tally[str](), _Tally[int]()
    seconds: dict[tuple[str | None, str, int], float] = {}  # by outcome, phase and GPUs
    for one in attempts:
        for phase, spent in one.by_phase.items():
            key = (one.outcome, phase, one.gpus)
            seconds[key] = seconds.get(key, 0.0) + spent
        held = held_seconds(one.by_phase)
        trials.add(one.trial, sum(one.by_phase.values()), held * one.gpus)
        if one.gang is not None:
            gangs.add(one.gang, held, held * one.gpus)
    phases, wasted, void = _ends(seconds, gpu_hour_dollars)
    return Ledger(
        len(attempts), phases, wasted, void, sum(phases.values(), wasted),
        *_dearest(gangs.costs(gpu_hour_dollars)), *_dearest(trials.costs(gpu_hour_dollars)),
    )  # fmt: skip


def seconds_by_phase(
    queued_at: datetime | None,
    started_at: datetime,
    phase: str,
    phase_since: datetime | None,
    phase_seconds: Mapping[str, float] | None,
    until: datetime | None,
) -> dict[str, float]:
    """Seconds of an attempt in each phase, in its last up to `until`; None leaves that one out.

    The queue's are those before the claim, and those behind another attempt.
    """
    seconds = dict(phase_seconds or {})
    if queued_at is not None:
        _count(seconds, QUEUE, queued_at, started_at)
    if until is not None and phase_since is not None:
        _count(seconds, phase, phase_since, until)
    elif until is not None:
        _count(seconds, UNKNOWN, started_at, until)
    return seconds


def _count(seconds: dict[str, float], phase: str, since: datetime, until: datetime) -> None:
    spent = max((until - since).total_seconds(), 0.0)  # another machine's clock may be behind
    seconds[phase] = seconds.get(phase, 0.0) + spent


def _ends(
    seconds: Mapping[tuple[str | None, str, int], float], gpu_hour_dollars: float
) -> tuple[dict[str, Cost], Cost, Cost]:
    """Costs by phase, of what was wasted, and of that what was void; from seconds by outcome, phase and GPUs."""
    phases, ends = _Tally[str](), _Tally[str]()
    for (outcome, phase, gpus), spent in seconds.items():
        held = 0.0 if phase in FREE else spent * gpus
        if outcome in WASTED and phase not in WAITS:
            ends.add(outcome, spent, held)
        else:
            phases.add(phase, spent, held)
    by_phase, by_end = phases.costs(gpu_hour_dollars), ends.costs(gpu_hour_dollars)
    ordered = dict(sorted(by_phase.items(), key=lambda item: place_of(item[0])))
    return ordered, sum(by_end.values(), Cost()), by_end.get(Outcome.VOID, Cost())


class _Tally(Generic[Key]):
    """Seconds and GPU-seconds by key, and their costs."""

    def __init__(self) -> None:
        self._sums: dict[Key, list[float]] = {}

    def add(self, key: Key, seconds: float, gpu_seconds: float) -> None:
        sums = self._sums.setdefault(key, [0.0, 0.0])
        sums[0] += seconds
        sums[1] += gpu_seconds

    def costs(self, gpu_hour_dollars: float) -> dict[Key, Cost]:
        return {key: Cost(sums[0], sums[1], sums[1] * gpu_hour_dollars / 3600) for key, sums in self._sums.items()}


def place_of(phase: str) -> int:
    """The phase's place among PHASES, as what to sort by."""
    return PHASES.index(phase) if phase in PHASES else len(PHASES)


def _dearest(costs: Mapping[Key, Cost]) -> tuple[dict[Key, Cost], Cost]:
    """The MOST that cost most, and the sum of the others."""
    ordered = sorted(costs.items(), key=lambda item: (-item[1].gpu_seconds, -item[1].seconds))
    return dict(ordered[:MOST]), sum((cost for _, cost in ordered[MOST:]), Cost())
