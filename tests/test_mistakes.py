"""Studies that pause because their proposals fail for one bad input, and what going on brings back."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import pytest
from claims import NewStudies, NewTrials, Results
from track import Track

from api.client import Caddie
from orchestrator import leases
from orchestrator.database import Database
from orchestrator.lifecycle import Cause, Outcome, StudyState, TrialState
from orchestrator.mistakes import pause_reason
from orchestrator.study import AttemptResult, Claim

NO_DATA = "dataset 'nosuch' is not in manifest.json"


@pytest.fixture
def track(database: Database, new_study: NewStudies, trial_result: Results, now: datetime) -> Track:
    return Track(database, new_study("sweep", max_trials=30), now, trial_result)


@pytest.fixture
def propose(track: Track, new_trial: NewTrials) -> Callable[..., Claim]:
    """Adds a trial of its own seed, and claims it."""

    def run(origin: str = "proposed") -> Claim:
        track.submit(new_trial({"seed": len(track.trials())}, origin=origin))
        return track.claimed()

    return run


@pytest.fixture
def caddie(track: Track, serve: Callable[..., str]) -> Iterator[Caddie]:
    with Caddie(serve(track.database, dashboard=False)) as caddie:
        yield caddie


def fail(track: Track, claim: Claim, reason: str = NO_DATA, cause: Cause = Cause.BAD_INPUT) -> None:
    track.now += timedelta(seconds=1)
    with track.database.write() as session:
        leases.finish(session, claim.lease, AttemptResult(Outcome.FAILED, reason, cause=cause), track.now)


@pytest.mark.parametrize(
    "resume",
    [
        lambda caddie: caddie.move_study("sweep", "resume"),
        lambda caddie: caddie.change_study("sweep", {"state": "running"}),
    ],
    ids=["resume", "change"],
)
def test_two_proposals_that_fail_for_the_same_bad_input_pause_the_study_until_it_is_mended(
    track: Track, propose: Callable[..., Claim], caddie: Caddie, resume: Callable[[Caddie], Any]
) -> None:
    fail(track, propose(), "the vocabulary is not 1024")
    first, second, third, fourth = [propose() for _ in range(4)]
    fail(track, first)
    assert track.current().state is StudyState.RUNNING
    for claim in (second, third):  # one that runs then is seen to its end
        fail(track, claim)
        assert (track.current().state, track.current().reason) == (StudyState.PAUSED, pause_reason(NO_DATA))
    assert track.events("study.paused") == [f"Study sweep is paused: {pause_reason(NO_DATA)}"]
    track.end(fourth)
    assert track.claim() is None

    study = resume(caddie)
    assert (study.state, study.reason, study.counts) == ("running", None, {"failed": 1, "queued": 3, "complete": 1})
    assert track.events("trial.retried") == [f"Trial {number} is tried again" for number in (1, 2, 3)]
    for _ in range(3):
        track.end(track.claimed())
    assert track.states() == [TrialState.FAILED] + [TrialState.COMPLETE] * 4


def test_a_study_goes_on_where_what_failed_may_be_the_point(track: Track, propose: Callable[..., Claim]) -> None:
    fail(track, propose())
    fail(track, propose("submitted"))
    fail(track, propose(), "the vocabulary is not 1024")
    for _ in range(3):
        fail(track, propose(), "the loss is nan", Cause.DIVERGED)
    for claim in (propose(), propose()):  # by what they trained to
        track.measure(claim, {0.5: 2.5})
        fail(track, claim, "evaluation.ttt.lr is 0.002: made the model diverge")
    track.end(propose())
    fail(track, propose())
    assert track.current().state is StudyState.RUNNING
    fail(track, propose())
    assert track.current().state is StudyState.PAUSED


def test_a_study_that_a_person_paused_stays_theirs_and_brings_nothing_back(
    track: Track, propose: Callable[..., Claim], caddie: Caddie
) -> None:
    claims = [propose() for _ in range(2)]
    caddie.move_study("sweep", "pause")
    for claim in claims:
        fail(track, claim)
    assert track.current().reason is None
    assert caddie.move_study("sweep", "resume").counts == {"failed": 2}


def test_of_two_that_fail_at_once_one_sees_the_other(track: Track, propose: Callable[..., Claim]) -> None:
    claims = [propose() for _ in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda claim: fail(track, claim), claims))
    assert track.current().state is StudyState.PAUSED
    assert len(track.events("study.paused")) == 1
