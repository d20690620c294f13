"""Roles: what whoever holds a token may do. Tokens themselves are in `tokens`."""

from dataclasses import dataclass
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
    """Who asks. `token_id` is None where the door is open and nobody had to say."""

    name: str
    role: Role
    token_id: int | None = None


LOCAL = Principal("local", Role.ADMIN)
