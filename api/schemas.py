"""What the API answers: the shape of each response, and how it is made from a domain value."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any, Generic, Literal, Self, TypeVar

from pydantic import BaseModel

from api.reports import CostOut, SpendingOut
from orchestrator.cost import Cost, cost_of
from orchestrator.lifecycle import Cause, Outcome, RunState, StudyState, TrialState
from orchestrator.standing import Standing
from orchestrator.study import (
    Attempt,
    Event,
    NewStudy,
    Origin,
    Prediction,
    Progress,
    Run,
    Scores,
    Study,
    Suggestion,
    Trial,
    Verdict,
)
from worker.inventory import TensorClass, tensor_inventory
from worker.report import Hardware, TrialResult
from worker.spec import BudgetConfig, GangConfig, TrialSpec
from worker.tying import TyingMap

if TYPE_CHECKING:  # SQLAlchemy and NumPy come with these, and clients read answers without them
    from orchestrator.activity import Activity
    from orchestrator.detail import Detail
    from orchestrator.labels import Note
    from orchestrator.spending import Account

Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """Some items, and what to send for the next page where there may be more: a number as `after`, text as `cursor`."""

    items: list[Item]
    next: int | str | None = None


class StudyOut(BaseModel):
    """A study, how many trials it has in each state, and the best of those that fit the cap."""

    id: int
    name: str
    state: StudyState
    reason: str | None
    definition: NewStudy
    max_trials: int
    """How many the proposer may propose: 0 without a space."""
    proposed: int
    submitted: int
    refused: int
    """Points of the search that no cap let through, which never became trials: an orchestrator counts each once."""
    counts: dict[TrialState, int]
    best_trial: int | None
    best_bpb: float | None
    """The mean of its seeds."""
    spending: SpendingOut | None
    """None where nothing limits its GPU-hours."""
    priority: int
    """Runs of studies with a higher one start first."""
    archived_at: datetime | None
    created_at: datetime
    changed_at: datetime

    @property
    def to_come(self) -> int:
        """How many more it may propose; none once it has ended."""
        going = self.state in (StudyState.RUNNING, StudyState.PAUSED)
        return max(self.max_trials - self.proposed, 0) if going else 0

    @property
    def all_refused(self) -> int:
        """What was refused before any GPU second: infeasible trials, and points that never became trials."""
        return self.refused + self.counts.get(TrialState.INFEASIBLE, 0)

    @property
    def paused_itself(self) -> bool:
        """Whether it waits for somebody to mend something: whoever pauses a study gives no reason."""
        return self.state is StudyState.PAUSED and self.reason is not None

    @classmethod
    def of(
        cls, study: Study, counts: Mapping[TrialState, int], best: Standing | None, account: "Account | None"
    ) -> "StudyOut":
        new = study.definition
        return cls(
            id=study.id, name=study.name, state=study.state, reason=study.reason, definition=new,
            max_trials=new.max_trials if new.space else 0, proposed=study.proposed,
            submitted=sum(counts.values()) - study.proposed, refused=study.refused, counts=dict(counts),
            best_trial=best.number if best else None, best_bpb=best.sample.mean if best and best.sample else None,
            spending=account and SpendingOut.of(account, new.spending.gpu_hour_dollars),
            priority=study.priority, archived_at=study.archived_at,
            created_at=study.created_at, changed_at=study.changed_at,
        )  # fmt: skip


class TrialSummary(BaseModel):
    """A trial in a list: what it is, and what came of it. Bytes count code; the score is `val_bpb`."""

    number: int
    state: TrialState
    phase: str
    """What its gang does now: start, data, train, evaluate, pack; empty where none works on it."""
    origin: Origin
    params: dict[str, Any]
    verdict: Verdict
    reason: str | None
    tying_map: TyingMap
    lora_rank: int
    seed: int
    ranks: int
    parameters: int
    predicted_artifact_bytes: int
    val_bpb: float | None
    val_bpb_prequant: float | None
    artifact_bytes: int | None
    train_seconds: float | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    suggestion: Suggestion | None
    """What a proposal came from."""
    tags: list[str]

    @classmethod
    def of(cls, trial: Trial, phase: str = "", tags: Sequence[str] = ()) -> "TrialSummary":
        return cls(**_summary(trial, phase, tags))


class ArtifactOut(BaseModel):
    """The stored model: its bytes and their SHA-256 (hex)."""

    bytes: int
    sha256: str


class AttemptOut(BaseModel):
    """One execution of a run by one gang."""

    id: int
    number: int
    owner: str
    gang: str | None
    phase: str
    outcome: Outcome | None
    cause: Cause | None
    reason: str | None
    queued_at: datetime | None
    started_at: datetime
    finished_at: datetime | None
    phase_seconds: dict[str, float]
    """Seconds by phase, its wait in the queue included, of the phases it has left; once it has ended, of all."""
    cost: CostOut
    """Of `phase_seconds`."""
    step_seconds: float | None
    """Median of a training step."""
    hardware: Hardware | None
    artifact: ArtifactOut | None

    @classmethod
    def of(cls, attempt: Attempt, cost: Cost) -> "AttemptOut":
        stored = attempt.artifact and ArtifactOut(bytes=attempt.artifact.bytes, sha256=attempt.artifact.sha256)
        return cls(
            id=attempt.id, number=attempt.number, owner=attempt.owner, gang=attempt.gang,
            phase=attempt.phase, outcome=attempt.outcome, cause=attempt.cause, reason=attempt.reason,
            queued_at=attempt.queued_at, started_at=attempt.started_at, finished_at=attempt.finished_at,
            phase_seconds=attempt.phase_seconds, cost=CostOut.of(cost), step_seconds=attempt.step_seconds,
            hardware=attempt.hardware, artifact=stored,
        )  # fmt: skip


class RunOut(BaseModel):
    """A trial at one seed and budget, with the shape of gang it needs and every attempt at it."""

    id: int
    seed: int
    rung: int
    """0 is the spec's own budget; -1 the dearest of the cheaper rungs, and so on down."""
    state: RunState
    gang: GangConfig
    budget: BudgetConfig
    spared_at: float | None
    """The share of the budget at which it would have been stopped, had it not been spared."""
    scores: Scores | None
    """None before it has a result."""
    attempts: list[AttemptOut]

    @classmethod
    def of(cls, run: Run, attempts: Sequence[Attempt], gpu_hour_dollars: float) -> "RunOut":
        own = [
            AttemptOut.of(attempt, cost_of(attempt.phase_seconds, run.gang, gpu_hour_dollars))
            for attempt in attempts
            if attempt.run_id == run.id
        ]
        return cls(
            id=run.id, seed=run.seed, rung=run.rung, state=run.state, gang=run.gang, budget=run.budget,
            spared_at=run.spared_at, scores=run.scores, attempts=own,
        )  # fmt: skip


class PredictionOut(BaseModel):
    """What a spec will cost, before it runs. Artifact bytes include code. `low` and `high` are a 90% interval's ends.

    Seconds are null until some trial has shown how fast the gangs are; on GPUs there is a first guess at training.
    """

    parameters: int
    model_bytes: int
    """The model's expected share of `artifact_bytes`."""
    code_bytes: int
    artifact_bytes: int
    artifact_bytes_low: int
    artifact_bytes_high: int
    step_seconds: float | None
    """Of a training step, the mean."""
    steps: int | None
    """That the budget allows, whichever of its limits comes first."""
    train_seconds: float | None
    train_seconds_low: float | None
    train_seconds_high: float | None
    evaluate_seconds: float | None
    """Of all final scores."""
    evaluate_seconds_low: float | None
    evaluate_seconds_high: float | None

    @classmethod
    def of(cls, prediction: Prediction) -> "PredictionOut":
        return cls(model_bytes=prediction.artifact_bytes - prediction.code_bytes, **asdict(prediction))


class NoteOut(BaseModel):
    """What somebody wrote about a trial: plain text."""

    id: int
    at: datetime
    author: str
    """The name of the token that it was written with."""
    text: str

    @classmethod
    def of(cls, note: "Note") -> "NoteOut":
        return cls.model_validate(note, from_attributes=True)


class TagsOut(BaseModel):
    """A trial's tags, in alphabetical order."""

    tags: list[str]


class TrialOut(TrialSummary):
    """Everything about one trial but its measurements."""

    study: str
    spec: TrialSpec
    spec_hash: str
    prediction: PredictionOut
    result: TrialResult | None
    runs: list[RunOut]
    notes: list[NoteOut]
    """Oldest first."""

    @classmethod
    def detailed(cls, study: str, detail: "Detail", gpu_hour_dollars: float, **more: Any) -> Self:
        """With what a kind of it has `more`."""
        trial, attempts = detail.trial, detail.attempts
        phase = next((attempt.phase for attempt in attempts if attempt.outcome is None), "")
        return cls(
            **_summary(trial, phase, detail.tags), study=study, spec=trial.spec, spec_hash=trial.spec_hash,
            prediction=PredictionOut.of(trial.prediction), result=trial.result,
            runs=[RunOut.of(run, attempts, gpu_hour_dollars) for run in detail.runs],
            notes=[NoteOut.of(note) for note in detail.notes], **more,
        )  # fmt: skip


class SubmittedOut(TrialOut):
    """The trial, and which of its runs was asked for: where the study had the configuration, one at a further seed."""

    run_id: int | None
    """None where the trial is infeasible."""


class BatchedOut(TrialSummary):
    """One trial of a batch, and which of its runs was asked for."""

    spec_hash: str
    run_id: int | None
    """None where the trial is infeasible."""

    @classmethod
    def submitted(cls, trial: Trial, run_id: int | None, tags: Sequence[str]) -> "BatchedOut":
        return cls(**_summary(trial, "", tags), spec_hash=trial.spec_hash, run_id=run_id)


class BatchOut(BaseModel):
    """The trials of a batch, in the order in which they were sent."""

    trials: list[BatchedOut]


class MeasurementOut(BaseModel):
    """Metrics at one step of one attempt; `number` counts from 1 within the attempt."""

    attempt_id: int
    run_id: int
    seed: int
    number: int
    step: int
    elapsed_seconds: float
    metrics: dict[str, float]

    @classmethod
    def of(cls, progress: Progress) -> "MeasurementOut":
        said = progress.measurement
        return cls(
            attempt_id=progress.attempt_id, run_id=progress.run_id, seed=progress.seed, number=said.number,
            step=said.step, elapsed_seconds=said.elapsed_seconds, metrics=said.metrics,
        )  # fmt: skip


class ActivityOut(BaseModel):
    """What one open attempt is doing now, with the last metrics it gave."""

    trial: int
    seed: int
    attempt_id: int
    gang: str | None
    phase: str
    started_at: datetime
    step: int | None
    elapsed_seconds: float | None
    metrics: dict[str, float]

    @classmethod
    def of(cls, activity: "Activity") -> "ActivityOut":
        return cls.model_validate(activity, from_attributes=True)


class EventOut(BaseModel):
    """One state change. Ids follow the order of commits; `trial` is the trial's number, where it is about one."""

    id: int
    study: str
    trial: int | None
    at: datetime
    kind: str
    message: str

    @classmethod
    def of(cls, event: Event, study: str) -> "EventOut":
        return cls(
            id=event.id, study=study, trial=event.trial_number, at=event.at, kind=event.kind, message=event.message
        )


class RecipeOut(BaseModel):
    """A named spec from the literature, complete with defaults."""

    name: str
    spec: TrialSpec


class Health(BaseModel):
    status: Literal["ok"] = "ok"


def parameters_by_class(spec: TrialSpec) -> dict[TensorClass, int]:
    """Distinct stored values of the spec's model, by tensor class; classes without any are left out."""
    totals: dict[TensorClass, int] = {}
    for tensor in tensor_inventory(spec.model, spec.sharing):
        totals[tensor.tensor_class] = totals.get(tensor.tensor_class, 0) + tensor.elements
    return totals


def _summary(trial: Trial, phase: str, tags: Sequence[str]) -> dict[str, Any]:
    result, sharing = trial.result, trial.spec.sharing
    return {
        "number": trial.number, "state": trial.state, "phase": phase, "origin": trial.origin, "params": trial.params,
        "verdict": trial.verdict, "reason": trial.reason,
        "tying_map": sharing.tying_map, "lora_rank": sharing.lora.rank, "seed": trial.spec.seed,
        "ranks": trial.spec.gang.ranks, "parameters": trial.prediction.parameters,
        "predicted_artifact_bytes": trial.prediction.artifact_bytes,
        "val_bpb": result.val_bpb if result else None, "val_bpb_prequant": result.val_bpb_prequant if result else None,
        "artifact_bytes": result.artifact_bytes if result else None,
        "train_seconds": result.train_seconds if result else None,
        "created_at": trial.created_at, "started_at": trial.started_at, "finished_at": trial.finished_at,
        "suggestion": trial.suggestion, "tags": list(tags),
    }  # fmt: skip
