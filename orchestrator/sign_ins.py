"""Sign-ins: what a browser shows at the door, in a cookie, instead of the token that it showed once.

They are rows, so that they outlast a restart, hold in every API process, and end with a sign-out. A cookie is
`<id>_<secret>`; as of a token, only the hash of the secret is kept.
"""

import hmac
import re
import secrets
from datetime import datetime, timedelta

from sqlalchemy import delete, insert, select
from sqlalchemy.orm import Session

from orchestrator.tables import SignInRow
from orchestrator.tokens import digest

SIGN_IN_DAYS = 7
MOST_SIGN_INS = 100  # of one token: programs send the token itself
WRITTEN = re.compile(r"(\d{1,9})_([A-Za-z0-9_-]{43})")


def open_sign_in(session: Session, token_sha256: str, now: datetime) -> str:
    """A new cookie for whoever has shown the token of this SHA-256. Clears away what has run out, and the oldest where
    the token has MOST_SIGN_INS."""
    session.execute(delete(SignInRow).where(SignInRow.expires_at <= now))
    of_token = select(SignInRow.id).where(SignInRow.token_sha256 == token_sha256).order_by(SignInRow.id.desc())
    session.execute(delete(SignInRow).where(SignInRow.id.in_(of_token.offset(MOST_SIGN_INS - 1))))
    secret = secrets.token_urlsafe(32)
    values = {
        "sha256": digest(secret), "token_sha256": token_sha256, "expires_at": now + timedelta(days=SIGN_IN_DAYS)
    }  # fmt: skip
    opened = session.scalars(insert(SignInRow).values(values).returning(SignInRow.id)).one()
    return f"{opened}_{secret}"


def find_sign_in(session: Session, cookie: str, now: datetime) -> str | None:
    """The SHA-256 of the token that a cookie stands for. Compared in constant time."""
    row = _row(session, cookie)
    return None if row is None or row.expires_at <= now else row.token_sha256


def close_sign_in(session: Session, cookie: str) -> None:
    """Make a cookie worthless."""
    row = _row(session, cookie)
    if row is not None:
        session.execute(delete(SignInRow).where(SignInRow.id == row.id))


def _row(session: Session, cookie: str) -> SignInRow | None:
    parts = WRITTEN.fullmatch(cookie)
    row = session.get(SignInRow, int(parts[1])) if parts is not None else None
    if parts is None or row is None or not hmac.compare_digest(row.sha256, digest(parts[2])):
        return None
    return row
