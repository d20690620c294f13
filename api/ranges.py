"""A stored file as an answer, whole or by range, as RFC 9110 has it."""

import re
from pathlib import Path

from fastapi.responses import FileResponse
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

from api.problems import problem, respond

RANGE = re.compile(r"bytes=(?:(\d{1,15})-(\d{0,15})|-(\d{1,15}))")


class StoredFile(FileResponse):
    """A file that never changes, named by its digest. One range is answered; of anything else asked for, all of it."""

    def __init__(self, path: Path, size: int, filename: str, headers: dict[str, str]) -> None:
        super().__init__(path, media_type="application/octet-stream", filename=filename, headers=headers)
        self._size = size

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        asked = RANGE.fullmatch(headers.get("range", "").replace(" ", ""))
        first, last, suffix = (int(part) if part else None for part in asked.groups()) if asked else (None, None, None)
        if asked is None or (first is not None and last is not None and last < first):
            # Starlette would answer 400; a range that is not understood is to be ignored.
            scope = {**scope, "headers": [(name, value) for name, value in scope["headers"] if name != b"range"]}
        elif headers.get("if-range", self.headers["etag"]) == self.headers["etag"] and (
            suffix == 0 or (first is not None and first >= self._size)
        ):
            wrong = problem("range-not-satisfiable", f"there are {self._size:,} bytes")
            refusal = respond(wrong, {"Content-Range": f"bytes */{self._size}"})
            await refusal(scope, receive, send)
            return
        await super().__call__(scope, receive, send)
