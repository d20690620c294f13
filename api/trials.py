"""Trials over HTTP: submitted, listed, read, cancelled, and what they measured and made."""

import base64
import logging
from functools import lru_cache, partial
from typing import Annotated, Any, Literal, cast

from fastapi import APIRouter, Depends, Header, Path, Query, Response
from fastapi.responses import FileResponse
from pydantic import Field
from sqlalchemy.orm import Session

from api.bodies import BatchIn, NoteIn, SeedsIn, Tag, TagsChange, TagsIn, TrialIn
from api.context import (
    LARGEST_ID,
    After,
    Context,
    ContextOf,
    DatabaseOf,
    Limit,
    Now,
    StudyName,
    TrialNumber,
    WriterOf,
)
from api.events import read_cursor, write_cursor
from api.intake import Submission, Taken, take
from api.plain import PlainRoute
from api.problems import responses
from api.ranges import StoredFile
from api.reports import LedgerOut
from api.schemas import (
    BatchedOut,
    BatchOut,
    EventOut,
    MeasurementOut,
    NoteOut,
    Page,
    RunOut,
    SubmittedOut,
    TagsOut,
    TrialOut,
    TrialSummary,
)
from api.submission import Asked, submit_batch
from orchestrator import curves, reopening, store
from orchestrator.activity import list_activity, list_trial_events
from orchestrator.artifacts import DamagedArtifact
from orchestrator.detail import KEPT, Detail, get_detail
from orchestrator.errors import NotFound
from orchestrator.labels import add_note, change_tags, delete_note, list_notes, list_tags, set_tags
from orchestrator.ledger import ledger
from orchestrator.lifecycle import TrialState
from orchestrator.listing import Order, Place, Sort, Wanted, list_page, read_place
from orchestrator.seeds import ask_seeds, cancel_seed
from orchestrator.study import Artifact, Attempt, Origin, Trial, Verdict
from worker.shape import FieldError

MAX_MEASUREMENTS = 1000
"""In one answer, each with all that its gang measured at one step."""

log = logging.getLogger(__name__)
router = APIRouter(
    route_class=PlainRoute, prefix="/studies/{study}/trials", tags=["trials"], responses=responses(404, 422)
)

RunId = Annotated[int, Path(ge=1, le=LARGEST_ID)]
NoteId = Annotated[int, Path(ge=1, le=LARGEST_ID)]
Sorting = Literal[
    "number", "-number", "val_bpb", "-val_bpb", "artifact_bytes", "-artifact_bytes",
    "created_at", "-created_at", "finished_at", "-finished_at",
]  # fmt: skip
Name = Annotated[str, Field(pattern=r"^[ -~]{1,64}$")]


async def _wanted(
    state: Annotated[tuple[TrialState, ...], Query()] = (),
    origin: Annotated[tuple[Origin, ...], Query()] = (),
    verdict: Annotated[tuple[Verdict, ...], Query()] = (),
    arm: Annotated[tuple[Name, ...], Query(max_length=32, description="As /arms names them.")] = (),
    tag: Annotated[tuple[Tag, ...], Query(max_length=32, description="It must have them all.")] = (),
    after: Annotated[int, Query(ge=-1, le=LARGEST_ID, description="Only numbers above this.")] = -1,
) -> Wanted:
    return Wanted(state, origin, verdict, arm, tag, after)


WantedOf = Annotated[Wanted, Depends(_wanted)]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key", min_length=1, max_length=255, pattern=r"^[\x21-\x7e]+$",
        description="Sending the same body again under the same key returns the trial that it made the first time.",
    ),
]  # fmt: skip


@router.post(
    "", status_code=201, response_model=SubmittedOut,
    responses={**responses(400, 409, 415), 200: {"model": SubmittedOut, "description": "Replayed"}},
)  # fmt: skip
async def submit_trial(
    study: StudyName, body: TrialIn, context: ContextOf, writer: WriterOf, key: Key = None
) -> Response:
    """Submit a trial. One that cannot fit the byte cap is kept as infeasible, with the reason, and never runs.

    With `allow_duplicate`, a configuration of which the study has a complete trial is that trial's next replicate.
    """
    taken: Taken = await context.submissions.ask(Submission(study, body, key, writer), partial(take, context))
    headers = {"Location": f"/v1/studies/{study}/trials/{taken.number}"}
    if taken.replayed:
        headers["Idempotent-Replay"] = "true"
    return Response(taken.written, 200 if taken.replayed else 201, headers, "application/json")


@router.post(
    "/batch", status_code=201,
    responses={**responses(400, 409, 415), 200: {"model": BatchOut, "description": "Replayed"}},
)  # fmt: skip
def submit_trials(
    study: StudyName, body: BatchIn, database: DatabaseOf, writer: WriterOf, response: Response, key: Key = None
) -> BatchOut:
    """Submit up to a hundred trials, each as alone: all are added, or none. Problems name the trial, as `trials.3`."""
    with database.read() as session:
        found = store.get_study(session, study)
    specs = body.build_all(found.definition)
    asked = [
        Asked(spec, trial.allow_duplicate, f"trials.{place}")
        for place, (trial, spec) in enumerate(zip(body.trials, specs, strict=True))
    ]
    submitted = submit_batch(writer, found, asked, key=key)
    if submitted[0].replayed:
        response.status_code = 200
        response.headers["Idempotent-Replay"] = "true"
    with database.read() as session:
        tags = list_tags(session, [one.trial.id for one in submitted])
    return BatchOut(
        trials=[BatchedOut.submitted(one.trial, one.run_id, tags.get(one.trial.id, ())) for one in submitted]
    )


@router.get("")
def list_trials(
    study: StudyName,
    database: DatabaseOf,
    wanted: WantedOf,
    sort: Annotated[Sorting, Query(description="Descending with a minus. What has no value comes last.")] = "number",
    limit: Limit = 100,
    cursor: Annotated[str | None, Query(max_length=200, description="The `next` of the page before.")] = None,
) -> Page[TrialSummary]:
    """A study's trials, filtered and sorted. A page goes on where the one before ended, whatever was added since."""
    order = Sort(cast(Order, sort.removeprefix("-")), sort.startswith("-"))
    after = None if cursor is None else _place(cursor, order)
    with database.read() as session:
        found = store.get_study(session, study)
        trials, ended = list_page(session, found.id, wanted, order, after, limit)
        phases = {activity.trial: activity.phase for activity in list_activity(session, found.id)}
        tags = list_tags(session, [trial.id for trial in trials])
    items = [TrialSummary.of(trial, phases.get(trial.number, ""), tags.get(trial.id, ())) for trial in trials]
    return Page(items=items, next=None if ended is None else _cursor(ended, order))


@router.get("/{number}", response_model=TrialOut)
def get_trial(study: StudyName, number: TrialNumber, context: ContextOf) -> Response:
    """One trial with its runs and attempts."""
    with context.database.read() as session:
        detail = get_detail(session, study, number)
    return Response(_written(study, detail, context.gpu_hour_dollars), media_type="application/json")


@router.post("/{number}/cancel", responses=responses(409))
def cancel_trial(study: StudyName, number: TrialNumber, context: ContextOf, writer: WriterOf) -> TrialOut:
    """End a queued or running trial; its gang is stopped."""
    with writer.write("trial.cancel", f"studies/{study}/trials/{number}") as session:
        trial = store.cancel_trial(session, store.get_study(session, study).id, number, writer.now)
        described = describe(session, study, trial, context)
    log.info("trial %d of study %s was cancelled", number, study, extra={"trial_id": trial.id})
    return described


@router.post("/{number}/retry", responses=responses(409))
def retry_trial(study: StudyName, number: TrialNumber, context: ContextOf, writer: WriterOf) -> TrialOut:
    """Queue a failed or cancelled trial once more, with attempts as if it had had none."""
    with writer.write("trial.retry", f"studies/{study}/trials/{number}") as session:
        trial = reopening.retry_trial(session, store.get_study(session, study).id, number, writer.now)
        described = describe(session, study, trial, context)
    log.info("trial %d of study %s is tried again", number, study, extra={"trial_id": trial.id})
    return described


@router.post("/{number}/seeds", status_code=201, responses=responses(400, 409, 415))
def add_seeds(
    study: StudyName, number: TrialNumber, body: SeedsIn, context: ContextOf, writer: WriterOf
) -> Page[RunOut]:
    """Run a complete trial at further seeds, which its leaderboard row then is the mean of."""
    with writer.write("trial.seeds", f"studies/{study}/trials/{number}") as session:
        found = store.get_study(session, study)
        runs = ask_seeds(session, found, number, writer.now, named=body.seeds, count=body.count)
    log.info("trial %d of study %s runs at %d more seeds", number, study, len(runs))
    return Page(items=[RunOut.of(run, (), context.gpu_hour_dollars) for run in runs])


@router.post("/{number}/runs/{run}/cancel", responses=responses(409))
def cancel_run(study: StudyName, number: TrialNumber, run: RunId, context: ContextOf, writer: WriterOf) -> RunOut:
    """End one queued or running seed of a complete trial; its gang is stopped."""
    with writer.write("run.cancel", f"studies/{study}/trials/{number}/runs/{run}") as session:
        cancelled = cancel_seed(session, store.get_study(session, study).id, number, run, writer.now)
        attempts = store.list_attempts(session, cancelled.trial_id)
    log.info("run %d of trial %d of study %s was cancelled", run, number, study)
    return RunOut.of(cancelled, attempts, context.gpu_hour_dollars)


@router.put("/{number}/tags", responses=responses(400, 415))
def tag_trial(study: StudyName, number: TrialNumber, body: TagsIn, writer: WriterOf) -> TagsOut:
    """Give the trial these tags, and take all others from it."""
    with writer.write("trial.tag", f"studies/{study}/trials/{number}") as session:
        trial = store.get_trial(session, store.get_study(session, study).id, number)
        set_tags(session, trial.id, body.tags)
        tags = list_tags(session, [trial.id]).get(trial.id, ())
    return TagsOut(tags=list(tags))


@router.patch("/{number}/tags", responses=responses(400, 409, 415))
def change_trial_tags(study: StudyName, number: TrialNumber, body: TagsChange, writer: WriterOf) -> TagsOut:
    """Give the trial tags and take others from it, whatever others it has or is given meanwhile."""
    with writer.write("trial.tag", f"studies/{study}/trials/{number}") as session:
        trial = store.get_trial(session, store.get_study(session, study).id, number)
        tags = change_tags(session, trial.id, body.add, body.remove)
    return TagsOut(tags=list(tags))


@router.get("/{number}/notes")
def get_trial_notes(study: StudyName, number: TrialNumber, database: DatabaseOf) -> Page[NoteOut]:
    """What people wrote about the trial, oldest first."""
    with database.read() as session:
        notes = list_notes(session, store.get_trial(session, store.get_study(session, study).id, number).id)
    return Page(items=[NoteOut.of(note) for note in notes])


@router.post("/{number}/notes", status_code=201, responses=responses(400, 409, 415))
def add_trial_note(study: StudyName, number: TrialNumber, body: NoteIn, writer: WriterOf) -> NoteOut:
    """Write something about the trial, in plain text."""
    with writer.write("note.create", f"studies/{study}/trials/{number}") as session:
        trial = store.get_trial(session, store.get_study(session, study).id, number)
        return NoteOut.of(add_note(session, trial.id, writer.actor, body.text, writer.now))


@router.delete("/{number}/notes/{note}", status_code=204)
def delete_trial_note(study: StudyName, number: TrialNumber, note: NoteId, writer: WriterOf) -> None:
    """Remove a note."""
    with writer.write("note.delete", f"studies/{study}/trials/{number}/notes/{note}") as session:
        trial = store.get_trial(session, store.get_study(session, study).id, number)
        delete_note(session, trial.id, note)


@router.get("/{number}/events")
def get_trial_events(
    study: StudyName, number: TrialNumber, database: DatabaseOf, limit: Limit = 100, after: After = 0
) -> Page[EventOut]:
    """What became of the trial, oldest first."""
    with database.read() as session:
        found = store.get_study(session, study)
        store.get_trial(session, found.id, number)
        events = list_trial_events(session, found.id, number, after, limit + 1)
    items = [EventOut.of(event, study) for event in events[:limit]]
    return Page(items=items, next=items[-1].id if len(events) > limit else None)


@router.get("/{number}/ledger")
def get_trial_ledger(study: StudyName, number: TrialNumber, context: ContextOf, now: Now) -> LedgerOut:
    """What the trial's attempts have cost so far, by phase and by gang."""
    with context.database.read() as session:
        trial = store.get_trial(session, store.get_study(session, study).id, number)
        found = ledger(session, trial.study_id, context.gpu_hour_dollars, now, number=number)
    return LedgerOut.of(study, number, found, context.gpu_hour_dollars)


@router.get("/{number}/measurements")
def list_measurements(
    study: StudyName,
    number: TrialNumber,
    database: DatabaseOf,
    limit: Annotated[int, Query(ge=1, le=MAX_MEASUREMENTS, description="How many at the most.")] = MAX_MEASUREMENTS,
    cursor: Annotated[
        str | None, Query(max_length=11_000, description="The `next` of the page before, or an event's id.")
    ] = None,
) -> Page[MeasurementOut]:
    """What a trial's attempts measured, attempt by attempt."""
    after = read_cursor("cursor", cursor)
    with database.read() as session:
        trial = store.get_trial(session, store.get_study(session, study).id, number)
        measured = curves.list_measurements(session, trial.id, after, limit + 1)
    after |= {each.attempt_id: each.measurement.number for each in measured[:limit]}
    items = [MeasurementOut.of(each) for each in measured[:limit]]
    return Page(items=items, next=write_cursor(after) if len(measured) > limit else None)


ARTIFACT_ANSWERS: dict[int | str, dict[str, Any]] = {
    **responses(410, 416), 206: {"description": "The range that was asked for"}
}  # fmt: skip


@router.get("/{number}/artifact", response_class=FileResponse, responses=ARTIFACT_ANSWERS)
@router.head("/{number}/artifact", name="head_artifact", response_class=FileResponse, responses=ARTIFACT_ANSWERS)
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
    headers = {"Repr-Digest": f"sha-256=:{digest}:", "ETag": f'"{artifact.sha256}"'}
    return StoredFile(path, artifact.bytes, f"{study}-{number}.caddie", headers)


def artifact_of(trial: Trial, attempts: tuple[Attempt, ...]) -> Artifact | None:
    """The artifact of the trial's result: the last, of those that were stored, with its digest."""
    digest = trial.result.artifact_sha256 if trial.result is not None else None
    stored = (attempt.artifact for attempt in reversed(attempts) if attempt.artifact is not None)
    return next((artifact for artifact in stored if artifact.sha256 == digest), None)


def describe(session: Session, study: str, trial: Trial, context: Context) -> TrialOut:
    """The trial with its runs and attempts, and what these cost."""
    return TrialOut.detailed(study, get_detail(session, study, trial.number), context.gpu_hour_dollars)


@lru_cache(maxsize=KEPT)  # by the very detail: one that has changed is another
def _written(study: str, detail: Detail, gpu_hour_dollars: float) -> bytes:
    return TrialOut.detailed(study, detail, gpu_hour_dollars).model_dump_json().encode()


def _cursor(place: Place, sort: Sort) -> str:
    return base64.urlsafe_b64encode(f"{sort}:{place.written()}".encode()).decode().rstrip("=")


def _place(cursor: str, sort: Sort) -> Place:
    try:
        order, _, written = base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode().partition(":")
        if order != str(sort):
            raise ValueError(f"it is one by {order}")
        return read_place(written, sort)
    except (TypeError, ValueError):
        raise FieldError("query.cursor", cursor, f"must be the `next` of a page by {sort}") from None
