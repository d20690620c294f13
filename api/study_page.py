"""The page of one study, and the part of it that changes."""

from collections.abc import Iterator
from datetime import datetime
from typing import Any, Literal

from fastapi import APIRouter, Request
from sqlalchemy.orm import Session
from starlette.responses import HTMLResponse, RedirectResponse

from api.bars import STACK, stacked
from api.context import Context, ContextOf, Now, StudyName, WriterOf
from api.kept import Answer
from api.overview import Overview, overview
from api.pages import page
from api.schemas import StudyOut, TrialSummary
from api.studies import (
    archive_study,
    describe,
    leaderboard,
    pause_study,
    resume_study,
    stop_study,
    unarchive_study,
)
from orchestrator import store
from orchestrator.activity import latest_events, list_activity
from orchestrator.lifecycle import STUDY_MOVES, StudyState, TrialState
from orchestrator.study import Study

FEW = 1000
"""Trials whose overview is reckoned while the reader waits: it takes a tenth of a second or so."""
SHOWN = 100
SHOWN_TRIALS = 20
SHOWN_EVENTS = 12
MOVES = {
    "pause": pause_study, "resume": resume_study, "stop": stop_study, "archive": archive_study,
    "unarchive": unarchive_study,
}  # fmt: skip

Move = Literal["pause", "resume", "stop", "archive", "unarchive"]

router = APIRouter(include_in_schema=False)


@router.get("/studies/{study}")
def show_study(request: Request, study: StudyName, context: ContextOf, now: Now) -> HTMLResponse:
    """A study: progress, charts, leaderboard, what the search believes, costs, and what its other trials are doing."""
    return page(request, "study.html", **_facts(study, context, now))


@router.get("/studies/{study}/live")
def show_study_live(request: Request, study: StudyName, context: ContextOf, now: Now) -> HTMLResponse:
    """The part of a study's page that changes."""
    return page(request, "study_live.html", **_facts(study, context, now))


@router.post("/studies/{study}/state/{move}")
def move_study(study: StudyName, move: Move, writer: WriterOf) -> RedirectResponse:
    """What the page's buttons do. Then the page again."""
    MOVES[move](study, writer)
    return RedirectResponse(f"/studies/{study}", 303)


def _facts(name: str, context: Context, now: datetime) -> dict[str, Any]:
    with context.database.read() as session:
        study = store.get_study(session, name)
        # Before the rest: what happens while we read comes again in the stream, rather than never.
        events = latest_events(session, study.id, SHOWN_EVENTS)
        facts = _facts_now(session, study, context, now)
    whole = _overview(study, context, now, facts["total"] - facts["planned"])
    return {
        **facts,
        "whole": whole.value,
        "chart": whole.value.chart() if whole.value else None,
        "again": whole.seconds_left,
        "gpu_hour_dollars": context.gpu_hour_dollars,
        "events": events,
        "seen": events[0].id if events else 0,
    }


def _overview(study: Study, context: Context, now: datetime, trials: int) -> Answer[Overview | None]:
    """What the page says of all trials; of many, nobody waits for it."""

    def reckon() -> Overview:
        with context.database.read() as session:
            return overview(session, study, context.gpu_hour_dollars, now)

    key = ("study", study.id)
    return context.kept.get(key, reckon) if trials <= FEW else context.kept.get_soon(key, reckon)


def _facts_now(session: Session, study: Study, context: Context, now: datetime) -> dict[str, Any]:
    described = describe(session, study, now, context.accounts)
    planned = described.to_come
    # What is in state s, with how many there are: lists are cut, counts are not.
    listed = {
        state: [
            TrialSummary.of(trial)
            for trial in store.list_trials(session, study.id, states=(state,), limit=SHOWN_TRIALS)
        ]
        for state in STACK
        if state is not TrialState.COMPLETE and described.counts.get(state)
        if state is not TrialState.RUNNING
    }
    gangs = list_activity(session, study.id)
    numbers = {gang.trial for gang in gangs[:SHOWN]}
    training = store.list_trials(session, study.id, numbers=numbers)
    trained = {trial.number: TrialSummary.of(trial) for trial in training}
    return {
        "study": described,
        "moves": list(_moves(described)),
        "board": leaderboard(session, study, SHOWN),
        "gangs": [(gang, trained[gang.trial]) for gang in gangs[:SHOWN]],
        "validation_tokens": {trial.spec.evaluation.validation_tokens for trial in training},
        "gangs_more": len(gangs[SHOWN:]),
        "further_seeds": max(len(gangs) - described.counts.get(TrialState.RUNNING, 0), 0),
        "listed": listed,
        "stack": stacked(described.counts),
        "planned": planned,
        "total": sum(described.counts.values()) + planned,
    }


def _moves(study: StudyOut) -> Iterator[Move]:
    """What is offered to be done with the study as it is: one that is complete, and has proposed all that it may, would
    be so again at once."""
    if study.archived_at is not None:
        yield "unarchive"
        return
    to, complete = STUDY_MOVES[study.state], study.state is StudyState.COMPLETE
    if StudyState.PAUSED in to:
        yield "pause"
    if StudyState.RUNNING in to and (not complete or study.proposed < study.max_trials):
        yield "resume"
    if StudyState.STOPPED in to and not complete:
        yield "stop"
    if study.state in (StudyState.STOPPED, StudyState.COMPLETE):
        yield "archive"
