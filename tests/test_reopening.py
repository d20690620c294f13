"""Retries of trials that failed or were cancelled, further seeds that people ask for, and their cancelling."""

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from claims import NewStudies, NewTrials, Results
from track import ONE_CPU, Track

from api.client import ApiError, Caddie
from orchestrator import leases, reopening, store
from orchestrator.database import Database
from orchestrator.errors import IllegalMove, LeaseLost
from orchestrator.history import History
from orchestrator.leases import MAX_ATTEMPTS
from orchestrator.lifecycle import Cause, Outcome, StudyState, TrialState
from orchestrator.rungs import Ladder
from orchestrator.store import add_trial, cancel_trial
from orchestrator.study import AttemptResult


@pytest.fixture
def track(database: Database, new_study: NewStudies, trial_result: Results, now: datetime) -> Track:
    return Track(database, new_study("sweep", max_trials=0), now, trial_result)


@pytest.fixture
def caddie(track: Track, serve: Callable[..., str]) -> Iterator[Caddie]:
    with Caddie(serve(track.database, dashboard=False)) as caddie:
        yield caddie


def fail(track: Track, cause: Cause = Cause.CRASH) -> None:
    claim = track.claimed()
    with track.database.write() as session:
        leases.finish(session, claim.lease, AttemptResult(Outcome.FAILED, "it died", cause=cause), track.now)


def retry(track: Track, number: int = 0) -> None:
    with track.database.write() as session:
        reopening.retry_trial(session, track.study.id, number, track.now)


# Retry


def test_a_retried_trial_has_all_its_attempts_again(track: Track, new_trial: NewTrials) -> None:
    track.submit(new_trial(origin="submitted"))
    for _ in range(2):
        for _ in range(MAX_ATTEMPTS):
            assert track.states() == [TrialState.QUEUED]
            fail(track)
        assert track.states() == [TrialState.FAILED]
        retry(track)
        (trial,) = track.trials()
        assert (trial.state, trial.reason, trial.finished_at) == (TrialState.QUEUED, None, None)
    track.end(track.claimed())
    assert track.states() == [TrialState.COMPLETE]
    with track.database.read() as session:
        assert [attempt.number for attempt in store.list_attempts(session, trial.id)] == [*range(1, 8)]


def test_a_retry_after_running_out_of_memory_goes_on_with_smaller_parts(track: Track, new_trial: NewTrials) -> None:
    track.submit(new_trial({"data.micro_batch_sequences": 8}, origin="submitted"))
    for _ in range(2):
        fail(track, Cause.OUT_OF_MEMORY)
    assert track.states() == [TrialState.FAILED]
    retry(track)
    assert track.claimed().spec.data.micro_batch_sequences == 2


def test_a_cancelled_trial_is_retried_and_whoever_held_it_has_lost_it(track: Track, new_trial: NewTrials) -> None:
    track.submit(new_trial(origin="submitted"))
    claim = track.claimed()
    with track.database.write() as session:
        cancel_trial(session, track.study.id, 0, track.now)
    retry(track)
    with pytest.raises(LeaseLost):
        track.end(claim)
    assert track.states() == [TrialState.QUEUED]
    track.end(track.claimed())
    assert track.states() == [TrialState.COMPLETE]


def test_a_retry_reopens_a_complete_study_and_is_refused_in_a_stopped_one(track: Track, new_trial: NewTrials) -> None:
    track.submit(new_trial(origin="submitted"))
    fail(track, Cause.DIVERGED)
    for to, state in ((StudyState.COMPLETE, StudyState.RUNNING), (StudyState.STOPPED, StudyState.STOPPED)):
        with track.database.write() as session:
            store.move_study(session, track.study.id, to, track.now)
        if to is StudyState.STOPPED:
            with pytest.raises(IllegalMove, match="study sweep is stopped and cannot retry trials"):
                retry(track)
        else:
            retry(track)
            fail(track, Cause.DIVERGED)
        assert track.current().state is state


def test_what_keeps_finished_trials_sees_that_one_was_retried(track: Track, new_trial: NewTrials) -> None:
    history = History(track.study.id)
    track.submit(new_trial(origin="submitted"))
    fail(track, Cause.DIVERGED)
    seen = []
    for step in (None, retry, lambda track: track.end(track.claimed(), 1.5)):
        if step is not None:
            step(track)
        with track.database.read() as session:
            (trial,) = history.read(session)
        seen.append((trial.state, trial.result and trial.result.val_bpb))
    assert seen == [(TrialState.FAILED, None), (TrialState.QUEUED, None), (TrialState.COMPLETE, 1.5)]


def test_a_ladder_sees_what_a_retried_run_has_come_to(
    database: Database, new_study: NewStudies, new_trial: NewTrials, trial_result: Results, now: datetime
) -> None:
    new = new_study(promotion={"rungs": [{"budget": {"steps": 30}}], "keep": 0.5, "spare": 0}, max_trials=9)
    track = Track(database, new, now, trial_result)
    promotion = new.promotion
    assert promotion is not None
    ladder = Ladder(track.study, promotion)
    rung = ladder.rung(-1, ONE_CPU)
    with database.write() as session:
        for _ in range(2):
            add_trial(session, track.study.id, new_trial(), track.now, rung)
    fail(track, Cause.DIVERGED)
    track.end(track.claimed(), 2.0)
    with database.read() as session:
        ladder.read(session)
    retry(track)
    track.end(track.claimed(), 1.5)
    with database.read() as session:
        ladder.read(session)
    due = ladder.due()
    assert due is not None and (due.number, track.states()[0]) == (0, TrialState.PRUNED)


def test_a_trial_is_retried_over_http_and_others_are_refused_by_state(
    caddie: Caddie, track: Track, new_trial: NewTrials
) -> None:
    for _ in range(2):
        track.submit(new_trial(origin="submitted"))
    track.end(track.claimed())
    caddie.cancel("sweep", 1)
    assert caddie.retry("sweep", 1).state == "queued"
    assert caddie.trial_events("sweep", 1)[-1].kind == "trial.retried"
    for number, status in ((0, 409), (1, 409), (2, 404)):
        with pytest.raises(ApiError) as refused:
            caddie.retry("sweep", number)
        assert refused.value.status == status
        if status == 409:
            assert refused.value.problem.problems[0].message == "must be failed or cancelled to be retried"


# Further seeds


def test_a_complete_trial_runs_at_the_seeds_asked_for_or_the_next_of_the_list(
    caddie: Caddie, track: Track, new_trial: NewTrials
) -> None:
    track.submit(new_trial({"seed": 314}, origin="submitted"))
    with pytest.raises(ApiError) as refused:
        caddie.add_seeds("sweep", 0, [1])
    assert (refused.value.status, refused.value.problem.problems[0].field) == (409, "state")
    track.end(track.claimed())
    assert [(run.seed, run.state) for run in caddie.add_seeds("sweep", 0, [7, 2**63 - 1])] == [
        (7, "queued"), (2**63 - 1, "queued"),
    ]  # fmt: skip
    assert [run.seed for run in caddie.add_seeds("sweep", 0, count=2)] == [42, 999]
    wrong: list[tuple[dict[str, Any], int, str]] = [
        ({"seeds": [8, 7]}, 409, "seeds.1"), ({"seeds": [8, 8]}, 409, "seeds.1"), ({"count": 3}, 409, "count"),
        ({}, 422, "seeds"), ({"seeds": [1], "count": 1}, 422, "seeds"), ({"seeds": [-1]}, 422, "seeds.0"),
        ({"seeds": [2**63]}, 422, "seeds.0"), ({"seeds": [1.5]}, 422, "seeds.0"), ({"count": 65}, 422, "count"),
    ]  # fmt: skip
    for body, status, field in wrong:
        answer = caddie._http.post("/v1/studies/sweep/trials/0/seeds", json=body)
        assert (answer.status_code, answer.json()["problems"][0]["field"]) == (status, field), answer.text
    assert [run.seed for run in caddie.trial("sweep", 0).runs] == [314, 7, 2**63 - 1, 42, 999]
    caddie.move_study("sweep", "stop")
    with pytest.raises(ApiError):
        caddie.add_seeds("sweep", 0, [8])


def test_one_seed_of_a_complete_trial_is_cancelled_alone(caddie: Caddie, track: Track, new_trial: NewTrials) -> None:
    track.submit(new_trial(origin="submitted"))
    own = track.runs(0)[0]
    with pytest.raises(ApiError, match="cancel the trial"):
        caddie.cancel_run("sweep", 0, own.id)
    track.end(track.claimed())
    running, waiting, kept = caddie.add_seeds("sweep", 0, [1, 2, 3])
    claim = track.claimed()
    assert [caddie.cancel_run("sweep", 0, run.id).state for run in (running, waiting)] == ["cancelled", "cancelled"]
    with pytest.raises(LeaseLost):
        track.end(claim)
    for run, status in ((own.id, 409), (waiting.id, 409), (10**6, 404)):
        with pytest.raises(ApiError) as refused:
            caddie.cancel_run("sweep", 0, run)
        assert refused.value.status == status
    track.now += timedelta(seconds=1)
    track.end(track.claimed())
    trial = caddie.trial("sweep", 0)
    assert [run.state for run in trial.runs] == ["succeeded", "cancelled", "cancelled", "succeeded"]
    assert trial.state == "complete" and trial.runs[3].id == kept.id
