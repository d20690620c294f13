"""The HTTP server: uvicorn, with streams that end when it goes down."""

import socket

import uvicorn
from fastapi import FastAPI

from api.context import Context


class Server(uvicorn.Server):
    """uvicorn for our application. Without this, one open event stream would keep a stopped server waiting for ever."""

    def __init__(self, app: FastAPI, *, host: str = "127.0.0.1", port: int = 0, log_level: str = "warning") -> None:
        context: Context = app.state.context
        self._closing = context.closing
        super().__init__(
            uvicorn.Config(
                app, host=host, port=port, log_level=log_level, access_log=False, timeout_graceful_shutdown=10,
                server_header=False, ws="none",
            )
        )  # fmt: skip

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, let open requests finish, and close."""
        self._closing.set()
        await super().shutdown(sockets)
