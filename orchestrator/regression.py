"""What the trials of a study say about the next one: Gaussian processes with Student t predictions, averaged.

Log-ratios of actual to expected are regressed on a few features of the specs: a level and straight lines through all of
them, a smooth rest (Matérn 3/2), and what no feature explains. Of the last, a share is the configuration's own, the
rest the seed's: trials of one configuration have the first in common, so replicates tell the two apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import log, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]

LEVEL, SLOPE = 25.0, 0.3  # prior variances of the level, and of lines per unit of a feature, in units of the scale
ROUGH = ((0.0, 1.0), (1.0, 2.0), (1.0, 4.0))  # variance of the smooth rest, and the distance over which it changes
UNEXPLAINED = (0.1, 0.3)  # variance of what no feature explains
OWN = (0.1, 0.5, 0.95)  # the configuration's share of it
FREEDOM = 2  # observations that the prior of the scale counts for
CHOSEN_ON = 64  # latest observations that weigh the hypotheses
NEGLIGIBLE = 0.05  # weight of a hypothesis that is left out
ODD = 6.0  # standard deviations from where the others put an observation


@dataclass(frozen=True)
class Observation:
    """One finished trial: where it lies, which configuration it is of, and log-ratios, of the whole first."""

    features: Vector
    configuration: str
    ratios: Vector


@dataclass(frozen=True)
class Forecast:
    """The expected log-ratios, and the Student t of the whole's."""

    ratios: Vector
    deviation: float
    freedom: int
    seed_deviation: float
    """Of it, what differs between the seeds of one configuration; the rest is the model's own error."""

    def quantile(self, probability: float) -> float:
        """Of the whole's log-ratio, from its expected one."""
        from scipy.special import stdtrit  # a fifth of a second, which processes that predict nothing do without

        return self.deviation * float(stdtrit(self.freedom, probability))


class _Variances(NamedTuple):
    """A hypothesis of where the ratios' differences come from, in units of the scale."""

    rough: float
    distance: float
    unexplained: float
    own: float

    def between(self, lines: Vector, distances: Vector, alike: Vector) -> Vector:
        """The covariance of two specs, given their features' product and distance, and whether they are alike."""
        near = distances * (sqrt(3) / self.distance)
        return LEVEL + SLOPE * lines + self.rough * (1 + near) * np.exp(-near) + self.unexplained * self.own * alike

    def among(self, features: Vector, groups: NDArray[np.int64]) -> Vector:
        """The covariance of observations, their seeds' parts included."""
        offset = features - features.mean(axis=0)
        lines = offset @ offset.T
        squares = np.diag(lines)
        distances = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * lines, 0))
        covariance = self.between(lines, distances, (groups[:, None] == groups[None]).astype(np.float64))
        return covariance + self.unexplained * (1 - self.own) * np.eye(len(features))

    def of_one(self, square: float) -> float:
        """The variance of one, the seed's part included."""
        return LEVEL + SLOPE * square + self.rough + self.unexplained


@dataclass(frozen=True)
class _Hypothesis:
    """Prior variances, fitted."""

    variances: _Variances
    scale: float
    inverse: Vector  # (n, n), of the covariance in units of the scale
    coefficients: Vector  # (n, outputs)


class Regression:
    """Fitted on observations, at least one. `spread` is the scale, a log-ratio, that is assumed before any."""

    def __init__(self, observations: Sequence[Observation], spread: float, slack: float) -> None:
        """Odd observations, at least `slack` from where the others put them, have no say."""
        features = np.array([each.features for each in observations])
        ratios = np.array([each.ratios for each in observations])
        names = {name: number for number, name in enumerate({each.configuration: None for each in observations})}
        groups = np.array([names[each.configuration] for each in observations])
        kept = _usual(features, ratios[:, 0], spread, slack)
        self._features, self._groups, self._names = features[kept], groups[kept], names
        self._centre: Vector = np.median(ratios[kept], axis=0)
        self._mean: Vector = self._features.mean(axis=0)
        self._spread = spread
        self._hypotheses, self._weights = self._fit(ratios[kept] - self._centre)

    def forecast(self, features: Vector, configuration: Callable[[], str]) -> Forecast:
        """Of a spec with these features. Its configuration's name is asked for where it may be one of those known."""
        distances = np.sqrt(((self._features - features) ** 2).sum(axis=1))
        alike = np.zeros(len(distances))
        if distances.min() < 1e-9:
            alike += self._groups == self._names.get(configuration(), -1)
        offset = features - self._mean
        lines, square = (self._features - self._mean) @ offset, float(offset @ offset)
        means, variances = [], []
        for each in self._hypotheses:
            shared = each.variances.between(lines, distances, alike)
            left = each.variances.of_one(square) - float(shared @ each.inverse @ shared)
            means.append(shared @ each.coefficients)
            variances.append(each.scale * left)
        outcomes = np.array(means)
        mean = self._weights @ outcomes
        between = self._weights @ (outcomes[:, 0] - mean[0]) ** 2
        deviation = sqrt(float(self._weights @ np.array(variances) + between))
        return Forecast(mean + self._centre, deviation, FREEDOM + len(distances), self.seed_deviation)

    @property
    def seed_deviation(self) -> float:
        """Between seeds of one configuration."""
        parts = [each.scale * each.variances.unexplained * (1 - each.variances.own) for each in self._hypotheses]
        return sqrt(float(self._weights @ np.array(parts)))

    def _fit(self, ratios: Vector) -> tuple[list[_Hypothesis], Vector]:
        """The hypotheses that the latest observations leave likely, each fitted on all, with their weights."""
        latest = slice(-CHOSEN_ON, None)
        features, groups = self._features[latest], self._groups[latest]
        owns = OWN if len(set(groups.tolist())) < len(groups) else (0.5,)  # without replicates nothing tells
        tried, evidence = [], []
        for rough, unexplained, own in product(ROUGH, UNEXPLAINED, owns):
            tried.append(_Variances(*rough, unexplained, own))
            covariance = tried[-1].among(features, groups)
            scale = _hypothesis(tried[-1], covariance, ratios[latest], self._spread).scale
            determinant = float(np.linalg.slogdet(covariance)[1])
            evidence.append(-(determinant + (FREEDOM + len(features)) * log(scale)) / 2)  # the scale integrated out
        weights = np.exp(np.array(evidence) - max(evidence))
        likely = np.flatnonzero(weights / weights.sum() > NEGLIGIBLE)
        chosen = [
            _hypothesis(tried[index], tried[index].among(self._features, self._groups), ratios, self._spread)
            for index in likely
        ]
        return chosen, weights[likely] / weights[likely].sum()


def _hypothesis(variances: _Variances, covariance: Vector, ratios: Vector, spread: float) -> _Hypothesis:
    """The fit. The scale has a scaled inverse χ² prior (Gelman et al., Bayesian Data Analysis, section 3.2)."""
    inverse: Vector = np.asarray(np.linalg.inv(covariance), np.float64)
    coefficients = inverse @ ratios
    misfit = FREEDOM * spread**2 + float(ratios[:, 0] @ coefficients[:, 0])
    return _Hypothesis(variances, misfit / (FREEDOM + len(ratios)), inverse, coefficients)


def _usual(features: Vector, ratios: Vector, spread: float, slack: float) -> NDArray[np.bool_]:
    """Which observations lie where the others put them: those remain once the oddest are left out, one by one.

    An odd one is further than `slack` from a fit on the others, and ODD of its standard deviations.
    """
    centred = ratios - np.median(ratios)
    variances = _Variances(*ROUGH[-1], UNEXPLAINED[-1], 0.5)
    inverse = np.linalg.inv(variances.among(features, np.arange(len(ratios))))
    kept = np.ones(len(ratios), bool)
    for _ in range(len(ratios) // 5):  # never more than a fifth of them
        pulls, precisions = inverse @ centred, np.where(kept, np.diag(inverse), 1.0)
        misfits = pulls**2 / precisions  # by which each makes the whole misfit larger
        oddest = int(misfits.argmax())
        left = FREEDOM * spread**2 + float(centred @ pulls) - misfits[oddest]
        near = abs(pulls[oddest]) <= slack * precisions[oddest]
        if near or misfits[oddest] <= ODD**2 * left / (FREEDOM + int(kept.sum()) - 1):
            break
        kept[oddest] = False
        inverse = inverse - np.outer(inverse[oddest], inverse[oddest]) / inverse[oddest, oddest]
    return kept
