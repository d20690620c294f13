"""Regression on a study's trials: intervals that hold what they say, and what seeds do apart from what is not known."""

import random
from math import sin

import numpy as np
import pytest

from orchestrator.regression import Forecast, Observation, Regression, Vector


def at(x: float, y: float = 0.0) -> Vector:
    return np.array([x, y])


def observed(features: Vector, ratio: float, configuration: str) -> Observation:
    return Observation(features, configuration, np.array([ratio]))


def forecast(regression: Regression, features: Vector, configuration: str = "new") -> Forecast:
    return regression.forecast(features, lambda: configuration)


def holds(found: Forecast, ratio: float) -> bool:
    return bool(abs(ratio - found.ratios[0]) <= found.quantile(0.95))


@pytest.mark.parametrize("count", [5, 20, 80, 150])
def test_nine_of_ten_following_ratios_lie_in_the_interval(count: int) -> None:
    noise, held = random.Random(count), list[bool]()
    for _ in range(20):
        level, slope, wave = noise.gauss(0, 0.05), noise.gauss(0, 0.01), noise.gauss(0, 0.01)
        drawn = []
        for _ in range(count + 30):
            features = at(noise.uniform(0, 4), noise.uniform(0, 2))
            ratio = level + slope * features[0] + wave * sin(features[1]) + noise.gauss(0, 0.005)
            drawn.append((features, ratio))
        regression = Regression([observed(*each, str(number)) for number, each in enumerate(drawn[:count])], 0.015, 0.1)
        held += [holds(forecast(regression, features), ratio) for features, ratio in drawn[count:]]
    assert 0.85 <= sum(held) / len(held) <= 0.97


@pytest.mark.parametrize(("own", "seeds"), [(0.02, 0.001), (0.001, 0.02), (0.01, 0.01)])
def test_what_seeds_do_is_told_apart_from_what_configurations_do(own: float, seeds: float) -> None:
    noise, observations = random.Random(1), list[Observation]()
    for number in range(25):
        features, middle = at(noise.uniform(0, 4)), noise.gauss(0, own)
        observations += [observed(features, middle + noise.gauss(0, seeds), str(number)) for _ in range(3)]
    regression = Regression(observations, 0.015, 0.1)
    known, new = forecast(regression, observations[0].features, "0"), forecast(regression, observations[0].features)
    assert known.seed_deviation == pytest.approx(seeds, rel=0.6, abs=0.003)
    assert known.deviation < new.deviation
    assert new.deviation == pytest.approx((own**2 + seeds**2) ** 0.5, rel=0.3)


def test_another_seed_of_a_known_configuration_is_expected_where_the_first_ones_were() -> None:
    noise = random.Random(2)
    observations = [
        observed(at(noise.uniform(0, 4)), noise.choice((-0.02, 0.02)), str(number // 2)) for number in range(40)
    ]
    twins = [observed(at(1.0), 0.02, "twin"), observed(at(1.0), 0.0201, "twin"), observed(at(1.0), -0.02, "other")]
    regression = Regression([*observations, *twins], 0.015, 0.1)
    assert forecast(regression, at(1.0), "twin").ratios[0] > forecast(regression, at(1.0), "other").ratios[0]


def test_far_from_all_observations_less_is_known() -> None:
    noise = random.Random(3)
    spread = [observed(at(noise.uniform(0, 1)), noise.gauss(0, 0.005), str(number)) for number in range(30)]
    regression = Regression(spread, 0.015, 0.1)
    deviations = [forecast(regression, at(x)).deviation for x in (0.5, 2.0, 4.0, 8.0)]
    assert deviations == sorted(deviations)
    assert deviations[-1] > 2 * deviations[0]


@pytest.mark.parametrize("count", [6, 30])
def test_one_odd_observation_has_no_say(count: int) -> None:
    noise = random.Random(4)
    usual = [observed(at(noise.uniform(0, 4)), noise.gauss(0, 0.003), str(number)) for number in range(count)]
    without, beside = Regression(usual, 0.015, 0.1), Regression([*usual, observed(at(2.0), 1.1, "odd")], 0.015, 0.1)
    assert forecast(beside, at(1.0)).ratios[0] == pytest.approx(forecast(without, at(1.0)).ratios[0], abs=0.001)
    assert forecast(beside, at(1.0)).deviation == pytest.approx(forecast(without, at(1.0)).deviation, rel=0.1)
