"""What is true after every commit: in races, in random play, and by the database's own refusal."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from shutil import copy
from threading import Barrier
from typing import Any

import pytest
from claims import ONE_CPU, TTL, NewStudies, NewTrials, Results, measured
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from orchestrator.database import Database
from orchestrator.errors import IllegalMove, LeaseLost
from orchestrator.leases import (
    MAX_ATTEMPTS,
    claim,
    expire,
    finish,
    record,
    still_held,
)
from orchestrator.lifecycle import OPEN_TRIALS, Cause, Outcome, RunState, StudyState, TrialState
from orchestrator.store import (
    add_trial,
    cancel_trial,
    create_study,
    list_attempts,
    list_runs,
    list_trials,
    move_study,
)
from orchestrator.study import AttemptResult, Claim, Lease, NewStudy, Study, Trial
from orchestrator.tables import ArtifactRow, AttemptRow
from worker.report import TrialResult
from worker.spec import GangConfig

# Invariants, in races and in random play


STATES_TOGETHER = {
    TrialState.QUEUED: RunState.QUEUED,
    TrialState.RUNNING: RunState.RUNNING,
    TrialState.COMPLETE: RunState.SUCCEEDED,
    TrialState.PRUNED: RunState.STOPPED,
    TrialState.FAILED: RunState.FAILED,
    TrialState.CANCELLED: RunState.CANCELLED,
}


def check(session: Session, trial: Trial) -> None:
    """What is true of a trial with one run after every commit."""
    (run,) = list_runs(session, trial.id)
    attempts = list_attempts(session, trial.id)
    outcomes = Counter(attempt.outcome for attempt in attempts)
    assert run.state is STATES_TOGETHER[trial.state]
    assert outcomes[None] == (trial.state is TrialState.RUNNING)
    assert outcomes[Outcome.SUCCEEDED] == (trial.state is TrialState.COMPLETE)
    assert outcomes[Outcome.FAILED] <= MAX_ATTEMPTS
    assert (trial.result is not None) == (trial.state is TrialState.COMPLETE)
    assert (trial.finished_at is None) == (trial.state in OPEN_TRIALS)
    assert (trial.started_at is None) == (not attempts)
    assert [attempt.number for attempt in attempts] == list(range(1, len(attempts) + 1))


def test_writers_that_meet_on_the_same_trials_end_each_once_and_never_deadlock(
    database: Database, study: Study, new_study: NewStudies, new_trial: NewTrials, trial_result: Results, now: datetime
) -> None:
    turns = 12
    success = AttemptResult(Outcome.SUCCEEDED, result=trial_result())
    new = [new_trial(origin="submitted") for _ in range(2 * turns)]
    with database.write() as session:
        other = create_study(session, new_study("other"), now)
        for each in new[:turns]:
            add_trial(session, study.id, each, now)
            add_trial(session, other.id, each, now)

    def train(turn: int) -> None:
        with database.write() as session:
            won = claim(session, ONE_CPU, "a", now, TTL)
        if won is not None:
            with database.write() as session:
                finish(session, won.lease, success if turn % 2 else AttemptResult(Outcome.FAILED), now)

    def cancel(turn: int) -> None:
        with database.write() as session:
            cancel_trial(session, study.id, turn, now)

    def lose(turn: int) -> None:
        with database.write() as session:
            expire(session, now + TTL)

    def submit(turn: int) -> None:
        with database.write() as session:
            add_trial(session, study.id, new[turns + turn], now)

    def stop(turn: int) -> None:
        if turn == turns // 2:
            with database.write() as session:
                move_study(session, other.id, StudyState.STOPPED, now)

    players = [train, train, cancel, lose, submit, stop]
    together = Barrier(len(players))

    def play(player: Callable[[int], None]) -> None:
        for turn in range(turns):
            together.wait()
            try:
                player(turn)
            except (LeaseLost, IllegalMove):
                continue
            except BaseException:
                together.abort()
                raise

    with ThreadPoolExecutor(len(players)) as pool:
        for playing in [pool.submit(play, player) for player in players]:
            playing.result()
    with database.write() as session:
        expire(session, now + TTL)
        for trial in (*list_trials(session, study.id), *list_trials(session, other.id)):
            check(session, trial)
        assert not OPEN_TRIALS & {trial.state for trial in list_trials(session, other.id)}


class Play(RuleBasedStateMachine):
    """Random claims, endings, cancels and expirations in one study, at moments that only go forward."""

    def __init__(self, path: Path, study: NewStudy, new_trial: NewTrials, result: TrialResult, now: datetime) -> None:
        super().__init__()
        self.database = Database(f"sqlite:///{path}")
        self.new_trial = new_trial
        self.result = result
        self.now = now
        with self.database.write() as session:
            self.study = create_study(session, study, now)
        self.leases: dict[int, tuple[Lease, datetime]] = {}  # trial number -> its last lease, and when that expires
        self.succeeded: set[int] = set()

    @rule(ranks=st.sampled_from([1, 2]))
    def add(self, ranks: int) -> None:
        with self.database.write() as session:
            add_trial(session, self.study.id, self.new_trial({"gang.ranks": ranks}), self.now)

    @rule(ranks=st.sampled_from([1, 2]))
    def claim(self, ranks: int) -> None:
        with self.database.write() as session:
            queued = [t for t in list_trials(session, self.study.id) if t.state is TrialState.QUEUED]
            fitting = [t.number for t in queued if t.spec.gang.ranks == ranks]
            won = claim(session, GangConfig.model_validate({"ranks": ranks}), "a", self.now, TTL)
        assert (None if won is None else won.trial_number) == (fitting[0] if fitting else None)
        if won is not None:
            self.leases[won.trial_number] = (won.lease, self.now + TTL)

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome), cause=st.sampled_from(Cause))
    def finish(self, data: st.DataObject, outcome: Outcome, cause: Cause) -> None:
        number = data.draw(st.sampled_from(sorted(self.leases)))
        lease, _ = self.leases[number]
        result = self.result if outcome is Outcome.SUCCEEDED else None
        with self.database.read() as session:
            holds = still_held(session, [lease]) == {lease.attempt_id}
        ended = AttemptResult(outcome, result=result, cause=cause if outcome is Outcome.FAILED else None)
        try:
            with self.database.write() as session:
                finish(session, lease, ended, self.now)
        except LeaseLost:
            assert not holds
            return
        assert holds
        if outcome is Outcome.SUCCEEDED:
            assert number not in self.succeeded
            self.succeeded.add(number)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def renew(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.leases)))
        lease, _ = self.leases[number]
        try:
            with self.database.write() as session:
                record(session, lease, "train", measured(1, 2), self.now, TTL)
        except LeaseLost:
            return
        self.leases[number] = (lease, self.now + TTL)

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        with self.database.read() as session:
            trials = list_trials(session, self.study.id)
        if not trials:
            return
        trial = data.draw(st.sampled_from(trials))
        try:
            with self.database.write() as session:
                cancel_trial(session, self.study.id, trial.number, self.now)
        except IllegalMove:
            assert trial.state not in OPEN_TRIALS

    @rule(seconds=st.sampled_from([1, 59, 60]))
    def wait_and_expire(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)
        with self.database.write() as session:
            held = still_held(session, [lease for lease, _ in self.leases.values()])
            overdue = [lease for lease, at in self.leases.values() if lease.attempt_id in held and at <= self.now]
            assert expire(session, self.now) == len(overdue)

    @invariant()
    def holds(self) -> None:
        with self.database.read() as session:
            for trial in list_trials(session, self.study.id):
                check(session, trial)
                assert (trial.state is TrialState.COMPLETE) == (trial.number in self.succeeded)

    def teardown(self) -> None:
        self.database.close()


@pytest.mark.parametrize(
    ("games", "moves"), [(12, 20), pytest.param(400, 60, marks=[pytest.mark.soak, pytest.mark.timeout(0)])]
)
def test_whatever_is_played_each_trial_agrees_with_its_run_and_succeeds_at_most_once(
    games: int,
    moves: int,
    sqlite_template: Path,
    tmp_path: Path,
    new_study: NewStudies,
    new_trial: NewTrials,
    trial_result: Results,
    now: datetime,
) -> None:
    def start() -> Play:
        copy(sqlite_template, tmp_path / "play.db")
        return Play(tmp_path / "play.db", new_study(), new_trial, trial_result(), now)

    # Every step writes to a disk that others may be using.
    slow = [HealthCheck.too_slow]
    bounds = settings(max_examples=games, stateful_step_count=moves, deadline=None, suppress_health_check=slow)
    run_state_machine_as_test(start, settings=bounds)  # type: ignore[arg-type]  # a factory is documented to do


# What the database itself refuses


ATTEMPT: dict[str, Any] = {"owner": "a", "phase": "queue", "permanent": False}


@pytest.mark.parametrize(
    ("values", "constraint"),
    [
        ({"outcome": None, "lease": True}, "uq_attempts_open|attempts.run_id"),
        ({"outcome": None, "lease": False}, "ck_attempts_lease_token"),
        ({"outcome": None, "lease": True, "lease_expires_at": None}, "ck_attempts_lease_expires_at"),
        ({"outcome": "failed"}, "ck_attempts_finished_at"),
        ({"outcome": None, "finished": True, "lease": True}, "ck_attempts_finished_at"),
        ({"outcome": "failed", "finished": True, "lease": True}, "ck_attempts_lease_token"),
        ({"outcome": "resting", "finished": True}, "ck_attempts_outcome"),
        ({"outcome": "failed", "finished": True, "cause": "boredom"}, "ck_attempts_cause"),
        ({"outcome": "lost", "finished": True, "cause": "crash"}, "ck_attempts_cause"),
        ({"outcome": None, "lease": True, "number": 2, "cause": "crash"}, "ck_attempts_cause"),
        ({"outcome": "failed", "finished": True, "number": 1}, "uq_attempts_run_id|attempts.number"),
    ],
)
def test_the_database_refuses_an_attempt_that_contradicts_itself_or_another(
    values: dict[str, Any], constraint: str, database: Database, held: Claim, now: datetime
) -> None:
    row = {"run_id": held.run_id, "number": 2, "started_at": now, **ATTEMPT, **values}
    if row.pop("finished", False):
        row["finished_at"] = now
    if row.pop("lease", False):
        row = {"lease_token": "t", "lease_expires_at": now, **row}
    with pytest.raises(IntegrityError, match=constraint), database.write() as session:
        session.execute(insert(AttemptRow).values(row))


def test_the_database_refuses_a_second_success_of_one_run(
    database: Database, held: Claim, trial_result: Results, now: datetime
) -> None:
    with database.write() as session:
        finish(session, held.lease, AttemptResult(Outcome.SUCCEEDED, result=trial_result()), now)
    row = {"run_id": held.run_id, "number": 2, "started_at": now, "finished_at": now, "outcome": "succeeded", **ATTEMPT}
    with pytest.raises(IntegrityError, match=r"uq_attempts_succeeded|attempts.run_id"), database.write() as session:
        session.execute(insert(AttemptRow).values(row))


def test_the_database_refuses_an_artifact_without_bytes(database: Database, held: Claim, now: datetime) -> None:
    row = {"attempt_id": held.lease.attempt_id, "uri": "file:///a", "bytes": 0, "sha256": "0" * 64}
    with pytest.raises(IntegrityError, match="ck_artifacts_bytes"), database.write() as session:
        session.execute(insert(ArtifactRow).values(row))
