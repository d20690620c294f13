"""Optuna's dashboard over our tables. It has no notion of a sub-path, so it sits at the root, below our own paths."""

import asyncio
from typing import Any

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from api.problems import problem, respond
from orchestrator.database import Database

PATHS = ("/dashboard", "/favicon.ico", *(f"/{top}/{{rest:path}}" for top in ("dashboard", "api", "static", "csv")))
METHODS = ("GET", "HEAD")


class Dashboard:
    """An ASGI application that reads and never writes: of Optuna's dashboard, only GET and HEAD get through.

    Its writing routes would corrupt our bookkeeping. It is built at the first visit, in a thread: it loads optuna.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._app: ASGIApp | None = None
        self._building = asyncio.Lock()

    def mount(self, app: FastAPI) -> None:
        """Answer the dashboard's own paths, after every path that the application has."""
        for path in PATHS:
            app.router.routes.append(Route(path, self, include_in_schema=False))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in METHODS:
            details = problem(
                "method-not-allowed", "Optuna's dashboard is read-only here; trials are changed under /v1"
            )
            await respond(details, {"Allow": ", ".join(METHODS)})(scope, receive, send)
            return
        async with self._building:
            if self._app is None:
                self._app = await run_in_threadpool(_build, self._database)
        await self._app(_with_encoding(scope), receive, send)


def _build(database: Database) -> ASGIApp:
    # Not at the top: optuna takes seconds to load, and a server that nobody asks for its dashboard never needs it.
    from a2wsgi import WSGIMiddleware
    from optuna_dashboard import wsgi

    from orchestrator.optuna_view import DashboardView

    application: Any = wsgi(DashboardView(database))
    return GZipMiddleware(WSGIMiddleware(application, workers=4), minimum_size=1000, compresslevel=5)  # type: ignore[arg-type]


def _with_encoding(scope: Scope) -> Scope:
    """The dashboard reads Accept-Encoding without asking whether it is there, and would answer 500."""
    if any(name == b"accept-encoding" for name, _ in scope["headers"]):
        return scope
    return {**scope, "headers": [*scope["headers"], (b"accept-encoding", b"identity")]}
