"""An orchestrator's name, held by one live process at a time: two of a name would take each other's attempts over."""

import fcntl
import hashlib
import os
from datetime import datetime, timedelta

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from orchestrator.database import Database

CHECK_EVERY = timedelta(seconds=5)
# A host that vanished is taken for dead after 30 s: by the system's default, PostgreSQL would wait for two hours.
KEEPALIVE = "SET tcp_keepalives_idle = 15; SET tcp_keepalives_interval = 5; SET tcp_keepalives_count = 3"


class Owner:
    """A name in one database. However its holder dies, the name is free at once: it is a lock of PostgreSQL's, on a
    connection of its own, or of a byte of a file beside SQLite's."""

    def __init__(self, database: Database, name: str) -> None:
        self._database = database
        self._key = int.from_bytes(hashlib.sha256(f"caddie owner {name}".encode()).digest()[:8]) >> 1  # it is signed
        self._connection: Connection | None = None
        self._file: int | None = None
        self._checked_at: datetime | None = None

    def take(self) -> bool:
        """Hold the name; whether nobody else does. Raises OperationalError where the database does not answer."""
        if self._database.is_sqlite:
            return self._lock_byte()
        connection = self._database.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        connection.detach()  # closed, it is not kept in the pool with its lock
        connection.execute(text(KEEPALIVE))
        if not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": self._key}):
            connection.close()
            return False
        self._connection = connection
        return True

    def keep(self, now: datetime) -> bool:
        """Whether the name is still ours. One that was lost with its connection is taken again at the next chance."""
        if self._file is not None or (self._checked_at is not None and now - self._checked_at < CHECK_EVERY):
            return True
        self._checked_at = now
        try:
            if self._connection is None:
                return self.take()
            self._connection.execute(text("SELECT 1"))
        except DBAPIError:  # the database is away, and with it anyone else's chance
            self.release()
        return True

    def release(self) -> None:
        """Let others have it. Repeatable."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _lock_byte(self) -> bool:
        file = os.open(f"{self._database.url.database}.owners", os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, self._key)
        except BlockingIOError:
            os.close(file)
            return False
        self._file = file
        return True
