"""The HTTP server: uvicorn, with streams that end when it goes down, and connections that nobody holds for ever."""

import asyncio
import fcntl
import socket
import sys
import termios
from functools import partial
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from api.admission import Door
from api.context import Context
from api.problems import problem, respond

MOST_CONNECTIONS = 1000
MOST_OF_ADDRESS = 600  # so that one leaves room for others, and a proxy for its streams and what is asked beside them
REST_SECONDS = 20  # longer than clients keep a connection (httpx: 5 s), so that they meet none that just closes


class Impatient(H11Protocol):
    """uvicorn's own protocol, which waits without end for the head of a request, for the body of one that was answered
    without it, and for a client to read. The body of one that is being answered is the door's to time (`limits`)."""

    def __init__(self, *arguments: Any, patience_seconds: float, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._patience_seconds = patience_seconds
        self._patience: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if self._is_one_too_many():
            self.connections.discard(self)
            transport.write(_full())
            transport.close()
            return
        transport.set_write_buffer_limits(high=0)  # so that whatever waits to be read is known to wait
        self._expect()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reading(self._unread_bytes())

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_watching()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._relax()
        self._stop_watching()

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

    def _watch_reading(self, unread_bytes: int) -> None:
        """Cut the client off unless it takes some of what waits for it; nothing more is written before it took all."""

        def look() -> None:
            left = self._unread_bytes()
            if left >= unread_bytes:
                self.transport.abort()
            else:
                self._watch_reading(left)

        self._stop_watching()
        self._unread = self.loop.call_later(self._patience_seconds, look)

    def _unread_bytes(self) -> int:
        """What the client has not taken: ours, and the kernel's, which asks us for more only after megabytes."""
        connection: socket.socket = self.transport.get_extra_info("socket")
        queued = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
        return self.transport.get_write_buffer_size() + int.from_bytes(queued, sys.byteorder)

    def _stop_watching(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _is_one_too_many(self) -> bool:
        """By the address that connects, which is a proxy's where there is one: requests say whom it speaks for."""
        address = self.client and self.client[0]
        same = sum(1 for other in self.connections if other.client and other.client[0] == address)
        return len(self.connections) > MOST_CONNECTIONS or same > MOST_OF_ADDRESS


def _full() -> bytes:
    """The answer to a connection too many, as it goes over the wire: there is no request yet."""
    answer = respond(problem("not-ready", "too many connections are open: come again"), {"Connection": "close"})
    head = b"".join(name + b": " + value + b"\r\n" for name, value in answer.raw_headers)
    return b"HTTP/1.1 503 Service Unavailable\r\n" + head + b"\r\n" + bytes(answer.body)


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
                server_header=False, ws="none", http=patient, log_config=None,
                timeout_keep_alive=REST_SECONDS,
            )
        )  # fmt: skip

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End the streams, let open requests finish, and close."""
        self._closing.set()
        await super().shutdown(sockets)
