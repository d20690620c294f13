"""Tokens, and what was done with them, as the API takes and gives them."""

from datetime import datetime, timedelta
from typing import Self

from pydantic import AwareDatetime, BaseModel, Field, model_validator

from orchestrator.access import NAME, Role, Token
from worker.shape import Frozen


class TokenIn(Frozen):
    """A token to be made. Without `expires_in_days` and `expires_at` it lasts until it is revoked."""

    name: str = Field(pattern=f"^{NAME}$")
    role: Role
    expires_in_days: float | None = Field(default=None, gt=0, le=3650)
    expires_at: AwareDatetime | None = None

    @model_validator(mode="after")
    def _says_once_when(self) -> Self:
        if self.expires_in_days is not None and self.expires_at is not None:
            raise ValueError("give expires_in_days or expires_at, not both")
        return self

    def end(self, now: datetime) -> datetime | None:
        """When it expires."""
        return self.expires_at if self.expires_in_days is None else now + timedelta(days=self.expires_in_days)


class TokenOut(BaseModel):
    """A token without its secret. `last_used_at` is true to a minute."""

    id: int
    name: str
    role: Role
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None

    @classmethod
    def of(cls, token: "Token") -> "TokenOut":
        return cls(**{name: getattr(token, name) for name in TokenOut.model_fields})


class MadeTokenOut(TokenOut):
    """A token, this once with the text that its holder shows."""

    token: str


class AuditOut(BaseModel):
    """One write: who did what to what, when."""

    id: int
    at: datetime
    actor: str
    action: str
    subject: str


class MeOut(BaseModel):
    """Who asks. `token_id` is null for CADDIE_ADMIN_TOKEN, and where the door is open."""

    name: str
    role: Role
    token_id: int | None
