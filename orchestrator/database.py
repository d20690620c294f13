"""One database, by URL: SQLite (the embedded default) or PostgreSQL. Sessions that read, and sessions that write."""

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, DisconnectionError
from sqlalchemy.orm import Session

from worker.shape import FieldError

DRIVERS = {
    "sqlite": "sqlite",
    "sqlite+pysqlite": "sqlite",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
MIGRATION_LOCK = 0x0CADD1E  # any fixed number: PostgreSQL's advisory lock for migrations
RESTED_SECONDS = 1.0  # a server restarts in no less
# PostgreSQL's own default gives every statement a snapshot of its own.
READ_ONLY = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
# A row read again is read again: the guarded UPDATEs of the store do not pass through the session's objects.
FRESH = {"populate_existing": True}


class Database:
    """An engine and its two kinds of session. `write` takes SQLite's one write lock at its start, never midway."""

    def __init__(self, url: str) -> None:
        """Nothing is connected to yet, or made. Raises FieldError, naming the setting, for a URL of no database that we
        know."""
        self.url = _parse(url)
        self.engine = _create_engine(self)
        self._writing = self.engine.execution_options(writing=True)
        self._heads: set[str] | None = None
        # SQLite has one writer. Its own waiters ask again and again, and the last to come may be the first to get it.
        self._turn: AbstractContextManager[Any] = threading.Lock() if self.is_sqlite else nullcontext()
        self._reading = self.engine if self.is_sqlite else self.engine.execution_options(**READ_ONLY)

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @property
    def is_new(self) -> bool:
        """Whether it is an SQLite file that is not there yet, and that the first session makes. Raises OSError where it
        cannot be."""
        if not self.is_sqlite or not self.url.database:
            return False
        try:
            Path(self.url.database).stat()
        except FileNotFoundError:
            return True
        return False

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A session over one snapshot; whatever it changes is refused or rolled back."""
        with Session(self._reading, expire_on_commit=False, execution_options=FRESH) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """A session committed at the end of the block, or rolled back by an exception."""
        session = Session(self._writing, expire_on_commit=False, execution_options=FRESH)
        with self._turn, session, session.begin():
            yield session

    def migrate(self) -> None:
        """Bring the schema to this version's head. Safe to call by several processes at once, and again."""
        with self._writing.connect() as connection, connection.begin():
            if not self.is_sqlite:
                connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": MIGRATION_LOCK})
            with alembic_config(connection) as config:
                command.upgrade(config, "head")

    def needs_migration(self) -> bool:
        """Whether the schema is not at this version's head."""
        with self.engine.connect() as connection, alembic_config(connection) as config:
            if self._heads is None:  # this version's: they are in its files, which need reading once
                self._heads = set(ScriptDirectory.from_config(config).get_heads())
            return set(MigrationContext.configure(connection).get_current_heads()) != self._heads

    def close(self) -> None:
        self.engine.dispose()


def shown(url: URL) -> str:
    """A database's address as people may read it: without a password, wherever that stands."""
    return url.set(query={}).render_as_string(hide_password=True)


@contextmanager
def alembic_config(connection: Connection) -> Iterator[Config]:
    """Alembic's configuration for our one migration history, over an open connection."""
    with as_file(files("migrations")) as directory:
        config = Config()
        config.set_main_option("script_location", str(directory).replace("%", "%%"))
        config.attributes["connection"] = connection
        yield config


def _parse(url: str) -> URL:
    expected = "must start with sqlite:/// or postgresql://"
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):  # the second for a port that is no number
        raise FieldError("CADDIE_DATABASE_URL", url, expected) from None
    if parsed.drivername not in DRIVERS:
        raise FieldError("CADDIE_DATABASE_URL", shown(parsed), expected)
    return parsed.set(drivername=DRIVERS[parsed.drivername])


def _create_engine(database: Database) -> Engine:
    if not database.is_sqlite:
        # A host that has vanished does not refuse: without limits the loop would wait for minutes.
        patience = {"connect_timeout": 5, "keepalives_idle": 5, "tcp_user_timeout": 10_000}
        engine = create_engine(database.url, connect_args=patience)
        event.listen(engine, "checkin", _note_use)
        event.listen(engine, "checkout", _check_rested)
        return engine
    engine = create_engine(database.url, connect_args={"timeout": 30})
    event.listen(engine, "do_connect", _make_folder)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _note_use(_connection: Any, record: Any) -> None:
    record.info["used_at"] = time.monotonic()


def _check_rested(connection: Any, record: Any, _proxy: Any) -> None:
    """Ask a connection that has rested whether its server still is there; the pool then makes another. SQLAlchemy's own
    way asks each time, of which a trial has a dozen."""
    now = time.monotonic()
    if now - record.info.get("used_at", now) < RESTED_SECONDS:
        return
    try:
        connection.execute("SELECT 1")
        connection.rollback()
    except connection.OperationalError as error:
        raise DisconnectionError from error


def _make_folder(_dialect: object, _record: object, arguments: list[Any], _options: object) -> None:
    Path(arguments[0]).parent.mkdir(parents=True, exist_ok=True)


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # Else the driver itself would open transactions late, and two claimants could both read before either writes.
    connection.isolation_level = None
    for pragma in ("journal_mode=WAL", "foreign_keys=ON", "busy_timeout=30000"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: Connection) -> None:
    writing = connection.get_execution_options().get("writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")
