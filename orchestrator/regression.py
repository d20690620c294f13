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
UNEXPLAINED = (0.03, 0.3)  # variance of what no feature explains
OWN = (0.2, 0.8)  # the configuration's share of it
FREEDOM = 2  # observations that the prior of the scale counts for
CHOSEN_ON = 64  # latest observations that weigh the hypotheses
NEGLIGIBLE = 0.05  # weight of a hypothesis that is left out
ODD = 5.0  # robust standard deviations from where the others put an observation


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

    def of_one(self, square: float) -> float:
        """The variance of one, the seed's part included."""
        return LEVEL + SLOPE * square + self.rough + self.unexplained


@dataclass(frozen=True)
class _Hypothesis:
    """Prior variances, fitted."""

    variances: _Variances
    evidence: float
    """The logarithm of how likely they make the observations."""
    scale: float
    inverse: Vector  # (n, n), of the covariance in units of the scale
    coefficients: Vector  # (n, outputs)


class Regression:
    """Fitted on observations, at least one. `spread` is the scale, a log-ratio, that is assumed before any."""

    def __init__(self, observations: Sequence[Observation], spread: float, slack: float) -> None:
        """An observation further than `slack` from the median, as a log-ratio, may be odd: it has no say if so."""
        features = np.array([each.features for each in observations])
        ratios = np.array([each.ratios for each in observations])
        names = {name: number for number, name in enumerate({each.configuration: None for each in observations})}
        groups = np.array([names[each.configuration] for each in observations])
        kept = _usual(features, _tamed(ratios[:, 0], slack), spread)
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
        tried = [
            _hypothesis(features, groups, ratios[latest], self._spread, _Variances(*rough, unexplained, own))
            for rough, unexplained, own in product(ROUGH, UNEXPLAINED, owns)
        ]
        evidence = np.array([each.evidence for each in tried])
        weights = np.exp(evidence - evidence.max())
        likely = np.flatnonzero(weights / weights.sum() > NEGLIGIBLE)
        chosen = [tried[index] for index in likely]
        if len(ratios) > CHOSEN_ON:
            chosen = [
                _hypothesis(self._features, self._groups, ratios, self._spread, each.variances) for each in chosen
            ]
        return chosen, weights[likely] / weights[likely].sum()


def _hypothesis(
    features: Vector, groups: NDArray[np.int64], ratios: Vector, spread: float, variances: _Variances
) -> _Hypothesis:
    """The variances' fit: the scale from a scaled inverse χ² prior, the evidence with the scale integrated out."""
    offset, count = features - features.mean(axis=0), len(features)
    lines = offset @ offset.T
    squares = np.diag(lines)
    distances = np.sqrt(np.maximum(squares[:, None] + squares[None] - 2 * lines, 0))
    covariance = variances.between(lines, distances, groups[:, None] == groups[None])
    covariance += variances.unexplained * (1 - variances.own) * np.eye(count)
    inverse: Vector = np.asarray(np.linalg.inv(covariance), np.float64)
    coefficients = inverse @ ratios
    misfit = FREEDOM * spread**2 + float(ratios[:, 0] @ coefficients[:, 0])
    evidence = -(float(np.linalg.slogdet(covariance)[1]) + (FREEDOM + count) * log(misfit)) / 2
    return _Hypothesis(variances, evidence, misfit / (FREEDOM + count), inverse, coefficients)


def _usual(features: Vector, ratios: Vector, spread: float) -> NDArray[np.bool_]:
    """Which observations lie where the others put them, by each one's residual from a fit on all others."""
    variances = _Variances(*ROUGH[-1], UNEXPLAINED[-1], 0.5)
    centred = (ratios - np.median(ratios))[:, None]
    fit = _hypothesis(features, np.arange(len(ratios)), centred, spread, variances)
    strays = np.abs(fit.coefficients[:, 0]) / np.sqrt(np.diag(fit.inverse))
    usual: NDArray[np.bool_] = strays <= ODD * max(1.4826 * float(np.median(strays)), spread)
    return usual


def _tamed(ratios: Vector, slack: float) -> Vector:
    """The ratios, those far from their median brought nearer: one that is very odd would make all others look so."""
    middle = np.median(ratios)
    far = max(slack, 8 * 1.4826 * float(np.median(np.abs(ratios - middle))))
    tamed: Vector = np.clip(ratios, middle - far, middle + far)
    return tamed
