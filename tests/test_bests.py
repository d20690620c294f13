"""A study's course: its new bests in the order in which they came, and what had been spent by then."""

from datetime import datetime, timedelta

from claims import NewStudies, NewTrials, Results

from orchestrator import leases, store
from orchestrator.bests import Best, course
from orchestrator.database import Database
from orchestrator.ledger import list_spent
from orchestrator.lifecycle import Cause, Outcome
from orchestrator.study import AttemptResult
from worker.spec import GangConfig

TTL = timedelta(minutes=5)
TWO = GangConfig(ranks=2, device="cpu")


def test_a_best_is_better_than_all_before_it_and_keeps_the_caps(
    database: Database, new_study: NewStudies, new_trial: NewTrials, trial_result: Results, now: datetime
) -> None:
    with database.write() as session:
        study = store.create_study(session, new_study(cap_bytes=200_000), now)
    ends = [
        AttemptResult(Outcome.SUCCEEDED, result=trial_result(val_bpb=2.5)),
        AttemptResult(Outcome.SUCCEEDED, result=trial_result(val_bpb=2.0, artifact_bytes=300_000)),
        AttemptResult(Outcome.FAILED, "loss is nan", cause=Cause.DIVERGED),
        AttemptResult(Outcome.SUCCEEDED, result=trial_result(val_bpb=2.6)),
        AttemptResult(Outcome.SUCCEEDED, result=trial_result(val_bpb=2.4)),
        AttemptResult(Outcome.FAILED, "loss is nan", cause=Cause.DIVERGED),
    ]
    for place, ended in enumerate(ends):
        began = now + timedelta(seconds=100 * place)
        with database.write() as session:
            store.add_trial(session, study.id, new_trial({"gang.ranks": 2}), began)
            claim = leases.claim(session, TWO, "host", began, TTL)
            assert claim is not None
            leases.renew(session, claim.lease, began, TTL, gang="two", phase="train")
            leases.finish(session, claim.lease, ended, began + timedelta(seconds=10))
    with database.read() as session:
        found = course(session, study.id, list_spent(session, study.id, now))
    assert found.bests == (Best(0, 2.5, 1, 20.0), Best(4, 2.4, 4, 100.0))
    assert (found.trials, found.gpu_seconds) == (4, 120.0)
