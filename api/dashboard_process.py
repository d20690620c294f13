"""`python -m api.dashboard_process`: Optuna's dashboard over our tables, in a process of its own.

It answers HTTP on a Unix socket in a folder that only its user can enter, and prints the socket's path once it does.
It ends with whoever holds its standard input, and when nobody has asked it for a while.
"""

import os
import select
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn
from a2wsgi import WSGIMiddleware
from optuna_dashboard import wsgi
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from orchestrator.database import Database
from orchestrator.optuna_view import DashboardView

URL_VARIABLE = "CADDIE_DATABASE_URL"  # not an argument: other users can read those, and a URL may hold a password
IDLE_SECONDS = 900.0
LOOK_SECONDS = 5.0


class Dashboard:
    """The dashboard as an ASGI application that knows when it was last asked."""

    def __init__(self, database: Database) -> None:
        application: Any = wsgi(DashboardView(database))
        self._app: ASGIApp = GZipMiddleware(WSGIMiddleware(application, workers=4), minimum_size=1000, compresslevel=1)  # type: ignore[arg-type]
        self._asked = time.monotonic()
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._open += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._open -= 1
            self._asked = time.monotonic()

    @property
    def is_idle(self) -> bool:
        """Whether nobody has asked for IDLE_SECONDS."""
        return not self._open and time.monotonic() - self._asked > IDLE_SECONDS


def main() -> int:
    """Serve until standard input ends, or nobody asks any more."""
    dashboard = Dashboard(Database(os.environ[URL_VARIABLE]))
    with tempfile.TemporaryDirectory(prefix="caddie-dashboard-") as folder:
        path = Path(folder) / "socket"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen(128)
        server = uvicorn.Server(
            uvicorn.Config(dashboard, log_level="warning", access_log=False, lifespan="off", ws="none")
        )

        def watch() -> None:
            while not select.select([sys.stdin], [], [], LOOK_SECONDS)[0] and not dashboard.is_idle:
                pass
            server.should_exit = server.force_exit = True

        threading.Thread(target=watch, name="watch", daemon=True).start()
        print(path, flush=True)
        server.run(sockets=[listener])
    return 0


if __name__ == "__main__":
    sys.exit(main())
