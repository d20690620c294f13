"""Batches of trials over HTTP: all or none, once however often they are sent."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from threading import Barrier
from typing import Any

import httpx
import pytest
from claims import Results

from api.client import ApiError, Caddie
from orchestrator import leases
from orchestrator.audit import list_audits
from orchestrator.database import Database
from orchestrator.lifecycle import Outcome
from orchestrator.study import AttemptResult
from worker.spec import GangConfig

STUDY: dict[str, Any] = {
    "name": "sweep", "recipe": "laptop", "space": {"sharing.lora.rank": {"choice": [0, 2]}}, "cap_bytes": 1_000_000
}  # fmt: skip
TOO_LARGE = {"overrides": {"model.width": 960, "sharing.unique_blocks": 6, "sharing.tying": "sequence"}}


@pytest.fixture
def url(database: Database, serve: Callable[..., str]) -> str:
    return serve(database, dashboard=False)


@pytest.fixture
def caddie(url: str) -> Iterator[Caddie]:
    with Caddie(url) as caddie:
        caddie.create_study(STUDY)
        yield caddie


def at(rank: int, seed: int = 1337, **fields: Any) -> dict[str, Any]:
    return {"overrides": {"sharing.lora.rank": rank, "seed": seed}, **fields}


def test_a_batch_is_submitted_in_its_order_with_one_line_in_the_audit(caddie: Caddie, database: Database) -> None:
    bodies = [at(1), {"params": {"sharing.lora.rank": 2}}, TOO_LARGE]
    made = caddie.submit_batch("sweep", bodies)
    assert [(trial.number, trial.state, trial.lora_rank) for trial in made[:2]] == [(0, "queued", 1), (1, "queued", 2)]
    assert (made[2].state, made[2].run_id) == ("infeasible", None)
    assert [trial.run_id for trial in made[:2]] == [caddie.trial("sweep", n).runs[0].id for n in (0, 1)]
    with database.read() as session:
        assert [audit.action for audit in list_audits(session)] == ["trial.submit", "study.create"]


def test_a_batch_with_anything_wrong_leaves_nothing(caddie: Caddie) -> None:
    caddie.submit("sweep", at(7))
    wrong: list[tuple[list[Any], int, list[str]]] = [
        ([at(1), at(7)], 409, ["trials.1.spec"]),
        ([at(1), at(2), at(1)], 422, ["trials.2"]),
        ([at(1), at(-1), {"recipe": "none"}, {"x": 1}], 422, ["trials.3.x"]),
        ([at(1), at(-1), {"recipe": "none"}], 422, ["trials.1.overrides.sharing.lora.rank", "trials.2.recipe"]),
        ([], 422, ["trials"]),
        ([at(1)] * 101, 422, ["trials"]),
    ]
    for bodies, status, fields in wrong:
        with pytest.raises(ApiError) as refused:
            caddie.submit_batch("sweep", bodies)
        problems = refused.value.problem.problems
        assert (refused.value.status, [each.field for each in problems]) == (status, fields), problems
    assert [trial.number for trial in caddie.trials("sweep")] == [0]
    assert caddie.submit("sweep", at(8)).number == 1


def test_a_replay_returns_the_same_trials_and_another_body_is_refused(caddie: Caddie, url: str) -> None:
    made = caddie.submit_batch("sweep", [at(1), at(2), at(3)], idempotency_key="k")
    assert caddie.submit_batch("sweep", [at(1), at(2), at(3)], idempotency_key="k") == made
    others = [[at(1), at(2)], [at(1), at(2), at(3), at(4)], [at(1), at(2), at(4)], [at(2), at(1), at(3)], [at(9)]]
    for bodies in others:
        with pytest.raises(ApiError, match="Idempotency-Key: was used for") as refused:
            caddie.submit_batch("sweep", bodies, idempotency_key="k")
        assert refused.value.status == 409 and "'k'" in refused.value.problem.detail
    with pytest.raises(ApiError, match="Idempotency-Key"):
        caddie.submit("sweep", at(2), idempotency_key="k")
    body = {"trials": [at(1), at(2), at(3)]}
    answer = httpx.post(f"{url}/v1/studies/sweep/trials/batch", json=body, headers={"Idempotency-Key": "k"})
    assert (answer.status_code, answer.headers["Idempotent-Replay"]) == (200, "true")
    assert len(caddie.trials("sweep")) == 3


def test_one_key_sent_by_many_at_once_makes_one_batch(caddie: Caddie, url: str) -> None:
    together = Barrier(5)

    def send(_number: int) -> list[int]:
        with Caddie(url) as own:
            together.wait()
            return [trial.number for trial in own.submit_batch("sweep", [at(1), at(2)], idempotency_key="k")]

    with ThreadPoolExecutor(5) as pool:
        assert set(map(tuple, pool.map(send, range(5)))) == {(0, 1)}


def test_a_batch_may_add_seeds_to_a_trial_and_is_replayed_all_the_same(
    caddie: Caddie, database: Database, trial_result: Results, now: datetime
) -> None:
    caddie.submit("sweep", at(1))
    with database.write() as session:
        claim = leases.claim(session, GangConfig(), "host", now, timedelta(minutes=1))
        assert claim is not None
        leases.finish(session, claim.lease, AttemptResult(Outcome.SUCCEEDED, result=trial_result()), now)
    bodies = [at(1, 7, allow_duplicate=True), at(2), at(1, 8, allow_duplicate=True)]
    made = caddie.submit_batch("sweep", bodies, idempotency_key="k")
    assert [trial.number for trial in made] == [0, 1, 0]
    assert caddie.submit_batch("sweep", bodies, idempotency_key="k") == made
    assert [run.seed for run in caddie.trial("sweep", 0).runs] == [1337, 7, 8]


def test_a_stopped_study_takes_no_batch(caddie: Caddie) -> None:
    caddie.move_study("sweep", "stop")
    with pytest.raises(ApiError) as refused:
        caddie.submit_batch("sweep", [at(1), at(2)])
    assert refused.value.status == 409 and not caddie.trials("sweep")
