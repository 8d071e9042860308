"""Regression without training: a linear part, and a smooth one where rows that are left out find it better."""

from itertools import product
from typing import NamedTuple

import numpy as np
from sklearn.metrics.pairwise import rbf_kernel

PENALTIES = np.geomspace(1e-2, 1e4, 13)
WIDTHS = (0.1, 0.3, 1.0, 3.0)  # kernels that are tried: exp(-width * mean squared distance)
ROWS, LANDMARKS = 10_000, 400  # rows that the smooth part is fitted to, and kernels that it is made of, at most
LEVERAGE = 0.99  # penalties that leave a row more weight than this in its own prediction are not tried
LEFT = 0.9  # the smooth part of a column is kept where it leaves less than this of the variance


class SmoothRegression(NamedTuple):
    """y (N, p) from x (N, q): linear, plus kernels exp(-|x axes - landmark|²)."""

    weights: np.ndarray  # of x and of one, (p, q + 1)
    axes: np.ndarray  # (q, r)
    landmarks: np.ndarray  # (M, r)
    coefficients: np.ndarray  # of the kernels, (M, p)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        y = x @ self.weights[:, :-1].T + self.weights[:, -1]
        for k in range(0, len(x), ROWS):  # kernels of all rows of a large table would be gigabytes
            y[k : k + ROWS] += rbf_kernel(x[k : k + ROWS] @ self.axes, self.landmarks, 1.0) @ self.coefficients
        return y


def fit_smooth(x: np.ndarray, y: np.ndarray, smooth: bool = True) -> tuple[SmoothRegression, np.ndarray]:
    """The regression of y (N, p) on x (N, q), rows in random order, and its errors at rows that are left out.

    Ridge regression, then of its errors on kernels (Nyström's), unless it shall not be ``smooth``. Distances are those
    of x as it is, without its correlations, or of the linear part: what says the most of rows that are left out.
    """
    mean, offset = x.mean(0), y.mean(0)
    slope, errors, _ = _ridge(x - mean, y - offset)
    values, basis = np.linalg.eigh(np.cov(x.T).reshape(x.shape[1], -1))
    uncorrelated, predicted = basis / np.sqrt(values.clip(1e-6 * values[-1])), slope / (x @ slope).std(0).clip(1e-12)
    spaces = np.eye(len(slope)), uncorrelated, predicted
    weights, least = np.c_[slope.T, offset - mean @ slope], np.inf
    found, errors = SmoothRegression(weights, spaces[0], x[:1], np.zeros((1, y.shape[1]))), errors[:ROWS]
    left_out = errors
    for space, width in product(spaces, WIDTHS) if smooth else ():
        axes = space * np.sqrt(width / space.shape[1])
        z = x[:ROWS] @ axes
        values, basis = np.linalg.eigh(rbf_kernel(z[:LANDMARKS], gamma=1.0))
        # Numbers whose inner products are the kernels, as well as so many can have them.
        root = (basis / np.sqrt(values.clip(1e-300)))[:, values > 1e-7 * values[-1]]
        coefficients, smaller, left = _ridge(rbf_kernel(z, z[:LANDMARKS], 1.0) @ root, errors)
        if left.mean() < least:
            least, left_out = left.mean(), np.where(left < LEFT, smaller, errors)
            found = SmoothRegression(weights, axes, z[:LANDMARKS], root @ coefficients * (left < LEFT))
    return found, np.r_[left_out, y[ROWS:] - found(x[ROWS:])]


def _ridge(features: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coefficients, errors of rows that are left out (N, p), and their share of the variance; a penalty each."""
    values, basis = np.linalg.eigh(features.T @ features)
    projected = features @ basis
    onto, variance = projected.T @ y, y.var(0).clip(1e-300)
    best, found, left = np.zeros_like(onto), y, np.ones(y.shape[1])
    shrunk = 1 / (values.clip(0)[:, None] + PENALTIES)
    leverages = projected**2 @ shrunk
    for k in np.flatnonzero(leverages.max(0) < LEVERAGE):
        coefficients = shrunk[:, k, None] * onto
        errors = (y - projected @ coefficients) / (1 - leverages[:, k, None])
        share = (errors**2).mean(0) / variance
        best = np.where(share < left, coefficients, best)
        found, left = np.where(share < left, errors, found), np.minimum(left, share)
    return basis @ best, found, left
