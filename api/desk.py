"""What executors that are not Ray send and get: the wire schemas of ask, report and tell."""

from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, Field
from pydantic.config import JsonDict

from orchestrator.lifecycle import Cause, Outcome
from worker.report import MAX_LINE, MAX_LINES, Directive, LogLine, Measurement, TrialResult, printable
from worker.shape import Frozen
from worker.spec import GangConfig, TrialSpec

if TYPE_CHECKING:  # a client needs no database
    from orchestrator.study import Claim

LEAST_LEASE_SECONDS, MOST_LEASE_SECONDS = 1.0, 3600.0
MOST_AT_ONCE = 1000
Seconds = Annotated[
    float,
    Field(
        ge=LEAST_LEASE_SECONDS, le=MOST_LEASE_SECONDS, description="How long the attempt is yours without a word of it."
    ),
]  # fmt: skip
Count = Annotated[int, Field(ge=0, le=2**31 - 1)]
Number = Annotated[int, Field(ge=1, le=2**31 - 1)]
Elapsed = Annotated[float, Field(ge=0, le=1e9)]
NO_OTHERS: JsonDict = {"additionalProperties": False}  # a pattern for names forbids, in JSON schema, no other names
Phase = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,31}$", description="What it does: data, train, evaluate …")]


class AskIn(Frozen):
    """Who asks, and for what shape of gang: by default the study's first."""

    executor: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,63}$")
    gang: GangConfig | None = None
    lease_seconds: Seconds = 60.0


class AskOut(BaseModel):
    """A run to execute. The token goes into the header `Caddie-Lease` of everything that is said of the attempt."""

    attempt_id: int
    lease_token: str
    lease_expires_at: datetime
    study: str
    trial: int
    run_id: int
    rung: int
    spec: TrialSpec
    """At the run's seed and budget."""

    @classmethod
    def of(cls, study: str, claim: "Claim", lease_expires_at: datetime) -> "AskOut":
        return cls(
            attempt_id=claim.lease.attempt_id, lease_token=claim.lease.token, lease_expires_at=lease_expires_at,
            study=study, trial=claim.trial_number, run_id=claim.run_id, rung=claim.rung, spec=claim.spec,
        )  # fmt: skip


class MeasurementIn(Frozen):
    """Metrics at one step. `number` counts the attempt's messages from 1: one sent twice is kept once."""

    number: Number
    step: Count
    elapsed_seconds: Elapsed
    metrics: dict[Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,64}$")], float] = Field(
        max_length=64, json_schema_extra=NO_OTHERS
    )

    def said(self) -> Measurement:
        return Measurement(**self.model_dump())


class LogLineIn(Frozen):
    """One line of the log. `number` counts the attempt's lines from 1: one sent twice is kept once."""

    number: int = Field(ge=1, le=MAX_LINES)
    elapsed_seconds: Elapsed
    line: str = Field(max_length=MAX_LINE)

    def said(self) -> LogLine:
        return LogLine(number=self.number, elapsed_seconds=self.elapsed_seconds, line=printable(self.line))


class HeartbeatIn(Frozen):
    """A sign of life, and the phase that the attempt is in now."""

    lease_seconds: Seconds = 60.0
    phase: Phase | None = None


class ReportIn(HeartbeatIn):
    """What the attempt has measured and logged since the last report, or once more."""

    measurements: list[MeasurementIn] = Field(default_factory=list, max_length=MOST_AT_ONCE)
    lines: list[LogLineIn] = Field(default_factory=list, max_length=MOST_AT_ONCE)


class DirectiveOut(BaseModel):
    """Whether to go on. At `stop` end training early, score and pack what there is, and tell it as stopped."""

    directive: Directive
    lease_expires_at: datetime


class TellIn(Frozen):
    """How the attempt ended.

    succeeded: with its result, whose artifact was stored before. stopped: as asked, with a result where there is one.
    failed: with its cause, if it is known. preempted: it was not the run's fault, and is tried again without charge.
    """

    outcome: Literal["succeeded", "stopped", "failed", "preempted"]
    reason: str = Field(default="", max_length=2000)
    result: TrialResult | None = None
    cause: Cause | None = None
    traceback: str = Field(default="", max_length=20_000)
    seconds: Annotated[dict[Phase, Elapsed], Field(max_length=32, json_schema_extra=NO_OTHERS)] | None = None
    """By phase, by the executor's clock; else they are reckoned from its reports."""


class ToldOut(BaseModel):
    """How the attempt ended, as it is recorded: a success that was slower than its kind is void."""

    attempt_id: int
    outcome: Outcome
    reason: str
