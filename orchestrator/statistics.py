"""What a few noisy numbers can say: means with intervals, one beside another, and one ranking beside another.

scipy is imported where it is needed: loading it takes longer than most commands, and few of them ask for statistics.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import atanh, inf, sqrt, tanh
from statistics import NormalDist, fmean, variance

PRIOR_SD = 0.00076
PRIOR_DEGREES = 3.0
"""The SD of BPB between seeds before a study has measured its own. An inverse chi-square of these degrees around it
gives what 338 published groups of three seeds or more have: a median SD of 0.00071, a 90th percentile of 0.0017."""
MOST_SEEDS = 1000
"""Beyond these, more seeds are no answer."""


@dataclass(frozen=True)
class Sample:
    """What is known of numbers that differ by chance. One has no `sd`, and none no mean: both are 0."""

    mean: float
    sd: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Sample":
        if len(values) < 2:
            return cls(sum(values), 0.0, len(values))
        return cls(fmean(values), sqrt(variance(values)), len(values))


@dataclass(frozen=True)
class Spread:
    """A standard deviation, and the degrees of freedom that it was measured with."""

    sd: float
    degrees: float

    @classmethod
    def pooled(cls, groups: Iterable[Sequence[float]]) -> "Spread | None":
        """Within groups of different means; None where no group has two numbers."""
        squares, degrees = 0.0, 0
        for group in groups:
            if len(group) > 1:
                squares += variance(group) * (len(group) - 1)
                degrees += len(group) - 1
        return cls(sqrt(squares / degrees), degrees) if degrees else None

    def with_prior(self) -> "Spread":
        """The posterior under the weakly informative prior, which a study's own seeds soon outweigh."""
        degrees = self.degrees + PRIOR_DEGREES
        return Spread(sqrt((self.sd**2 * self.degrees + PRIOR_SD**2 * PRIOR_DEGREES) / degrees), degrees)


@dataclass(frozen=True)
class Interval:
    low: float
    high: float


@dataclass(frozen=True)
class Welch:
    """How far the means of two samples lie apart: `t` with its degrees of freedom, and the one-sided `p`."""

    t: float
    degrees: float
    p: float


@dataclass(frozen=True)
class Correlation:
    """Spearman's, of `count` pairs. It is 0 and its interval everything, where one side does not vary."""

    value: float
    low: float
    high: float
    count: int


def interval_of(mean: float, count: int, spread: Spread, confidence: float = 0.95) -> Interval:
    """Student's interval of a mean of `count` numbers with this spread."""
    from scipy.special import stdtrit

    half = float(stdtrit(spread.degrees, 0.5 + confidence / 2)) * spread.sd / sqrt(count)
    return Interval(mean - half, mean + half)


def chance_below(one: Sample, other: Sample, spread: Spread) -> float:
    """The chance that the true mean of `one` is below that of `other`, both having this spread and no prior mean."""
    from scipy.special import stdtr

    return float(stdtr(spread.degrees, (other.mean - one.mean) / (spread.sd * sqrt(1 / one.count + 1 / other.count))))


def welch(lower: Sample, higher: Sample, margin: float = 0.0) -> Welch:
    """Whether the true mean of `lower` is below that of `higher` by more than the margin: small `p` where it is.

    Both need two numbers. Where neither varies, their difference is certain.
    """
    from scipy.special import stdtr

    assert lower.count > 1 and higher.count > 1, "a spread needs two numbers"
    ahead = higher.mean - lower.mean - margin
    error = sqrt(lower.sd**2 / lower.count + higher.sd**2 / higher.count)
    if not error:
        return Welch(inf if ahead > 0 else -inf, inf, 0.0 if ahead > 0 else 1.0)
    degrees = _degrees(lower, higher)
    return Welch(ahead / error, degrees, float(stdtr(degrees, -ahead / error)))


def numbers_needed(ahead: float, spread: Spread, count: int, alpha: float, power: float = 0.8) -> int | None:
    """How many numbers a sample needs until Welch's test finds it `ahead`, beyond the margin, this often.

    The other sample has `count` numbers. None where no count suffices.
    """
    from scipy.special import nctdtr, stdtrit

    if ahead <= 0 or not spread.sd:
        return 2 if ahead > 0 else None

    def suffices(own: int) -> bool:
        degrees = _degrees(Sample(0.0, spread.sd, own), Sample(0.0, spread.sd, count))
        distance = ahead / (spread.sd * sqrt(1 / own + 1 / count))
        return 1 - float(nctdtr(degrees, distance, stdtrit(degrees, 1 - alpha))) >= power

    return next((own for own in range(2, MOST_SEEDS + 1) if suffices(own)), None)


def spearman(xs: Sequence[float], ys: Sequence[float], confidence: float = 0.9) -> Correlation:
    """The correlation of two rankings, ties at their mean rank, with Fisher's interval as Bonett and Wright widen it.

    Few pairs that agree wholly are no proof: the interval is drawn around half a step less than ±1.
    """
    count = len(xs)
    value = _pearson(_ranks(xs), _ranks(ys)) if count > 1 else None
    if value is None or count < 4:
        return Correlation(value or 0.0, -1.0, 1.0, count)
    most = 1 - 6 / (count * (count**2 - 1))  # two neighbours that change places cost twice this
    inside = max(-most, min(most, value))
    half = NormalDist().inv_cdf(0.5 + confidence / 2) * sqrt((1 + inside**2 / 2) / (count - 3))
    return Correlation(value, tanh(atanh(inside) - half), tanh(atanh(inside) + half), count)


def _degrees(one: Sample, other: Sample) -> float:
    """Of the difference of their means, as Welch and Satterthwaite reckon them."""
    parts = [(sample.sd**2 / sample.count, sample.count - 1) for sample in (one, other)]
    return float(sum(part for part, _ in parts) ** 2 / sum(part**2 / degrees for part, degrees in parts))


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=lambda index: values[index])
    ranks = [0.0] * len(values)
    start = 0
    for end in range(1, len(order) + 1):
        if end == len(order) or values[order[end]] != values[order[start]]:
            for index in order[start:end]:
                ranks[index] = (start + end - 1) / 2
            start = end
    return ranks


def _pearson(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    mean_x, mean_y = fmean(xs), fmean(ys)
    across = sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True))
    scale = sqrt(sum((x - mean_x) ** 2 for x in xs) * sum((y - mean_y) ** 2 for y in ys))
    return max(-1.0, min(1.0, across / scale)) if scale else None
