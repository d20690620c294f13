"""The Gaussian process of the surrogate arm, and the features that it compares."""

import numpy as np
import pytest
from searches import make_study

from orchestrator.descriptors import Descriptors
from orchestrator.points import Domain
from orchestrator.surrogate import Surrogate
from worker.recipes import load_recipe
from worker.spec import GangConfig, override, parse_spec

GROUPS = ("size", "sharing", "rest")


def rows_of(count: int, seed: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    return np.random.default_rng(seed).uniform(-2, 2, (count, 3))


def test_it_predicts_a_smooth_function_where_it_has_seen_neighbours() -> None:
    rows, asked = rows_of(80), rows_of(20, 1)
    surrogate = Surrogate(rows, np.sin(rows[:, 0]) + 0.5 * rows[:, 1], GROUPS, asked, 0.0)
    mean, deviation = surrogate.predict(asked)
    truth = np.sin(asked[:, 0]) + 0.5 * asked[:, 1]
    assert np.abs(mean - truth).mean() < 0.1
    assert (np.abs(mean - truth) < 4 * deviation + 0.05).all()


def test_without_trials_larger_models_are_expected_to_be_better() -> None:
    asked = np.array([[1.0, 0, 0], [2.0, 0, 0], [3.0, 0, 0]])
    mean, _ = Surrogate(np.zeros((0, 3)), np.zeros(0), GROUPS, asked, -0.5).predict(asked)
    assert mean[0] > mean[1] > mean[2]


def test_trials_overrule_what_was_expected_of_size() -> None:
    rows = rows_of(40)
    mean, _ = Surrogate(rows, rows[:, 0], GROUPS, rows, -0.5).predict(rows)
    assert np.corrcoef(mean, rows[:, 0])[0, 1] > 0.95


def test_what_is_believed_of_open_trials_takes_the_doubt_from_their_neighbourhood() -> None:
    rows, asked = rows_of(12), np.array([[1.9, 1.9, 1.9], [-1.9, -1.9, -1.9]])
    surrogate = Surrogate(rows, rows[:, 1], GROUPS, asked, 0.0)
    before, doubt = surrogate.predict(asked)
    surrogate.believe(asked[:1])
    after, left = surrogate.predict(asked)
    assert left[0] < 0.5 * doubt[0]
    assert after[0] == pytest.approx(before[0], abs=0.05)


def test_improvement_is_largest_where_low_values_are_likely_and_never_negative() -> None:
    rows = rows_of(40)
    surrogate = Surrogate(rows, rows[:, 0], GROUPS, rows, 0.0)
    gains = surrogate.improvement(rows, float(rows[:, 0].min()))
    assert (gains >= 0).all()
    assert rows[gains.argmax(), 0] < -1


def test_specs_that_share_alike_are_close_and_others_are_not() -> None:
    space = {"sharing.tying": {"families": ["free"]}, "optimizer.matrix_lr": {"low": 0.01, "high": 0.1, "log": True}}
    study = make_study(space)
    domain = Domain(study.definition.base, study.definition.space)
    descriptors = Descriptors(domain)

    def row(tying: list[int]) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
        changes = {"sharing.tying": tying, "sharing.unique_blocks": len(set(tying))}
        spec = parse_spec(override(load_recipe("laptop"), changes))
        point = domain.point(spec)
        assert point is not None
        assert len(domain.spec(point, GangConfig()).sharing.tying_map) == len(tying)
        return descriptors.row(spec, point)

    cycle, other_cycle, palindrome = row([0, 1, 2, 0, 1, 2]), row([0, 1, 2, 0, 1, 0]), row([0, 0, 0, 0, 0, 1])
    assert len(cycle) == len(descriptors.groups)
    assert np.linalg.norm(cycle - other_cycle) < np.linalg.norm(cycle - palindrome)
