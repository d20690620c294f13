"""The queue's contract: claims, leases and what may only be written under one, on SQLite and PostgreSQL."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from threading import Barrier
from typing import Any

import pytest
from claims import ONE_CPU, TTL, NewTrials, Results, claimed, measured
from sqlalchemy import func, select, update

from orchestrator.curves import list_measurements
from orchestrator.database import Database
from orchestrator.errors import LeaseLost
from orchestrator.leases import (
    MAX_ATTEMPTS,
    MAX_LOST,
    claim,
    expire,
    finish,
    record,
    renew,
    resume,
    still_held,
)
from orchestrator.lifecycle import Cause, Outcome, RunState, StudyState, TrialState
from orchestrator.store import (
    add_trial,
    cancel_trial,
    get_trial,
    list_attempts,
    list_events,
    list_runs,
    move_study,
)
from orchestrator.study import Artifact, Attempt, AttemptResult, Claim, Lease, Study
from orchestrator.tables import ArtifactRow, AttemptRow, MeasurementRow, RunRow, TrialRow
from worker.spec import BudgetConfig, GangConfig

SECOND = timedelta(seconds=1)
TWO_CPUS = GangConfig(ranks=2)
TRIED = {
    Cause.CRASH: 3, Cause.OUT_OF_MEMORY: 2, Cause.HANG: 3, Cause.LIMIT: 3, Cause.DIVERGED: 1, Cause.BAD_INPUT: 1,
    Cause.ERROR: 3,
}  # fmt: skip


def everything(database: Database) -> list[Sequence[Any]]:
    """All that a lease may write, row by row."""
    tables = (TrialRow, RunRow, AttemptRow, MeasurementRow, ArtifactRow)
    with database.read() as session:
        return [session.execute(select(table.__table__)).all() for table in tables]


def look(database: Database, held: Claim) -> tuple[TrialState, RunState, list[Attempt]]:
    """The states of the claim's trial and its only run, and the attempts at it."""
    with database.read() as session:
        (run,) = list_runs(session, held.trial_id)
        trial = get_trial(session, held.study_id, held.trial_number)
        return trial.state, run.state, list(list_attempts(session, held.trial_id))


# Claims


def test_a_claim_opens_an_attempt_and_hands_over_the_spec_at_the_runs_seed_and_budget(
    database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    new = new_trial({"seed": 7})
    with database.write() as session:
        added = add_trial(session, study.id, new, now)
        session.execute(update(RunRow).values(seed=8, budget={"steps": 5}))
        won = claim(session, ONE_CPU, "orchestrator-1", now + SECOND, TTL)
    assert added is not None
    assert won is not None
    assert (won.trial_id, won.trial_number, won.study_id) == (added.id, 0, study.id)
    assert won.spec == new.spec.model_copy(update={"seed": 8, "budget": BudgetConfig(steps=5)})
    trial_state, run_state, (attempt,) = look(database, won)
    assert (trial_state, run_state) == (TrialState.RUNNING, RunState.RUNNING)
    assert (attempt.id, attempt.run_id, attempt.number) == (won.lease.attempt_id, won.run_id, 1)
    assert (attempt.owner, attempt.gang, attempt.phase) == ("orchestrator-1", None, "queue")
    assert (attempt.started_at, attempt.finished_at, attempt.outcome) == (now + SECOND, None, None)
    with database.read() as session:
        assert get_trial(session, study.id, 0).started_at == now + SECOND


def test_submitted_runs_come_before_proposed_ones_and_older_before_younger(
    database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        for origin in ("proposed", "submitted", "proposed", "submitted"):
            add_trial(session, study.id, new_trial(origin=origin), now)
        assert [claimed(session, now).trial_number for _ in range(4)] == [1, 3, 0, 2]
        assert claim(session, ONE_CPU, "a", now, TTL) is None


def test_a_gang_claims_only_runs_of_its_own_shape(
    database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        add_trial(session, study.id, new_trial({"gang.ranks": 2}), now)
        assert claim(session, ONE_CPU, "a", now, TTL) is None
        assert claim(session, GangConfig(ranks=2, device="gpu"), "a", now, TTL) is None
        assert claimed(session, now, TWO_CPUS).spec.gang == TWO_CPUS


@pytest.mark.parametrize("state", [StudyState.PAUSED, StudyState.STOPPED])
def test_nothing_is_claimed_of_a_study_that_does_not_run(
    state: StudyState, database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        add_trial(session, study.id, new_trial(), now)
        move_study(session, study.id, state, now)
        assert claim(session, ONE_CPU, "a", now, TTL) is None


def test_every_run_has_exactly_one_winner_among_racing_claimants(
    database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    runs, claimants = 12, 6
    with database.write() as session:
        for _ in range(runs):
            add_trial(session, study.id, new_trial(), now)
    together = Barrier(claimants)

    def take_all(claimant: int) -> list[int]:
        together.wait()
        mine: list[int] = []
        while True:
            with database.write() as session:
                won = claim(session, ONE_CPU, str(claimant), now, TTL)
            if won is None:
                return mine
            mine.append(won.run_id)

    with ThreadPoolExecutor(claimants) as pool:
        won = [run for mine in pool.map(take_all, range(claimants)) for run in mine]
    assert len(won) == len(set(won)) == runs
    with database.read() as session:
        assert session.scalar(select(func.count()).select_from(AttemptRow)) == runs


# Leases


def test_a_lease_that_ran_out_is_renewed_until_someone_takes_it(database: Database, held: Claim, now: datetime) -> None:
    last = now + TTL - SECOND
    with database.write() as session:
        renew(session, held.lease, last, TTL, gang="g1")
        assert expire(session, now + TTL) == 0
        renew(session, held.lease, last + TTL - SECOND, TTL)
        assert still_held(session, [held.lease]) == {held.lease.attempt_id}
    _, _, (attempt,) = look(database, held)
    assert attempt.gang == "g1"
    with database.write() as session:
        renew(session, held.lease, last + 3 * TTL, TTL)
        assert expire(session, last + 4 * TTL) == 1
    with pytest.raises(LeaseLost), database.write() as session:
        renew(session, held.lease, last + 4 * TTL, TTL)


def test_measurements_delivered_again_are_kept_once(database: Database, held: Claim, now: datetime) -> None:
    for numbers in ((1, 2), (1, 2, 3), (3,), ()):
        with database.write() as session:
            record(session, held.lease, "train", measured(*numbers), now, TTL)
    with database.read() as session:
        assert [progress.measurement for progress in list_measurements(session, held.trial_id)] == measured(1, 2, 3)
    assert look(database, held)[2][0].phase == "train"


def test_a_long_silence_is_recorded_in_one_go(database: Database, held: Claim, now: datetime) -> None:
    said = measured(*range(1, 2_001))
    with database.write() as session:
        record(session, held.lease, "train", said, now, TTL)
    with database.read() as session:
        assert [progress.measurement for progress in list_measurements(session, held.trial_id)] == said


def forged(held: Claim) -> Lease:
    return Lease(held.lease.attempt_id, "f" * 32)


def of_no_attempt(held: Claim) -> Lease:
    return Lease(held.lease.attempt_id + 1, held.lease.token)


@pytest.mark.parametrize("bad", [forged, of_no_attempt])
def test_who_holds_no_lease_changes_nothing(
    bad: Callable[[Claim], Lease],
    database: Database, held: Claim, trial_result: Results, now: datetime,
) -> None:  # fmt: skip
    lease, at = bad(held), now
    before = everything(database)
    with pytest.raises(LeaseLost), database.write() as session:
        renew(session, lease, at, TTL, gang="g2")
    with pytest.raises(LeaseLost), database.write() as session:
        record(session, lease, "train", measured(1), at, TTL)
    with pytest.raises(LeaseLost), database.write() as session:
        finish(session, lease, AttemptResult(Outcome.SUCCEEDED, result=trial_result()), at)
    assert everything(database) == before


def test_an_attempt_ends_once(database: Database, held: Claim, trial_result: Results, now: datetime) -> None:
    ended = AttemptResult(Outcome.SUCCEEDED, result=trial_result())
    with database.write() as session:
        finish(session, held.lease, ended, now)
    before = everything(database)
    with pytest.raises(LeaseLost), database.write() as session:
        finish(session, held.lease, ended, now)
    with database.write() as session:
        assert still_held(session, [held.lease]) == set()
    assert everything(database) == before


def test_a_cancel_takes_the_lease_away(
    database: Database, study: Study, held: Claim, trial_result: Results, now: datetime
) -> None:
    with database.write() as session:
        cancel_trial(session, study.id, 0, now)
    before = everything(database)
    with pytest.raises(LeaseLost), database.write() as session:
        finish(session, held.lease, AttemptResult(Outcome.SUCCEEDED, result=trial_result()), now)
    with pytest.raises(LeaseLost), database.write() as session:
        record(session, held.lease, "train", measured(1), now, TTL)
    assert everything(database) == before
    assert look(database, held)[:2] == (TrialState.CANCELLED, RunState.CANCELLED)


def test_a_run_whose_lease_expired_is_lost_once_and_queued_again_without_charge(
    database: Database, held: Claim, now: datetime
) -> None:
    with database.write() as session:
        assert expire(session, now + TTL - SECOND) == 0
        assert expire(session, now + TTL) == 1
        assert expire(session, now + TTL) == 0
    trial_state, run_state, (lost,) = look(database, held)
    assert (trial_state, run_state) == (TrialState.QUEUED, RunState.QUEUED)
    assert (lost.outcome, lost.finished_at, lost.reason) == (Outcome.LOST, now + TTL, "its lease ran out")
    with database.write() as session:
        again = claimed(session, now + TTL)
    assert again.run_id == held.run_id
    assert again.lease.token != held.lease.token
    assert [attempt.number for attempt in look(database, held)[2]] == [1, 2]
    with database.read() as session:
        assert get_trial(session, held.study_id, 0).started_at == now


def test_only_the_overdue_expire(database: Database, study: Study, new_trial: NewTrials, now: datetime) -> None:
    with database.write() as session:
        for _ in range(3):
            add_trial(session, study.id, new_trial(), now)
        claims = [claimed(session, now + n * SECOND) for n in range(3)]
        assert expire(session, now + TTL + SECOND) == 2
        states = [get_trial(session, study.id, won.trial_number).state for won in claims]
    assert states == [TrialState.QUEUED, TrialState.QUEUED, TrialState.RUNNING]


# Endings


def test_a_success_completes_the_trial_with_its_result_and_artifact(
    database: Database, held: Claim, trial_result: Results, now: datetime
) -> None:
    result = trial_result(val_bpb=1.25, diagnostics={"gammas": [0.1, None]})
    artifact = Artifact("file:///a/b.caddie", 3_000_000_000, "ab" * 32)
    later = now + SECOND
    with database.write() as session:
        finish(session, held.lease, AttemptResult(Outcome.SUCCEEDED, result=result, artifact=artifact), later)
    trial_state, run_state, (attempt,) = look(database, held)
    assert (trial_state, run_state) == (TrialState.COMPLETE, RunState.SUCCEEDED)
    assert (attempt.outcome, attempt.finished_at, attempt.artifact) == (Outcome.SUCCEEDED, later, artifact)
    with database.read() as session:
        trial = get_trial(session, held.study_id, 0)
        told = list_events(session)[-1]
    assert (trial.result, trial.finished_at, trial.started_at) == (result, later, now)
    assert (told.kind, told.trial_number) == ("trial.complete", 0)
    assert told.message == "Trial 0 is complete: 1.2500 BPB in 120,000 bytes"


@pytest.mark.parametrize("scored", [True, False])
def test_a_stop_prunes_the_trial(
    scored: bool, database: Database, held: Claim, trial_result: Results, now: datetime
) -> None:
    result = trial_result(stopped=True) if scored else None
    with database.write() as session:
        finish(session, held.lease, AttemptResult(Outcome.STOPPED, "pruned", result), now)
    assert look(database, held)[:2] == (TrialState.PRUNED, RunState.STOPPED)
    with database.read() as session:
        trial = get_trial(session, held.study_id, 0)
    assert (trial.result, trial.reason, trial.finished_at) == (result, "pruned", now)


def test_a_failure_is_tried_again_until_its_attempts_are_spent(database: Database, held: Claim, now: datetime) -> None:
    won: Claim | None = held
    for attempts in range(1, MAX_ATTEMPTS + 1):
        assert won is not None
        with database.write() as session:
            finish(session, won.lease, AttemptResult(Outcome.FAILED, "exit 1"), now)
        trial_state, run_state, made = look(database, held)
        assert len(made) == attempts
        last = attempts == MAX_ATTEMPTS
        assert (trial_state, run_state) == (
            (TrialState.FAILED, RunState.FAILED) if last else (TrialState.QUEUED, RunState.QUEUED)
        )
        with database.write() as session:
            won = claim(session, ONE_CPU, "a", now, TTL)
    assert won is None
    with database.read() as session:
        assert get_trial(session, held.study_id, 0).finished_at == now


@pytest.mark.parametrize(("cause", "attempts"), TRIED.items())
def test_the_cause_of_a_failure_says_how_often_a_run_is_tried(
    cause: Cause, attempts: int, database: Database, held: Claim, now: datetime
) -> None:
    won: Claim | None = held
    for _ in range(attempts):
        assert won is not None
        with database.write() as session:
            finish(session, won.lease, AttemptResult(Outcome.PREEMPTED), now)  # which costs nothing
            again = claimed(session, now)
            finish(session, again.lease, AttemptResult(Outcome.FAILED, "why", cause=cause), now)
            won = claim(session, ONE_CPU, "a", now, TTL)
    trial_state, run_state, made = look(database, held)
    assert (won, trial_state, run_state) == (None, TrialState.FAILED, RunState.FAILED)
    assert [attempt.cause for attempt in made] == [None, cause] * attempts


def test_every_cause_has_its_policy() -> None:
    assert set(TRIED) == set(Cause)


@pytest.mark.parametrize(
    ("micro_batch", "batch_tokens", "ranks", "halved"),
    [(8, 2048, 1, 4), (64, 2048, 1, 8), (64, 2048, 2, 4), (5, 2048, 1, 2), (1, 2048, 1, 1)],
)
def test_a_run_that_ran_out_of_memory_is_tried_with_half_its_micro_batch(
    micro_batch: int, batch_tokens: int, ranks: int, halved: int,
    database: Database, study: Study, new_trial: NewTrials, now: datetime,
) -> None:  # fmt: skip
    changes = {"data.sequence_length": 128, "data.batch_tokens": batch_tokens, "gang.ranks": ranks}
    new = new_trial({**changes, "data.micro_batch_sequences": micro_batch})
    gang = new.spec.gang
    with database.write() as session:
        add_trial(session, study.id, new, now)
        first = claimed(session, now, gang)
        finish(session, first.lease, AttemptResult(Outcome.FAILED, cause=Cause.CRASH), now)
        second = claimed(session, now, gang)
        finish(session, second.lease, AttemptResult(Outcome.FAILED, cause=Cause.OUT_OF_MEMORY), now)
        third = claimed(session, now, gang)
        told = list_events(session)[-1].message
        trial = get_trial(session, study.id, 0)
    assert first.spec == second.spec == trial.spec == new.spec
    assert third.spec.data == new.spec.data.model_copy(update={"micro_batch_sequences": halved})
    assert third.spec.model_copy(update={"data": new.spec.data}) == new.spec
    assert told == f"Trial 0 started, attempt 3, with micro-batches of {halved} sequences"


def test_lost_and_preempted_attempts_cost_a_run_nothing_but_losses_do_not_go_on_for_ever(
    database: Database, held: Claim, now: datetime
) -> None:
    with database.write() as session:
        won = held
        for _ in range(MAX_LOST - 1):
            for outcome in (Outcome.PREEMPTED, Outcome.LOST):
                finish(session, won.lease, AttemptResult(outcome), now)
                won = claimed(session, now)
        for _ in range(MAX_ATTEMPTS - 1):
            finish(session, won.lease, AttemptResult(Outcome.FAILED), now)
            won = claimed(session, now)
    assert look(database, held)[0] is TrialState.RUNNING
    with database.write() as session:
        finish(session, won.lease, AttemptResult(Outcome.PREEMPTED), now)
        won = claimed(session, now)
        finish(session, won.lease, AttemptResult(Outcome.LOST), now)
    assert look(database, held)[:2] == (TrialState.FAILED, RunState.FAILED)


@pytest.mark.parametrize("outcome", [Outcome.FAILED, Outcome.PREEMPTED, Outcome.LOST])
def test_nothing_goes_back_to_the_queue_of_a_stopped_study(
    outcome: Outcome, database: Database, study: Study, held: Claim, now: datetime
) -> None:
    with database.write() as session:
        move_study(session, study.id, StudyState.STOPPED, now)
        if outcome is Outcome.LOST:
            assert expire(session, now + TTL) == 1
        else:
            finish(session, held.lease, AttemptResult(outcome), now)
    assert look(database, held)[:2] == (TrialState.CANCELLED, RunState.CANCELLED)


def test_a_paused_study_gets_its_run_back_and_hands_it_out_when_it_resumes(
    database: Database, study: Study, held: Claim, now: datetime
) -> None:
    with database.write() as session:
        move_study(session, study.id, StudyState.PAUSED, now)
        finish(session, held.lease, AttemptResult(Outcome.PREEMPTED), now)
        assert claim(session, ONE_CPU, "a", now, TTL) is None
        move_study(session, study.id, StudyState.RUNNING, now)
        assert claimed(session, now).run_id == held.run_id


def test_an_orchestrator_that_comes_back_takes_over_what_it_left_and_nothing_else(
    database: Database, study: Study, held: Claim, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        renew(session, held.lease, now, TTL, gang="gang-1", phase="train")
        record(session, held.lease, "train", measured(1, 2), now, TTL)
        add_trial(session, study.id, new_trial(), now)
        other = claim(session, ONE_CPU, "b", now, TTL)
    assert other is not None
    with database.write() as session:
        (resumed,) = resume(session, "a", now + SECOND, TTL)
    assert (resumed.gang, resumed.phase, resumed.after) == ("gang-1", "train", 2)
    assert resumed.claim == replace(held, lease=resumed.claim.lease)
    assert resumed.claim.lease.token != held.lease.token
    with database.write() as session, pytest.raises(LeaseLost):
        renew(session, held.lease, now, TTL)  # the one that was there before
    with database.read() as session:
        assert still_held(session, [resumed.claim.lease, other.lease]) == {
            resumed.claim.lease.attempt_id, other.lease.attempt_id,
        }  # fmt: skip
    with database.write() as session:
        assert resume(session, "nobody", now, TTL) == []
