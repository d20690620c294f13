"""Seeds over HTTP: duplicates that become replicates, the leaderboard of means, and record verdicts."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from threading import Barrier
from time import process_time
from typing import Any

import pytest
from claims import NewStudies, NewTrials, Results
from sqlalchemy import insert, select

from api.client import ApiError, Caddie
from api.studies import leaderboard
from orchestrator import leases, store
from orchestrator.database import Database
from orchestrator.lifecycle import Cause, Outcome, RunState, TrialState
from orchestrator.study import AttemptResult
from orchestrator.tables import RunRow, TrialRow
from worker.spec import GangConfig

TTL = timedelta(seconds=60)
STUDY: dict[str, Any] = {
    "name": "sweep", "recipe": "laptop", "space": {"sharing.lora.rank": {"choice": [0, 2]}},
    "replication": {"seeds": [1, 2, 3]},
}  # fmt: skip
BODY: dict[str, Any] = {"overrides": {"sharing.lora.rank": 1}, "allow_duplicate": True}
OWN = 1337


@pytest.fixture
def url(database: Database, serve: Callable[..., str]) -> str:
    return serve(database, dashboard=False)


@pytest.fixture
def caddie(url: str) -> Iterator[Caddie]:
    with Caddie(url) as caddie:
        caddie.create_study(STUDY)
        yield caddie


@pytest.fixture
def end(database: Database, trial_result: Results, now: datetime) -> Callable[..., None]:
    """Claims the first queued run and ends it in success; `nats` sets both scores."""

    def run(nats: float = 4.0, **fields: Any) -> None:
        with database.write() as session:
            claim = leases.claim(session, GangConfig(), "host", now, TTL)
            assert claim is not None
            result = trial_result(val_loss=nats, val_bpb=nats * 0.6, **fields)
            leases.finish(session, claim.lease, AttemptResult(Outcome.SUCCEEDED, result=result), now)

    return run


def at(seed: int, rank: int = 1) -> dict[str, Any]:
    return {**BODY, "overrides": {"sharing.lora.rank": rank, "seed": seed}}


# Duplicates


def test_a_duplicate_of_a_complete_trial_is_its_next_replicate(caddie: Caddie, end: Callable[..., None]) -> None:
    first = caddie.submit("sweep", BODY)
    assert first.run_id == first.runs[0].id
    end()
    seeds = []
    for body in (at(77), BODY, at(1), at(2)):
        again = caddie.submit("sweep", body)
        assert (again.number, again.state) == (0, "complete")
        (run,) = (run for run in again.runs if run.id == again.run_id)
        assert (run.state, run.scores) == (RunState.QUEUED, None)
        seeds.append(run.seed)
    assert seeds == [77, 1, 2, 3]
    with pytest.raises(ApiError, match="every seed of the study's list") as refused:
        caddie.submit("sweep", at(2))
    assert (refused.value.status, refused.value.problem.existing) == (409, "/v1/studies/sweep/trials/0")
    assert [trial.number for trial in caddie.trials("sweep")] == [0]
    end(5.0)
    assert [run.scores and run.scores.val_loss for run in caddie.trial("sweep", 0).runs] == [4.0, 5.0, None, None, None]


def test_a_duplicate_that_is_not_allowed_is_told_what_allowing_it_would_do(
    caddie: Caddie, end: Callable[..., None]
) -> None:
    caddie.submit("sweep", BODY)
    for state, would in ((TrialState.QUEUED, "adds another"), (TrialState.COMPLETE, "adds another seed to it")):
        with pytest.raises(
            ApiError, match=f"\\({state}\\) has the same configuration; allow_duplicate \\(--allow-duplicate\\) {would}"
        ) as told:
            caddie.submit("sweep", {**BODY, "allow_duplicate": False})
        assert told.value.status == 409
        if state is TrialState.QUEUED:
            end()


def test_a_duplicate_of_a_trial_that_is_open_or_has_failed_is_a_trial_of_its_own(
    caddie: Caddie, end: Callable[..., None]
) -> None:
    caddie.submit("sweep", BODY)
    assert caddie.submit("sweep", at(5)).number == 1
    caddie.cancel("sweep", 0)
    caddie.cancel("sweep", 1)
    assert caddie.submit("sweep", BODY).number == 2


def test_the_same_key_is_the_same_replicate(caddie: Caddie, end: Callable[..., None]) -> None:
    caddie.submit("sweep", BODY)
    end()
    for body, seed in ((at(77), 77), (BODY, 1)):
        key = f"key-{seed}"
        first, again = (caddie.submit("sweep", body, idempotency_key=key) for _ in range(2))
        assert first == again
        assert [run.seed for run in first.runs if run.id == first.run_id] == [seed]
    for other in (at(78), at(77, rank=2)):
        with pytest.raises(ApiError, match="Idempotency-Key: was used for trial 0, which has another spec") as refused:
            caddie.submit("sweep", other, idempotency_key="key-77")
        assert refused.value.status == 409
    assert [run.seed for run in caddie.trial("sweep", 0).runs] == [OWN, 77, 1]
    caddie.move_study("sweep", "stop")
    assert caddie.submit("sweep", at(77), idempotency_key="key-77").run_id == 2


@pytest.mark.parametrize("key", ["one", None])
def test_many_duplicates_at_once_make_one_run_under_one_key_and_else_one_each(
    key: str | None, caddie: Caddie, url: str, end: Callable[..., None]
) -> None:
    caddie.submit("sweep", BODY)
    end()
    together = Barrier(6)

    def send(_number: int) -> int:
        together.wait()
        with Caddie(url) as own:
            try:
                return own.submit("sweep", BODY, idempotency_key=key).run_id or 0
            except ApiError as error:
                return -error.status

    with ThreadPoolExecutor(6) as pool:
        answers = Counter(pool.map(send, range(6)))
    assert answers == ({2: 6} if key else {2: 1, 3: 1, 4: 1, -409: 3})
    assert len(caddie.trials("sweep")) == 1


def test_a_key_that_races_for_two_trials_counts_once(caddie: Caddie, url: str, end: Callable[..., None]) -> None:
    """One is a replicate of a complete trial, the other a trial that is new."""
    caddie.submit("sweep", BODY)
    end()
    together = Barrier(2)

    def send(body: dict[str, Any]) -> int:
        together.wait()
        with Caddie(url) as own:
            try:
                own.submit("sweep", body, idempotency_key="one")
            except ApiError as error:
                return error.status
        return 201

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(send, [BODY, at(1, rank=2)])) == [201, 409]
    assert sum(len(caddie.trial("sweep", trial.number).runs) for trial in caddie.trials("sweep")) == 2


# The leaderboard


def test_the_leaderboard_goes_by_means_and_says_how_sure_they_are(caddie: Caddie, end: Callable[..., None]) -> None:
    for rank, nats in ((1, 4.0), (2, 4.05), (3, 3.9)):
        caddie.submit("sweep", at(OWN, rank))
        end(nats, artifact_bytes=99_000_000 if rank == 3 else 120_000)
    board = caddie.leaderboard("sweep")
    assert [(row.rank, row.number, row.seeds) for row in board.rows] == [(1, 0, 1), (2, 1, 1), (None, 2, 0)]
    assert board.seed_sd is None and {row.low_bpb for row in board.rows} == {None}
    for seed, nats in ((5, 4.2), (6, 4.1), (7, 1.0)):
        caddie.submit("sweep", at(seed))
        end(nats, artifact_bytes=99_000_000 if seed == 7 else 120_000)
    board = caddie.leaderboard("sweep")
    first, second, over = board.rows
    assert [row.number for row in board.rows] == [1, 0, 2]
    assert second.mean_bpb == pytest.approx(4.1 * 0.6) and (second.seeds, second.seeds_over) == (3, 1)
    assert second.unscreened_bpb == pytest.approx(4.15 * 0.6) and second.val_bpb == 2.4
    assert not second.pooled and first.pooled and (first.unscreened_bpb, over.mean_bpb) == (None, None)
    half = 4.302653 * 0.06 / 3**0.5
    assert board.seed_sd == pytest.approx(0.06)
    assert second.low_bpb == pytest.approx(2.46 - half) and second.high_bpb == pytest.approx(2.46 + half)
    assert first.low_bpb == pytest.approx(2.43 - 4.302653 * 0.06)
    study = caddie.study("sweep")
    assert study.best_trial == 1 and study.best_bpb == pytest.approx(2.43)


@pytest.mark.soak
def test_a_leaderboard_of_10_000_trials_is_quick(
    database: Database, new_study: NewStudies, new_trial: NewTrials, trial_result: Results, now: datetime
) -> None:
    with database.write() as session:
        study = store.create_study(session, new_study(), now)
        trial = store.add_trial(session, study.id, new_trial(), now)
        assert trial is not None
        claim = leases.claim(session, GangConfig(), "host", now, TTL)
        assert claim is not None
        leases.finish(session, claim.lease, AttemptResult(Outcome.SUCCEEDED, result=trial_result()), now)
        first, run = (dict(session.execute(select(row.__table__)).mappings().one()) for row in (TrialRow, RunRow))
        ids = range(first["id"] + 1, first["id"] + 10_000)
        trials = [{**first, "id": id_, "number": id_, "spec_hash": str(id_), "val_bpb": 2.5 + id_ / 1e6} for id_ in ids]
        runs = [{**run, "id": id_, "trial_id": id_} for id_ in ids]
        runs += [{**run, "id": id_ + 100_000, "trial_id": id_, "seed": 1} for id_ in ids[:200]]
        session.execute(insert(TrialRow), trials)
        session.execute(insert(RunRow), runs)
    taken = []
    with database.read() as session:
        for _ in range(5):
            began = process_time()
            board = leaderboard(session, study, 100)
            taken.append(process_time() - began)
    assert board.rows[0].rank == 1 and len(board.rows) == 100
    assert min(taken) < 0.3, json.dumps(taken)


# Verdicts


def test_a_record_is_proved_against_another_trial(caddie: Caddie, end: Callable[..., None]) -> None:
    for rank, nats in ((1, 4.0), (2, 3.9)):
        caddie.submit("sweep", at(OWN, rank))
        end(nats)
    found = caddie.verdict("sweep", 1)
    assert not found.record and found.against_trial == 0 and found.settle_seeds == found.planned_seeds == 3
    assert found.missing == [
        "it has 0 of the 3 seeds, beyond its own, that the test is made on",
        "trial 0: 0 of the 3 seeds that it is held against",
    ]
    for rank, nats in ((1, 4.0), (2, 3.9)):
        for seed in (1, 2, 3):
            caddie.submit("sweep", at(seed, rank))
            end(nats + seed / 1000)
    found = caddie.verdict("sweep", 1, against=0)
    assert found.record and not found.missing and found.seeds == [1, 2, 3]
    assert found.p is not None and found.p < found.alpha
    assert (found.declared, found.look, found.against) == (1, 1, "trial 0")
    assert found.ahead_nats == pytest.approx(0.1) and found.ahead_bpb == pytest.approx(0.06)
    assert found.mean_bpb == pytest.approx(3.902 * 0.6)
    assert not caddie.verdict("sweep", 0).record


def test_a_diverged_seed_and_a_trial_that_had_its_seeds_before_stand_against_a_record(
    caddie: Caddie, end: Callable[..., None], database: Database, now: datetime
) -> None:
    for rank, nats in ((0, 3.9001), (1, 4.0), (2, 3.9)):
        for seed in (OWN, 1, 2, 3):
            caddie.submit("sweep", at(seed, rank))
            end(nats + seed % 10 / 1000)
    assert caddie.verdict("sweep", 2, against=1).missing[0].startswith("trial 0 had its seeds before")
    caddie.submit("sweep", at(4, 2))
    with database.write() as session:
        claim = leases.claim(session, GangConfig(), "host", now, TTL)
        assert claim is not None
        leases.finish(session, claim.lease, AttemptResult(Outcome.FAILED, "nan", cause=Cause.DIVERGED), now)
    assert caddie.verdict("sweep", 2, against=0).missing == ["seed 4 diverged, which counts against it"]


def test_a_record_is_proved_against_losses_from_elsewhere(caddie: Caddie, end: Callable[..., None]) -> None:
    caddie.submit("sweep", BODY)
    end()
    for seed, nats in ((1, 4.001), (2, 4.0), (3, 4.002)):
        caddie.submit("sweep", at(seed))
        end(nats)
    assert caddie.verdict("sweep", 0, losses=[4.1, 4.101, 4.102]).record
    luck = caddie.verdict("sweep", 0, losses=[4.0, 4.02, 4.03])
    assert not luck.record and luck.missing[0].startswith("p = ")
    assert caddie.verdict("sweep", 0, losses=[4.1]).missing == [
        "the losses given: 1 of the 2 seeds that it is held against"
    ]


def test_a_verdict_that_cannot_be_is_refused(caddie: Caddie, url: str, end: Callable[..., None]) -> None:
    caddie.submit("sweep", BODY)
    with pytest.raises(ApiError, match="queued"):
        caddie.verdict("sweep", 0, losses=[4.0, 4.0])
    end()
    for against, losses, says in ((0, (), "another trial"), (None, (), "no other trial"), (0, (4.0,), "absent")):
        with pytest.raises(ApiError, match=says) as refused:
            caddie.verdict("sweep", 0, against=against, losses=losses)
        assert refused.value.status == 422
    for number, against in ((9, 0), (0, 9)):
        with pytest.raises(ApiError) as refused:
            caddie.verdict("sweep", number, against=against)
        assert refused.value.status == 404
    for bad in (-1.0, float("nan"), float("inf"), 1e308):
        with pytest.raises(ApiError) as refused:
            caddie.verdict("sweep", 0, losses=[bad])
        assert refused.value.status == 422
