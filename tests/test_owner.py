"""An orchestrator's name: one live process a database, free again however that process ends."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any

import pytest
from deadline import wait_for

from orchestrator.database import Database
from orchestrator.owner import CHECK_EVERY, Owner

HOLDER = """
import sys
from orchestrator.database import Database
from orchestrator.owner import Owner

owner = Owner(Database(sys.argv[1]), sys.argv[2])
print(owner.take(), flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(url: str, name: str) -> Iterator[tuple[subprocess.Popen[str], bool]]:
    """Another process that tries to take the name, and whether it did. Killed at the end."""
    command = [sys.executable, "-c", HOLDER, url, name]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process, process.stdout.readline() == "True\n"
        finally:
            process.kill()


@pytest.fixture
def owner(database: Database) -> Iterator[Owner]:
    owner = Owner(database, "one")
    yield owner
    owner.release()


def test_a_name_is_held_by_one_process_and_free_once_that_is_killed(
    database: Database, database_url: str, owner: Owner
) -> None:
    with holder(database_url, "one") as (process, taken):
        assert taken
        assert not owner.take()
        other = Owner(database, "other")
        assert other.take()
        other.release()
        process.kill()
        wait_for(owner.take, "the name")


def test_a_name_that_was_released_is_free(database_url: str, owner: Owner) -> None:
    for free in (False, True):
        assert owner.take()
        if free:
            owner.release()
        with holder(database_url, "one") as (_, taken):
            assert taken is free
        owner.release()


@pytest.mark.parametrize("backend", ["postgresql"], indirect=True)
@pytest.mark.parametrize("stolen", [False, True])
def test_a_name_lost_with_its_connection_is_taken_again_unless_another_was_faster(
    database_url: str, owner: Owner, now: datetime, postgresql: Any, stolen: bool
) -> None:
    assert owner.take()
    postgresql.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name",
        name=database_url.rpartition("/")[2].partition("?")[0],
    )
    assert owner.keep(now), "it cannot know yet"
    assert owner.keep(now + timedelta(seconds=1)), "nor does it look all the time"
    if not stolen:
        assert owner.keep(now + CHECK_EVERY)
    with holder(database_url, "one") as (_, taken):
        assert taken is stolen
        assert owner.keep(now + 2 * CHECK_EVERY) is not stolen
