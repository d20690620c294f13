"""The cluster's picture: lanes put together from attempts, on SQLite and PostgreSQL."""

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from claims import NewTrials
from fastapi.testclient import TestClient
from sqlalchemy import insert

from api.app import create_app
from orchestrator import leases, store
from orchestrator.database import Database
from orchestrator.lanes import MAX_ATTEMPTS, MAX_SEGMENTS, Cluster, read_cluster
from orchestrator.lifecycle import Cause, Outcome
from orchestrator.study import AttemptResult, Claim, Study
from orchestrator.tables import ATTEMPTS
from worker.spec import GangConfig

TTL = timedelta(seconds=20)
TWO = GangConfig(ranks=2, device="cpu")


def after(now: datetime, seconds: float) -> datetime:
    return now + timedelta(seconds=seconds)


@pytest.fixture
def begin(database: Database, study: Study, new_trial: NewTrials, now: datetime) -> Callable[..., Claim]:
    """Claims a new run for this gang, so many seconds after `now`."""

    def run(gang: str, seconds: float, owner: str = "host", shape: GangConfig = TWO) -> Claim:
        new = new_trial({"gang.ranks": shape.ranks})
        with database.write() as session:
            store.add_trial(session, study.id, new, now)
            claimed = leases.claim(session, shape, owner, after(now, seconds), TTL, name=gang)
        assert claimed is not None
        return claimed

    return run


@pytest.fixture
def end(database: Database, now: datetime) -> Callable[..., None]:
    """Ends an attempt so many seconds after `now`, with what its gang says of its phases."""

    def run(held: Claim, seconds: float, **phases: float) -> None:
        failed = AttemptResult(
            Outcome.FAILED, "it was tried", cause=Cause.DIVERGED, seconds=phases or None,
            phase=[*phases][-1] if phases else None,
        )  # fmt: skip
        with database.write() as session:
            leases.finish(session, held.lease, failed, after(now, seconds))

    return run


def look(database: Database, at: datetime, hours: float = 1.0) -> Cluster:
    with database.read() as session:
        return read_cluster(session, at, timedelta(hours=hours))


def drawn(cluster: Cluster, lane: int = 0) -> list[tuple[str, float]]:
    return [(segment.phase, segment.seconds) for segment in cluster.lanes[lane].segments]


def test_a_lane_shows_what_its_gang_did_and_the_idle_time_between(
    database: Database, begin: Callable[..., Claim], end: Callable[..., None], now: datetime
) -> None:
    first = begin("warm", 0)
    end(first, 100, start=10.0, train=70.0, evaluate=20.0)
    second = begin("warm", 120)
    with database.write() as session:
        leases.record(session, second.lease, "train", [], after(now, 125), TTL)
    cluster = look(database, after(now, 150))
    expected = [("start", 10), ("train", 70), ("evaluate", 20), ("idle", 25), ("train", 25)]
    assert drawn(cluster) == expected  # the first five of the second attempt's seconds it was on its way
    lane = cluster.lanes[0]
    assert (lane.gang, lane.gangs, lane.attempts, lane.phase, lane.shape) == ("warm", 1, 2, "train", TWO)
    assert lane.idle_share == pytest.approx(25 / 150)
    assert cluster.ranks_in_use == {"cpu": 2}


def test_gangs_that_came_one_after_the_other_share_a_lane_and_those_beside_each_other_do_not(
    database: Database, begin: Callable[..., Claim], end: Callable[..., None], now: datetime
) -> None:
    for number, seconds in enumerate((0, 100)):  # each gang is there for one attempt, as without Ray
        end(begin(f"cold-{number}", seconds), seconds + 90, start=5.0, train=85.0)
    end(begin("beside", 50), 150, train=100.0)
    end(begin("theirs", 50, owner="other host"), 60, train=10.0)
    cluster = look(database, after(now, 200))
    assert [(lane.owner, lane.gang, lane.gangs, lane.idle_seconds) for lane in cluster.lanes] == [
        ("host", "cold-1", 2, 10), ("host", "beside", 1, 0), ("other host", "theirs", 1, 0)
    ]  # fmt: skip
    assert cluster.ranks_in_use == {"cpu": 0}
    assert cluster.idle_share == pytest.approx(10 / 300)


def test_the_idle_share_counts_each_gang_by_its_ranks(
    database: Database, begin: Callable[..., Claim], end: Callable[..., None], now: datetime
) -> None:
    end(begin("one", 0, shape=GangConfig()), 100, train=100.0)
    end(begin("two", 0), 50, train=50.0)
    end(begin("two", 80), 100, train=20.0)
    cluster = look(database, after(now, 100))
    assert (cluster.busy_seconds, cluster.idle_seconds) == (170, 30)
    assert cluster.idle_share == pytest.approx(60 / 300)


def test_what_waits_in_a_gangs_queue_or_is_stored_behind_the_next_holds_nothing(
    database: Database, begin: Callable[..., Claim], end: Callable[..., None], now: datetime
) -> None:
    first, second = begin("warm", 0), begin("warm", 60)
    end(first, 130, train=100.0, store=30.0)
    end(second, 200, queue=40.0, idle=0.0, train=100.0)
    cluster = look(database, after(now, 200))
    assert drawn(cluster) == [("train", 100), ("train", 100)]
    assert [(each.phase, each.trial) for each in cluster.lanes[0].beside] == [("store", 0), ("queue", 1)]
    assert cluster.idle_share == 0


def test_the_queue_says_for_how_long_each_shape_has_waited(
    database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        for seconds in (0, 30):
            store.add_trial(session, study.id, new_trial({"gang.ranks": 2}), after(now, seconds))
        store.add_trial(session, study.id, new_trial(), after(now, 40))
    waiting = look(database, after(now, 60)).queue
    assert [(each.study, each.shape.ranks, each.runs, each.since) for each in waiting] == [
        ("sharing", 2, 2, now), ("sharing", 1, 1, after(now, 40))
    ]  # fmt: skip


def test_a_window_with_too_many_attempts_is_cut_short_and_what_is_too_short_to_see_is_joined(
    database: Database, begin: Callable[..., Claim], end: Callable[..., None], now: datetime
) -> None:
    begun = begin("gang-0", 0)
    end(begun, 1, train=1.0)
    many = MAX_ATTEMPTS + 500
    with database.write() as session:
        session.execute(
            insert(ATTEMPTS), [
                {"run_id": begun.run_id, "number": 2 + i, "owner": "host", "gang": f"gang-{i % 4}",
                 "phase": "evaluate", "phase_seconds": {"start": 1.0, "train": 5.0, "evaluate": 2.0},
                 "phase_since": after(now, 10 * (i // 4) + 9), "outcome": "failed", "permanent": False,
                 "started_at": after(now, 10 * (i // 4) + 1), "finished_at": after(now, 10 * (i // 4) + 9)}
                for i in range(many)
            ],
        )  # fmt: skip
    until = after(now, 10 * many / 4 + 9)
    cluster = look(database, until, hours=2.0)
    assert cluster.truncated and cluster.attempts == MAX_ATTEMPTS
    assert sum(len(lane.segments) for lane in cluster.lanes) <= MAX_SEGMENTS
    assert [lane.gangs for lane in cluster.lanes] == [1] * 4
    assert cluster.idle_share == pytest.approx(0.2, abs=0.01)  # of each ten seconds two
    for lane in cluster.lanes:
        assert sum(segment.seconds for segment in lane.segments) == pytest.approx(lane.busy_seconds + lane.idle_seconds)


def test_the_api_shows_the_cluster(database: Database, begin: Callable[..., Claim]) -> None:
    begin("warm", 0)
    with TestClient(create_app(database), base_url="http://127.0.0.1", client=("127.0.0.1", 1)) as client:
        answer = client.get("/v1/cluster?hours=24")
        assert (answer.status_code, answer.json()["queue"]) == (200, [])
        assert client.get("/v1/cluster?hours=0").status_code == 422
