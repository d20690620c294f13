"""The page of all studies."""

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from api.bars import stacked
from api.context import ContextOf, Now
from api.pages import page
from api.studies import describe
from orchestrator import store
from orchestrator.activity import latest_events

router = APIRouter(include_in_schema=False)


@router.get("/")
def show_studies(request: Request, context: ContextOf, now: Now, archived: bool = False) -> HTMLResponse:
    """Every study in use, or every archived one, latest first."""
    with context.database.read() as session:
        seen = next((event.id for event in latest_events(session, None, 1)), 0)
        listed = [study for study in store.list_studies(session) if (study.archived_at is not None) == archived]
        studies = [describe(session, study, now, context.accounts) for study in reversed(listed)]
    shown = [(study, stacked(study.counts)) for study in studies]
    return page(request, "studies.html", studies=shown, seen=seen, archived=archived)
