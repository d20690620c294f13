"""The values that pass between store, proposer, loop and api. Frozen; no database row leaves the store."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from orchestrator.lifecycle import Cause, Outcome, RunState, StudyState, TrialState
from orchestrator.space import Parameter, check_space
from worker.report import Hardware, Measurement, TrialResult
from worker.shape import Frozen
from worker.spec import GangConfig, InvalidSpec, TrialSpec, parse_spec

CAP_BYTES = 16_000_000
Verdict = Literal["fits", "grey", "cannot_fit"]
Origin = Literal["proposed", "submitted"]


class NewStudy(Frozen):
    """A search to create: a base spec, the paths that vary, and how many trials to propose. None is invalid."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    base: dict[str, Any]
    space: dict[str, Parameter] = Field(default_factory=dict)
    sampler: Literal["tpe", "random"] = "tpe"
    seed: int = Field(default=0, ge=0, lt=2**31)
    max_trials: int = Field(default=100, ge=0, le=1_000_000)
    """Trials that Optuna proposes; submitted ones come on top. Without a space nothing is proposed."""
    cap_bytes: int = Field(default=CAP_BYTES, ge=1)
    gangs: tuple[GangConfig, ...] = Field(default=(), max_length=16)
    """Shapes of gang to propose for, turn by turn; none means the base spec's own."""

    @field_validator("gangs")
    @classmethod
    def _distinct(cls, gangs: tuple[GangConfig, ...]) -> tuple[GangConfig, ...]:
        if len(set(gangs)) != len(gangs):
            raise ValueError("must name each shape once")
        return gangs

    @model_validator(mode="after")
    def _check(self) -> "NewStudy":
        try:
            parse_spec(self.base)
        except InvalidSpec as error:
            raise InvalidSpec(tuple(problem.within("base") for problem in error.problems)) from None
        for index, gang in enumerate(self.gangs):
            try:
                parse_spec({**self.base, "gang": gang.model_dump()})
            except InvalidSpec as error:
                problems = (replace(problem, field=problem.field.removeprefix("gang.")) for problem in error.problems)
                raise InvalidSpec(tuple(problem.within(f"gangs.{index}") for problem in problems)) from None
        check_space(self.base, self.space)
        return self

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
    """Proposals that never became trials: invalid, duplicate, or certain not to fit."""
    reason: str | None
    created_at: datetime
    changed_at: datetime


@dataclass(frozen=True)
class Prediction:
    """What a spec will cost, before it runs. Artifact bytes include code; `low` and `high` bound them."""

    parameters: int
    code_bytes: int
    artifact_bytes: int
    artifact_bytes_low: int
    artifact_bytes_high: int


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


@dataclass(frozen=True)
class Run:
    id: int
    trial_id: int
    seed: int
    state: RunState
    gang: GangConfig


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


@dataclass(frozen=True)
class Resumed:
    """An open attempt taken over from an orchestrator that is gone: what it had recorded of it by then."""

    claim: Claim
    gang: str | None
    """None where the attempt may not have reached one."""
    phase: str
    after: int
    """The number of the last measurement recorded, 0 without any."""


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
