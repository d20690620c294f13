"""What lies between a client and the API, and fails as networks do: it cuts answers off, or gives one of its own."""

import contextlib
import select
import socket
import threading
from urllib.parse import urlsplit


class Relay:
    """Passes each request on over a connection of its own, and its answer back.

    The first answers are those in `canned`, which the server never hears of. Of the following, each is cut off after
    as many bytes as `cuts` says next. `asked` is the head of every request.
    """

    def __init__(self, url: str, *, canned: tuple[bytes, ...] = (), cuts: tuple[int, ...] = ()) -> None:
        self.target = (urlsplit(url).hostname, urlsplit(url).port)
        self.canned, self.cuts = list(canned), list(cuts)
        self.asked: list[str] = []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self._run, name="relay")
        self.thread.start()

    def __enter__(self) -> "Relay":
        return self

    def __exit__(self, *_error: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        self.thread.join(timeout=30)
        assert not self.thread.is_alive()

    def _run(self) -> None:
        while True:
            try:
                near, _ = self.listener.accept()
            except OSError:
                return
            with near, contextlib.suppress(ConnectionError):
                self._answer(near)

    def _answer(self, near: socket.socket) -> None:
        request = message(near)
        if not request:
            return
        self.asked.append(request.partition(b"\r\n\r\n")[0].decode().lower())
        if self.canned:
            near.sendall(self.canned.pop(0))
            return
        left = self.cuts.pop(0) if self.cuts else None
        with socket.create_connection(self.target) as far:
            far.sendall(request.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
            while left != 0 and near not in select.select([far, near], [], [])[0]:  # else the client has left
                data = far.recv(65_536 if left is None else min(left, 65_536))
                if not data:
                    return
                near.sendall(data)
                left = None if left is None else left - len(data)


def canned(status: str, body: bytes = b"", **headers: str) -> bytes:
    """An answer, of a proxy say."""
    lines = [f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items()]
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n{''.join(lines)}\r\n"
    return head.encode() + body


def message(source: socket.socket) -> bytes:
    """One HTTP message, headers and body; nothing where the connection has ended."""
    data = b""
    while b"\r\n\r\n" not in data:
        more = source.recv(65_536)
        if not more:
            return b""
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    lengths = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    while len(body) < (int(lengths[0]) if lengths else 0):
        body += source.recv(65_536)
    return head + b"\r\n\r\n" + body
