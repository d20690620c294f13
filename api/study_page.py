"""The page of one study, and the part of it that changes."""

from datetime import datetime
from typing import Any

from fastapi import APIRouter, Request
from sqlalchemy.orm import Session
from starlette.responses import HTMLResponse

from api.context import Context, ContextOf, Now, StudyName
from api.pages import page
from api.schemas import TrialSummary
from api.studies import describe, leaderboard
from orchestrator import store
from orchestrator.activity import latest_events, list_activity
from orchestrator.arms import arms
from orchestrator.ledger import ledger
from orchestrator.lifecycle import TrialState
from orchestrator.stopping import regret
from orchestrator.study import Study

SHOWN = 100
SHOWN_EVENTS = 12
# The order in which trials pass through states, and in which the progress bar stacks them.
STACK = (
    TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING, TrialState.QUEUED, TrialState.FAILED,
    TrialState.CANCELLED, TrialState.INFEASIBLE,
)  # fmt: skip

router = APIRouter(include_in_schema=False)


@router.get("/studies/{study}")
def show_study(request: Request, study: StudyName, context: ContextOf, now: Now) -> HTMLResponse:
    """A study: progress, chart, leaderboard, costs, and what its other trials are doing."""
    with context.database.read() as session:
        return page(request, "study.html", **_study_facts(session, store.get_study(session, study), context, now))


@router.get("/studies/{study}/live")
def show_study_live(request: Request, study: StudyName, context: ContextOf, now: Now) -> HTMLResponse:
    """The part of a study's page that changes."""
    with context.database.read() as session:
        return page(request, "study_live.html", **_study_facts(session, store.get_study(session, study), context, now))


def _study_facts(session: Session, study: Study, context: Context, now: datetime) -> dict[str, Any]:
    # Before the rest: what happens while we read comes again in the stream, rather than never.
    events = latest_events(session, study.id, SHOWN_EVENTS)
    described = describe(session, study, now, context.accounts)
    planned = max(described.max_trials - described.proposed, 0)
    # What is in state s, with how many there are: lists are cut, counts are not.
    listed = {
        state: [TrialSummary.of(trial) for trial in store.list_trials(session, study.id, states=(state,), limit=SHOWN)]
        for state in STACK
        if state is not TrialState.COMPLETE
    }
    board = leaderboard(session, study, SHOWN)
    return {
        "study": described,
        "stopping": regret(session, study) if study.definition.stopping else None,
        "board": board,
        "rows": [row.model_dump(mode="json") for row in board.rows],  # for the chart, so that it is there at once
        "activity": {one.trial: one for one in list_activity(session, study.id)},
        "listed": listed,
        "stack": [(state.value, described.counts.get(state, 0)) for state in STACK],
        "planned": planned,
        "arms": arms(session, study.id),
        "costs": ledger(session, study.id, context.gpu_hour_dollars, now),
        "gpu_hour_dollars": context.gpu_hour_dollars,
        "total": sum(described.counts.values()) + planned,
        "events": events,
        "seen": events[0].id if events else 0,
    }
