"""The load: one process that sends prepared requests over so many connections, and notes how long each took.

It speaks HTTP/1.1 over bare asyncio sockets, so that it costs less than the servers that it measures: `rates.py` prints
how many requests a second it sends to a server that answers without looking.

Run by rates.py: load.py PORT CONNECTIONS SECONDS, with the requests as JSON lines {"method", "path", "body"} on
standard input; answers {"seconds", "statuses", "latencies"} as JSON.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any


class Connection(asyncio.Protocol):
    """Sends one request after the other as long as there are any and time is left."""

    def __init__(self, requests: Iterator[bytes], until: float, latencies: list[float], statuses: Counter[str]) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._requests, self._until, self._latencies, self._statuses = requests, until, latencies, statuses
        self._buffer = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._send()

    def _send(self) -> None:
        self._sent = time.perf_counter()
        request = next(self._requests, None) if self._sent < self._until else None
        if request is None:
            self._transport.close()
            return
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, body = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        if len(body) < int(length):
            return
        self._latencies.append(time.perf_counter() - self._sent)
        self._statuses[head[9:12].decode()] += 1
        self._buffer = b""
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


def encoded(request: dict[str, Any]) -> bytes:
    """A request's bytes."""
    body = json.dumps(request["body"]).encode() if request.get("body") is not None else b""
    headers = {"Host": "localhost", "Content-Length": str(len(body)), **request.get("headers", {})}
    if body:
        headers["Content-Type"] = "application/json"
    lines = [f"{request['method']} {request['path']} HTTP/1.1", *(f"{k}: {v}" for k, v in headers.items()), "", ""]
    return "\r\n".join(lines).encode() + body


async def run(port: int, connections: int, seconds: float, requests: Iterator[bytes]) -> dict[str, Any]:
    """What came of the load."""
    latencies: list[float] = []
    statuses: Counter[str] = Counter()
    loop, began = asyncio.get_running_loop(), time.perf_counter()
    opened = [
        (await loop.create_connection(
            lambda: Connection(requests, began + seconds, latencies, statuses), "127.0.0.1", port
        ))[1]
        for _ in range(connections)
    ]  # fmt: skip
    await asyncio.gather(*(connection.done for connection in opened))
    return {"seconds": time.perf_counter() - began, "statuses": statuses, "latencies": latencies}


def main() -> None:
    port, connections, seconds = int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    prepared = [encoded(json.loads(line)) for line in sys.stdin]
    print(json.dumps(asyncio.run(run(port, connections, seconds, iter(prepared)))))


if __name__ == "__main__":
    main()
