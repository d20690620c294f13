"""The store's contract for trials and their results, on SQLite and PostgreSQL."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timedelta
from threading import Barrier
from typing import Any

import pytest
from claims import ONE_CPU, TTL, NewStudies, NewTrials, Results
from sqlalchemy import insert, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from orchestrator.curves import list_measurements
from orchestrator.database import Database
from orchestrator.errors import IllegalMove, NotFound
from orchestrator.leases import claim, finish, record
from orchestrator.lifecycle import Cause, Outcome, RunState, StudyState, TrialState
from orchestrator.store import (
    add_trial,
    cancel_trial,
    count_queued,
    count_trials,
    create_study,
    find_trial,
    get_study,
    get_trial,
    list_attempts,
    list_runs,
    list_trials,
    move_study,
)
from orchestrator.study import AttemptResult, NewTrial, Study, Trial
from orchestrator.tables import RunRow, StudyRow, TrialRow
from worker.report import Measurement, TrialResult
from worker.spec import GangConfig

MINUTE = timedelta(minutes=1)


def complete(
    session: Session,
    study: Study,
    new: NewTrial,
    result: TrialResult,
    now: datetime,
    outcome: Outcome = Outcome.SUCCEEDED,
) -> Trial:
    """A trial added and run to its end in one go."""
    trial = add_trial(session, study.id, new, now)
    assert trial is not None
    claimed = claim(session, ONE_CPU, "a", now, TTL)
    assert claimed is not None
    finish(session, claimed.lease, AttemptResult(outcome, result=result), now)
    return get_trial(session, study.id, trial.number)


@pytest.mark.parametrize(("origin", "proposed"), [("proposed", 1), ("submitted", 0)])
def test_a_trial_is_added_queued_with_one_run_at_its_own_seed(
    origin: str, proposed: int, database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    new = new_trial({"seed": 2**62, "gang.ranks": 2}, origin=origin, params={"sharing.lora.rank": 4}, reason="near")
    with database.write() as session:
        added = add_trial(session, study.id, new, now)
    assert added is not None
    with database.read() as session:
        assert get_trial(session, study.id, 0) == added
        (run,) = list_runs(session, added.id)
        assert count_queued(session) == {(study.id, GangConfig(ranks=2)): 1}
        assert count_trials(session, study.id) == {TrialState.QUEUED: 1}
        assert get_study(session, study.name).proposed == proposed
    assert (added.number, added.state, added.origin, added.result) == (0, TrialState.QUEUED, origin, None)
    assert (added.spec, added.params, added.prediction) == (new.spec, new.params, new.prediction)
    assert (added.spec_hash, added.verdict, added.reason) == (new.spec.canonical_hash, "fits", "near")
    assert (added.created_at, added.started_at, added.finished_at) == (now, None, None)
    assert (run.seed, run.state, run.gang) == (2**62, RunState.QUEUED, GangConfig(ranks=2))


def test_an_infeasible_trial_is_finished_at_once_and_has_no_run(
    database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        added = add_trial(session, study.id, new_trial(verdict="cannot_fit", reason="17 MB"), now)
    assert added is not None
    assert (added.state, added.finished_at, added.reason) == (TrialState.INFEASIBLE, now, "17 MB")
    with database.write() as session:
        assert list_runs(session, added.id) == ()
        assert claim(session, ONE_CPU, "a", now, TTL) is None
        assert get_study(session, study.name).proposed == 1


@pytest.mark.parametrize("state", [StudyState.PAUSED, StudyState.STOPPED, StudyState.COMPLETE])
def test_a_proposal_to_a_study_that_does_not_run_comes_too_late(
    state: StudyState, database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        move_study(session, study.id, state, now)
        assert add_trial(session, study.id, new_trial(), now) is None
        assert list_trials(session, study.id) == ()
        assert get_study(session, study.name).proposed == 0


def test_a_submission_to_a_stopped_study_is_refused_and_adds_nothing(
    database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        move_study(session, study.id, StudyState.STOPPED, now)
    with pytest.raises(IllegalMove, match="stopped"), database.write() as session:
        add_trial(session, study.id, new_trial(origin="submitted"), now)
    with database.read() as session:
        assert list_trials(session, study.id) == ()


@pytest.mark.parametrize(
    ("before", "after"), [(StudyState.COMPLETE, StudyState.RUNNING), (StudyState.PAUSED, StudyState.PAUSED)]
)
def test_a_submission_reopens_a_complete_study_and_leaves_a_paused_one(
    before: StudyState, after: StudyState, database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        move_study(session, study.id, before, now)
        assert add_trial(session, study.id, new_trial(origin="submitted"), now) is not None
        assert get_study(session, study.name).state is after


def test_concurrent_proposers_never_exceed_max_trials_and_leave_no_gap_in_the_numbers(
    database: Database, new_study: NewStudies, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        study = create_study(session, new_study(max_trials=10), now)
    trials = [[new_trial() for _ in range(4)] for _ in range(5)]
    together = Barrier(len(trials))

    def propose(mine: list[NewTrial]) -> list[Trial | None]:
        together.wait()
        added = []
        for new in mine:
            with database.write() as session:
                added.append(add_trial(session, study.id, new, now))
        return added

    with ThreadPoolExecutor(len(trials)) as pool:
        added = [trial for mine in pool.map(propose, trials) for trial in mine]
    assert sorted(trial.number for trial in added if trial is not None) == list(range(10))
    assert added.count(None) == 10
    with database.read() as session:
        assert [trial.number for trial in list_trials(session, study.id)] == list(range(10))
        assert get_study(session, study.name).proposed == 10


def test_submissions_come_on_top_of_max_trials(
    database: Database, new_study: NewStudies, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        study = create_study(session, new_study(max_trials=1), now)
        assert add_trial(session, study.id, new_trial(), now) is not None
        assert add_trial(session, study.id, new_trial(), now) is None
        assert add_trial(session, study.id, new_trial(origin="submitted"), now) is not None
        assert get_study(session, study.name).proposed == 1


def test_a_study_without_a_space_takes_no_proposals(
    database: Database, new_study: NewStudies, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        study = create_study(session, new_study(space={}, max_trials=5), now)
        assert add_trial(session, study.id, new_trial(), now) is None


def test_an_idempotency_key_is_kept_once_a_study(
    database: Database, study: Study, new_study: NewStudies, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        first = add_trial(session, study.id, new_trial(origin="submitted", idempotency_key="k"), now)
        other = create_study(session, new_study("other"), now)
        add_trial(session, other.id, new_trial(origin="submitted", idempotency_key="k"), now)
    with pytest.raises(IntegrityError), database.write() as session:
        add_trial(session, study.id, new_trial(origin="submitted", idempotency_key="k"), now)
    with database.read() as session:
        assert list_trials(session, study.id) == (first,)
        assert find_trial(session, study.id, idempotency_key="k") == first
        assert find_trial(session, study.id, idempotency_key="other") is None


def test_the_database_refuses_a_second_proposal_of_one_spec_but_not_a_submission_of_it(
    database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    new = new_trial()
    with database.write() as session:
        first = add_trial(session, study.id, new, now)
        assert add_trial(session, study.id, replace(new, origin="submitted"), now) is not None
    with pytest.raises(IntegrityError), database.write() as session:
        add_trial(session, study.id, new, now)
    with database.read() as session:
        assert find_trial(session, study.id, spec_hash=new.spec.canonical_hash) == first
        assert get_study(session, study.name).proposed == 1


def test_trials_are_listed_by_number_state_and_page(
    database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        for _ in range(4):
            add_trial(session, study.id, new_trial(), now)
        cancel_trial(session, study.id, 2, now)
        assert [trial.number for trial in list_trials(session, study.id, after=0, limit=2)] == [1, 2]
        assert [trial.number for trial in list_trials(session, study.id, states=[TrialState.QUEUED])] == [0, 1, 3]
        assert count_trials(session, study.id) == {TrialState.QUEUED: 3, TrialState.CANCELLED: 1}
        with pytest.raises(NotFound, match="no trial 9"):
            get_trial(session, study.id, 9)


# Cancelling


def test_cancelling_a_queued_trial_ends_it_and_its_run(
    database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        added = add_trial(session, study.id, new_trial(), now)
        cancelled = cancel_trial(session, study.id, 0, now + MINUTE)
    assert added is not None
    assert (cancelled.state, cancelled.reason) == (TrialState.CANCELLED, None)
    assert cancelled.finished_at == now + MINUTE
    with database.write() as session:
        assert [run.state for run in list_runs(session, added.id)] == [RunState.CANCELLED]
        assert claim(session, ONE_CPU, "a", now, TTL) is None


def test_cancelling_a_running_trial_ends_its_attempt_as_stopped(
    database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    with database.write() as session:
        added = add_trial(session, study.id, new_trial(), now)
        assert claim(session, ONE_CPU, "a", now, TTL) is not None
    with database.write() as session:
        cancel_trial(session, study.id, 0, now + MINUTE)
    assert added is not None
    with database.read() as session:
        (attempt,) = list_attempts(session, added.id)
    assert (attempt.outcome, attempt.finished_at) == (Outcome.STOPPED, now + MINUTE)


def test_a_finished_trial_cannot_be_cancelled(
    database: Database, study: Study, new_trial: NewTrials, trial_result: Results, now: datetime
) -> None:
    with database.write() as session:
        finished = complete(session, study, new_trial(), trial_result(), now)
    with pytest.raises(IllegalMove, match="complete and cannot be cancelled"), database.write() as session:
        cancel_trial(session, study.id, 0, now)
    with pytest.raises(NotFound), database.write() as session:
        cancel_trial(session, study.id, 1, now)
    with database.read() as session:
        assert get_trial(session, study.id, 0) == finished


# Results


def test_what_a_gang_says_is_kept_whatever_bytes_are_in_it(
    database: Database, study: Study, new_trial: NewTrials, trial_result: Results, now: datetime
) -> None:
    with database.write() as session:
        add_trial(session, study.id, new_trial(), now)
        claimed = claim(session, ONE_CPU, "host" * 100, now, TTL)
        assert claimed is not None
        record(session, claimed.lease, "a phase with quite a long name", (), now, TTL)
        finish(session, claimed.lease, AttemptResult(Outcome.FAILED, "nul \0 and \udc80", cause=Cause.DIVERGED), now)
    with database.read() as session:
        assert get_trial(session, study.id, 0).reason == "nul \ufffd and ?"
        (attempt,) = list_attempts(session, claimed.trial_id)
    assert (attempt.owner, attempt.phase) == ("host" * 100, "a phase with quite a long name")


def test_measurements_are_listed_attempt_by_attempt_in_the_order_in_which_they_were_made(
    database: Database, study: Study, new_trial: NewTrials, now: datetime
) -> None:
    said = [
        Measurement(number=n, step=10 * n, elapsed_seconds=n / 2, metrics={"train_loss": 1 / n, "val_bpb": 1e-300})
        for n in range(1, 4)
    ]
    with database.write() as session:
        add_trial(session, study.id, new_trial({"seed": 5}), now)
        first = claim(session, ONE_CPU, "a", now, TTL)
        assert first is not None
        record(session, first.lease, "train", [said[1], said[0]], now, TTL)
        finish(session, first.lease, AttemptResult(Outcome.PREEMPTED), now)
        second = claim(session, ONE_CPU, "a", now, TTL)
        assert second is not None
        record(session, second.lease, "train", said, now, TTL)
    with database.read() as session:
        listed = list_measurements(session, first.trial_id)
    assert [progress.measurement for progress in listed] == [*said[:2], *said]
    attempts = [first.lease.attempt_id] * 2 + [second.lease.attempt_id] * 3
    assert [progress.attempt_id for progress in listed] == attempts
    assert {(progress.run_id, progress.seed) for progress in listed} == {(first.run_id, 5)}


# What the database itself refuses


TRIAL: dict[str, Any] = {
    "number": 0, "state": "queued", "origin": "submitted", "spec": {}, "spec_hash": "h", "params": {}, "prediction": {},
    "verdict": "fits",
}  # fmt: skip
ENDED = {"result": {}, "val_bpb": 1.0, "artifact_bytes": 1, "feasible": True}


@pytest.mark.parametrize(
    ("values", "constraint"),
    [
        ({"state": "resting", "finished_at": True}, "ck_trials_state"),
        ({"origin": "found"}, "ck_trials_origin"),
        ({"verdict": "perhaps"}, "ck_trials_verdict"),
        ({"finished_at": True}, "ck_trials_finished_at"),
        ({"state": "failed"}, "ck_trials_finished_at"),
        ({"state": "complete", "finished_at": True}, "ck_trials_result"),
        ({"state": "complete", "finished_at": True, **ENDED, "val_bpb": None}, "ck_trials_val_bpb"),
        ({"state": "complete", "finished_at": True, **ENDED, "artifact_bytes": None}, "ck_trials_artifact_bytes"),
        ({"state": "complete", "finished_at": True, **ENDED, "feasible": None}, "ck_trials_feasible"),
    ],
)
def test_the_database_refuses_a_trial_that_contradicts_itself(
    values: dict[str, Any], constraint: str, database: Database, study: Study, now: datetime
) -> None:
    row = {**TRIAL, "study_id": study.id, "created_at": now, **values}
    if "finished_at" in row:
        row["finished_at"] = now
    with pytest.raises(IntegrityError, match=constraint), database.write() as session:
        session.execute(insert(TrialRow).values(row))


def test_the_database_refuses_rows_that_belong_to_nothing(database: Database, study: Study, now: datetime) -> None:
    with pytest.raises(IntegrityError, match=r"(?i)foreign key"), database.write() as session:
        session.execute(insert(TrialRow).values({**TRIAL, "study_id": study.id + 1, "created_at": now}))
    run = {"trial_id": 1, "seed": 0, "budget": {}, "state": "queued", "ranks": 1, "device": "cpu", "created_at": now}
    with pytest.raises(IntegrityError, match=r"(?i)foreign key"), database.write() as session:
        session.execute(insert(RunRow).values(run))


def test_the_database_refuses_more_proposals_than_the_study_takes(database: Database, study: Study) -> None:
    with pytest.raises(IntegrityError, match="ck_studies_proposed"), database.write() as session:
        session.execute(update(StudyRow).values(max_trials=10, proposed=11))
