"""What attempts cost: kept under their lease as they change phase, and added up on SQLite and PostgreSQL."""

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from claims import NewTrials, Results
from sqlalchemy import update

from orchestrator import leases, store
from orchestrator.cost import Cost, cost_of
from orchestrator.database import Database
from orchestrator.errors import LeaseLost
from orchestrator.ledger import MOST, PHASES, UNKNOWN, Ledger, ledger
from orchestrator.lifecycle import Outcome
from orchestrator.study import AttemptResult, Claim, Study
from orchestrator.tables import AttemptRow
from worker.spec import GangConfig

TTL = timedelta(seconds=20)
FOUR_GPUS = GangConfig(ranks=4, device="gpu")
GPU_HOUR_DOLLARS = 7200.0  # two dollars a GPU-second
WAITED = 30.0


def seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


@pytest.fixture
def claim(database: Database, study: Study, new_trial: NewTrials, now: datetime) -> Callable[[GangConfig], Claim]:
    """Adds a trial for this shape of gang, WAITED seconds before `now`, and claims the first that waits for one."""

    def run(gang: GangConfig) -> Claim:
        new = new_trial({"gang.ranks": gang.ranks, "gang.device": gang.device})
        with database.write() as session:
            store.add_trial(session, study.id, new, now - seconds(WAITED))
            claimed = leases.claim(session, gang, "host", now, TTL)
        assert claimed is not None
        return claimed

    return run


@pytest.fixture
def enter(database: Database, now: datetime) -> Callable[..., None]:
    """Lets an attempt say, so many seconds after `now`, in which phase it is."""

    def run(held: Claim, phase: str, after_seconds: float) -> None:
        with database.write() as session:
            leases.record(session, held.lease, phase, [], now + seconds(after_seconds), TTL)

    return run


@pytest.fixture
def finish(database: Database, now: datetime) -> Callable[..., None]:
    def run(held: Claim, ended: AttemptResult, after_seconds: float) -> None:
        with database.write() as session:
            leases.finish(session, held.lease, ended, now + seconds(after_seconds))

    return run


def spent(database: Database, held: Claim) -> dict[str, float]:
    with database.read() as session:
        return store.list_attempts(session, held.trial_id)[0].phase_seconds


def ledger_of(database: Database, study: Study, at: datetime, number: int | None = None) -> Ledger:
    with database.read() as session:
        return ledger(session, study.id, GPU_HOUR_DOLLARS, at, number=number)


def test_an_attempts_seconds_lie_in_the_phases_it_went_through(
    database: Database, claim: Callable[..., Claim], enter: Callable[..., None], finish: Callable[..., None],
    trial_result: Results,
) -> None:  # fmt: skip
    held = claim(GangConfig())
    assert spent(database, held) == {"queue": WAITED}
    for phase, after_seconds in (("start", 1), ("train", 4), ("train", 9), ("evaluate", 10), ("pack", 12)):
        enter(held, phase, after_seconds)
    assert spent(database, held) == {"queue": WAITED + 1, "start": 3, "train": 6, "evaluate": 2}
    enter(held, "evaluate", 15)
    finish(held, AttemptResult(Outcome.SUCCEEDED, result=trial_result()), 16)
    assert spent(database, held) == {"queue": WAITED + 1, "start": 3, "train": 6, "evaluate": 3, "pack": 3}


def test_a_lost_lease_changes_nothing_in_the_ledger(
    database: Database, claim: Callable[..., Claim], enter: Callable[..., None], now: datetime
) -> None:
    held = claim(GangConfig())
    enter(held, "train", 2)
    with database.write() as session:
        leases.expire(session, now + seconds(60))
    with pytest.raises(LeaseLost):
        enter(held, "pack", 70)
    assert spent(database, held) == {"queue": WAITED + 2, "train": 58}


def test_a_studys_ledger_adds_up_its_attempts_by_phase(
    database: Database, study: Study, claim: Callable[..., Claim], enter: Callable[..., None],
    finish: Callable[..., None], trial_result: Results, now: datetime,
) -> None:  # fmt: skip
    for _ in range(2):
        done = claim(FOUR_GPUS)
        enter(done, "train", 60)
        finish(done, AttemptResult(Outcome.SUCCEEDED, result=trial_result()), 660)
    cheap = claim(GangConfig())
    enter(cheap, "train", 5)
    found = ledger_of(database, study, now + seconds(10))
    assert found.attempts == 3
    assert found.phases == {
        "queue": Cost(3 * WAITED + 125),  # which holds no GPU
        "train": Cost(1205, 4800, 9600),
    }
    assert found.wasted == found.void == Cost()
    assert found.total == Cost(1420, 4800, 9600)
    first = ledger_of(database, study, now + seconds(10), number=0)
    assert (first.attempts, first.total) == (1, Cost(690, 2400, 4800))
    assert found.trials == {0: first.total, 1: first.total, 2: Cost(WAITED + 10)}
    assert first.trials == {0: first.total}


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.PREEMPTED, Outcome.LOST, Outcome.VOID])
def test_what_attempts_cost_that_came_to_nothing_is_wasted(
    database: Database, study: Study, claim: Callable[..., Claim], enter: Callable[..., None],
    finish: Callable[..., None], now: datetime, outcome: Outcome,
) -> None:  # fmt: skip
    held = claim(FOUR_GPUS)
    enter(held, "train", 10)
    finish(held, AttemptResult(outcome, "gone"), 100)
    found = ledger_of(database, study, now + seconds(1000))
    assert (found.phases, found.attempts) == ({"queue": Cost(WAITED + 10)}, 1)
    assert found.wasted == Cost(90, 360, 720)
    assert found.void == (found.wasted if outcome is Outcome.VOID else Cost())
    assert found.total == Cost(WAITED + 100, 360, 720)


def test_a_trial_that_was_cancelled_has_used_what_it_cost(
    database: Database, study: Study, claim: Callable[..., Claim], enter: Callable[..., None], now: datetime
) -> None:
    held = claim(GangConfig())
    enter(held, "train", 10)
    with database.write() as session:
        store.cancel_trial(session, study.id, held.trial_number, now + seconds(30))
    found = ledger_of(database, study, now + seconds(1000))
    assert (found.phases, found.wasted) == ({"queue": Cost(WAITED + 10), "train": Cost(20)}, Cost())


def test_a_gangs_ledger_adds_up_what_it_ran(
    database: Database, study: Study, claim: Callable[..., Claim], finish: Callable[..., None], now: datetime
) -> None:
    for gang, took in (("a", 10), ("b", 20), ("a", 30)):
        held = claim(FOUR_GPUS)
        with database.write() as session:
            leases.renew(session, held.lease, now + seconds(1), TTL, gang=gang, phase="start")
        finish(held, AttemptResult(Outcome.STOPPED, "enough"), took)
    found = ledger_of(database, study, now)
    assert found.gangs == {"a": Cost(38, 152, 304), "b": Cost(19, 76, 152)}  # without the queue before it
    assert found.other_gangs == Cost()


def test_the_gangs_and_trials_that_cost_most_come_first_and_the_others_are_summed(
    database: Database, study: Study, claim: Callable[..., Claim], enter: Callable[..., None],
    finish: Callable[..., None], now: datetime,
) -> None:  # fmt: skip
    for took in range(1, MOST + 4):
        held = claim(FOUR_GPUS)
        with database.write() as session:
            leases.renew(session, held.lease, now, TTL, gang=f"gang-{took}", phase="train")
        finish(held, AttemptResult(Outcome.STOPPED, "enough"), took)
    found = ledger_of(database, study, now)
    dearest = list(range(MOST + 3, 3, -1))
    assert list(found.gangs) == [f"gang-{took}" for took in dearest]
    assert list(found.trials) == [took - 1 for took in dearest]
    assert found.other_gangs == Cost(6, 24, 48)
    assert found.other_trials == Cost(3 * WAITED + 6, 24, 48)


def test_what_a_gang_measured_itself_is_whole_and_its_waits_are_no_waste(
    database: Database, study: Study, claim: Callable[..., Claim], finish: Callable[..., None], now: datetime
) -> None:
    held = claim(FOUR_GPUS)
    with database.write() as session:
        leases.renew(session, held.lease, now, TTL, gang="a", phase="train")
    measured = {"queue": 5.0, "idle": 2.0, "start": 1.0, "train": 10.0, "compile": 3.0, "store": 7.0}
    finish(held, AttemptResult(Outcome.FAILED, "gone", seconds=measured, phase="store"), 500)
    found = ledger_of(database, study, now + seconds(1000))
    assert found.phases == {"queue": Cost(WAITED + 5), "idle": Cost(2, 8, 16)}
    assert found.wasted == Cost(21, 56, 112)
    assert found.gangs == {"a": Cost(16, 64, 128)}
    with database.read() as session:
        (attempt,) = store.list_attempts(session, held.trial_id)
    assert attempt.phase == "store"
    assert cost_of(attempt.phase_seconds, FOUR_GPUS, GPU_HOUR_DOLLARS) == found.total == Cost(WAITED + 28, 64, 128)


def test_phases_are_in_the_order_in_which_an_attempt_goes_through_them(
    database: Database, study: Study, claim: Callable[..., Claim], finish: Callable[..., None], now: datetime
) -> None:
    held = claim(GangConfig())
    finish(held, AttemptResult(Outcome.STOPPED, seconds=dict.fromkeys(("rest", *reversed(PHASES)), 1.0)), 9)
    assert list(ledger_of(database, study, now).phases) == [*PHASES, "rest"]


def test_attempts_older_than_the_ledger_count_as_a_whole(
    database: Database, study: Study, claim: Callable[..., Claim], enter: Callable[..., None],
    finish: Callable[..., None], now: datetime,
) -> None:  # fmt: skip
    held = claim(GangConfig())
    with database.write() as session:
        session.execute(update(AttemptRow).values(queued_at=None, phase_since=None, phase_seconds=None))
    enter(held, "train", 5)
    assert spent(database, held) == {}
    assert ledger_of(database, study, now + seconds(7)).phases == {UNKNOWN: Cost(7)}
    finish(held, AttemptResult(Outcome.STOPPED, "enough"), 9)
    assert spent(database, held) == {UNKNOWN: 9}
    assert ledger_of(database, study, now + seconds(70)).phases == {UNKNOWN: Cost(9)}
