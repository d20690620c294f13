"""The values that pass between store, proposer, loop and api. Frozen; no database row leaves the store."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from math import inf
from typing import Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, ValidationError, field_validator, model_validator

from orchestrator.check import check_study, rest_problems
from orchestrator.lifecycle import Cause, Outcome, RunState, StudyState, TrialState
from orchestrator.points import Domain
from orchestrator.shortening import rung_problems
from orchestrator.space import Parameter
from worker.report import Hardware, Measurement, TrialResult
from worker.shape import Frozen
from worker.spec import BudgetConfig, GangConfig, InvalidSpec, Problem, TrialSpec, parse_spec, problems_of

CAP_BYTES = 16_000_000
CAP_SECONDS = 600.0
Verdict = Literal["fits", "grey", "cannot_fit"]
Origin = Literal["proposed", "submitted", "imported"]
SamplerName = Literal["caddie", "tpe", "gp", "nsga2", "random", "qmc", "grid"]
Objective = Literal["val_bpb", "artifact_bytes"]


class StoppingConfig(Frozen):
    """When a run is stopped early, judged on intermediate BPB beside that of others at the same fraction of the budget.

    Only runs of the same rung count, each trial's first at it; further seeds are never stopped. median: it is worse
    than the median of those that trained to the end. percentile: it is not among the best `percent` of them. halving:
    at `after_fraction`, and at each halving of what is left of the budget, it must be among the best half of all that
    came so far. A share `spare` of the runs, drawn from the study's seed, is never stopped: they show what stopping
    costs.
    """

    rule: Literal["median", "percentile", "halving"] = "median"
    percent: float = Field(default=50.0, gt=0, lt=100)
    after_fraction: float = Field(default=0.5, gt=0, lt=1)
    """Of the budget: no run is stopped before."""
    min_runs: int = Field(default=5, ge=2, le=1_000_000)
    """Finished runs that there must be to compare with."""
    spare: float = Field(default=0.1, gt=0, le=1)


class RungConfig(Frozen):
    """A cheaper way to train every trial first: a shortened schedule of its own, perhaps on fewer ranks."""

    budget: BudgetConfig
    ranks: Literal[1, 2, 4, 8] | None = None
    """None: as many as the study's gangs have."""


class PromotionConfig(Frozen):
    """Rungs, cheapest first; above them is the spec's own budget. Asynchronous successive halving (Li et al., 2020).

    Proposals start at the cheapest rung that decides; submitted trials have their own budget.
    """

    rungs: tuple[RungConfig, ...] = Field(min_length=1, max_length=5)
    keep: float = Field(default=0.25, gt=0, lt=1)
    """The share of a rung's trials, the best ones, that go on to the next."""
    spare: float = Field(default=0.1, ge=0, le=1)
    """The share that goes on whatever it scored, drawn from the study's seed: the best alone would hide how well the
    rung ranks the others."""
    min_correlation: float = Field(default=0.3, ge=-1, le=1)
    """Of the trials that finished a rung and the next, by rank (Spearman). Once the whole 90% interval lies below this,
    the rung no longer decides: its trials all go on, and new ones start above it."""


class ReplicationConfig(Frozen):
    """Further seeds for promising trials, in this order, the same for all."""

    seeds: tuple[int, ...] = Field(default=(42, 314, 999, 2025, 7), min_length=1, max_length=64)
    chance: float = Field(default=0.1, gt=0, lt=1)
    """A trial earns its next seed while the chance that its mean beats the incumbent's is above this."""

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) != len(seeds) or any(not 0 <= seed < 2**63 for seed in seeds):
            raise ValueError("must name different seeds, each from 0 to 2**63 - 1")
        return seeds


class SpendingConfig(Frozen):
    """What a study may spend, and when it has found enough. What a run will cost is reserved before it starts.

    A study that may start nothing more stops itself, and says why; what runs goes on to its end.
    """

    gpu_hours: float | None = Field(default=None, gt=0, le=1e6)
    """Of all ranks together; a CPU rank counts as one GPU."""
    dollars: float | None = Field(default=None, gt=0, le=1e6)
    gpu_hour_dollars: float = Field(default=2.5, ge=0, le=1e6)
    wall_hours: float | None = Field(default=None, gt=0, le=1e6)
    """Since the study was created."""
    target_bpb: float | None = Field(default=None, gt=0, le=100)
    """The study stops once a trial within all limits scores this or less; imported ones do not count."""

    @field_validator("gpu_hour_dollars")
    @classmethod
    def _a_price(cls, dollars: float) -> float:
        if 0 < dollars < 1e-6:
            raise ValueError("must be 0, or a millionth of a dollar at least")
        return dollars


class NewStudy(Frozen):
    """A search to create: a base spec, the paths that vary, and how many trials to propose. None is invalid."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    base: dict[str, Any]
    space: dict[str, Parameter] = Field(default_factory=dict)
    sampler: SamplerName = "caddie"
    objectives: tuple[Objective, ...] = ("val_bpb",)
    """What is minimised; with artifact_bytes beside val_bpb, the trade-off of the two."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    max_trials: int = Field(default=100, ge=0, le=1_000_000)
    """Trials that Optuna proposes; submitted ones come on top. Without a space nothing is proposed."""
    cap_bytes: int = Field(default=CAP_BYTES, ge=1)
    tolerance_bytes: int = Field(default=0, ge=0)
    """How far above the cap the low end of a prediction may be before a trial is refused."""
    cap_train_seconds: float = Field(default=CAP_SECONDS, gt=0)
    cap_evaluate_seconds: float = Field(default=CAP_SECONDS, gt=0)
    stopping: StoppingConfig | None = None
    promotion: PromotionConfig | None = None
    replication: ReplicationConfig | None = None
    spending: SpendingConfig = SpendingConfig()
    gangs: tuple[GangConfig, ...] = Field(default=(), max_length=16)
    """Shapes of gang to propose for, turn by turn; none means the base spec's own."""

    @field_validator("gangs")
    @classmethod
    def _distinct(cls, gangs: tuple[GangConfig, ...]) -> tuple[GangConfig, ...]:
        if len(set(gangs)) != len(gangs):
            raise ValueError("must name each shape once")
        return gangs

    @field_validator("objectives")
    @classmethod
    def _known_objectives(cls, objectives: tuple[Objective, ...]) -> tuple[Objective, ...]:
        if objectives not in (("val_bpb",), ("val_bpb", "artifact_bytes")):
            raise ValueError("must be val_bpb alone, or val_bpb and artifact_bytes")
        return objectives

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, data: Any, handler: ModelWrapValidatorHandler["NewStudy"]) -> "NewStudy":
        try:
            study = handler(data)
        except ValidationError as error:
            raise InvalidSpec((*problems_of(error, cls), *rest_problems(data))) from None
        check_study(study.base, study.gangs, study.space)
        rungs = study.promotion.rungs if study.promotion else ()
        problems = rung_problems(study.base, study.space, study.shapes, [(rung.budget, rung.ranks) for rung in rungs])
        if found := (*problems, *study._endless()):
            raise InvalidSpec(found)
        return study

    def _endless(self) -> Iterator[Problem]:
        """What a grid cannot go through."""
        if self.sampler == "grid":
            for each in Domain(self.base, self.space).dimensions:
                if each.parameter.count == inf:
                    yield Problem(f"space.{each.name}", each.name, "needs a step: a grid has finitely many values")

    @property
    def shapes(self) -> tuple[GangConfig, ...]:
        return self.gangs or (parse_spec(self.base).gang,)


@dataclass(frozen=True)
class Study:
    id: int
    name: str
    state: StudyState
    definition: NewStudy
    proposed: int
    """Proposals that became trials so far."""
    refused: int
    """Points of the search that no cap let through, which never became trials: a Proposer counts each once."""
    reason: str | None
    created_at: datetime
    changed_at: datetime
    priority: int = 0
    archived_at: datetime | None = None


@dataclass(frozen=True)
class Prediction:
    """What a spec will cost, before it runs. Artifact bytes include code. `low` and `high` are a 90% interval's ends.

    Seconds are None until some trial has shown how fast the gangs are; on GPUs there is a first guess at training.
    """

    parameters: int
    code_bytes: int
    artifact_bytes: int
    artifact_bytes_low: int
    artifact_bytes_high: int
    step_seconds: float | None = None
    """Of a training step, the mean."""
    steps: int | None = None
    """That the budget allows, whichever of its limits comes first."""
    train_seconds: float | None = None
    train_seconds_low: float | None = None
    train_seconds_high: float | None = None
    evaluate_seconds: float | None = None
    """Of all final scores."""
    evaluate_seconds_low: float | None = None
    evaluate_seconds_high: float | None = None


class Suggestion(Frozen):
    """What a proposal came from: an arm of the sampler, and for a guided one the rule, the trial and the finding."""

    arm: str
    rule: str | None = None
    parent: int | None = None
    """The number of the trial that it was made from."""
    why: str | None = None
    position: int | None = None
    """In the sequence that qmc or grid walk: the proposal's place; of one found elsewhere, how far they had come."""


@dataclass(frozen=True)
class NewTrial:
    """A trial to add. `params` are its parameters in the study's space, as JSON values by path."""

    spec: TrialSpec
    params: dict[str, Any]
    origin: Origin
    prediction: Prediction
    verdict: Verdict
    reason: str | None = None
    idempotency_key: str | None = None
    suggestion: Suggestion | None = None


@dataclass(frozen=True)
class Trial:
    id: int
    study_id: int
    number: int
    """Counts from 0 within the study."""
    state: TrialState
    origin: Origin
    spec: TrialSpec
    spec_hash: str
    params: dict[str, Any]
    prediction: Prediction
    verdict: Verdict
    reason: str | None
    result: TrialResult | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    suggestion: Suggestion | None = None
    feasible: bool | None = None
    """Whether its result keeps every cap of the study; None without a result."""


@dataclass(frozen=True)
class Run:
    id: int
    trial_id: int
    seed: int
    state: RunState
    gang: GangConfig
    rung: int
    """0 is the spec's own budget; -1 the dearest of the cheaper rungs, and so on down."""
    budget: BudgetConfig
    scores: "Scores | None"
    """Of the attempt that succeeded, or was stopped with a result."""
    spared_at: float | None
    """The fraction of the budget at which it would have been stopped, had it not been spared."""


@dataclass(frozen=True)
class Scores:
    """What counts of a run's result, in leaderboards and verdicts."""

    val_bpb: float
    val_loss: float
    """Nats per token."""
    artifact_bytes: int
    train_seconds: float
    evaluate_seconds: float
    feasible: bool
    """Whether it keeps every cap of its study."""


@dataclass(frozen=True)
class Attempt:
    id: int
    run_id: int
    number: int
    """Counts from 1 within the run."""
    owner: str
    gang: str | None
    phase: str
    outcome: Outcome | None
    cause: Cause | None
    reason: str | None
    queued_at: datetime | None
    """When its run had entered the queue; None on attempts older than this account."""
    started_at: datetime
    finished_at: datetime | None
    phase_seconds: dict[str, float]
    """Seconds by phase, its wait in the queue included, of the phases it has left; once it has ended, of all."""
    step_seconds: float | None
    """Median of a training step; None without a result."""
    hardware: Hardware | None
    artifact: "Artifact | None"


@dataclass(frozen=True)
class Artifact:
    """A stored file: where, how many bytes, and their SHA-256 (hex)."""

    uri: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Lease:
    """The right to write one attempt, until it expires or is taken."""

    attempt_id: int
    token: str


@dataclass(frozen=True)
class Claim:
    """A run that is ours to execute: its lease, and the spec at the run's seed and budget."""

    lease: Lease
    run_id: int
    trial_id: int
    trial_number: int
    study_id: int
    spec: TrialSpec
    started_at: datetime
    rung: int = 0


@dataclass(frozen=True)
class Resumed:
    """An open attempt taken over from an orchestrator that is gone: what it had recorded of it by then."""

    claim: Claim
    gang: str | None
    """None where the attempt may not have reached one."""
    phase: str
    after: int
    logged: int = 0
    """The numbers of the last measurement and of the last log line recorded, 0 without any."""


@dataclass(frozen=True)
class AttemptResult:
    """How an attempt ended, to be recorded under its lease."""

    outcome: Outcome
    reason: str = ""
    result: TrialResult | None = None
    artifact: Artifact | None = None
    cause: Cause | None = None
    """Set only where it failed."""
    seconds: Mapping[str, float] | None = None
    """By phase, where its gang has told; else they are reckoned from when the phases were recorded."""
    phase: str | None = None
    """The last of those that its gang has told."""
    traceback: str = ""  # of a failure, its last lines


@dataclass(frozen=True)
class Progress:
    """Measurements of one attempt, in order, with the attempt they belong to."""

    attempt_id: int
    run_id: int
    seed: int
    measurement: Measurement


@dataclass(frozen=True)
class Event:
    """One state change, in the order in which they were committed."""

    id: int
    study_id: int
    trial_number: int | None
    at: datetime
    kind: str
    message: str
