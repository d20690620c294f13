"""What a study did not spend, as its ledger says."""

from collections.abc import Callable
from datetime import datetime

import pytest
from claims import NewStudies, NewTrials, Results
from track import ONE_CPU, Track

from api.client import Caddie
from orchestrator.database import Database
from orchestrator.lifecycle import Outcome
from orchestrator.rungs import Ladder
from orchestrator.savings import savings
from orchestrator.store import add_trial
from orchestrator.study import Prediction
from worker.spec import GangConfig

SEEN = Prediction(100_000, 40_000, 120_000, 110_000, 130_000, train_seconds=500.0, evaluate_seconds=100.0)
GPUS = {"gang.ranks": 4, "gang.device": "gpu"}


@pytest.fixture
def track(database: Database, new_study: NewStudies, trial_result: Results, now: datetime) -> Track:
    new = new_study("sweep", promotion={"rungs": [{"budget": {"steps": 30}}], "keep": 0.5}, max_trials=20)
    return Track(database, new, now, trial_result)


def test_refused_trials_count_as_predicted_and_stopped_ones_by_what_was_left(
    track: Track, new_trial: NewTrials, serve: Callable[..., str]
) -> None:
    for prediction in (SEEN, Prediction(1, 1, 1, 1, 1)):
        track.submit(new_trial(GPUS, verdict="cannot_fit", prediction=prediction))
    track.submit(new_trial({**GPUS, "budget": {"steps": 400}}, prediction=SEEN, origin="submitted"))
    claim = track.claimed(GangConfig(ranks=4, device="gpu"))
    track.end(claim, outcome=Outcome.STOPPED, steps=100, train_seconds=60.0)
    with Caddie(serve(track.database, dashboard=False, gpu_hour_dollars=3.6)) as caddie:
        found = caddie.ledger("sweep").savings
        assert caddie.ledger("sweep", 2).savings is None
    assert found is not None and (found.refused_trials, found.pruned_trials) == (2, 1)
    assert (found.refused_unknown, found.pruned_unknown) == (1, 0)
    assert (found.refused.seconds, found.refused.gpu_seconds, found.refused.dollars) == (600, 2400, 2.4)
    assert found.pruned.seconds == pytest.approx(180) and found.pruned.dollars == pytest.approx(0.72)


def test_a_trial_that_was_not_promoted_saved_its_own_budget(track: Track, new_trial: NewTrials) -> None:
    promotion = track.study.definition.promotion
    assert promotion is not None
    with track.database.write() as session:
        rung = Ladder(track.study, promotion).rung(-1, ONE_CPU)
        add_trial(session, track.study.id, new_trial(prediction=SEEN), track.now, rung)
    track.end(track.claimed())
    with track.database.read() as session:
        found = savings(session, track.study.id, 3.6)
    assert (found.pruned.seconds, found.pruned.gpu_seconds, found.pruned_trials) == (600, 0, 1)
