"""Access tokens: `caddie_<id>_<secret>`, shown once. The database keeps the SHA-256 of the secret, which is 256 random
bits: a slow hash defends passwords that can be guessed, and these cannot."""

import hashlib
import hmac
import re
import secrets
from datetime import datetime, timedelta

from sqlalchemy import delete, insert, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from orchestrator.access import NAME, Role, Token
from orchestrator.errors import Conflict, NotFound
from orchestrator.tables import SignInRow, TokenRow
from worker.shape import FieldError

RESERVED = ("environment", "local")  # what the audit calls CADDIE_ADMIN_TOKEN, and an open door
USE_NOTED = timedelta(minutes=1)
WRITTEN = re.compile(r"caddie_(\d{1,9})_([A-Za-z0-9_-]{43})")


def create_token(
    session: Session, name: str, role: Role, now: datetime, expires_at: datetime | None = None
) -> tuple[Token, str]:
    """The token, and the text to hand to whoever shall use it: nobody can read that again. A name is never given twice,
    not even after its token was revoked: the audit knows who did what by it. Raises FieldError and Conflict."""
    if not re.fullmatch(NAME, name) or name in RESERVED:
        raise FieldError("name", name, f"must match {NAME} and be neither {' nor '.join(RESERVED)}")
    if expires_at is not None and expires_at <= now:
        raise FieldError("expires_at", expires_at.isoformat(), "must lie in the future")
    secret = secrets.token_urlsafe(32)
    values = {"name": name, "role": role, "sha256": digest(secret), "created_at": now, "expires_at": expires_at}
    try:
        row = session.scalars(insert(TokenRow).values(values).returning(TokenRow)).one()
    except IntegrityError:
        raise Conflict("name", name, "is the name of another token") from None
    return _token_of(row), f"caddie_{row.id}_{secret}"


def list_tokens(session: Session, after: int = -1, limit: int | None = None) -> tuple[Token, ...]:
    """Tokens with ids above `after`, in the order in which they were made, revoked and expired ones included."""
    rows = session.scalars(select(TokenRow).where(TokenRow.id > after).order_by(TokenRow.id).limit(limit))
    return tuple(_token_of(row) for row in rows)


def revoke_token(session: Session, token_id: int, now: datetime) -> Token:
    """Make a token worthless, for good, and clear its sign-ins away. Again changes nothing. Raises NotFound."""
    changed = update(TokenRow).where(TokenRow.id == token_id, TokenRow.revoked_at.is_(None)).values(revoked_at=now)
    session.execute(changed)
    row = session.get(TokenRow, token_id)
    if row is None:
        raise NotFound("token", token_id)
    session.execute(delete(SignInRow).where(SignInRow.token_sha256 == row.sha256))
    return _token_of(row)


def find_token(session: Session, written: str) -> Token | None:
    """The token that was handed out as this text, whether or not it still is usable. Compared in constant time."""
    parts = WRITTEN.fullmatch(written)
    row = session.get(TokenRow, int(parts[1])) if parts is not None else None
    if parts is None or row is None or not hmac.compare_digest(row.sha256, digest(parts[2])):
        return None
    return _token_of(row)


def token_of_digest(session: Session, sha256: str) -> Token | None:
    """The token whose secret has this SHA-256: for digests of our own, never for what a visitor shows."""
    row = session.scalars(select(TokenRow).where(TokenRow.sha256 == sha256)).one_or_none()
    return None if row is None else _token_of(row)


def note_use(session: Session, token_id: int, now: datetime) -> None:
    """Write down that a token is in use, unless that was within the last minute."""
    old = or_(TokenRow.last_used_at.is_(None), TokenRow.last_used_at <= now - USE_NOTED)
    session.execute(update(TokenRow).where(TokenRow.id == token_id, old).values(last_used_at=now))


def has_tokens(session: Session) -> bool:
    """Whether a token was ever made."""
    return session.scalar(select(TokenRow.id).limit(1)) is not None


def has_usable_token(session: Session, now: datetime) -> bool:
    return any(token.is_usable(now) for token in list_tokens(session))


def require_admin(session: Session, role: Role, now: datetime) -> None:
    """Raises FieldError for a token that would shut the door before there is an admin's token to open it."""
    if role is not Role.ADMIN and not any(
        token.role is Role.ADMIN and token.is_usable(now) for token in list_tokens(session)
    ):
        raise FieldError("role", role.value, "must be admin as long as no admin's token works: a token shuts the door")


def digest(secret: str) -> str:
    """SHA-256, as the database keeps it."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _token_of(row: TokenRow) -> Token:
    return Token(
        row.id, row.name, Role(row.role), row.sha256, row.created_at, row.expires_at, row.revoked_at, row.last_used_at
    )
