"""Rows as values: no row leaves the modules that write them."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

from sqlalchemy import Row

from orchestrator.ledger import seconds_by_phase
from orchestrator.lifecycle import Cause, Outcome, RunState, StudyState, TrialState
from orchestrator.study import (
    Artifact,
    Attempt,
    NewStudy,
    Prediction,
    Progress,
    Run,
    Scores,
    Study,
    Suggestion,
    Trial,
)
from orchestrator.tables import ArtifactRow, AttemptRow, MeasurementRow, RunRow, StudyRow, TrialRow
from worker.report import Hardware, Measurement, TrialResult
from worker.spec import BudgetConfig, GangConfig, TrialSpec


def gang_of(ranks: int, device: str) -> GangConfig:
    return GangConfig.model_validate({"ranks": ranks, "device": device})


def study_of(row: StudyRow | Row[*tuple[Any, ...]]) -> Study:
    """Of a mapped row, or of one whose definition is the text that was written."""
    written = row.definition if isinstance(row.definition, str) else json.dumps(row.definition)
    return Study(
        id=row.id, name=row.name, state=StudyState(row.state), definition=_definition(written),
        proposed=row.proposed, refused=row.refused, reason=row.reason,
        created_at=row.created_at, changed_at=row.changed_at, priority=row.priority, archived_at=row.archived_at,
    )  # fmt: skip


@lru_cache(maxsize=256)  # every tick asks for those of all studies that run
def _definition(written: str) -> NewStudy:
    try:
        return NewStudy.model_validate_json(written)
    except ValueError:  # of a version that took true for 1 where a number was asked for
        return NewStudy.model_validate(_with_numbers(json.loads(written)))


def _with_numbers(value: Any) -> Any:
    """The same with 1 and 0 for true and false, which are both to pydantic."""
    if isinstance(value, dict):
        return {key: _with_numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_with_numbers(one) for one in value]
    return int(value) if isinstance(value, bool) else value


def trial_of(row: TrialRow, spec: TrialSpec | None = None) -> Trial:
    """With its spec, where the caller has it: building one takes time."""
    return Trial(
        id=row.id, study_id=row.study_id, number=row.number, state=TrialState(row.state),
        origin=cast(Any, row.origin), spec=spec or TrialSpec.model_validate(row.spec),
        spec_hash=row.spec_hash, params=row.params, prediction=Prediction(**row.prediction),
        verdict=cast(Any, row.verdict), reason=row.reason,
        result=None if row.result is None else TrialResult.model_validate(row.result),
        created_at=row.created_at, started_at=row.started_at, finished_at=row.finished_at,
        suggestion=None if row.suggestion is None else Suggestion.model_validate(row.suggestion), feasible=row.feasible,
    )  # fmt: skip


def run_of(row: RunRow) -> Run:
    return Run(
        id=row.id, trial_id=row.trial_id, seed=row.seed, state=RunState(row.state),
        gang=gang_of(row.ranks, row.device), rung=row.rung, budget=BudgetConfig.model_validate(row.budget),
        scores=None if row.scores is None else Scores(**row.scores), spared_at=row.spared_at,
    )  # fmt: skip


def attempt_of(row: AttemptRow, artifact: ArtifactRow | None) -> Attempt:
    return Attempt(
        id=row.id, run_id=row.run_id, number=row.number, owner=row.owner, gang=row.gang, phase=row.phase,
        outcome=None if row.outcome is None else Outcome(row.outcome),
        cause=None if row.cause is None else Cause(row.cause),
        reason=row.reason, queued_at=row.queued_at, started_at=row.started_at, finished_at=row.finished_at,
        phase_seconds=seconds_by_phase(
            row.queued_at, row.started_at, row.phase, row.phase_since, row.phase_seconds, row.finished_at
        ),
        step_seconds=None if row.result is None else row.result["step_seconds"],
        hardware=None if row.hardware is None else Hardware.model_validate(row.hardware),
        artifact=None if artifact is None else Artifact(artifact.uri, artifact.bytes, artifact.sha256),
    )  # fmt: skip


def progress_of(rows: Sequence[MeasurementRow], run_id: int, seed: int) -> Progress:
    first = rows[0]
    measurement = Measurement(
        number=first.number, step=first.step, elapsed_seconds=first.elapsed_seconds,
        metrics={row.name: row.value for row in rows},
    )  # fmt: skip
    return Progress(first.attempt_id, run_id, seed, measurement)
