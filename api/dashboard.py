"""Optuna's dashboard over our tables. It has no notion of a sub-path, so it sits at the root, below our own paths.

It runs in a process of its own, started at the first visit and again should it die: what it reads and draws takes no
time of ours.
"""

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from api.pages import CONTENT_POLICY
from api.problems import NotReady, problem, respond
from api.program import SECRETS, program
from orchestrator.database import Database
from orchestrator.local_launcher import source_roots

PATHS = ("/dashboard", "/favicon.ico", *(f"/{top}/{{rest:path}}" for top in ("dashboard", "api", "static", "csv")))
METHODS = ("GET", "HEAD")
URL_VARIABLE = "CADDIE_DATABASE_URL"
PASSED = ("accept", "if-none-match", "if-modified-since", "range")
"""Of a request's headers. Neither cookies nor tokens are the dashboard's business."""
ANSWERED = (
    "content-type", "content-length", "content-encoding", "etag", "last-modified", "cache-control", "location", "vary",
)  # fmt: skip
START_TRIES = 2
END_SECONDS = 5.0


class Dashboard:
    """An ASGI application that reads and never writes: of Optuna's dashboard, only GET and HEAD get through.

    Its writing routes would corrupt our bookkeeping.
    """

    def __init__(self, database: Database) -> None:
        self._url = database.url.render_as_string(hide_password=False)
        self._process: subprocess.Popen[str] | None = None
        self._client: httpx.AsyncClient | None = None
        self._starting = asyncio.Lock()

    def mount(self, app: FastAPI) -> None:
        """Answer the dashboard's own paths, after every path that the application has."""
        for path in PATHS:
            app.router.routes.append(Route(path, self, include_in_schema=False))

    @asynccontextmanager
    async def lifespan(self, _app: FastAPI) -> AsyncIterator[None]:
        """As long as the application runs; afterwards the dashboard's process is gone."""
        yield
        await self._end()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] not in METHODS:
            details = problem(
                "method-not-allowed", "Optuna's dashboard is read-only here; trials are changed under /v1"
            )
            await respond(details, {"Allow": ", ".join(METHODS)})(scope, receive, send)
            return
        answer = await self._ask(Request(scope, receive))
        await answer(scope, receive, send)

    async def _ask(self, request: Request) -> Response:
        headers = {name: value for name in PASSED if (value := request.headers.get(name)) is not None}
        # It reads Accept-Encoding without asking whether it is there, and would answer 500.
        headers["accept-encoding"] = request.headers.get("accept-encoding", "identity")
        path = request.url.path + (f"?{request.url.query}" if request.url.query else "")
        for left in reversed(range(START_TRIES)):
            client = await self._started()
            try:
                answer = await client.send(client.build_request(request.method, path, headers=headers), stream=True)
                break
            except httpx.TransportError:  # it has just died, or was about to end
                if not left:
                    raise NotReady("Optuna's dashboard did not start; the server's log says why") from None
                await self._give_up(client)
        kept = {name: answer.headers[name] for name in ANSWERED if name in answer.headers}
        if kept.get("content-type", "").startswith("text/html"):  # it shares our cookie's origin
            kept["content-security-policy"] = CONTENT_POLICY
        return StreamingResponse(_body(answer), answer.status_code, kept)

    async def _started(self) -> httpx.AsyncClient:
        """A client of the dashboard's process, which runs."""
        async with self._starting:
            if self._process is None or self._process.poll() is not None or self._client is None:
                await self._end()
                roots = [*map(str, source_roots()), *filter(None, [os.environ.get("PYTHONPATH")])]
                environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
                environment |= {URL_VARIABLE: self._url, "PYTHONPATH": os.pathsep.join(roots)}
                self._process = subprocess.Popen(
                    program("api.dashboard_process"), env=environment, start_new_session=True, text=True,
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                )  # fmt: skip
                assert self._process.stdout is not None
                socket = (await run_in_threadpool(self._process.stdout.readline)).strip()
                transport = httpx.AsyncHTTPTransport(uds=socket)
                self._client = httpx.AsyncClient(transport=transport, base_url="http://dashboard", timeout=300)
            return self._client

    async def _give_up(self, client: httpx.AsyncClient) -> None:
        """End the process of this client, unless another has taken its place."""
        async with self._starting:
            if self._client is client:
                await self._end()

    async def _end(self) -> None:
        if self._client is not None:
            await self._client.aclose()
        if self._process is not None:
            await run_in_threadpool(_stop, self._process)
        self._client = self._process = None


def _stop(process: subprocess.Popen[str]) -> None:
    """End it by the end of its standard input, or else by force."""
    assert process.stdin is not None and process.stdout is not None
    process.stdin.close()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()
