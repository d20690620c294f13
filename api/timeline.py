"""A trial's attempts as lanes of one time axis: how long each was in which phase, from when it was claimed."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from api.schemas import AttemptOut, RunOut
from orchestrator.cost import QUEUE
from orchestrator.ledger import place_of


@dataclass(frozen=True)
class Span:
    """A phase of an attempt. `share` is its part of the axis, in percent."""

    phase: str
    seconds: float
    share: float


@dataclass(frozen=True)
class AttemptLane:
    """One attempt: what it waited for its claim, and its phases since."""

    run: RunOut
    attempt: AttemptOut
    waited_seconds: float
    seconds: float
    spans: tuple[Span, ...]


def attempt_lanes(runs: Sequence[RunOut], now: datetime) -> list[AttemptLane]:
    """The lanes of all attempts, as they began, on the axis that the longest of them needs."""
    found = [(run, attempt, _phases(attempt, now)) for run in runs for attempt in run.attempts]
    longest = max((sum(phases.values()) for _, _, phases in found), default=0.0) or 1.0
    return [
        AttemptLane(
            run, attempt, attempt.phase_seconds.get(QUEUE, 0.0), sum(phases.values()),
            tuple(Span(name, seconds, 100 * seconds / longest) for name, seconds in phases.items() if seconds > 0),
        )
        for run, attempt, phases in sorted(found, key=lambda one: one[1].started_at)
    ]  # fmt: skip


def _phases(attempt: AttemptOut, now: datetime) -> dict[str, float]:
    """Seconds by phase in their order, without the queue; of an open attempt the present one up to now."""
    phases = {name: seconds for name, seconds in attempt.phase_seconds.items() if name != QUEUE}
    if attempt.finished_at is None:
        so_far = (now - attempt.started_at).total_seconds() - sum(phases.values())
        phases[attempt.phase] = phases.get(attempt.phase, 0.0) + max(so_far, 0.0)
    return dict(sorted(phases.items(), key=lambda one: place_of(one[0])))
