"""What a study may spend: reserved before a run starts, never exceeded, and said when it ends the study."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from threading import Barrier
from typing import Any

import pytest
from claims import NewStudies, NewTrials, Results
from pydantic import ValidationError
from sqlalchemy import event, update
from track import TTL, Track

from orchestrator import leases
from orchestrator.database import Database
from orchestrator.errors import OverBudget
from orchestrator.lifecycle import Outcome
from orchestrator.records import import_trial
from orchestrator.spending import Account, Accounts, Purses, limit_hours
from orchestrator.study import SpendingConfig
from orchestrator.tables import AttemptRow
from worker.inventory import count_parameters
from worker.recipes import load_recipe
from worker.spec import GangConfig, override

HOUR = 3600.0


@pytest.fixture
def track(database: Database, now: datetime, new_study: NewStudies, trial_result: Results) -> Callable[..., Track]:
    def build(budget: dict[str, Any] | None = None, **spending: Any) -> Track:
        base = override(load_recipe("laptop"), {"budget": budget or {"steps": 120, "seconds": None}})
        return Track(database, new_study(base=base, spending=spending), now, trial_result)

    return build


def account(there: Track) -> Account:
    with there.database.read() as session:
        found = Accounts().read(session, there.study, there.now)
    assert found is not None
    return found


def seconds(there: Track) -> tuple[float, float]:
    """Spent, and reserved."""
    found = account(there)
    return round(found.spent_hours * HOUR, 6), round(found.reserved_hours * HOUR, 6)


def submit(there: Track, new_trial: NewTrials, count: int, **changes: Any) -> None:
    for _ in range(count):
        there.submit(new_trial({"budget": {"steps": 120}, **changes}, origin="submitted"))


def test_the_nearer_limit_counts() -> None:
    assert limit_hours(SpendingConfig()) is None
    assert limit_hours(SpendingConfig(dollars=10)) == 4
    assert limit_hours(SpendingConfig(dollars=10, gpu_hours=3)) == 3
    assert limit_hours(SpendingConfig(dollars=10, gpu_hour_dollars=0)) is None, "what costs nothing is not limited"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("wall_hours", 1e12), ("gpu_hours", float("inf")), ("dollars", 1e300), ("gpu_hour_dollars", 1e300),
        ("gpu_hour_dollars", 1e-300), ("target_bpb", 1e300),
    ],
)  # fmt: skip
def test_a_number_that_no_study_needs_is_refused_by_name(field: str, value: float, new_study: NewStudies) -> None:
    with pytest.raises(ValidationError, match=f"spending.{field}"):
        new_study(spending={field: value})


def test_an_imported_trial_reaches_no_target(track: Callable[..., Track], new_trial: NewTrials) -> None:
    there = track(target_bpb=2.0)
    new = new_trial(origin="imported")
    result = there.result(val_bpb=1.5, parameters=count_parameters(new.spec.model, new.spec.sharing))

    def enough() -> dict[int, str]:
        with there.database.read() as session:
            return there.purses.enough(session, [there.current()], there.now)

    with there.database.write() as session:
        import_trial(session, there.study, new, result, there.now)
    assert enough() == {}, "nobody here has measured it"
    submit(there, new_trial, 1)
    there.end(there.claimed(), 1.9)
    assert enough() == {there.study.id: "trial 1 has reached the target of 2 BPB with 1.9000"}


def test_a_first_run_shows_alone_what_its_like_costs_and_then_so_many_start_as_can_be_paid_for(
    track: Callable[..., Track], new_trial: NewTrials
) -> None:
    there = track(gpu_hours=35 / HOUR)
    submit(there, new_trial, 5)
    first = there.claimed()
    with pytest.raises(OverBudget) as alone:
        there.claim()
    assert not alone.value.final
    there.end(first, seconds=10)
    second, third = there.claimed(), there.claimed()
    found = account(there)
    assert (found.spent_hours + found.reserved_hours) * HOUR == pytest.approx(30)
    with pytest.raises(OverBudget):
        there.claim()
    there.end(second, seconds=10)
    with pytest.raises(OverBudget) as refused:
        there.claim()
    assert not refused.value.final
    there.end(third, seconds=4)
    fourth = there.claimed()
    there.end(fourth, seconds=10)
    with pytest.raises(OverBudget) as refused:
        there.claim()
    assert refused.value.final
    assert str(refused.value) == (
        "the budget of 0.00972222 GPU-hours is spent: 0.009444 GPU-hours so far, and the next run would take about "
        "0.002778"
    )


def test_an_attempt_that_takes_longer_than_expected_holds_what_it_has_taken(
    track: Callable[..., Track], new_trial: NewTrials
) -> None:
    there = track(gpu_hours=1)
    submit(there, new_trial, 3)
    there.end(there.claimed(), seconds=10)
    claim = there.claimed()
    assert account(there).reserved_hours * HOUR == pytest.approx(10)
    there.now += timedelta(seconds=100)
    assert seconds(there) == (10, 10), "it waits in a queue"
    there.measure(claim, {})
    there.now += timedelta(seconds=4)
    assert seconds(there) == (14, 6)
    there.now += timedelta(seconds=10)
    assert seconds(there) == (24, 0)


def test_kept_accounts_read_an_ended_attempt_once_and_say_what_new_ones_do(
    track: Callable[..., Track], new_trial: NewTrials
) -> None:
    there, kept = track(gpu_hours=1), Accounts()
    submit(there, new_trial, 3)

    def look() -> Account | None:
        with there.database.read() as session:
            return kept.read(session, there.study, there.now)

    for _ in range(3):
        claim = there.claimed()
        assert look() == account(there)
        there.end(claim, seconds=10)
        assert look() == account(there)
    with there.database.write() as session:
        session.execute(update(AttemptRow).values(phase_seconds={}, started_at=AttemptRow.finished_at))
    assert look() != account(there), "they are not looked at again"


def test_a_run_in_seconds_is_paid_for_with_its_evaluation_before_any_was_measured(
    track: Callable[..., Track], new_trial: NewTrials
) -> None:
    there = track({"seconds": 100}, gpu_hours=1500 * 4 / HOUR)
    changes = {"budget": {"seconds": 100}, "gang.ranks": 4}
    submit(there, new_trial, 3, **changes)
    four = GangConfig(ranks=4)
    for _ in range(2):
        there.claimed(four)
    assert account(there).reserved_hours * HOUR == pytest.approx(2 * 4 * 700)
    with pytest.raises(OverBudget):
        there.claim(four)


def test_a_run_whose_training_alone_cannot_be_paid_for_never_starts(
    track: Callable[..., Track], new_trial: NewTrials
) -> None:
    there = track({"seconds": 100}, gpu_hours=99 / HOUR)
    submit(there, new_trial, 1, budget={"seconds": 100})
    with pytest.raises(OverBudget) as refused:
        there.claim()
    assert refused.value.final
    with there.database.write() as session:
        assert leases.claim(session, GangConfig(), "host", there.now, TTL, without=(there.study.id,)) is None
        assert leases.claim(session, GangConfig(), "host", there.now, TTL) is not None, "the refusal left it queued"


def test_failures_lost_attempts_and_every_rank_count_as_spent(
    track: Callable[..., Track], new_trial: NewTrials
) -> None:
    there = track(gpu_hours=1)
    submit(there, new_trial, 1, **{"gang.ranks": 2})
    for outcome in (Outcome.FAILED, Outcome.LOST, Outcome.SUCCEEDED):
        there.end(there.claimed(GangConfig(ranks=2)), outcome=outcome, seconds=10)
    assert seconds(there) == (60, 0)


def test_orchestrators_that_claim_at_once_never_reserve_more_than_there_is(
    track: Callable[..., Track], new_trial: NewTrials
) -> None:
    there = track(gpu_hours=75 / HOUR)
    submit(there, new_trial, 12)
    there.end(there.claimed(), seconds=10)
    barrier = Barrier(4)

    def claim_until_refused(name: str) -> int:
        purses, claims = Purses(), 0
        barrier.wait()
        while True:
            try:
                with there.database.write() as session:
                    claims += leases.claim(session, GangConfig(), name, there.now, TTL, purses=purses) is not None
            except OverBudget:
                return claims

    with ThreadPoolExecutor(4) as pool:
        claims = sum(pool.map(claim_until_refused, "abcd"))
    assert claims == 6
    assert account(there).left_hours * HOUR == pytest.approx(5)


def test_a_study_without_a_budget_pays_nothing_for_the_question(
    track: Callable[..., Track], new_trial: NewTrials
) -> None:
    there = track()
    submit(there, new_trial, 4)
    there.claimed()
    statements: list[str] = []
    event.listen(there.database.engine, "before_cursor_execute", lambda *said: statements.append(said[2]))
    there.claimed()
    with_purses = len(statements)
    with there.database.write() as session:
        leases.claim(session, GangConfig(), "host", there.now, TTL)
    assert len(statements) == 2 * with_purses


def test_time_and_a_target_end_a_study_that_says_why(track: Callable[..., Track], new_trial: NewTrials) -> None:
    there = track(wall_hours=2, target_bpb=2.0)
    submit(there, new_trial, 3)

    def enough() -> dict[int, str]:
        with there.database.read() as session:
            return there.purses.enough(session, [there.current()], there.now)

    there.end(there.claimed(), 2.1)
    assert enough() == {}
    there.end(there.claimed(), 1.5, artifact_bytes=20_000_000)
    assert enough() == {}, "that one is over the cap"
    there.end(there.claimed(), 1.9)
    assert enough() == {there.study.id: "trial 2 has reached the target of 2 BPB with 1.9000"}
    there.now += timedelta(hours=2)
    assert enough() == {there.study.id: "its 2 hours are over"}
