"""Studies over HTTP: created, read, listed, paused, resumed, stopped, and their leaderboard."""

import logging
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Query, Response
from sqlalchemy.orm import Session

from api.bodies import CloneIn, StudyChange, StudyIn
from api.context import After, ContextOf, DatabaseOf, Limit, Now, StudyName, Writer, WriterOf
from api.plain import PlainRoute
from api.problems import responses
from api.reports import ArmOut, ArmsOut, ImportanceOut, LedgerOut, ParetoOut, ParetoPoint, StoppingOut
from api.schemas import ActivityOut, Page, StudyOut
from api.standings import LeaderboardOut, rows_of
from orchestrator import amendments, reopening, seeds, store
from orchestrator.activity import list_activity
from orchestrator.amendments import amend_study
from orchestrator.arms import arms
from orchestrator.importance import importance
from orchestrator.ledger import ledger
from orchestrator.lifecycle import StudyState
from orchestrator.listing import list_studies_page
from orchestrator.pareto import front, scored
from orchestrator.savings import savings
from orchestrator.spending import Accounts
from orchestrator.standing import ranked, spread_of
from orchestrator.stopping import regret
from orchestrator.study import Study

log = logging.getLogger(__name__)
router = APIRouter(route_class=PlainRoute, tags=["studies"], responses=responses(422))


@router.post("/studies", status_code=201, responses=responses(400, 409, 415))
def create_study(body: StudyIn, writer: WriterOf, response: Response) -> StudyOut:
    """Create a study; it runs at once."""
    definition = body.definition()
    with writer.write("study.create", f"studies/{definition.name}") as session:
        study = store.create_study(session, definition, writer.now)
        described = describe(session, study, writer.now, Accounts())
    log.info("study %s was created", study.name, extra={"study_id": study.id})
    response.headers["Location"] = f"/v1/studies/{study.name}"
    return described


@router.get("/studies")
def list_studies(
    context: ContextOf,
    now: Now,
    state: Annotated[tuple[StudyState, ...], Query()] = (),
    archived: Annotated[bool, Query(description="Those that were archived, instead of those in use.")] = False,
    limit: Limit = 100,
    after: After = -1,
) -> Page[StudyOut]:
    """Studies, oldest first."""
    with context.database.read() as session:
        studies = list_studies_page(session, state, archived, after, limit + 1)
        items = [describe(session, study, now, context.accounts) for study in studies[:limit]]
    return Page(items=items, next=items[-1].id if len(studies) > limit else None)


@router.get("/studies/{study}", responses=responses(404))
def get_study(study: StudyName, context: ContextOf, now: Now) -> StudyOut:
    """One study."""
    with context.database.read() as session:
        return describe(session, store.get_study(session, study), now, context.accounts)


@router.patch("/studies/{study}", responses=responses(400, 404, 409, 415))
def change_study(study: StudyName, body: StudyChange, writer: WriterOf) -> StudyOut:
    """Pause, resume or stop a study, or give it another budget or priority. All of the changes are made, or none.

    A complete study that may propose more runs again; so does one that its own budget stopped, where this one gives
    room: what was cancelled then stays cancelled until it is tried again.
    """
    with writer.write("study.change", f"studies/{study}") as session:
        found = amend_study(
            session, study, writer.now, state=body.state and StudyState(body.state), max_trials=body.max_trials,
            priority=body.priority, spending=None if body.spending is None else body.spending.over,
        )  # fmt: skip
        described = describe(session, found, writer.now, Accounts())
    log.info("study %s was changed", study, extra={"study_id": found.id})
    return described


@router.post("/studies/{study}/clone", status_code=201, responses=responses(400, 404, 409, 415))
def clone_study(study: StudyName, body: CloneIn, writer: WriterOf, response: Response) -> StudyOut:
    """Create a study like this one, with changes. It runs at once, and has none of the trials."""
    with writer.database.read() as session:
        source = store.get_study(session, study)
    definition = body.definition(source.definition)
    with writer.write("study.clone", f"studies/{definition.name}") as session:
        created = store.create_study(session, definition, writer.now)
        described = describe(session, created, writer.now, Accounts())
    log.info("study %s was created like %s", created.name, study, extra={"study_id": created.id})
    response.headers["Location"] = f"/v1/studies/{created.name}"
    return described


@router.post("/studies/{study}/archive", responses=responses(404, 409))
def archive_study(study: StudyName, writer: WriterOf) -> StudyOut:
    """Leave a stopped or complete study out of lists. All of it is kept."""
    return _archive(writer, study, True)


@router.post("/studies/{study}/unarchive", responses=responses(404))
def unarchive_study(study: StudyName, writer: WriterOf) -> StudyOut:
    """Put a study back into lists."""
    return _archive(writer, study, False)


@router.post("/studies/{study}/pause", responses=responses(404, 409))
def pause_study(study: StudyName, writer: WriterOf) -> StudyOut:
    """Start nothing more; what runs goes on to its end."""
    return _move(writer, study, StudyState.PAUSED, "study.pause")


@router.post("/studies/{study}/resume", responses=responses(404, 409))
def resume_study(study: StudyName, writer: WriterOf) -> StudyOut:
    """Propose and start again. Where the study had paused because of bad input, the trials that failed for it are tried
    again."""
    return _move(writer, study, StudyState.RUNNING, "study.resume")


@router.post("/studies/{study}/stop", responses=responses(404, 409))
def stop_study(study: StudyName, writer: WriterOf) -> StudyOut:
    """Start nothing more, for good, and cancel what is queued; what runs goes on to its end."""
    return _move(writer, study, StudyState.STOPPED, "study.stop")


@router.get("/studies/{study}/leaderboard", responses=responses(404))
def get_leaderboard(study: StudyName, database: DatabaseOf, limit: Limit = 100) -> LeaderboardOut:
    """Complete trials by the mean BPB of their seeds, best first. Those over a cap come last, without a rank."""
    with database.read() as session:
        return leaderboard(session, store.get_study(session, study), limit)


@router.get("/studies/{study}/pareto", responses=responses(404))
def get_pareto(study: StudyName, database: DatabaseOf) -> ParetoOut:
    """Complete trials within every cap that no other beats in both BPB and bytes."""
    with database.read() as session:
        found = store.get_study(session, study)
        points = front(scored(session, found.id))
    return ParetoOut(
        study=study, cap_bytes=found.definition.cap_bytes, points=[ParetoPoint.of(point) for point in points]
    )


@router.get("/studies/{study}/importance", responses=responses(404))
def get_importance(study: StudyName, database: DatabaseOf) -> ImportanceOut:
    """Which parameters matter, and how the families of tying maps compare."""
    with database.read() as session:
        found = importance(session, store.get_study(session, study).id)
    return ImportanceOut.of(study, found)


@router.get("/studies/{study}/arms", responses=responses(404))
def get_arms(study: StudyName, database: DatabaseOf) -> ArmsOut:
    """What proposed the study's trials, and what came of it."""
    with database.read() as session:
        by_arm, by_rule = arms(session, store.get_study(session, study).id)
    return ArmsOut(arms=[ArmOut.of(record) for record in by_arm], rules=[ArmOut.of(record) for record in by_rule])


@router.get("/studies/{study}/activity", responses=responses(404))
def get_activity(study: StudyName, database: DatabaseOf) -> Page[ActivityOut]:
    """What the study's gangs are doing now."""
    with database.read() as session:
        found = list_activity(session, store.get_study(session, study).id)
    return Page(items=[ActivityOut.of(activity) for activity in found])


@router.get("/studies/{study}/stopping", responses=responses(404))
def get_stopping(study: StudyName, database: DatabaseOf) -> StoppingOut:
    """How often runs were stopped early, and how often that would have been a mistake."""
    with database.read() as session:
        return StoppingOut.of(regret(session, store.get_study(session, study)))


@router.get("/studies/{study}/ledger", responses=responses(404))
def get_ledger(study: StudyName, context: ContextOf, now: Now) -> LedgerOut:
    """What the study's attempts have cost so far, by phase, and by the gangs and trials that cost most; and what was
    saved."""
    with context.database.read() as session:
        study_id = store.get_study(session, study).id
        found = ledger(session, study_id, context.gpu_hour_dollars, now)
        saved = savings(session, study_id, context.gpu_hour_dollars)
    return LedgerOut.of(study, None, found, context.gpu_hour_dollars, saved)


def describe(session: Session, study: Study, now: datetime, accounts: Accounts) -> StudyOut:
    """The study with its counts, its best trial, and what it has spent of its budget. In a session that writes,
    `accounts` are new ones: those that are kept know only what was committed."""
    first = next(iter(ranked(seeds.list_standings(session, study.id, limit=1))), None)
    best, account = first if first and first.bpb else None, accounts.read(session, study, now)
    return StudyOut.of(study, store.count_trials(session, study.id), best, account)


def leaderboard(session: Session, study: Study, limit: int) -> LeaderboardOut:
    """The study's leaderboard. Ranks count only trials that keep every cap."""
    standings = ranked(seeds.list_standings(session, study.id, limit))
    spread = spread_of(standings)
    best = standings[:limit]
    trials = store.list_trials(session, study.id, numbers=[standing.number for standing in best])
    return LeaderboardOut(
        study=study.name, cap_bytes=study.definition.cap_bytes, seed_sd=spread.sd if spread else None,
        rows=rows_of(trials, best, spread),
    )  # fmt: skip


def _archive(writer: Writer, name: str, archived: bool) -> StudyOut:
    with writer.write("study.archive" if archived else "study.unarchive", f"studies/{name}") as session:
        study = amendments.archive_study(session, name, archived, writer.now)
        return describe(session, study, writer.now, Accounts())


def _move(writer: Writer, name: str, to: StudyState, action: str) -> StudyOut:
    with writer.write(action, f"studies/{name}") as session:
        study = reopening.move_study(session, store.get_study(session, name).id, to, writer.now)
        described = describe(session, study, writer.now, Accounts())
    log.info("study %s is %s", name, to, extra={"study_id": study.id})
    return described
