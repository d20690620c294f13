"""When a run is stopped early, whom stopping spares, and what it is seen to cost: on SQLite and PostgreSQL."""

from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
from claims import NewStudies, NewTrials, Results
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event
from track import Track

from orchestrator.database import Database
from orchestrator.lifecycle import Outcome, TrialState
from orchestrator.stopping import Curve, Stopping, regret, threshold, value_at
from orchestrator.study import Claim, StoppingConfig
from worker.report import Measurement

NEW = Measurement(number=1, step=1, elapsed_seconds=1.0, metrics={"fraction": 0.5, "val_bpb": 2.0})


def straight(final: float, until: float = 1.0) -> Curve:
    """From one above its final score straight down to it, measured at each tenth of the budget."""
    return [(n / 10, final + 1 - n / 10) for n in range(1, round(until * 10) + 1)]


def test_a_curve_is_read_between_its_points_and_not_beyond_its_ends() -> None:
    curve = [(0.25, 4.0), (0.5, 3.0), (0.75, 2.0)]
    assert value_at(curve, 0.5) == 3.0
    assert value_at(curve, 0.6) == pytest.approx(2.6)
    assert value_at(curve, 0.755) == 2.0, "near enough: no two trainings are measured at the very same share"
    assert value_at(curve, 0.8) is None
    assert value_at(curve, 0.2) is None
    assert value_at([], 0.5) is None


FINISHED = [straight(final) for final in (2.0, 2.1, 2.2, 2.3, 2.4)]


@pytest.mark.parametrize(
    ("config", "final", "stopped"),
    [
        ({"rule": "median"}, 2.25, True),
        ({"rule": "median"}, 2.2, False),
        ({"rule": "percentile", "percent": 40}, 2.15, True),
        ({"rule": "percentile", "percent": 40}, 2.05, False),
        ({"rule": "halving"}, 2.25, True),
        ({"rule": "halving"}, 2.15, False),
    ],
)
def test_each_rule_stops_what_is_worse_than_it_allows(config: dict[str, Any], final: float, stopped: bool) -> None:
    found = threshold(StoppingConfig.model_validate(config), straight(final, 0.5), FINISHED, FINISHED)
    assert (found is not None) is stopped


def test_halving_asks_at_each_halving_of_what_is_left_and_of_all_that_came_so_far() -> None:
    config = StoppingConfig(rule="halving", after_fraction=0.5)
    asked = [n / 10 for n in range(1, 11) if threshold(config, straight(9.0, n / 10), FINISHED, FINISHED)]
    assert asked == [0.5, 0.8, 0.9], "0.5, past 0.75, past 0.875; a training that is over is not stopped"
    stopped = [straight(9.5, 0.5)] * 10
    assert threshold(config, straight(9.0, 0.5), FINISHED, [*FINISHED, *stopped]) is None


def test_a_halving_that_lies_between_two_looks_is_not_missed() -> None:
    config = StoppingConfig(rule="halving", after_fraction=0.5)
    late = straight(9.0, 0.9)  # measured at 0.75 and since, both told in one poll
    assert threshold(config, late, FINISHED, FINISHED, since=0.6) is not None
    assert threshold(config, late, FINISHED, FINISHED, since=0.88) is None


@given(
    rule=st.sampled_from(["median", "percentile", "halving"]), after=st.floats(0.05, 0.95),
    fraction=st.floats(0.01, 1.2), finished=st.integers(0, 12), least=st.integers(2, 8),
)  # fmt: skip
def test_no_run_is_stopped_too_early_or_beside_too_few(
    rule: Any, after: float, fraction: float, finished: int, least: int
) -> None:
    config = StoppingConfig(rule=rule, after_fraction=after, min_runs=least)
    others = [straight(1.0)] * finished
    if threshold(config, [(fraction, 99.0)], others, others) is not None:
        assert after <= fraction < 1
        assert finished >= least
    elif rule != "halving" and after <= fraction < 1 and fraction >= 0.1:
        assert finished < least


@pytest.fixture
def track(database: Database, now: datetime, new_study: NewStudies, trial_result: Results) -> Callable[..., Track]:
    def build(**stopping: Any) -> Track:
        return Track(database, new_study(stopping={"min_runs": 3, "spare": 0.001, **stopping}), now, trial_result)

    return build


def test_a_hopeless_run_is_stopped_at_the_stated_share_and_not_before(
    track: Callable[..., Track], new_trial: NewTrials
) -> None:
    there = track()
    stopping = Stopping(there.database)
    for final in (2.0, 2.1, 2.2):
        finish(there, new_trial, final)
    doomed = start(there, new_trial)
    for tenth in range(1, 6):
        there.measure(doomed, dict(straight(3.0, tenth / 10)))
        stopped = stopping.look([(doomed, [NEW])], there.now)
        assert bool(stopped) is (tenth == 5)
    assert stopped == {
        doomed.lease.attempt_id: "median: 3.5000 BPB at 50% of its budget is over 2.6000, the median of 3 runs"
    }
    assert Stopping(there.database).look([(doomed, [NEW])], there.now) == stopped, "another orchestrator decides alike"


def test_few_finished_runs_and_those_of_other_rungs_stop_nothing(
    track: Callable[..., Track], new_trial: NewTrials
) -> None:
    there = track(min_runs=4)
    stopping = Stopping(there.database)
    for final in (2.0, 2.1, 2.2):
        finish(there, new_trial, final)
    doomed = start(there, new_trial)
    there.measure(doomed, dict(straight(3.0, 0.5)))
    assert stopping.look([(doomed, [NEW])], there.now) == {}
    hopeful = start(there, new_trial)
    there.measure(hopeful, dict(straight(2.0, 0.5)))
    finish(there, new_trial, 2.0)
    assert set(stopping.look([(doomed, [NEW]), (hopeful, [NEW])], there.now)) == {doomed.lease.attempt_id}


def test_a_look_costs_one_query_a_study_and_none_without_a_new_score(
    track: Callable[..., Track], new_trial: NewTrials
) -> None:
    there = track()
    stopping = Stopping(there.database)
    for final in (2.0, 2.1, 2.2):
        finish(there, new_trial, final)
    doomed = start(there, new_trial)
    there.measure(doomed, dict(straight(3.0, 0.5)))
    stopping.look([(doomed, [NEW])], there.now)
    statements: list[str] = []
    event.listen(
        there.database.engine, "before_cursor_execute",
        lambda *arguments: statements.append(arguments[2]) if "SELECT" in arguments[2] else None,
    )  # fmt: skip
    loss = Measurement(number=1, step=1, elapsed_seconds=1.0, metrics={"fraction": 0.5, "train_loss": 2.0})
    stopping.look([(doomed, [loss]), (doomed, [])], there.now)
    assert statements == []
    stopping.look([(doomed, [NEW])], there.now)
    assert len(statements) == 1


def test_spared_runs_train_on_and_show_what_stopping_would_have_cost(
    track: Callable[..., Track], new_trial: NewTrials
) -> None:
    there = track(spare=1.0)
    stopping = Stopping(there.database)
    for final in (2.0, 2.1, 2.2):
        finish(there, new_trial, final)
    for final in (3.0, 2.05, 1.9):  # hopeless; better than the median in the end; the best of all
        spared = start(there, new_trial)
        there.measure(spared, dict(straight(3.0, 0.5)))
        assert stopping.look([(spared, [NEW])], there.now) == {}
        assert stopping.look([(spared, [NEW])], there.now) == {}, "once is enough"
        (run,) = there.runs(spared.trial_number)
        assert run.spared_at == 0.5
        there.end(spared, final)
    assert len(there.events("trial.spared")) == 3
    with there.database.read() as session:
        found = regret(session, there.study)
    assert (found.stopped, found.spared, found.finished, found.wrong, found.best) == (0, 3, 3, 2, 1)
    assert found.given_up_bpb == pytest.approx(0.1 / 3)
    assert found.error_rate.low < 2 / 3 < found.error_rate.high


def test_the_share_that_is_spared_is_drawn_from_the_study_and_the_run(
    track: Callable[..., Track], new_trial: NewTrials
) -> None:
    there = track(spare=0.5)
    for final in (2.0, 2.1, 2.2):
        finish(there, new_trial, final)
    doomed = [start(there, new_trial) for _ in range(16)]
    for each in doomed:
        there.measure(each, dict(straight(3.0, 0.5)))
    told = Stopping(there.database).look([(each, [NEW]) for each in doomed], there.now)
    stopped = [each.lease.attempt_id in told for each in doomed]
    for place, each in enumerate(doomed):
        there.end(each, 3.5 + place, Outcome.STOPPED if stopped[place] else Outcome.SUCCEEDED)
    assert 2 < sum(stopped) < 14
    with there.database.read() as session:
        found = regret(session, there.study)
    assert (found.stopped, found.spared, found.wrong) == (sum(stopped), 16 - sum(stopped), 0)
    assert [trial.state for trial in there.trials()[3:]] == [
        TrialState.PRUNED if each else TrialState.COMPLETE for each in stopped
    ]


def start(there: Track, new_trial: NewTrials) -> Claim:
    there.submit(new_trial(origin="submitted"))
    return there.claimed()


def finish(there: Track, new_trial: NewTrials, final: float) -> None:
    claim = start(there, new_trial)
    there.measure(claim, dict(straight(final)))
    there.end(claim, final)
