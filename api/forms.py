"""What a browser's form sends, for the pages that are more than read."""

from typing import Annotated
from urllib.parse import parse_qsl

from fastapi import Depends, HTTPException, Request

MEDIA_TYPE = "application/x-www-form-urlencoded"
MOST_FIELDS = 500


async def _form(request: Request) -> dict[str, str]:
    if request.headers.get("content-type", "").partition(";")[0].strip() != MEDIA_TYPE:
        raise HTTPException(415, f"send the header Content-Type: {MEDIA_TYPE}")
    try:
        pairs = parse_qsl((await request.body()).decode(), keep_blank_values=True, max_num_fields=MOST_FIELDS)
    except ValueError as error:
        raise HTTPException(400, f"the body is not a form: {error}") from None
    return dict(pairs)


FormOf = Annotated[dict[str, str], Depends(_form)]
"""A form's fields by name; of several with one name, the last."""
