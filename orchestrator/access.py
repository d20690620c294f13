"""Roles and the tokens that give them, as values. `tokens` makes and finds them."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

NAME = r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}"
"""What a principal may be called."""


class Role(StrEnum):
    """Each may do what those before it may."""

    VIEWER = "viewer"
    """Reads everything but tokens and the audit."""
    SUBMITTER = "submitter"
    """Changes studies and trials."""
    ADMIN = "admin"
    """Also creates and revokes tokens, and reads the audit."""

    def includes(self, other: "Role") -> bool:
        ranks = list(Role)
        return ranks.index(self) >= ranks.index(other)


@dataclass(frozen=True)
class Principal:
    """Who asks. `token_id` is None where the door is open and nobody had to say, and for CADDIE_ADMIN_TOKEN."""

    name: str
    role: Role
    token_id: int | None = None


@dataclass(frozen=True)
class Token:
    """A token without its secret."""

    id: int
    name: str
    role: Role
    sha256: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    """To within a minute, so that reading stays reading."""

    def is_usable(self, now: datetime) -> bool:
        return self.revoked_at is None and (self.expires_at is None or self.expires_at > now)

    @property
    def principal(self) -> Principal:
        return Principal(self.name, self.role, self.id)


LOCAL = Principal("local", Role.ADMIN)
