"""The page that says what the API answers."""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from api.pages import page

router = APIRouter(include_in_schema=False)


@router.get("/docs")
def show_docs(request: Request) -> HTMLResponse:
    """What the API answers, from its own OpenAPI document."""
    by_tag: dict[str, list[tuple[str, str, dict[str, Any]]]] = {}
    for path, operations in request.app.openapi()["paths"].items():
        for method, operation in operations.items():
            by_tag.setdefault(operation["tags"][0], []).append((method.upper(), path, operation))
    return page(request, "docs.html", by_tag=by_tag)
