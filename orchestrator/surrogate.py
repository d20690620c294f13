"""A Gaussian process over a few hundred trials at most, in numpy: what a candidate may be expected to improve."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import erf, pi, sqrt

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

LENGTHS = (0.7, 1.4, 2.8, 8.0)  # of a group of features, in their standard deviations; the last: it hardly matters
NOISES = (0.02, 0.1, 0.3)  # standard deviation around the function, of that of all values
SLOPES = (0.3, 1.0)  # prior standard deviation of a feature's linear effect
SIZE_EFFECT = -0.5  # prior mean of the first feature's, size: larger models are better until trials say otherwise
FITTED = 120  # trials that choose the lengths; all that are given make the posterior
USUAL = 1.4  # what a length is taken for until trials say otherwise
LEAST_TO_FIT = 6  # trials


@dataclass(frozen=True)
class Kernel:
    """Matérn 5/2 over groups of features, each with its length, beside a line in every feature."""

    lengths: tuple[float, ...]
    noise: float = 0.1
    slope: float = 0.3

    def between(self, first: Matrix, second: Matrix, groups: Sequence[Matrix]) -> Matrix:
        """Covariances of two sets of rows. `groups` has for each group the columns' weights."""
        squares = [_squares(first * weights, second * weights) for weights in groups]
        return self.of(squares, first @ second.T / max(first.shape[1], 1))

    def of(self, squares: Sequence[Matrix], products: Matrix) -> Matrix:
        """The same, from squared distances by group and mean products."""
        total = sum(square / length**2 for square, length in zip(squares, self.lengths, strict=True))
        distance = np.sqrt(5 * np.maximum(total, 0))
        return (1 + distance + distance**2 / 3) * np.exp(-distance) + self.slope**2 * products  # type: ignore[no-any-return]


class Surrogate:
    """The posterior given rows of features and their values, both in any units. The same input, the same posterior."""

    def __init__(self, rows: Matrix, values: Matrix, groups: Sequence[str], around: Matrix, size_effect: float) -> None:
        """`around` are rows that will be asked about; with the others they set the scale of each feature."""
        self._size_effect = size_effect
        everything = np.vstack([rows, around])
        self._centre, spread = everything.mean(axis=0), everything.std(axis=0)
        self._scale = np.where(spread > 1e-9, spread, np.inf)  # what never differs says nothing
        alive = np.isfinite(self._scale)
        self._weights = [_weights(groups, name, alive) for name in dict.fromkeys(groups)]
        self._x = self._scaled(rows)
        self._mean, self._spread = (values.mean(), values.std() or 1.0) if len(values) > 1 else (values.sum(), 1.0)
        self._residual = (values - self._mean) / self._spread - self._prior(self._x)
        self.kernel = self._fit(len(values))
        self._solve()

    def _scaled(self, rows: Matrix) -> Matrix:
        return (rows - self._centre) / self._scale  # type: ignore[no-any-return]

    def _prior(self, x: Matrix) -> Matrix:
        return self._size_effect * x[:, 0]

    def _fit(self, count: int) -> Kernel:
        """The kernel under which the values are likeliest, by one pass over its parameters from the usual ones."""
        kernel = Kernel((USUAL,) * len(self._weights))
        if count < LEAST_TO_FIT:
            return kernel
        some = np.linspace(0, count - 1, min(count, FITTED)).astype(int)
        x, y = self._x[some], self._residual[some]
        squares, products = [_squares(x * weights, x * weights) for weights in self._weights], x @ x.T / x.shape[1]
        tried = [replace(kernel, noise=noise) for noise in NOISES]
        kernel = max(tried, key=lambda each: _likelihood(each, squares, products, y))
        for place in range(len(self._weights)):
            lengths = [(*kernel.lengths[:place], length, *kernel.lengths[place + 1 :]) for length in LENGTHS]
            tried = [replace(kernel, lengths=each) for each in lengths]
            kernel = max(tried, key=lambda each: _likelihood(each, squares, products, y))
        tried = [replace(kernel, noise=noise, slope=slope) for noise in NOISES for slope in SLOPES]
        return max(tried, key=lambda each: _likelihood(each, squares, products, y))

    def _solve(self) -> None:
        covariance = self.kernel.between(self._x, self._x, self._weights)
        covariance[np.diag_indices_from(covariance)] += self.kernel.noise**2
        self._inverse = np.linalg.inv(np.linalg.cholesky(covariance))
        self._alpha = self._inverse.T @ (self._inverse @ self._residual)

    def believe(self, rows: Matrix) -> None:
        """Take what is expected at these rows for seen: open trials keep others away (kriging believer)."""
        if len(rows):
            expected, _ = self._posterior(self._scaled(rows))
            self._x = np.vstack([self._x, self._scaled(rows)])
            self._residual = np.concatenate([self._residual, expected])
            self._solve()

    def _posterior(self, x: Matrix) -> tuple[Matrix, Matrix]:
        """Mean and standard deviation of what the values are above the prior, in standard deviations of all values."""
        cross = self.kernel.between(self._x, x, self._weights)
        own = 1 + self.kernel.slope**2 * (x**2).sum(axis=1) / max(x.shape[1], 1)
        variance = own - ((self._inverse @ cross) ** 2).sum(axis=0)
        return cross.T @ self._alpha, np.sqrt(np.maximum(variance, 1e-12))

    def predict(self, rows: Matrix) -> tuple[Matrix, Matrix]:
        """Mean and standard deviation of the function at each row, in the units of the values."""
        x = self._scaled(rows)
        mean, deviation = self._posterior(x)
        return (mean + self._prior(x)) * self._spread + self._mean, deviation * self._spread

    def improvement(self, rows: Matrix, best: float) -> Matrix:
        """By how much each row may be expected to be below `best` (expected improvement)."""
        mean, deviation = self.predict(rows)
        gain = (best - mean) / deviation
        below = 0.5 * (1 + np.array([erf(each / sqrt(2)) for each in gain]))
        return deviation * (gain * below + np.exp(-(gain**2) / 2) / sqrt(2 * pi))


def _weights(groups: Sequence[str], name: str, alive: NDArray[np.bool_]) -> Matrix:
    """1/√count at the live columns of the group, so that its size does not count; 0 elsewhere."""
    own = np.array([group == name for group in groups]) & alive
    return own / sqrt(max(own.sum(), 1))


def _squares(first: Matrix, second: Matrix) -> Matrix:
    """Squared distances of rows."""
    squares: Matrix = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1)[None] - 2 * first @ second.T
    return np.maximum(squares, 0)


def _likelihood(kernel: Kernel, squares: Sequence[Matrix], products: Matrix, values: Matrix) -> float:
    """Log marginal likelihood, with a prior that prefers the usual lengths."""
    covariance = kernel.of(squares, products)
    covariance[np.diag_indices_from(covariance)] += kernel.noise**2
    factor = np.linalg.cholesky(covariance)
    white = np.linalg.solve(factor, values)
    unusual = sum(np.log(length / USUAL) ** 2 for length in kernel.lengths)
    return float(-0.5 * white @ white - np.log(np.diag(factor)).sum() - 0.25 * unusual)
