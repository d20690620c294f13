"""Record verdicts: the challenge's rule, and how often it is fooled by chance."""

from collections.abc import Sequence
from math import pi
from typing import Any

import numpy as np
import pytest
from scipy import stats

from orchestrator.lifecycle import RunState
from orchestrator.statistics import Sample
from orchestrator.study import ReplicationConfig, Run, Scores
from orchestrator.verdict import ALPHA, MARGIN_NATS, Champion, judge_record, planned_seeds, share
from worker.spec import BudgetConfig, GangConfig

OWN = 1337
SD = 0.0012  # nats, which is the field's SD between seeds
NOISE = (0.4, -1.1, 0.2, 0.9, -0.4, 1.3, -0.6, -0.9, 0.1, 0.1)


def run_of(number: int, seed: int, loss: float | None, *, feasible: bool = True, **fields: Any) -> Run:
    state = RunState.QUEUED if loss is None else RunState.SUCCEEDED
    scores = None if loss is None else Scores(loss * 0.6, loss, 15_900_000, 590.0, 100.0, feasible)
    values: dict[str, Any] = {"state": state, "rung": 0, "scores": scores, **fields}
    return Run(
        id=number, trial_id=1, seed=seed, gang=GangConfig(), budget=BudgetConfig(steps=1), spared_at=None, **values
    )


def runs_of(losses: Sequence[float | None], screening: float = 1.0) -> list[Run]:
    further = [run_of(number, 40 + number, loss) for number, loss in enumerate(losses, 1)]
    return [run_of(0, OWN, screening), *further]


def around(mean: float, count: int = 5) -> list[float]:
    return [mean + SD * noise for noise in NOISE[:count]]


STANDING = Champion("trial 0", Sample.of(around(2.0)), planned=5)


def test_a_clear_lead_at_all_seeds_is_a_record() -> None:
    found = judge_record(runs_of(around(1.985)), OWN, 5, 1, STANDING)
    assert found.record and not found.missing and found.settle is None
    assert found.test is not None and found.test.p < found.alpha < ALPHA
    assert found.ahead_nats == pytest.approx(0.015)
    assert found.seeds == (41, 42, 43, 44, 45)


def test_the_screening_run_is_left_out_of_the_test_however_good_or_bad_it_was() -> None:
    verdicts = [judge_record(runs_of(around(1.985), screening), OWN, 5, 1, STANDING) for screening in (1.0, 3.0)]
    assert verdicts[0] == verdicts[1]
    held = Champion.of(0, runs_of(around(1.985), screening=1.0), OWN, 5)
    assert (held.name, held.sample, held.asked) == ("trial 0", Sample.of(around(1.985)), 5)


def test_no_test_is_made_before_all_planned_seeds_are_done() -> None:
    found = judge_record(runs_of([*around(1.9, 4), None]), OWN, 5, 1, STANDING)
    assert not found.record and found.test is None and found.sample is None
    assert found.missing == ("it has 4 of the 5 seeds, beyond its own, that the test is made on",)
    assert found.settle == 5


def test_a_test_is_not_made_again_at_every_further_seed() -> None:
    once = judge_record(runs_of(around(1.993)), OWN, 5, 1, STANDING)
    more = judge_record(runs_of([*around(1.993), 1.9, 1.9]), OWN, 5, 1, STANDING)
    assert more == once
    twice = judge_record(runs_of([*around(1.993), *around(1.993)]), OWN, 5, 1, STANDING)
    assert (twice.look, len(twice.seeds)) == (2, 10)
    assert twice.alpha == pytest.approx(once.alpha / 5)


def test_a_lead_under_the_margin_is_no_record_however_certain() -> None:
    found = judge_record(runs_of(around(1.996)), OWN, 5, 1, STANDING)
    assert not found.record and found.settle is None
    assert found.missing == ("it is 0.0040 nats ahead, and a record is by 0.005 at least",)


def test_a_lead_that_may_be_luck_says_how_many_seeds_would_settle_it() -> None:
    losses = Champion("the losses given", Sample.of(around(2.0, 10) * 2))
    found = judge_record(runs_of(around(1.9935)), OWN, 5, 1, losses)
    assert not found.record and found.missing[0].startswith("p = ")
    nearer = judge_record(runs_of(around(1.9934)), OWN, 5, 1, losses)
    assert (nearer.settle, found.settle) == (10, 15)
    few = judge_record(runs_of(around(1.9935)), OWN, 5, 1, STANDING)
    assert few.settle is None, "five of the champion's are too few for so small a lead"


@pytest.mark.parametrize("which", [0, 3])
def test_one_seed_over_a_cap_rules_a_record_out(which: int) -> None:
    runs = runs_of(around(1.95))
    bad = runs[which]
    assert bad.scores is not None
    runs[which] = run_of(which, bad.seed, bad.scores.val_loss, feasible=False)
    found = judge_record(runs, OWN, 5, 1, STANDING)
    assert not found.record and found.test is None
    assert found.missing == (f"seed {bad.seed} misses a cap of the study",)


def test_a_failed_seed_is_left_out_and_named_and_a_stopped_one_has_to_be_explained() -> None:
    runs = runs_of([*around(1.985), None])
    runs[2] = run_of(2, 42, None, state=RunState.FAILED)
    runs[6] = run_of(6, 46, 1.985)
    found = judge_record(runs, OWN, 5, 1, STANDING)
    assert found.record and found.failed == (42,) and found.seeds == (41, 43, 44, 45, 46)
    runs[2] = run_of(2, 42, 2.2, state=RunState.STOPPED)
    assert "seed 42 was stopped before its end" in judge_record(runs, OWN, 5, 1, STANDING).missing


def test_a_seed_that_diverged_counts_against_the_trial_and_one_that_failed_otherwise_can_be_replaced() -> None:
    runs = runs_of(around(1.985))
    runs[2] = run_of(2, 42, None, state=RunState.FAILED)
    found = judge_record(runs, OWN, 5, 1, STANDING)
    assert found.settle == 5 and found.missing == (
        "it has 4 of the 5 seeds, beyond its own, that the test is made on; 1 failed or were cancelled, and others can"
        " be submitted instead",
    )
    runs.append(run_of(6, 46, 1.985))
    assert judge_record(runs, OWN, 5, 1, STANDING).record
    found = judge_record(runs, OWN, 5, 1, STANDING, diverged=frozenset((42,)))
    assert found.missing == ("seed 42 diverged, which counts against it",) and found.settle is None


def test_a_champion_is_tested_with_its_first_planned_seeds_and_not_before_it_has_them() -> None:
    short = Champion.of(0, runs_of([*around(2.0, 4), None, 1.0]), OWN, 5)
    assert (short.sample.count, short.asked) == (4, 5)
    found = judge_record(runs_of(around(1.9)), OWN, 5, 1, short)
    assert found.missing == ("trial 0: 4 of the 5 seeds that it is held against",) and found.test is None
    assert Champion.of(0, runs_of([*around(2.0), 2.5, 2.6]), OWN, 5) == Champion.of(0, runs_of(around(2.0)), OWN, 5)
    failed = runs_of([*around(2.0), None])
    failed[2] = run_of(2, 42, None, state=RunState.FAILED)
    assert Champion.of(0, failed, OWN, 5).asked == 6


def test_who_had_its_seeds_before_the_champion_has_to_be_beaten_too() -> None:
    first, second = (Champion(f"trial {n}", Sample.of(around(2.0 - n / 100)), 5, asked=10 + n) for n in (0, 1))
    trial = runs_of(around(1.988))
    assert judge_record(trial, OWN, 5, 1, first, [second]).record, "it came later"
    assert judge_record(runs_of(around(1.975)), OWN, 5, 1, second, [first]).record
    better = Champion("trial 2", Sample.of(around(1.99)), 5, asked=9)
    assert judge_record(trial, OWN, 5, 1, first, [better]).missing == (
        "trial 2 had its seeds before and has to be beaten too: 0.0020 nats ahead of it, p = 1",
    )
    unfinished = Champion("trial 3", Sample.of(around(1.99, 3)), 5, asked=9)
    assert judge_record(trial, OWN, 5, 1, first, [unfinished]).missing == (
        "trial 3: 3 of the 5 seeds that it is held against",
    )


def test_a_champion_of_one_seed_cannot_be_beaten() -> None:
    found = judge_record(runs_of(around(1.9)), OWN, 5, 1, Champion("the losses given", Sample.of([2.0])))
    assert found.missing == ("the losses given: 1 of the 2 seeds that it is held against",)


def test_runs_of_cheaper_rungs_count_for_nothing() -> None:
    runs = [*runs_of(around(1.985)), run_of(9, OWN, 2.5, rung=-1, feasible=False), run_of(10, 99, 2.5, rung=-1)]
    assert judge_record(runs, OWN, 5, 1, STANDING).record


def test_alpha_over_all_declared_trials_and_looks_adds_up_to_no_more_than_the_rules() -> None:
    spent = sum(share(declared, look) for declared in range(1, 3000) for look in range(1, 12))
    assert ALPHA * 0.999 < spent <= ALPHA
    assert share(1, 1) == pytest.approx(0.8 * 0.01 * 6 / pi**2)


def test_the_planned_seeds_are_the_studys_list_but_for_the_trials_own() -> None:
    assert planned_seeds(None, OWN) == 5
    assert planned_seeds(ReplicationConfig(seeds=(OWN, 1, 2, 3)), OWN) == 3
    assert planned_seeds(ReplicationConfig(seeds=(1,)), OWN) == 2


# Simulated studies in which nothing is a record


STUDIES, CONFIGURATIONS, REPLICATED = 10_000, 50, 6


def null_studies(ahead: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Screening losses, further losses in the order of declaration, and the champion's: all true means are alike, and
    this far ahead of the champion's. The best of the screening are declared, best first."""
    rng = np.random.default_rng(5)
    screening = rng.normal(0, SD, (STUDIES, CONFIGURATIONS))
    best = np.sort(screening, axis=1)[:, :REPLICATED]
    return best, rng.normal(0, SD, (STUDIES, REPLICATED, 10)), rng.normal(ahead, SD, (STUDIES, 1, 5))


def p_of(losses: np.ndarray, champion: np.ndarray) -> np.ndarray:
    test = stats.ttest_ind(losses + MARGIN_NATS, champion, axis=-1, equal_var=False, alternative="less")
    return np.asarray(test.pvalue)


def test_fewer_than_15_in_1000_null_studies_report_a_record() -> None:
    """At the edge, where the true lead is the margin itself. Six trials are declared, each may be looked at twice."""
    _, further, champion = null_studies(ahead=MARGIN_NATS)
    declared = 1 + np.arange(REPLICATED)
    shares = [np.array([share(int(k), look) for k in declared]) for look in (1, 2)]
    records = (p_of(further[..., :5], champion) < shares[0]) | (p_of(further, champion) < shares[1])
    assert 0.001 < np.mean(records.any(axis=1)) < 0.01
    assert np.mean(records[:, 0]) < 0.0075  # the best of 50 alone
    for study in range(100):
        sample = Champion("champion", Sample.of(list(champion[study, 0])))
        once = judge_record(runs_of(list(further[study, 0, :5])), OWN, 5, 1, sample)
        assert once.record == (p_of(further[study, 0, :5], champion[study, 0]) < share(1, 1))


RIVALS = 5
BATCHES = ((6, 4, 2, 0, 0), (10, 8, 6, 4, 2), (20, 20, 20, 20, 20))


def test_champions_that_grow_and_are_chosen_freely_add_no_false_records() -> None:
    """At the edge again. Five champions are as good as each other and get up to 20 seeds each; after every batch each
    of the six trials is held against every one of them. A record at any time is one too many."""
    rng = np.random.default_rng(6)
    further, champions = rng.normal(0, SD, (STUDIES, REPLICATED, 5)), rng.normal(MARGIN_NATS, SD, (STUDIES, RIVALS, 20))
    alpha = np.array([share(1 + place, 1) for place in range(REPLICATED)])
    free = np.zeros((STUDIES, REPLICATED), bool)
    for rival in range(RIVALS):
        for count in {counts[rival] for counts in BATCHES} - {0}:
            free |= p_of(further, champions[:, rival : rival + 1, :count]) < alpha
    # Who beats any beats the first: with as many seeds as are planned, whenever it is asked.
    false = p_of(further, champions[:, :1, :5]) < alpha
    assert np.mean(free.any(axis=1)) > 0.02
    assert 0.001 < np.mean(false.any(axis=1)) < 0.01
    for study, place in [*np.argwhere(free & ~false)[:10], *np.argwhere(false)[:5]]:
        assert _recorded(further[study, place], int(place), champions[study]) == false[study, place]


def _recorded(losses: np.ndarray, place: int, champions: np.ndarray) -> bool:
    """Whether the trial is ever said to set a record."""
    trial, said = runs_of(list(losses)), []
    for counts in BATCHES:
        held = []
        for rival, count in enumerate(counts):
            runs = [run_of(100 * seed + rival, seed, champions[rival, seed - 1]) for seed in range(1, count + 1)]
            held.append(Champion.of(rival, runs, OWN, 5))
        for champion in held:
            others = [one for one in held if one is not champion]
            said.append(judge_record(trial, OWN, 5, 1 + place, champion, others).record)
    return any(said)


def test_equal_configurations_hardly_ever_report_a_record() -> None:
    _, further, champion = null_studies(ahead=0.0)
    assert np.mean(p_of(further[..., :5], champion) < ALPHA) < 0.0005


def test_without_these_rules_records_would_be_false_several_times_as_often() -> None:
    screening, further, champion = null_studies(ahead=MARGIN_NATS)
    with_screening = np.concatenate([screening[..., None], further[..., :5]], axis=-1)
    false = p_of(with_screening, champion) < ALPHA
    fair = p_of(further[..., :5], champion) < ALPHA
    assert np.mean(false[:, 0]) > 0.015 > 0.012 > np.mean(fair[:, 0])  # the best of 50, with its screening run
    assert np.mean(false.any(axis=1)) > 1.5 * np.mean(fair.any(axis=1))
    assert np.mean(fair.any(axis=1)) > 0.03  # six trials, each with the whole alpha
    at_any_seed = np.stack([p_of(further[:, 0, :count], champion[:, 0]) < ALPHA for count in range(2, 11)])
    assert np.mean(at_any_seed.any(axis=0)) > 0.03  # one trial, looked at after every seed
