"""A log's lines on the wire."""

from datetime import datetime
from typing import TYPE_CHECKING

from pydantic import BaseModel

if TYPE_CHECKING:  # a client needs no database
    from orchestrator.logs import Logged


class LogLineOut(BaseModel):
    """One line of an attempt's log; `number` counts from 1 within the attempt, and `at` is when it was said."""

    attempt_id: int
    number: int
    at: datetime
    elapsed_seconds: float
    line: str

    @classmethod
    def of(cls, logged: "Logged") -> "LogLineOut":
        return cls(attempt_id=logged.attempt_id, at=logged.at, **logged.said.model_dump())
