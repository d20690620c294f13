"""Prometheus' view of a server and its database: right numbers, few labels, and a scrape that costs little."""

import asyncio
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from claims import NewStudies, NewTrials
from fastapi.testclient import TestClient
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message, Receive, Scope, Send
from test_events import stream

from api.app import create_app
from api.metrics import Measured, Metrics
from orchestrator import leases, store
from orchestrator.database import Database
from orchestrator.gauges import Gauges
from orchestrator.lifecycle import Cause, Outcome
from orchestrator.study import AttemptResult

TTL = timedelta(minutes=5)
Samples = dict[tuple[str, ...], float]


def parsed(text: str) -> dict[str, Samples]:
    found: dict[str, Samples] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sample.labels.values())] = sample.value
    return found


@pytest.fixture
def http(database: Database) -> Iterator[TestClient]:
    with TestClient(
        create_app(database, gpu_hour_dollars=3600.0), base_url="http://127.0.0.1", client=("127.0.0.1", 1)
    ) as client:
        yield client


def scrape(http: TestClient) -> dict[str, Samples]:
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    return parsed(answer.text)


def test_what_the_database_holds_is_counted(
    database: Database, new_study: NewStudies, new_trial: NewTrials, http: TestClient
) -> None:
    now = datetime.now(UTC) - timedelta(seconds=100)
    shape = {"gang.ranks": 2, "gang.device": "gpu"}
    with database.write() as session:
        study = store.create_study(session, new_study(), now)
        for _ in range(3):
            trial = store.add_trial(session, study.id, new_trial(shape), now)
    assert trial is not None
    for ends in (True, False):
        with database.write() as session:
            claim = leases.claim(session, trial.spec.gang, "host", now, TTL, name="warm")
            assert claim is not None
            leases.record(session, claim.lease, "train", [], now, TTL)
            if ends:
                failed = AttemptResult(Outcome.FAILED, "no luck", cause=Cause.BAD_INPUT)
                leases.finish(session, claim.lease, failed, now + timedelta(seconds=50))
    seen = scrape(http)
    assert seen["caddie_studies"][("running",)] == 1
    assert (seen["caddie_trials"][("failed",)], seen["caddie_trials"][("complete",)]) == (1, 0)
    assert seen["caddie_queued_runs"] == {("gpu", "2"): 1}
    assert seen["caddie_queue_seconds"][("gpu", "2")] >= 100
    assert seen["caddie_gangs"] == {("train",): 1}
    assert seen["caddie_attempts_total"] == {("failed",): 1}
    assert seen["caddie_attempt_seconds_total"][("train",)] == pytest.approx(50)
    assert seen["caddie_dollars_total"][("train",)] == pytest.approx(2 * 50)
    assert seen["caddie_database_up"] == {(): 1}
    assert seen["caddie_idle_share"] == {(): 0}


def test_an_ended_attempt_counts_once_however_often_it_is_looked_at(
    database: Database, new_study: NewStudies, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        study = store.create_study(session, new_study(), now)
    gauges = Gauges()
    for count, seconds in enumerate((50.0, 20.0), 1):  # the second by a clock that is behind
        with database.write() as session:
            store.add_trial(session, study.id, new_trial(), now)
            claim = leases.claim(session, study.definition.shapes[0], "host", now, TTL)
            assert claim is not None
            failed = AttemptResult(Outcome.FAILED, "no luck", cause=Cause.BAD_INPUT, seconds={"train": seconds})
            leases.finish(session, claim.lease, failed, now + timedelta(seconds=seconds))
        for _ in range(2):
            with database.read() as session:
                figures = gauges.read(session, now)
            assert figures.attempts == {"failed": count}
    assert figures.seconds["train"] == 70


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_requests_are_counted_by_route_and_never_by_path(http: TestClient) -> None:
    for number in range(20):
        http.get(f"/v1/studies/study-{number}")
        http.get(f"/studies/study-{number}")
        http.get(f"/nothing/{number}")
    http.request("BREW", "/v1/studies")
    counted = scrape(http)["caddie_http_requests_total"]
    assert counted[("GET", "/v1/studies/{study}", "404")] == 20
    assert counted[("GET", "/studies/{study}", "404")] == 20
    assert counted[("GET", "other", "404")] == 20
    assert {method for method, _route, _status in counted} == {"GET", "other"}


def test_who_leaves_before_the_answer_is_no_error_and_no_duration(small_database: Database) -> None:
    async def leave(_scope: Scope, _receive: Receive, _send: Send) -> None:
        return

    async def fail(_scope: Scope, _receive: Receive, _send: Send) -> None:
        raise ValueError("ours")

    async def silence(*_sent: Message) -> Any:
        raise AssertionError("nobody is there")

    metrics = Metrics(small_database, 1.0)
    scope: Scope = {"type": "http", "method": "GET", "path": "/nothing"}
    asyncio.run(Measured(leave, metrics)(scope, silence, silence))
    with pytest.raises(ValueError, match="ours"):
        asyncio.run(Measured(fail, metrics)(scope, silence, silence))
    found = parsed(generate_latest(metrics.registry).decode())
    assert found["caddie_http_requests_total"] == {("GET", "other", "none"): 1, ("GET", "other", "500"): 1}
    assert found["caddie_http_request_seconds_count"] == {("GET", "other"): 1}


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_open_streams_and_database_errors_are_counted(database: Database, serve: Callable[..., str]) -> None:
    import httpx

    address = serve(database)
    with stream(f"{address}/v1/events"):
        assert parsed(httpx.get(f"{address}/metrics").text)["caddie_event_streams"] == {(): 1}
    with database.read() as session, pytest.raises(Exception, match="no such table"):
        session.connection().exec_driver_sql("SELECT * FROM missing")
    assert parsed(httpx.get(f"{address}/metrics").text)["caddie_database_errors_total"] == {("OperationalError",): 1}
