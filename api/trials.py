"""Trials over HTTP: submitted, listed, read, cancelled, and what they measured and made."""

import base64
import logging
from typing import Annotated

from fastapi import APIRouter, Header, Query, Response
from fastapi.responses import FileResponse
from sqlalchemy.orm import Session

from api.bodies import TrialIn
from api.context import After, Context, ContextOf, DatabaseOf, Limit, Now, StudyName, TrialNumber, WriterOf
from api.problems import responses
from api.reports import LedgerOut
from api.schemas import MeasurementOut, Page, SubmittedOut, TrialOut, TrialSummary
from api.submission import submit
from orchestrator import store
from orchestrator.activity import list_activity
from orchestrator.artifacts import DamagedArtifact
from orchestrator.errors import NotFound
from orchestrator.ledger import ledger
from orchestrator.lifecycle import TrialState
from orchestrator.study import Artifact, Attempt, Trial

log = logging.getLogger(__name__)
router = APIRouter(prefix="/studies/{study}/trials", tags=["trials"], responses=responses(404, 422))

Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key", min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$",
        description="Sending the same body again under the same key returns the trial that it made the first time.",
    ),
]  # fmt: skip


@router.post(
    "", status_code=201, responses={**responses(400, 409, 415), 200: {"model": SubmittedOut, "description": "Replayed"}}
)
def submit_trial(
    study: StudyName, body: TrialIn, context: ContextOf, writer: WriterOf, response: Response, key: Key = None
) -> SubmittedOut:
    """Submit a trial. One that cannot fit the byte cap is kept as infeasible, with the reason, and never runs.

    With `allow_duplicate`, a configuration of which the study has a complete trial is that trial's next replicate.
    """
    database = context.database
    with database.read() as session:
        found = store.get_study(session, study)
    spec = body.build(found.definition)
    submitted = submit(writer, found, spec, key=key, allow_duplicate=body.allow_duplicate)
    response.headers["Location"] = f"/v1/studies/{study}/trials/{submitted.trial.number}"
    if submitted.replayed:
        response.status_code = 200
        response.headers["Idempotent-Replay"] = "true"
    with database.read() as session:
        trial = describe(session, study, submitted.trial, context)
    return SubmittedOut(**dict(trial), run_id=submitted.run_id)


@router.get("")
def list_trials(
    study: StudyName,
    database: DatabaseOf,
    state: Annotated[tuple[TrialState, ...], Query()] = (),
    limit: Limit = 100,
    after: After = -1,
) -> Page[TrialSummary]:
    """A study's trials by number."""
    with database.read() as session:
        found = store.get_study(session, study)
        trials = store.list_trials(session, found.id, states=state, after=after, limit=limit + 1)
        phases = {activity.trial: activity.phase for activity in list_activity(session, found.id)}
    items = [TrialSummary.of(trial, phases.get(trial.number, "")) for trial in trials[:limit]]
    return Page(items=items, next=items[-1].number if len(trials) > limit else None)


@router.get("/{number}")
def get_trial(study: StudyName, number: TrialNumber, context: ContextOf) -> TrialOut:
    """One trial with its runs and attempts."""
    with context.database.read() as session:
        trial = store.get_trial(session, store.get_study(session, study).id, number)
        return describe(session, study, trial, context)


@router.post("/{number}/cancel", responses=responses(409))
def cancel_trial(study: StudyName, number: TrialNumber, context: ContextOf, writer: WriterOf) -> TrialOut:
    """End a queued or running trial; its gang is stopped."""
    with writer.write("trial.cancel", f"studies/{study}/trials/{number}") as session:
        trial = store.cancel_trial(session, store.get_study(session, study).id, number, writer.now)
        described = describe(session, study, trial, context)
    log.info("trial %d of study %s was cancelled", number, study, extra={"trial_id": trial.id})
    return described


@router.get("/{number}/ledger")
def get_trial_ledger(study: StudyName, number: TrialNumber, context: ContextOf, now: Now) -> LedgerOut:
    """What the trial's attempts have cost so far, by phase and by gang."""
    with context.database.read() as session:
        trial = store.get_trial(session, store.get_study(session, study).id, number)
        found = ledger(session, trial.study_id, context.gpu_hour_dollars, now, number=number)
    return LedgerOut.of(study, number, found, context.gpu_hour_dollars)


@router.get("/{number}/measurements")
def list_measurements(study: StudyName, number: TrialNumber, database: DatabaseOf) -> Page[MeasurementOut]:
    """Everything that a trial's attempts measured, attempt by attempt."""
    with database.read() as session:
        trial = store.get_trial(session, store.get_study(session, study).id, number)
        measured = store.list_measurements(session, trial.id)
    return Page(items=[MeasurementOut.of(progress) for progress in measured])


@router.get("/{number}/artifact", response_class=FileResponse, responses=responses(410))
def get_artifact(study: StudyName, number: TrialNumber, context: ContextOf) -> FileResponse:
    """The stored model's bytes, whole or by range, with their digest (RFC 9530)."""
    with context.database.read() as session:
        trial = store.get_trial(session, store.get_study(session, study).id, number)
        artifact = artifact_of(trial, store.list_attempts(session, trial.id))
    if artifact is None or context.artifacts is None:
        raise NotFound("artifact of trial", number)
    path = context.artifacts.path(artifact)
    if not path.is_file():
        raise DamagedArtifact(f"artifact {artifact.uri} is missing")
    digest = base64.b64encode(bytes.fromhex(artifact.sha256)).decode()
    return FileResponse(
        path, media_type="application/octet-stream", filename=f"{study}-{number}.caddie",
        headers={"Repr-Digest": f"sha-256=:{digest}:", "ETag": f'"{artifact.sha256}"'},
    )  # fmt: skip


def artifact_of(trial: Trial, attempts: tuple[Attempt, ...]) -> Artifact | None:
    """The artifact of the trial's result: the last, of those that were stored, with its digest."""
    digest = trial.result.artifact_sha256 if trial.result is not None else None
    stored = (attempt.artifact for attempt in reversed(attempts) if attempt.artifact is not None)
    return next((artifact for artifact in stored if artifact.sha256 == digest), None)


def describe(session: Session, study: str, trial: Trial, context: Context) -> TrialOut:
    """The trial with its runs and attempts, and what these cost."""
    runs, attempts = store.list_runs(session, trial.id), store.list_attempts(session, trial.id)
    return TrialOut.detailed(study, trial, runs, attempts, context.gpu_hour_dollars)
