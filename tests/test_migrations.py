"""The migration history: it builds exactly the tables that the code describes, on both databases."""

import multiprocessing
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from claims import Results
from sqlalchemy import Connection, Engine, insert, inspect, select, text, update
from sqlalchemy.engine.interfaces import ReflectedIndex
from sqlalchemy.exc import IntegrityError

from orchestrator.database import Database, alembic_config
from orchestrator.study import Scores
from orchestrator.tables import AttemptRow, Base, MeasurementRow, RunRow, StudyRow, TrialRow


@pytest.fixture
def empty(empty_database_url: str) -> Iterator[Database]:
    database = Database(empty_database_url)
    yield database
    database.close()


def test_upgrading_an_empty_database_builds_exactly_the_tables_of_the_code(empty: Database) -> None:
    empty.migrate()
    with empty.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []


def test_the_migrations_build_every_constraint_of_the_code(empty: Database) -> None:
    empty.migrate()
    migrated = _constraints(empty.engine)
    with empty.engine.begin() as connection:
        Base.metadata.drop_all(connection)
        Base.metadata.create_all(connection)
    assert migrated == _constraints(empty.engine)
    assert "ck_attempts_lease_token" in {name for names in migrated.values() for name in names}


def test_downgrading_to_base_leaves_no_table_of_ours_and_upgrading_again_works(empty: Database) -> None:
    empty.migrate()
    with empty.engine.connect() as connection, connection.begin():
        _downgrade(connection)
    assert inspect(empty.engine).get_table_names() == ["alembic_version"]
    empty.migrate()
    assert set(inspect(empty.engine).get_table_names()) == {*Base.metadata.tables, "alembic_version"}


def test_a_database_needs_migration_until_it_is_at_the_head(empty: Database) -> None:
    assert empty.needs_migration()
    empty.migrate()
    assert not empty.needs_migration()
    with empty.engine.connect() as connection, connection.begin():
        _downgrade(connection)
    assert empty.needs_migration()


def test_rows_and_what_refers_to_them_outlive_an_upgrade_and_a_downgrade(empty: Database, now: datetime) -> None:
    with empty.engine.connect() as connection, connection.begin(), alembic_config(connection) as config:
        command.upgrade(config, "0001")
        for table, values in _attempt_and_a_measurement(now):
            connection.execute(insert(table).values(values))
    empty.migrate()
    with empty.read() as session:
        (attempt,) = session.scalars(select(AttemptRow))
        assert (attempt.outcome, attempt.cause) == ("failed", None)
    with empty.engine.connect() as connection, connection.begin(), alembic_config(connection) as config:
        command.downgrade(config, "0001")
        assert connection.execute(text("SELECT attempt_id, value FROM measurements")).all() == [(1, 2.5)]
        assert connection.execute(text("SELECT id, run_id, outcome FROM attempts")).all() == [(1, 1, "failed")]


def test_an_attempt_that_was_void_is_preempted_to_the_version_before(empty: Database, now: datetime) -> None:
    empty.migrate()
    with empty.engine.connect() as connection, connection.begin(), alembic_config(connection) as config:
        for table, values in _attempt_and_a_measurement(now):
            connection.execute(insert(table).values(values))
        connection.execute(text("UPDATE attempts SET outcome = 'void'"))
        command.downgrade(config, "0003")
        assert connection.execute(text("SELECT id, outcome FROM attempts")).all() == [(1, "preempted")]
    with pytest.raises(IntegrityError, match="ck_attempts_outcome"), empty.engine.begin() as connection:
        connection.execute(text("UPDATE attempts SET outcome = 'void'"))
    empty.migrate()
    with empty.engine.begin() as connection:
        connection.execute(text("UPDATE attempts SET outcome = 'void'"))
        assert connection.execute(text("SELECT attempt_id FROM measurements")).all() == [(1,)]


def test_runs_from_before_were_queued_when_they_were_made(empty: Database, now: datetime) -> None:
    with empty.engine.connect() as connection, connection.begin(), alembic_config(connection) as config:
        command.upgrade(config, "0003")
        for table, values in _attempt_and_a_measurement(now):
            connection.execute(insert(table).values(values))
    empty.migrate()
    with empty.read() as session:
        assert session.scalars(select(RunRow.queued_at)).all() == [now]
        assert session.scalars(select(AttemptRow.queued_at)).all() == [None]


def test_results_from_before_are_judged_by_the_one_cap_there_was(
    empty: Database, trial_result: Results, now: datetime
) -> None:
    with empty.engine.connect() as connection, connection.begin(), alembic_config(connection) as config:
        command.upgrade(config, "0004")
        for table, values in _attempt_and_a_measurement(now):
            connection.execute(insert(table).values(values))
        connection.execute(update(StudyRow).values(definition={"cap_bytes": 100}))
        result = trial_result(artifact_bytes=101).model_dump(mode="json")
        connection.execute(update(TrialRow).values(result=result, val_bpb=1.0, artifact_bytes=101))
    empty.migrate()
    with empty.read() as session:
        assert session.scalars(select(TrialRow.feasible)).all() == [False]
        (definition,) = session.scalars(select(StudyRow.definition))
        assert definition["cap_train_seconds"] == definition["cap_evaluate_seconds"] == 1e9, "there was none"
        (scores,) = session.scalars(select(RunRow.scores))
        assert scores is not None
        assert Scores(**scores).val_bpb == result["val_bpb"]


def test_migrating_again_changes_nothing(empty: Database) -> None:
    empty.migrate()
    before = _constraints(empty.engine)
    empty.migrate()
    assert _constraints(empty.engine) == before


def test_a_migration_that_fails_leaves_the_database_as_it_was(empty: Database) -> None:
    with empty.engine.begin() as connection:
        connection.execute(text("CREATE TABLE artifacts (mine INTEGER)"))
    with pytest.raises(Exception, match="artifacts"):
        empty.migrate()
    assert inspect(empty.engine).get_table_names() == ["artifacts"]


def test_processes_that_migrate_at_once_all_succeed(empty_database_url: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(2)
    processes = [spawn.Process(target=_migrate_together, args=(empty_database_url, barrier)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    database = Database(empty_database_url)
    assert not database.needs_migration()
    database.close()


def _migrate_together(url: str, barrier: "multiprocessing.synchronize.Barrier") -> None:
    database = Database(url)
    barrier.wait()
    database.migrate()
    database.close()


def _downgrade(connection: Connection) -> None:
    with alembic_config(connection) as config:
        command.downgrade(config, "base")


def _attempt_and_a_measurement(now: datetime) -> list[tuple[type[Base], dict[str, Any]]]:
    """One row of each table that an attempt needs, and one that needs it, in columns of the first revision."""
    parent = {"id": 1, "created_at": now}
    return [
        (StudyRow, {**parent, "name": "s", "state": "running", "definition": {}, "max_trials": 0, "changed_at": now}),
        (TrialRow, {
            **parent, "study_id": 1, "number": 0, "state": "queued", "origin": "submitted", "spec": {}, "params": {},
            "spec_hash": "0", "prediction": {}, "verdict": "fits",
        }),
        (RunRow, {
            **parent, "trial_id": 1, "seed": 1, "budget": {}, "state": "queued", "ranks": 1, "device": "cpu",
        }),
        (AttemptRow, {
            "id": 1, "run_id": 1, "number": 1, "owner": "a", "phase": "train", "outcome": "failed", "started_at": now,
            "finished_at": now, "permanent": False,
        }),
        (MeasurementRow, {
            "attempt_id": 1, "number": 1, "name": "val_bpb", "step": 1, "value": 2.5, "elapsed_seconds": 0.5,
        }),
    ]  # fmt: skip


def _definition(index: ReflectedIndex) -> str:
    where = {option: str(condition) for option, condition in index.get("dialect_options", {}).items()}
    return f"{index['column_names']} {index['unique']} {where}"


def _constraints(engine: Engine) -> dict[str, dict[str, str]]:
    """Table -> name -> definition, of everything that alembic's own comparison leaves out."""
    inspector = inspect(engine)
    found: dict[str, dict[str, str]] = {}
    for table in Base.metadata.tables:
        checks = {str(check["name"]): str(check["sqltext"]) for check in inspector.get_check_constraints(table)}
        indexes = {str(index["name"]): _definition(index) for index in inspector.get_indexes(table)}
        keys = {str(key["name"]): str(key) for key in inspector.get_foreign_keys(table)}
        found[table] = {**checks, **indexes, **keys}
    return found
