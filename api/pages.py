"""What the pages share: templates, headers, errors shown to a person, and the files below /assets."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import FileResponse, HTMLResponse, Response
from starlette.staticfiles import StaticFiles

from api.pictures import tying_strip
from api.refusals import ProblemDetails
from orchestrator.access import Principal, Role
from worker.tying import TyingMap

HERE = Path(__file__).parent
# Plotly sets styles from its script; nothing else needs more than our own files.
CONTENT_POLICY = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'self'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "same-origin",
    "Cache-Control": "no-store",
}  # fmt: skip


def page(request: Request, template: str, status: int = 200, **facts: Any) -> HTMLResponse:
    """A template rendered, under the policy that our pages load nothing but our own files.

    Every template knows the `path` it is shown at, who reads it (`principal`, None before a sign-in), whether they may
    change anything, and the token that its forms send back.
    """
    templates: Environment = request.app.state.templates
    principal: Principal | None = getattr(request.state, "principal", None)
    shared = {
        "path": request.url.path, "principal": principal, "csrf": getattr(request.state, "csrf", ""),
        "may_write": principal is not None and principal.role.includes(Role.SUBMITTER),
    }  # fmt: skip
    return HTMLResponse(templates.get_template(template).render(shared, **facts), status, headers=HEADERS)


def wants_page(request: Request) -> bool:
    """Whether an error should be shown to a person."""
    ours = not request.url.path.startswith(("/v1/", "/api/", "/static/", "/assets/"))
    return ours and "text/html" in request.headers.get("accept", "")


def error_page(request: Request, details: ProblemDetails) -> Response:
    """The problem as a page."""
    return page(request, "error.html", details.status, problem=details)


def load_templates() -> Environment:
    """The templates, which escape what they show and refuse a name that they were not given."""
    templates = Environment(loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined)
    templates.trim_blocks = templates.lstrip_blocks = True
    templates.filters |= {"bytes": readable_bytes, "count": "{:,}".format, "bpb": "{:.4f}".format}
    templates.globals |= {"strip": _strip}
    return templates


def mount_assets(app: FastAPI) -> None:
    """Serve our style and scripts, and plotly's bundle out of its Python package, below /assets."""
    found = find_spec("plotly")  # finding does not load it
    assert found is not None and found.origin is not None, "plotly is a dependency"
    bundle = Path(found.origin).parent / "package_data" / "plotly.min.js"

    @app.get("/assets/plotly.min.js", include_in_schema=False)
    async def get_plotly() -> FileResponse:
        return FileResponse(bundle, media_type="text/javascript", headers={"Cache-Control": "max-age=86400"})

    app.mount("/assets", GZipMiddleware(StaticFiles(directory=HERE / "static"), minimum_size=1000))


def _strip(tying_map: TyingMap) -> Markup:
    return Markup(tying_strip(tying_map))


def readable_bytes(size: float) -> str:
    """Bytes with a unit that a person reads: 815 B, 93.4 kB, 15.82 MB."""
    if size < 1000:
        return f"{size:.0f} B"
    return f"{size / 1000:.1f} kB" if size < 1_000_000 else f"{size / 1_000_000:.2f} MB"
