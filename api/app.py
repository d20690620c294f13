"""The application: /v1, the pages, Optuna's dashboard, and one answer to every error."""

import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.routing import Match

from api import (
    cluster,
    cluster_page,
    compare_page,
    docs_page,
    events,
    executors,
    health,
    imports,
    logs,
    metrics,
    new_trial_page,
    pages,
    preview,
    sign_in,
    studies,
    studies_page,
    study_page,
    tokens,
    trial_actions,
    trial_page,
    trials,
    verdicts,
)
from api.admission import Admission, Door
from api.context import Context
from api.dashboard import Dashboard
from api.doors import Doors
from api.problems import EXPECTED, MEDIA_TYPE, problem, problem_of, respond, title_of
from orchestrator.artifacts import ArtifactStore
from orchestrator.database import Database
from orchestrator.executors import Executors
from orchestrator.settings import GPU_HOUR_DOLLARS

# Trials first: they are asked for most, and routes are tried one after the other.
VERSION_1 = (trials, studies, verdicts, imports, preview, cluster, logs, executors, events, tokens)
PAGES = (
    studies_page, study_page, trial_page, trial_actions, new_trial_page, compare_page, cluster_page, docs_page, sign_in,
)  # fmt: skip
DOOR_STATUSES, BODY_STATUSES = (401, 403, 429, 503), (400, 408, 413)


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")


def create_app(
    database: Database,
    *,
    artifacts: Path | None = None,
    dashboard: bool = True,
    gpu_hour_dollars: float = GPU_HOUR_DOLLARS,
    door: Door | None = None,
) -> FastAPI:
    """The application over this database. Loads neither torch nor ray; optuna with the first visit to its dashboard.

    `artifacts` is the folder that artifacts are downloaded from; without it there are none to download.
    Without a `door` it is that of a server that this machine alone reaches.
    """
    optuna = Dashboard(database) if dashboard else None
    # FastAPI's own documentation pages load scripts from other hosts.
    app = FastAPI(
        title="Caddie", version="1", summary="Sweeps of layer sharing under a byte and a time budget",
        openapi_url="/v1/openapi.json", docs_url=None, redoc_url=None, generate_unique_id_function=_operation_id,
        lifespan=optuna.lifespan if optuna is not None else None,
    )  # fmt: skip
    store = ArtifactStore(artifacts) if artifacts is not None else None
    app.state.context = Context(database, store, gpu_hour_dollars)
    app.state.executors = Executors(database)
    door = door or Door()
    app.state.door = door
    app.state.admission = Admission(database, door)
    app.add_middleware(Doors, admission=app.state.admission, door=door, routes=app.router.routes)
    app.state.metrics = metrics.Metrics(database, gpu_hour_dollars)
    app.add_middleware(metrics.Measured, metrics=app.state.metrics)
    app.state.templates = pages.load_templates()
    for module in VERSION_1:
        app.include_router(module.router, prefix="/v1")
    for module in (health, metrics, *PAGES):
        app.include_router(module.router)
    pages.mount_assets(app)
    if optuna is not None:
        optuna.mount(app)
    _install_errors(app)
    _declare_problems(app)
    _keep_to_3_1(app)
    return app


def openapi_text() -> str:
    """The OpenAPI document as the golden file has it."""
    return json.dumps(create_app(Database("sqlite://")).openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _operation_id(route: APIRoute) -> str:
    return route.name


def _install_errors(app: FastAPI) -> None:
    async def answer(request: Request, error: Exception) -> Response:
        details = problem_of(error, _body(request))
        headers = getattr(error, "headers", None)
        if details.status == 405:
            allowed = _allowed(request)
            headers = {"Allow": allowed}
            details = problem("method-not-allowed", f"{request.method} is not among what this path takes: {allowed}")
        return pages.error_page(request, details) if pages.wants_page(request) else respond(details, headers)

    for expected in (*EXPECTED, Exception):
        app.add_exception_handler(expected, answer)


def _body(request: Request) -> Any:
    """The type of the body that the route of a request takes; none where it takes none."""
    field = getattr(request.scope.get("route"), "body_field", None)
    return None if field is None else field.field_info.annotation


def _allowed(request: Request) -> str:
    """Every method that the path takes: Starlette names those of the first route that has it."""
    scopes = {method: {**request.scope, "method": method} for method in METHODS}
    routes = request.app.routes
    return ", ".join(m for m in METHODS if any(r.matches(scopes[m])[0] is Match.FULL for r in routes))


def _declare_problems(app: FastAPI) -> None:
    """Complete the OpenAPI document: who may call what, what the door answers, and the type of problems."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is not None:  # completed already
            return app.openapi_schema
        document = describe()
        components = document["components"]
        components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        schema = {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}
        components["responses"] = {
            f"Problem{status}": {"description": title_of(status), "content": {MEDIA_TYPE: schema}}
            for status in (*DOOR_STATUSES, *BODY_STATUSES)
        }
        for path, operations in document["paths"].items():
            for method, operation in operations.items():
                answers = operation["responses"]
                for status in answers.keys() & {str(one) for one in range(400, 600)}:
                    answers[status]["content"] = {MEDIA_TYPE: next(iter(answers[status]["content"].values()))}
                by_the_door: tuple[int, ...] = BODY_STATUSES if "requestBody" in operation else ()
                if path.startswith("/v1/") or path == "/metrics":
                    operation.setdefault("x-role", "viewer" if method == "get" else "submitter")
                    operation["security"] = [{"token": []}]
                    by_the_door += DOOR_STATUSES
                for status in by_the_door:
                    answers.setdefault(str(status), {"$ref": f"#/components/responses/Problem{status}"})
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _keep_to_3_1(app: FastAPI) -> None:
    """Declare one event as a stream's schema: FastAPI does so by a key of OpenAPI 3.2."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        document = describe()
        for operations in document["paths"].values():
            for operation in operations.values():
                for response in operation["responses"].values():
                    for media in response.get("content", {}).values():
                        if "itemSchema" in media:
                            media["schema"] = media.pop("itemSchema")
        return document

    app.openapi = openapi  # type: ignore[method-assign]
