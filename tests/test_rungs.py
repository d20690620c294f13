"""Rungs: what a trial is trained with at each, who goes on to the next, and until when: on SQLite and PostgreSQL."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from claims import NewStudies, NewTrials, Results
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState as OptunaState
from pydantic import ValidationError
from sqlalchemy import event
from track import ONE_CPU, Track

from orchestrator import store
from orchestrator.database import Database
from orchestrator.history import History
from orchestrator.lifecycle import Outcome, StudyState, TrialState
from orchestrator.optuna_view import StudyView
from orchestrator.rungs import Finished, Ladder, Promotion, promote
from orchestrator.shortening import Rung, share_of, shortened
from orchestrator.study import Claim, NewStudy, PromotionConfig, Study
from worker.recipes import load_recipe
from worker.spec import BudgetConfig, GangConfig, override, parse_spec, problems_of

TWO = {"rungs": [{"budget": {"steps": 10}}, {"budget": {"steps": 30}}], "spare": 0.0}
ONE = {"rungs": [{"budget": {"steps": 10}}], "spare": 0.0}
LR = "optimizer.matrix_lr"
SPACE = {LR: {"choice": [round(0.01 * n, 2) for n in range(1, 41)]}}


# A cheaper training


def test_a_rung_is_a_share_of_the_whole_work() -> None:
    whole = BudgetConfig(seconds=600.0)
    assert share_of(BudgetConfig(seconds=60.0), 8, whole, 8) == pytest.approx(0.1)
    assert share_of(BudgetConfig(seconds=60.0), 1, whole, 8) == pytest.approx(0.0125), "one rank does an eighth"
    assert share_of(BudgetConfig(steps=10), 1, BudgetConfig(steps=40), 8) == 0.25, "steps are the same work on any"
    assert share_of(BudgetConfig(steps=10), 1, whole, 8) is None


def test_a_shortened_training_has_its_whole_schedule() -> None:
    spec = parse_spec(
        override(load_recipe("laptop"), {
            "budget": {"steps": 120}, "schedule": {"warmdown_steps": 60, "warmdown_fraction": None},
            "optimizer.muon_momentum_warmup_steps": 30, "averaging.swa_every": 12, "averaging.ema_decay": 0.9,
        })
    )  # fmt: skip
    short = shortened(spec, Rung(-1, BudgetConfig(steps=12), spec.gang))
    assert (short.budget.steps, short.schedule.warmdown_steps) == (12, 6)
    assert (short.optimizer.muon_momentum_warmup_steps, short.averaging.swa_every) == (3, 1)
    assert short.averaging.ema_decay == pytest.approx(0.9**10)
    by_share = parse_spec(override(spec.model_dump(), {"schedule": {"warmdown_fraction": 0.4, "warmdown_steps": None}}))
    assert shortened(by_share, Rung(-1, BudgetConfig(steps=12), spec.gang)).schedule == by_share.schedule
    assert shortened(spec, Rung(0, spec.budget, spec.gang)) == spec


@pytest.mark.parametrize(
    ("rungs", "space", "field"),
    [
        ([{"budget": {"seconds": 3}}], {}, "promotion.rungs.0.budget"),
        ([{"budget": {"steps": 500}}], {}, "promotion.rungs.0.budget"),
        ([{"budget": {"steps": 30}}, {"budget": {"steps": 10}}], {}, "promotion.rungs.1.budget"),
        ([{"budget": {"steps": 10}}], {"budget.steps": {"low": 50, "high": 120}}, "space.budget.steps"),
    ],
)
def test_rungs_that_are_no_cheaper_trainings_are_refused(
    new_study: NewStudies, rungs: list[Any], space: dict[str, Any], field: str
) -> None:
    base = override(load_recipe("laptop"), {"budget": {"steps": 120}})
    with pytest.raises(ValidationError) as caught:
        new_study(base=base, promotion={"rungs": rungs}, space={**SPACE, **space})
    assert field in [problem.field for problem in problems_of(caught.value)]


# Who goes on


def ladder(study: Study, **promotion: Any) -> Ladder:
    new = study.definition.model_copy(update={"promotion": None})
    config = NewStudy.model_validate({**new.model_dump(), "promotion": {**TWO, **promotion}}).promotion
    assert config is not None
    return Ladder(study, config)


@pytest.fixture
def study(now: datetime, new_study: NewStudies) -> Study:
    base = override(load_recipe("laptop"), {"budget": {"steps": 120}})
    return Study(1, "sharing", StudyState.RUNNING, new_study(base=base, space=SPACE), 0, 0, None, now, now)


@given(
    scores=st.lists(st.floats(1, 5), min_size=1, max_size=60, unique=True), keep=st.sampled_from([0.2, 0.25, 0.5]),
    data=st.data(),
)  # fmt: skip
def test_whatever_the_order_of_arrival_exactly_the_best_of_those_so_far_go_on(
    scores: list[float], keep: float, data: st.DataObject
) -> None:
    now = datetime(2026, 3, 1, tzinfo=UTC)
    base = override(load_recipe("laptop"), {"budget": {"steps": 120}})
    definition = NewStudy.model_validate({"name": "s", "base": base, "space": SPACE})
    rungs = ladder(Study(1, "s", StudyState.RUNNING, definition, 0, 0, None, now, now), keep=keep)
    running = [(number, -2) for number in range(len(scores))]
    ended: dict[int, dict[int, float]] = {-2: {}, -1: {}, 0: {}}
    went_on: dict[int, set[int]] = {-2: set(), -1: set()}
    while running:
        number, rung = running.pop(data.draw(st.integers(0, len(running) - 1)))
        now += timedelta(seconds=1)
        score = scores[number] + rung * 0.01  # scores of rungs are not compared
        ended[rung][number] = score
        rungs.take(number, rung, Finished(number, False, score, now, GangConfig()))
        while (due := rungs.due()) is not None:
            left = due.rung.number - 1
            assert due.number not in went_on[left], "each goes on once"
            best = sorted(ended[left], key=lambda each: ended[left][each])[: int(len(ended[left]) * keep)]
            assert due.number in best
            went_on[left].add(due.number)
            rungs.take(due.number, due.rung.number, None)
            running.append((due.number, due.rung.number))
        for left in (-2, -1):
            best = sorted(ended[left], key=lambda each: ended[left][each])[: int(len(ended[left]) * keep)]
            assert set(best) <= went_on[left], "none of the best waits"
    for left, there in went_on.items():  # so many at the most, who arrived while they were among the best
        assert len(there) <= len(ended[left])
    assert rungs.due() is None


def test_what_is_over_a_cap_goes_on_after_all_others(study: Study, now: datetime) -> None:
    rungs = ladder(study, keep=0.5)
    for number, over, score in ((0, True, 1.0), (1, False, 2.0), (2, False, 3.0), (3, True, 1.5)):
        rungs.take(number, -2, Finished(number, over, score, now, GangConfig()))
    assert went_on(rungs) == [1, 2]


def test_a_share_goes_on_whatever_it_scored(study: Study, now: datetime) -> None:
    rungs = ladder(study, spare=0.3, keep=0.01)
    for number in range(60):
        rungs.take(number, -2, Finished(number, False, 2 + number / 10, now, GangConfig()))
    drawn = went_on(rungs)
    assert 8 < len(drawn) < 28
    again = ladder(study, spare=0.3, keep=0.01)
    for number in reversed(range(60)):
        again.take(number, -2, Finished(number, False, 2 + number / 10, now, GangConfig()))
    assert went_on(again) == drawn, "drawn from the study's seed alone"


def test_once_its_ranking_is_shown_to_be_no_guide_a_rung_no_longer_decides(study: Study, now: datetime) -> None:
    rungs = ladder(study, keep=0.5)
    for number in range(40):
        rungs.take(number, -2, Finished(number, False, 2 + number / 100, now, GangConfig()))
    assert rungs.start(GangConfig()).number == -2
    for number in range(9):  # the better at one rung, the worse at the next
        rungs.take(number, -1, Finished(number, False, 3 - number / 100, now + timedelta(number), GangConfig()))
    assert rungs.low(-2) is None, "too few to tell"
    rungs.take(9, -1, Finished(9, False, 2.0, now + timedelta(9), GangConfig()))
    low = rungs.low(-2)
    assert low is not None
    assert low.high < 0.3
    assert rungs.start(GangConfig()).number == -1
    assert [number for number in went_on(rungs) if number > 9] == list(range(10, 40)), "all go on"
    for number in range(10, 19):  # what one look has found stands
        rungs.take(number, -1, Finished(number, False, 3 + number, now + timedelta(number), GangConfig()))
    assert rungs.low(-2) == low


def went_on(rungs: Ladder) -> list[int]:
    """Everybody who should leave the cheapest rung."""
    numbers = []
    while (due := rungs.due()) is not None:
        rungs.take(due.number, due.rung.number, None)
        if due.rung.number == -1:
            numbers.append(due.number)
    return numbers


# In the database


@pytest.fixture
def track(database: Database, now: datetime, new_study: NewStudies, trial_result: Results) -> Callable[..., Track]:
    def build(promotion: dict[str, Any] = TWO, **fields: Any) -> Track:
        base = override(load_recipe("laptop"), {"budget": {"steps": 120}, "schedule": {"warmdown_fraction": 0.4}})
        new = new_study(base=base, promotion=promotion, **{"space": SPACE, "sampler": "random", **fields})
        return Track(database, new, now, trial_result)

    return build


def play(there: Track, score: Callable[[Claim], float], gang: GangConfig = ONE_CPU) -> list[tuple[int, int]]:
    """Run whatever the study asks for, one run at a time, to its end; trial and rung of each, in order."""
    ran: list[tuple[int, int]] = []
    for _ in range(500):
        claim = there.claim(gang)
        if claim is None:
            if there.add(gang):
                continue
            there.supply.complete(there.current(), None, there.now)
            if there.current().state is StudyState.COMPLETE:
                return ran
            continue
        ran.append((claim.trial_number, claim.rung))
        there.end(claim, score(claim))
    raise AssertionError(f"the study does not end: {there.trials()}")


def good(claim: Claim) -> float:
    """Better the higher the learning rate, and with more steps."""
    return 3 - claim.spec.optimizer.matrix_lr - claim.rung / 10


def test_proposals_climb_rung_by_rung_and_only_the_top_counts_as_complete(track: Callable[..., Track]) -> None:
    there = track(max_trials=16)
    ran = play(there, good)
    assert [number for number, rung in ran if rung == -2] == list(range(16))
    for number in range(16):
        rungs = [rung for each, rung in ran if each == number]
        assert rungs == [-2, -1, 0][: len(rungs)], "a trial goes up one rung at a time"
    assert {trial.number for trial in there.trials() if trial.state is TrialState.COMPLETE} == {
        number for number, rung in ran if rung == 0
    }
    assert set(there.states()) == {TrialState.COMPLETE, TrialState.PRUNED}
    best = max(there.trials(), key=lambda trial: trial.spec.optimizer.matrix_lr)
    assert best.state is TrialState.COMPLETE
    assert best.result is not None
    assert [run.budget.steps for run in there.runs(best.number)] == [10, 30, 120]
    assert [run.scores.val_bpb if run.scores else None for run in there.runs(best.number)] == [
        pytest.approx(best.result.val_bpb + 0.2), pytest.approx(best.result.val_bpb + 0.1), best.result.val_bpb
    ]  # fmt: skip
    assert len(there.events("trial.promoted")) == len(ran) - 16
    first = ran.index(next(each for each in ran if each[1] == -1))
    assert sum(rung == -2 for _, rung in ran[:first]) == 4, "promotions come before proposals"


def test_few_trials_still_send_their_best_to_the_top(track: Callable[..., Track]) -> None:
    there = track(max_trials=3)
    ran = play(there, good)
    (top,) = [number for number, rung in ran if rung == 0]
    assert there.trials()[top] == max(there.trials(), key=lambda trial: trial.spec.optimizer.matrix_lr)


def test_a_rung_that_misleads_is_left_out_and_the_study_says_so(track: Callable[..., Track]) -> None:
    there = track({**ONE, "keep": 0.5}, max_trials=40)
    ran = play(there, lambda claim: good(claim) if claim.rung else 6 - good(claim))
    (said,) = there.events("study.rung")
    assert said.startswith("Rung -1 no longer decides: over 10 trials")
    assert [trial.state for trial in there.trials()] == [TrialState.COMPLETE] * 40
    direct = [number for number in range(40) if [rung for each, rung in ran if each == number] == [0]]
    assert direct
    assert direct == list(range(direct[0], 40)), "all that came later"


def test_rungs_on_fewer_ranks_wait_for_gangs_of_theirs(track: Callable[..., Track]) -> None:
    promotion = {**ONE, "rungs": [{"budget": {"steps": 10}, "ranks": 1}]}
    there = track(promotion, max_trials=4, gangs=[{"ranks": 4}, {"ranks": 2}])
    assert set(there.supply.shapes(there.study)) == {GangConfig(ranks=n) for n in (1, 2, 4)}
    for _ in range(4):
        assert not there.add(GangConfig(ranks=4))
        assert there.add(GangConfig(ranks=1))
        assert there.claim(GangConfig(ranks=4)) is None
        claim = there.claimed(GangConfig(ranks=1))
        assert claim.spec.gang.ranks == 1
        there.end(claim, good(claim))
    assert [trial.spec.gang.ranks for trial in there.trials()] == [4, 2, 4, 2]
    best = max(there.trials(), key=lambda trial: trial.spec.optimizer.matrix_lr)
    assert not there.add(GangConfig(ranks=1))
    assert there.add(best.spec.gang)
    assert there.claimed(best.spec.gang).spec == best.spec


def test_a_submitted_trial_has_its_own_budget(track: Callable[..., Track], new_trial: NewTrials) -> None:
    there = track()
    there.submit(new_trial({"budget.steps": 77}, origin="submitted"))
    claim = there.claimed()
    there.end(claim)
    assert (claim.rung, claim.spec.budget.steps, there.states()) == (0, 77, [TrialState.COMPLETE])


def test_what_fails_or_is_stopped_at_a_rung_goes_no_further(track: Callable[..., Track]) -> None:
    there = track({**ONE, "keep": 0.9})
    for outcome in (Outcome.STOPPED, Outcome.FAILED, Outcome.FAILED, Outcome.FAILED):
        claim = there.claim() or (there.add() and there.claim())
        assert claim
        there.end(claim, 0.1, outcome)
    assert there.states() == [TrialState.PRUNED, TrialState.FAILED]
    assert there.add(), "a proposal"
    assert there.states()[2:] == [TrialState.QUEUED]


def test_a_promotion_is_made_once_however_often_it_is_decided(track: Callable[..., Track], now: datetime) -> None:
    there = track(max_trials=8)
    for _ in range(4):
        assert there.add()
        claim = there.claimed()
        there.end(claim, good(claim))
    stale = Promotion(0, Rung(-1, BudgetConfig(steps=30), GangConfig()), "a test says so")
    with there.database.write() as session:
        assert promote(session, there.study.id, stale, now)
        assert not promote(session, there.study.id, stale, now)
    there.end(there.claimed(), 2.5)
    assert there.states()[0] is TrialState.PRUNED
    with there.database.write() as session:
        assert not promote(session, there.study.id, stale, now), "it has been there"
        store.move_study(session, there.study.id, StudyState.PAUSED, now)
        assert not promote(session, there.study.id, Promotion(1, stale.rung, ""), now)


def test_a_study_waits_for_the_promotions_that_are_due(track: Callable[..., Track]) -> None:
    there = track(max_trials=4)
    for _ in range(4):
        assert there.add()
        claim = there.claimed()
        there.end(claim, good(claim))
    there.supply.complete(there.current(), None, there.now)
    assert there.current().state is StudyState.RUNNING
    assert there.claimed().rung == -1


def test_a_promotion_is_not_undone_by_a_reader_of_an_older_snapshot(track: Callable[..., Track], now: datetime) -> None:
    there = track(ONE)
    assert there.add()
    there.end(there.claimed(), 2.5)
    view, overtaken = StudyView(there.database), False

    def overtake(*arguments: Any) -> None:  # amid the first look, whose snapshot has the trial pruned
        nonlocal overtaken
        if "trials.spec," in arguments[2] and not overtaken:
            overtaken = True
            rung = Ladder(there.study, PromotionConfig.model_validate(ONE)).rung(0, ONE_CPU)
            with there.database.write() as session:
                assert promote(session, there.study.id, Promotion(0, rung, ""), now)
            assert [trial.state for trial in view.get_all_trials(there.study.id)] == [OptunaState.WAITING]

    event.listen(there.database.engine, "before_cursor_execute", overtake)
    for _ in range(2):
        assert [trial.state for trial in view.get_all_trials(there.study.id)] == [OptunaState.WAITING]


def test_caches_of_finished_trials_follow_a_promotion(track: Callable[..., Track]) -> None:
    there = track(max_trials=4)
    history, view = History(there.study.id), StudyView(there.database)

    def look() -> None:
        with there.database.read() as session:
            assert history.read(session) == store.list_trials(session, there.study.id)
        fresh = StudyView(there.database)
        assert view.get_all_trials(there.study.id) == fresh.get_all_trials(there.study.id)

    for _ in range(4):
        assert there.add()
        claim = there.claimed()
        there.end(claim, good(claim))
        look()
    assert there.add()
    look()
    there.end(there.claimed(), 1.0)  # pruned once more, at another rung, with another result
    look()
    play(there, good)
    look()
