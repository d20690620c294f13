"""Server-sent events: in the order of commits, live, and taken up again where they broke off."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import httpx
import pytest
from claims import NewStudies, NewTrials, Results

from api.events import BATCH
from orchestrator import leases, store
from orchestrator.database import Database
from orchestrator.lifecycle import Outcome, StudyState
from orchestrator.seeds import ask_seeds
from orchestrator.study import AttemptResult, Claim, Study
from worker.report import Measurement

TTL = timedelta(minutes=5)


@dataclass(frozen=True)
class Message:
    """One event of a stream."""

    event: str
    id: str
    data: Any


def messages(answer: httpx.Response) -> Iterator[Message]:
    fields: dict[str, str] = {}
    for line in answer.iter_lines():
        if line:
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")
        else:
            if "data" in fields:
                yield Message(fields.get("event", "message"), fields.get("id", ""), json.loads(fields["data"]))
            fields = {}


@contextmanager
def stream(url: str, **options: Any) -> Iterator[Iterator[Message]]:
    with httpx.stream("GET", url, timeout=30, **options) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        yield messages(answer)


def take(source: Iterator[Message], count: int) -> list[Message]:
    return [next(source) for _ in range(count)]


@pytest.fixture
def study(database: Database, new_study: NewStudies, now: datetime) -> Study:
    with database.write() as session:
        return store.create_study(session, new_study("sweep"), now)


@pytest.fixture
def url(database: Database, study: Study, serve: Callable[..., str]) -> str:
    return f"{serve(database, dashboard=False)}/v1"


@pytest.fixture
def claim(database: Database, study: Study, new_trial: NewTrials, now: datetime) -> Claim:
    """A running trial's claim."""
    with database.write() as session:
        store.add_trial(session, study.id, new_trial(), now)
    with database.write() as session:
        claimed = leases.claim(session, study.definition.shapes[0], "host", now, TTL)
    assert claimed is not None
    return claimed


def measure(database: Database, claim: Claim, now: datetime, *numbers: int) -> None:
    said = [Measurement(number=n, step=n * 4, elapsed_seconds=n, metrics={"train_loss": 7 - n / 10}) for n in numbers]
    with database.write() as session:
        leases.record(session, claim.lease, "train", said, now, TTL)


def test_a_stream_says_what_was_and_then_what_comes(url: str, database: Database, study: Study, now: datetime) -> None:
    with stream(f"{url}/studies/sweep/events") as source:
        assert next(source).data["kind"] == "study.created"
        for move in (StudyState.PAUSED, StudyState.RUNNING, StudyState.PAUSED):
            with database.write() as session:
                store.move_study(session, study.id, move, now)
        seen = take(source, 3)
    assert [message.data["kind"] for message in seen] == ["study.paused", "study.running", "study.paused"]
    assert [message.id for message in seen] == [str(message.data["id"]) for message in seen]
    assert {message.data["study"] for message in seen} == {"sweep"}
    assert datetime.fromisoformat(seen[0].data["at"]) == now


def test_a_stream_goes_on_after_the_event_that_its_reader_saw_last(
    url: str, database: Database, study: Study, now: datetime
) -> None:
    for move in (StudyState.PAUSED, StudyState.RUNNING, StudyState.STOPPED):
        with database.write() as session:
            store.move_study(session, study.id, move, now)
    with stream(f"{url}/events") as source:
        everything = take(source, 4)
    second = everything[1].id
    with stream(f"{url}/studies/sweep/events?after={second}") as source:
        assert take(source, 2) == everything[2:]
    with stream(f"{url}/studies/sweep/events?after=0", headers={"Last-Event-ID": second}) as source:
        assert take(source, 2) == everything[2:]
    for wrong in ("x", "-1", "1" * 11):
        refused = httpx.get(f"{url}/events", headers={"Last-Event-ID": wrong})
        assert refused.status_code == 422
        assert refused.json()["problems"][0]["field"] == "Last-Event-ID"


def test_a_studys_stream_has_no_events_of_another(
    url: str, database: Database, new_study: NewStudies, now: datetime
) -> None:
    with database.write() as session:
        other = store.create_study(session, new_study("other"), now)
    with database.write() as session:
        store.move_study(session, other.id, StudyState.PAUSED, now)
    with stream(f"{url}/studies/other/events") as source:
        assert [message.data["message"] for message in take(source, 2)] == [
            "Study other was created",
            "Study other is paused",
        ]
    with stream(f"{url}/events") as source:
        assert [message.data["study"] for message in take(source, 3)] == ["sweep", "other", "other"]


def test_a_studys_stream_says_what_its_gangs_do(url: str, database: Database, claim: Claim, now: datetime) -> None:
    with stream(f"{url}/studies/sweep/events?after=1000") as source:
        before = next(source)
        assert (before.event, before.id) == ("activity", "")
        assert [(gang["trial"], gang["phase"], gang["step"]) for gang in before.data] == [(0, "queue", None)]
        measure(database, claim, now, 1, 2)
        gang = next(source).data[0]
        assert (gang["phase"], gang["step"], gang["metrics"]) == ("train", 8, {"train_loss": 6.8})
    shown = httpx.get(f"{url}/studies/sweep/activity").json()["items"]
    assert shown == [gang]


def test_a_trials_measurements_come_once_and_the_stream_ends_with_the_trial(
    url: str, database: Database, claim: Claim, trial_result: Results, now: datetime
) -> None:
    path = f"{url}/studies/sweep/trials/0/measurements"
    measure(database, claim, now, 1, 2)
    with stream(f"{path}/stream") as source:
        first = next(source)
        assert [said["number"] for said in first.data] == [1, 2]
        assert next(source).event == "state"
        measure(database, claim, now, 2, 3)
        second = next(source)
        assert [said["number"] for said in second.data] == [3]
        with database.write() as session:
            leases.finish(session, claim.lease, AttemptResult(Outcome.SUCCEEDED, result=trial_result()), now)
        rest = list(source)
    assert [(message.event, message.data) for message in rest] == [
        ("state", {"state": "complete"}), ("end", {"state": "complete"}),
    ]  # fmt: skip
    with stream(f"{path}/stream", headers={"Last-Event-ID": first.id}) as source:
        assert [said["number"] for said in next(source).data] == [3]
    assert [said["number"] for said in httpx.get(path).json()["items"]] == [1, 2, 3]
    refused = httpx.get(f"{path}/stream", headers={"Last-Event-ID": "1:2:3"})
    assert refused.status_code == 422


def test_an_earlier_attempts_measurements_are_not_lost_behind_a_later_ones(
    url: str, database: Database, claim: Claim, now: datetime
) -> None:
    measure(database, claim, now, 1, 2)
    with database.write() as session:
        leases.finish(session, claim.lease, AttemptResult(Outcome.PREEMPTED, "node lost"), now)
    with database.write() as session:
        again = leases.claim(session, claim.spec.gang, "host", now, TTL)
    assert again is not None
    with stream(f"{url}/studies/sweep/trials/0/measurements/stream") as source:
        assert [(said["attempt_id"], said["number"]) for said in next(source).data] == [
            (claim.lease.attempt_id, 1), (claim.lease.attempt_id, 2),
        ]  # fmt: skip
        next(source)
        measure(database, again, now, 1)
        assert [(said["attempt_id"], said["number"]) for said in next(source).data] == [(again.lease.attempt_id, 1)]


def test_a_stream_goes_on_while_a_complete_trial_runs_at_further_seeds(
    url: str, database: Database, claim: Claim, study: Study, trial_result: Results, now: datetime
) -> None:
    done = AttemptResult(Outcome.SUCCEEDED, result=trial_result())
    with database.write() as session:
        leases.finish(session, claim.lease, done, now)
        ask_seeds(session, study, 0, now, named=(7,), count=0)
    with database.write() as session:
        further = leases.claim(session, claim.spec.gang, "host", now, TTL)
    assert further is not None
    with (
        stream(f"{url}/studies/sweep/trials/0/measurements/stream") as source,
        stream(f"{url}/studies/sweep/trials/0/logs/stream") as lines,
    ):
        assert next(source).data == {"state": "complete"}
        measure(database, further, now, 1)
        assert [said["number"] for said in next(source).data] == [1]
        with database.write() as session:
            leases.finish(session, further.lease, done, now)
        assert [message.event for message in (*source, *lines)][-1] == "end"


def test_measurements_come_page_by_page_and_a_stream_takes_up_any_cursor_that_it_gave(
    url: str, database: Database, claim: Claim, now: datetime
) -> None:
    path, last = f"{url}/studies/sweep/trials/0/measurements", 2**31 - 1
    measure(database, claim, now, *range(1, BATCH + 2))
    first = httpx.get(path, params={"limit": 2}).json()
    assert ([said["number"] for said in first["items"]], first["next"]) == ([1, 2], f"{claim.lease.attempt_id}:2")
    second = httpx.get(path, params={"limit": BATCH - 1, "cursor": first["next"]}).json()
    assert ([said["number"] for said in second["items"]][-1], second["next"]) == (BATCH + 1, None)
    with stream(f"{path}/stream") as source:
        assert len(next(source).data) == BATCH
        assert next(source).event == "state"
        assert [said["number"] for said in next(source).data] == [BATCH + 1]
        said = Measurement(number=last, step=1, elapsed_seconds=1, metrics={"train_loss": 1})
        with database.write() as session:
            leases.record(session, claim.lease, "train", [said], now, TTL)
        end = next(source).id
    assert end == f"{claim.lease.attempt_id}:{last}"
    many = ",".join([end, *(f"{attempt}:{last}" for attempt in range(1000, 1400))])
    for cursor in (end, many):
        with stream(f"{path}/stream", headers={"Last-Event-ID": cursor}) as source:
            assert next(source).event == "state"
    for wrong in (f"1:{last + 1}", "1:x", ",", many + "," + many):
        assert httpx.get(path, params={"cursor": wrong}).status_code == 422
