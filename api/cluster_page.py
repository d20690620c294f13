"""The page of the cluster: what each gang does, and did."""

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from api.pages import page

router = APIRouter(include_in_schema=False)


@router.get("/cluster")
def show_cluster(request: Request) -> HTMLResponse:
    """Each gang as a lane on a time axis."""
    return page(request, "cluster.html")
