"""What a refusal says on the wire: RFC 9457 problem details."""

from typing import Any

from pydantic import BaseModel, Field


class FieldProblem(BaseModel):
    """One thing wrong with the input: the dotted path, the value there, and what would be right."""

    field: str
    value: Any
    message: str


class ProblemDetails(BaseModel):
    """RFC 9457. `type` is stable; `existing` names what a conflict is with."""

    type: str
    title: str
    status: int
    detail: str
    problems: list[FieldProblem] = Field(default_factory=list)
    existing: str | None = None
