"""What the API reports about a whole study: what it cost, and what came of what proposed its trials."""

from dataclasses import asdict
from typing import TYPE_CHECKING

from pydantic import BaseModel

from orchestrator.cost import Cost

if TYPE_CHECKING:  # SQLAlchemy comes with these, and clients read answers without it
    from orchestrator.arms import Record
    from orchestrator.importance import Importance
    from orchestrator.ledger import Ledger
    from orchestrator.pareto import Point
    from orchestrator.savings import Savings
    from orchestrator.spending import Account
    from orchestrator.stopping import Regret


class CostOut(BaseModel):
    """Seconds of attempts, the GPU-seconds of all their ranks, and what those cost. Waiting in the queue is free."""

    seconds: float
    gpu_seconds: float
    dollars: float

    @classmethod
    def of(cls, cost: Cost) -> "CostOut":
        return cls(seconds=cost.seconds, gpu_seconds=cost.gpu_seconds, dollars=cost.dollars)


class SavingsOut(BaseModel):
    """What was not spent: by trials refused before they ran, as predicted, and by those that were stopped early or not
    promoted, of what was left of their training. Trials whose seconds nobody knew count as nothing, and how many they
    are is said; points that the search refused, and that never were trials, are not in it."""

    refused: CostOut
    refused_trials: int
    refused_unknown: int
    pruned: CostOut
    pruned_trials: int
    pruned_unknown: int

    @classmethod
    def of(cls, found: "Savings") -> "SavingsOut":
        return cls(
            refused=CostOut.of(found.refused), refused_trials=found.refused_trials,
            refused_unknown=found.refused_unknown, pruned_unknown=found.pruned_unknown,
            pruned=CostOut.of(found.pruned), pruned_trials=found.pruned_trials,
        )  # fmt: skip


class LedgerOut(BaseModel):
    """What attempts of a study, or of one `trial`, have cost.

    `total` sums `phases` and `wasted`: what those cost that failed, were preempted, lost or void, but for their waits.
    A gang's wait before an attempt is in the phase `idle`; gangs and trials are those that cost most, dearest first.
    """

    study: str
    trial: int | None
    gpu_hour_dollars: float
    """Today's price, for all of it."""
    attempts: int
    phases: dict[str, CostOut]
    wasted: CostOut
    void: CostOut
    """Of `wasted`: successes that were slower than their kind, and repeated."""
    total: CostOut
    gangs: dict[str, CostOut]
    """By the gang's name, without the queue before it."""
    other_gangs: CostOut
    trials: dict[int, CostOut]
    other_trials: CostOut
    savings: SavingsOut | None
    """Of a whole study alone."""

    @classmethod
    def of(
        cls, study: str, trial: int | None, found: "Ledger", gpu_hour_dollars: float, savings: "Savings | None" = None
    ) -> "LedgerOut":
        return cls(
            study=study, trial=trial, gpu_hour_dollars=gpu_hour_dollars, attempts=found.attempts,
            phases={phase: CostOut.of(cost) for phase, cost in found.phases.items()},
            wasted=CostOut.of(found.wasted), void=CostOut.of(found.void), total=CostOut.of(found.total),
            gangs={gang: CostOut.of(cost) for gang, cost in found.gangs.items()},
            other_gangs=CostOut.of(found.other_gangs),
            trials={number: CostOut.of(cost) for number, cost in found.trials.items()},
            other_trials=CostOut.of(found.other_trials), savings=savings and SavingsOut.of(savings),
        )  # fmt: skip


class SpendingOut(BaseModel):
    """What a study under a budget has spent, in GPU-hours; a CPU rank counts as one GPU.

    `limit` is the nearer of its limits, on hours or on dollars; `reserved` is what open attempts will still take.
    """

    limit_gpu_hours: float
    spent_gpu_hours: float
    reserved_gpu_hours: float
    left_gpu_hours: float
    gpu_hour_dollars: float

    @classmethod
    def of(cls, account: "Account", gpu_hour_dollars: float) -> "SpendingOut":
        return cls(
            limit_gpu_hours=account.limit_hours, spent_gpu_hours=account.spent_hours,
            reserved_gpu_hours=account.reserved_hours, left_gpu_hours=account.left_hours,
            gpu_hour_dollars=gpu_hour_dollars,
        )  # fmt: skip


class StoppingOut(BaseModel):
    """Runs that were stopped early, and what the `spared` ones, which train on, show of that.

    Of those that have `finished`, so many would have passed the rule by their final score (`wrong`: the stop would have
    been a mistake), and so many would have been the best so far.
    """

    stopped: int
    spared: int
    finished: int
    wrong: int
    error_rate_low: float
    """Of all stops, with `error_rate_high`: a 90% interval."""
    error_rate_high: float
    best: int
    given_up_bpb: float | None
    """The mean of what the best score would have been worse by, without one of the finished."""

    @classmethod
    def of(cls, found: "Regret") -> "StoppingOut":
        return cls(
            stopped=found.stopped, spared=found.spared, finished=found.finished, wrong=found.wrong,
            error_rate_low=found.error_rate.low, error_rate_high=found.error_rate.high, best=found.best,
            given_up_bpb=found.given_up_bpb,
        )  # fmt: skip


class ArmOut(BaseModel):
    """What came of the trials that one arm, or one rule of guided proposals, made. Scores are of complete trials that
    keep every cap."""

    name: str
    trials: int
    scored: int
    bests: int
    """How often one of them was better than every trial before it."""
    best_bpb: float | None
    median_bpb: float | None
    compared: int
    """How many can be compared with the trial that they were made from."""
    better: int
    """How many of these did better."""
    mean_gain: float | None
    """BPB of the trial that each was made from, minus its own."""

    @classmethod
    def of(cls, record: "Record") -> "ArmOut":
        return cls(
            name=record.name, trials=record.trials, scored=len(record.scores), bests=record.bests,
            best_bpb=record.best_bpb, median_bpb=record.median_bpb, compared=len(record.gains), better=record.better,
            mean_gain=record.mean_gain,
        )  # fmt: skip


class ArmsOut(BaseModel):
    """What proposed a study's trials, and what came of it."""

    arms: list[ArmOut]
    rules: list[ArmOut]
    """Of guided proposals, by what a trained model had shown."""


class ParetoPoint(BaseModel):
    """A complete trial that keeps every cap: the mean BPB of its `seeds`, and the bytes of its artifact."""

    number: int
    val_bpb: float
    seeds: int
    artifact_bytes: int

    @classmethod
    def of(cls, point: "Point") -> "ParetoPoint":
        return cls(**asdict(point))


class ParetoOut(BaseModel):
    """The trials that no other of the study beats in both BPB and bytes, smallest first."""

    study: str
    cap_bytes: int
    points: list[ParetoPoint]


class ParameterOut(BaseModel):
    """One parameter: its share of the variance of ranks by BPB, among the `trials` that have it, of all variance."""

    name: str
    importance: float | None
    trials: int


class FamilyOut(BaseModel):
    """What one family of tying maps has come to: `trials` are complete, scores are of those that keep every cap."""

    family: str
    trials: int
    best_bpb: float | None
    median_bpb: float | None


class ImportanceOut(BaseModel):
    """Which parameters matter, as far as the study's complete trials show, most important first; and its families of
    tying maps, best first.

    A parameter's importance is the share of the variance of ranks by BPB that lies between its values (epsilon squared:
    Kelley, 1935, on ranks as Kruskal and Wallis, 1952), less what chance alone would show. It is of first order: what
    two do only together is not seen, and two that moved together both count, so that shares need not add up to 1.
    Parameters that fewer than 10 trials have are left out.
    """

    study: str
    trials: int
    parameters: list[ParameterOut]
    families: list[FamilyOut]

    @classmethod
    def of(cls, study: str, found: "Importance") -> "ImportanceOut":
        return cls(
            study=study, trials=found.trials,
            parameters=[ParameterOut(**asdict(each)) for each in found.parameters],
            families=[FamilyOut(**asdict(each)) for each in found.families],
        )  # fmt: skip
