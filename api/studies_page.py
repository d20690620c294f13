"""The page of all studies."""

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from api.context import ContextOf, Now
from api.pages import page
from api.studies import describe
from orchestrator import store
from orchestrator.activity import latest_events

router = APIRouter(include_in_schema=False)


@router.get("/")
def show_studies(request: Request, context: ContextOf, now: Now) -> HTMLResponse:
    """Every study, latest first."""
    with context.database.read() as session:
        listed = reversed(store.list_studies(session))
        studies = [describe(session, study, now, context.accounts) for study in listed]
        seen = next((event.id for event in latest_events(session, None, 1)), 0)
    return page(request, "studies.html", studies=studies, seen=seen)
