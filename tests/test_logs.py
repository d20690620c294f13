"""What attempts log, from their gang to whoever reads it: kept once, bounded, paged, tailed and followed."""

from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
from claims import NewStudies, NewTrials
from test_events import stream, take

from api.client import Caddie
from orchestrator import leases, store
from orchestrator.artifacts import ArtifactStore
from orchestrator.database import Database
from orchestrator.errors import LeaseLost
from orchestrator.lifecycle import OPEN_TRIALS, Cause, Outcome
from orchestrator.local_launcher import LocalLauncher
from orchestrator.logs import list_lines
from orchestrator.loop import Loop
from orchestrator.study import AttemptResult, Claim, Study
from worker.recipes import load_recipe
from worker.report import LogLine
from worker.spec import override

TTL = timedelta(minutes=5)
TICKS = 600


@pytest.fixture
def study(database: Database, new_study: NewStudies, now: datetime) -> Study:
    base = override(load_recipe("laptop"), {"data.dataset": "count", "budget.steps": 3})
    with database.write() as session:
        return store.create_study(session, new_study("sweep", base=base), now)


@pytest.fixture
def submit(database: Database, study: Study, new_trial: NewTrials, now: datetime) -> Callable[..., None]:
    def run(dataset: str = "count") -> None:
        with database.write() as session:
            store.add_trial(session, study.id, new_trial({"data.dataset": dataset}, origin="submitted"), now)

    return run


@pytest.fixture
def claim(database: Database, study: Study, submit: Callable[..., None], now: datetime) -> Callable[[], Claim]:
    def run() -> Claim:
        with database.write() as session:
            claimed = leases.claim(session, study.definition.shapes[0], "host", now, TTL)
        assert claimed is not None
        return claimed

    submit()
    return run


def say(database: Database, claim: Claim, now: datetime, first: int, last: int) -> None:
    lines = [LogLine(number=n, elapsed_seconds=n / 2, line=f"step {n}") for n in range(first, last + 1)]
    with database.write() as session:
        leases.record(session, claim.lease, "train", [], now, TTL, lines)


def lines_of(database: Database, trial_id: int) -> list[tuple[int, str]]:
    with database.read() as session:
        return [(logged.said.number, logged.said.line) for logged in list_lines(session, trial_id)]


def test_a_line_delivered_twice_is_kept_once(database: Database, claim: Callable[[], Claim], now: datetime) -> None:
    held = claim()
    say(database, held, now, 1, 2)
    say(database, held, now, 1, 3)
    assert lines_of(database, held.trial_id) == [(1, "step 1"), (2, "step 2"), (3, "step 3")]


def test_nothing_is_kept_of_a_gang_that_lost_its_lease(
    database: Database, claim: Callable[[], Claim], study: Study, now: datetime
) -> None:
    held = claim()
    with database.write() as session:
        store.cancel_trial(session, study.id, held.trial_number, now)
    with pytest.raises(LeaseLost):
        say(database, held, now, 1, 1)
    assert lines_of(database, held.trial_id) == []


def test_a_log_ends_with_what_is_known_of_a_failure(
    database: Database, claim: Callable[[], Claim], now: datetime
) -> None:
    held = claim()
    say(database, held, now, 1, 1)
    failed = AttemptResult(Outcome.FAILED, "rank 1: no luck", cause=Cause.ERROR, traceback="Traceback\n  line 3")
    with database.write() as session:
        leases.finish(session, held.lease, failed, now)
    told = [(1, "step 1"), (2, "Traceback"), (3, "  line 3"), (4, "failed: rank 1: no luck")]
    assert lines_of(database, held.trial_id) == told


def test_what_gangs_log_and_the_tracebacks_of_their_failures_reach_the_database(
    database: Database, study: Study, submit: Callable[..., None], tmp_path: Path, now: datetime
) -> None:
    for dataset in ("count", "out-of-memory"):
        submit(dataset)
    launcher = LocalLauncher(tmp_path, tmp_path, 2, "trainers:run", import_path=[Path(__file__).parent])
    loop = Loop(database, launcher, ArtifactStore(tmp_path / "artifacts"), "host", TTL)
    try:
        for _ in range(TICKS):
            loop.tick(now)
            with database.read() as session:
                trials = store.list_trials(session, study.id, numbers=[0, 1])
            if not any(trial.state in OPEN_TRIALS for trial in trials):
                break
            Event().wait(0.05)
    finally:
        launcher.close()
    assert lines_of(database, trials[0].id)[0] == (1, f"counts to {trials[0].spec.budget.steps}")
    assert "MemoryError: no 64 GiB left" in [line for _number, line in lines_of(database, trials[1].id)]


def test_logs_are_read_by_page_tail_and_attempt(
    database: Database, claim: Callable[[], Claim], serve: Callable[..., str], now: datetime
) -> None:
    first = claim()
    say(database, first, now, 1, 5)
    with database.write() as session:
        leases.finish(session, first.lease, AttemptResult(Outcome.PREEMPTED, "stopped"), now)
    second = claim()
    say(database, second, now, 1, 3)
    path = f"{serve(database, dashboard=False)}/v1/studies/sweep/trials/0/logs"

    def read(**query: int) -> tuple[list[tuple[int, int]], int | None]:
        page = httpx.get(path, params=query).json()
        return [(line["attempt_id"], line["number"]) for line in page["items"]], page["next"]

    one, two = first.lease.attempt_id, second.lease.attempt_id
    assert read() == ([(two, 1), (two, 2), (two, 3)], None)
    assert read(tail=2) == ([(two, 2), (two, 3)], None)
    assert read(after=2) == ([(two, 3)], None)
    assert read(attempt=one, limit=4) == ([(one, 1), (one, 2), (one, 3), (one, 4)], 4)
    assert read(attempt=one, after=4)[0] == [(one, 5), (one, 6)]
    assert httpx.get(path, params={"attempt": 99}).status_code == 404
    said = httpx.get(path, params={"tail": 1}).json()["items"][0]
    assert (said["line"], datetime.fromisoformat(said["at"])) == ("step 3", now + timedelta(seconds=1.5))


def test_a_log_is_followed_to_its_trials_end_and_from_the_event_seen_last(
    database: Database, claim: Callable[[], Claim], study: Study, serve: Callable[..., str], now: datetime
) -> None:
    held = claim()
    say(database, held, now, 1, 4)
    address = serve(database, dashboard=False)
    path, attempt = f"{address}/v1/studies/sweep/trials/0/logs/stream", held.lease.attempt_id

    def numbers(message: Any) -> list[int]:
        return [line["number"] for line in message.data]

    with stream(f"{path}?tail=2") as source:
        assert numbers(next(source)) == [3, 4]
        say(database, held, now, 5, 6)
        fresh = next(source)
        assert (numbers(fresh), fresh.id) == ([5, 6], f"{attempt}:6")
        with database.write() as session:
            store.cancel_trial(session, study.id, 0, now)
        assert next(source).event == "end"
    with stream(path, headers={"Last-Event-ID": f"{attempt}:4"}) as source:
        again, end = take(source, 2)
    assert (numbers(again), end.event) == ([5, 6], "end")
    assert httpx.get(path, params={"after": "x"}).status_code == 422
    with Caddie(address) as caddie:
        assert [said.number for said in caddie.follow_logs("sweep", 0, tail=3)] == [4, 5, 6]
