"""The HTTP server: uvicorn, with streams that end when it goes down, and connections that nobody holds for ever."""

import asyncio
import socket
from functools import partial
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from api.admission import Door
from api.context import Context

MOST_CONNECTIONS = 1000
REST_SECONDS = 20  # longer than clients keep a connection (httpx: 5 s), so that they meet none that just closes


class Impatient(H11Protocol):
    """uvicorn's own protocol, which waits without end for the head of a request, and for the body of one that was
    answered without it. The body of one that is being answered is the door's to time (`limits`)."""

    def __init__(self, *arguments: Any, patience_seconds: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._patience_seconds = patience_seconds
        self._patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._relax()

    def _expect(self) -> None:
        """Give what the client owes us so many seconds, counted from its beginning."""
        cycle: RequestResponseCycle | None = self.cycle
        answered = cycle is None or cycle.response_complete
        resting = self.conn.their_state is h11.IDLE and self.timeout_keep_alive_task is not None
        owes = self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and answered
        if resting or not owes:
            self._relax()
        elif self._patience is None:
            self._patience = self.loop.call_later(self._patience_seconds, self.transport.close)

    def _relax(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None


class Server(uvicorn.Server):
    """uvicorn for our application. Without this, one open event stream would keep a stopped server waiting for ever."""

    def __init__(self, app: FastAPI, *, host: str = "127.0.0.1", port: int = 0, log_level: str = "warning") -> None:
        context: Context = app.state.context
        door: Door = app.state.door
        self._closing = context.closing
        patient: Any = partial(Impatient, patience_seconds=door.patience_seconds)
        super().__init__(
            uvicorn.Config(
                app, host=host, port=port, log_level=log_level, access_log=False, timeout_graceful_shutdown=10,
                server_header=False, ws="none", http=patient, limit_concurrency=MOST_CONNECTIONS, log_config=None,
                timeout_keep_alive=REST_SECONDS,
            )
        )  # fmt: skip

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, let open requests finish, and close."""
        self._closing.set()
        await super().shutdown(sockets)
