"""Statistics, beside scipy's own and beside simulated seeds."""

from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from orchestrator.statistics import (
    Correlation,
    Sample,
    Spread,
    chance_below,
    interval_of,
    numbers_needed,
    spearman,
    welch,
)

VALUES = st.lists(st.floats(-10, 10).map(lambda value: round(value, 3)), min_size=2, max_size=12)


@given(VALUES)
def test_an_interval_of_a_mean_is_students(values: list[float]) -> None:
    sample = Sample.of(values)
    ours = interval_of(sample.mean, sample.count, Spread(sample.sd, sample.count - 1))
    if sample.sd < 1e-9:
        assert ours.high - ours.low < 1e-6
        return
    expected = stats.t.interval(0.95, sample.count - 1, sample.mean, stats.sem(values))
    assert (ours.low, ours.high) == pytest.approx(expected)


@given(VALUES, VALUES, st.sampled_from([0.0, 0.5]))
def test_a_test_against_a_margin_is_welchs(lower: list[float], higher: list[float], margin: float) -> None:
    ours = welch(Sample.of(lower), Sample.of(higher), margin)
    if min(Sample.of(lower).sd, Sample.of(higher).sd) < 1e-6:
        return
    expected = stats.ttest_ind(np.array(lower) + margin, higher, equal_var=False, alternative="less")
    assert ours.p == pytest.approx(expected.pvalue, abs=1e-9)
    assert (ours.t, ours.degrees) == pytest.approx((-expected.statistic, expected.df))


def test_samples_that_do_not_vary_differ_for_certain() -> None:
    same = Sample.of([2.0, 2.0])
    assert welch(Sample.of([1.0, 1.0]), same, 0.5).p == 0
    assert welch(Sample.of([1.5, 1.5]), same, 0.5).p == 1
    assert welch(Sample.of([1.0, 1.0]), same, 0.5).t == inf


def test_a_pooled_spread_is_that_within_groups() -> None:
    rng = np.random.default_rng(0)
    groups = [list(rng.normal(mean, 0.3, 4)) for mean in range(500)]
    pooled = Spread.pooled([*groups, [7.0]])
    assert pooled is not None and pooled.degrees == 1500
    assert pooled.sd == pytest.approx(0.3, rel=0.05)
    assert Spread.pooled([[1.0], [2.0]]) is None


def test_a_studys_own_seeds_soon_outweigh_the_fields() -> None:
    assert Spread(0.0, 0).with_prior() == Spread(0.00076, 3)
    few, many = Spread(0.01, 2).with_prior(), Spread(0.01, 40).with_prior()
    assert few.sd == pytest.approx(0.0064, rel=0.02)
    assert many.sd == pytest.approx(0.01, rel=0.04)


def test_the_prior_gives_the_fields_median_and_90th_percentile() -> None:
    rng = np.random.default_rng(1)
    prior = Spread(0.0, 0).with_prior()
    true = prior.sd * np.sqrt(prior.degrees / rng.chisquare(prior.degrees, 100_000))
    seen = true * np.sqrt(rng.chisquare(2, 100_000) / 2)  # of three seeds
    assert np.median(seen) == pytest.approx(0.00071, rel=0.05)
    assert np.quantile(seen, 0.9) == pytest.approx(0.0017, rel=0.08)


def test_the_chance_that_a_mean_is_below_another_is_right_as_often_as_it_says() -> None:
    """Means from anywhere, a spread that is only estimated: of those given about 10%, about 10% are below."""
    rng = np.random.default_rng(2)
    said, were = [], []
    for _ in range(4000):
        one, other = rng.uniform(0, 5, 2)
        a, b, pool = rng.normal(one, 1, 2), rng.normal(other, 1, 3), rng.normal(0, 1, 4)
        spread = Spread(float(np.std(pool, ddof=1)), 3)
        said.append(chance_below(Sample.of(list(a)), Sample.of(list(b)), spread))
        were.append(one < other)
    for low, high in [(0.02, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 0.98)]:
        among = [was for chance, was in zip(said, were, strict=True) if low <= chance < high]
        expected = [chance for chance in said if low <= chance < high]
        assert np.mean(among) == pytest.approx(np.mean(expected), abs=0.06)


@pytest.mark.parametrize(("ahead", "other"), [(2.0, 20), (3.0, 5)])
def test_the_numbers_needed_give_the_power_asked_for(ahead: float, other: int) -> None:
    rng = np.random.default_rng(3)
    needed = numbers_needed(ahead, Spread(1.0, 20), other, alpha=0.01)
    assert needed is not None

    def power(own: int) -> float:
        lower, higher = rng.normal(0, 1, (4000, own)), rng.normal(ahead, 1, (4000, other))
        return float(np.mean(stats.ttest_ind(lower, higher, axis=1, equal_var=False, alternative="less").pvalue < 0.01))

    assert power(needed - 1) < 0.82
    assert power(needed) > 0.78


def test_no_number_of_seeds_settles_what_is_not_ahead_or_too_little_compared_with() -> None:
    assert numbers_needed(0.0, Spread(1.0, 20), 5, 0.01) is None
    assert numbers_needed(0.5, Spread(1.0, 20), 2, 0.01) is None
    assert numbers_needed(0.5, Spread(0.0, 20), 2, 0.01) == 2


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=4, max_size=30))
def test_a_rank_correlation_is_spearmans(pairs: list[tuple[int, int]]) -> None:
    xs, ys = [x for x, _ in pairs], [y for _, y in pairs]
    ours = spearman(xs, ys)
    if len(set(xs)) == 1 or len(set(ys)) == 1:
        assert ours == Correlation(0.0, -1.0, 1.0, len(pairs))
        return
    assert ours.value == pytest.approx(stats.spearmanr(xs, ys).statistic)
    assert -1 < ours.low < ours.high < 1


def test_an_interval_of_a_rank_correlation_covers_it_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    covered = []
    for _ in range(2000):
        drawn = rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 20)
        ours = spearman(list(drawn[:, 0]), list(drawn[:, 1]))
        covered.append(ours.low <= 6 / np.pi * np.arcsin(0.3) <= ours.high)
    assert 0.87 <= np.mean(covered) <= 0.94


def test_three_pairs_say_nothing_and_four_that_agree_prove_little() -> None:
    assert spearman([1, 2, 3], [1, 2, 3]) == Correlation(1.0, -1.0, 1.0, 3)
    four = spearman([1, 2, 3, 4], [1, 2, 3, 4])
    assert four.value == 1 and four.low < 0
    assert spearman([], []) == Correlation(0.0, -1.0, 1.0, 0)
