"""Whether an attempt's timing counts: judged where its spec asks for it, by what its kind is known to take."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median

from sqlalchemy import Text, cast, exists, func, select
from sqlalchemy.orm import Session, aliased

from orchestrator.lifecycle import Cause, Outcome
from orchestrator.study import AttemptResult
from orchestrator.tables import AttemptRow, RunRow, TrialRow
from worker.report import Hardware

KNOWN_STEPS = 3  # successes of one configuration, without which nothing is known of its steps
KNOWN_PROBES = 5
LAST_PROBES = 20
MAX_VOID = 3  # of a run: what is slow every time is how fast it is


@dataclass(frozen=True)
class _Kind:
    """What the timing of an attempt is compared within."""

    attempt_id: int
    spec_hash: str
    ranks: int
    device: str

    def __str__(self) -> str:
        return f"{self.ranks} × {self.device}"


def judged(session: Session, attempt_id: int, ended: AttemptResult) -> AttemptResult:
    """The ending as it counts: void where a success was slower than `limits.slow_percent` allows.

    Slower in its steps than earlier successes of the same configuration on as many devices of the same model; or, in
    the probes of its ranks, than the last attempts of any configuration on those. After MAX_VOID void attempts of the
    run the success stands, and its reason says how slow it was.
    """
    hardware = ended.result.hardware if ended.result is not None else None
    if ended.outcome is not Outcome.SUCCEEDED or ended.result is None or hardware is None:
        return ended
    run_id, ranks, spec_hash, spec = session.execute(
        select(RunRow.id, RunRow.ranks, TrialRow.spec_hash, TrialRow.spec)
        .join(TrialRow, TrialRow.id == RunRow.trial_id).join(AttemptRow, AttemptRow.run_id == RunRow.id)
        .where(AttemptRow.id == attempt_id)
    ).one()  # fmt: skip
    limit = spec.get("limits", {}).get("slow_percent")  # which specs of an earlier version do not have
    if limit is None:
        return ended
    kind = _Kind(attempt_id, spec_hash, ranks, hardware.device)
    steps, probes = _known_steps(session, kind, run_id), _known_probes(session, kind)
    slow = _slower("step", ended.result.step_seconds, steps, KNOWN_STEPS, kind, limit) or _slower(
        "probe", hardware.slowest_probe_seconds, probes, KNOWN_PROBES, kind, limit
    )
    if slow is None:
        return ended
    void = session.scalar(
        select(func.count()).where(AttemptRow.run_id == run_id, AttemptRow.outcome == Outcome.VOID)
    )  # fmt: skip
    if void == MAX_VOID:
        return replace(ended, reason=f"{slow}; it stands after {void} void attempts")
    return replace(ended, outcome=Outcome.VOID, reason=slow)


def _slower(
    name: str, seconds: float, known: Sequence[float], enough: int, kind: _Kind, limit_percent: float
) -> str | None:
    """What is wrong with the timing, in numbers; None where nothing is, or not enough is known."""
    if len(known) < enough or seconds <= median(known) * (1 + limit_percent / 100):
        return None
    usual = median(known)
    return (
        f"{name} {seconds:.4g} s, {100 * (seconds / usual - 1):.0f}% slower than the {usual:.4g} s of {len(known)} "
        f"attempts on {kind}, and the limit is {limit_percent:g}%"
    )


def _known_steps(session: Session, kind: _Kind, run_id: int) -> Sequence[float]:
    """Seconds of a step of earlier successes at the same budget: other rungs are on other schedules. A run that ran out
    of memory has another micro-batch: another kind."""
    eased, own = aliased(AttemptRow), aliased(RunRow)
    budget = select(cast(own.budget, Text)).where(own.id == run_id).scalar_subquery()
    out_of_memory = exists().where(eased.run_id == RunRow.id, eased.cause == Cause.OUT_OF_MEMORY)
    if session.scalar(select(out_of_memory).where(RunRow.id == run_id)):
        return ()
    step_seconds = AttemptRow.result["step_seconds"].as_float()
    return session.scalars(
        select(step_seconds).join(RunRow, RunRow.id == AttemptRow.run_id).join(TrialRow, TrialRow.id == RunRow.trial_id)
        .where(TrialRow.spec_hash == kind.spec_hash, RunRow.ranks == kind.ranks, ~out_of_memory)
        .where(cast(RunRow.budget, Text) == budget)
        .where(AttemptRow.outcome == Outcome.SUCCEEDED, AttemptRow.hardware["device"].as_string() == kind.device)
    ).all()  # fmt: skip


def _known_probes(session: Session, kind: _Kind) -> Sequence[float]:
    """The slowest probe of each of the last attempts that were not void."""
    last = session.scalars(
        select(AttemptRow.hardware).join(RunRow, RunRow.id == AttemptRow.run_id)
        .where(RunRow.ranks == kind.ranks, AttemptRow.hardware["device"].as_string() == kind.device)
        .where(AttemptRow.outcome != Outcome.VOID)
        .order_by(AttemptRow.id.desc()).limit(LAST_PROBES)
    )  # fmt: skip
    return [Hardware.model_validate(hardware).slowest_probe_seconds for hardware in last]
