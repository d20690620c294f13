"""Run by Alembic. The connection comes from orchestrator.database, or from the URL in CADDIE_DATABASE_URL."""

import os

from alembic import context
from sqlalchemy import Connection

from orchestrator.database import Database
from orchestrator.tables import Base


def run() -> None:
    given = context.config.attributes.get("connection")
    if given is not None:
        _migrate(given)
        return
    database = Database(os.environ["CADDIE_DATABASE_URL"])
    with database.engine.connect() as opened, opened.begin():
        _migrate(opened)
    database.close()


def _migrate(connection: Connection) -> None:
    # SQLite cannot alter a table in place: batch mode has autogenerate write migrations that copy it.
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True, compare_type=True)
    context.run_migrations()


run()
