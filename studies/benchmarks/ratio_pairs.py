"""What the benchmarks of density ratios share: an invertible map, mixtures with a known ratio, and their report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchcdm.diffusion.exact import GaussianMixture
from torchcdm.diffusion.schedules import UniformSigmaSchedule

SCHEDULE = UniformSigmaSchedule(2)
"""Level 0 of every schedule is the data."""


class InvertibleMap:
    """A fixed map of R^d onto itself that mixes and bends the coordinates: a density ratio does not notice it.

    Two additive couplings of random halves a and b, ``b <- b + 0.5 tanh(a W)`` and the same for a, W orthogonal and
    random; then ``y <- y + 0.2 sin(2 y)`` in every coordinate, which is increasing.

    Args:
        dim: d.
        seed: Of the halves and of W; of an odd d one half is smaller, and W is cut.
    """

    def __init__(self, dim: int, seed: int = 0) -> None:
        draw = np.random.RandomState(seed)
        self.halves = np.array_split(draw.permutation(dim), 2)
        sizes = [len(half) for half in self.halves]
        self.weights = [orthogonal(sizes[0], draw)[:a, :b] for a, b in (sizes, sizes[::-1])]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(N, d) to (N, d)."""
        y = x.copy()
        for (a, b), weight in zip((self.halves, self.halves[::-1]), self.weights, strict=True):
            y[:, b] += 0.5 * np.tanh(y[:, a] @ weight)
        return y + 0.2 * np.sin(2 * y)


def orthogonal(dim: int, draw: np.random.RandomState) -> np.ndarray:
    """A random orthogonal matrix, (dim, dim), uniform."""
    q, r = np.linalg.qr(draw.normal(size=(dim, dim)))
    return q * np.sign(np.diag(r))


def mixture(weights: np.ndarray, means: np.ndarray, covariances: np.ndarray) -> GaussianMixture:
    """From arrays: (K,), (K, d), and (K, d, d) or variances (K,)."""
    parts = (np.asarray(part, dtype=np.float64) for part in (weights, means, covariances))
    return GaussianMixture(*map(torch.from_numpy, parts))


def sample(distribution: GaussianMixture, count: int, seed: int) -> np.ndarray:
    """(count, d), float64."""
    return distribution.sample(count, torch.Generator().manual_seed(seed)).numpy()


def log_prob(distribution: GaussianMixture, x: np.ndarray) -> np.ndarray:
    """(N,), float64."""
    return distribution.log_prob(torch.from_numpy(x), 0, SCHEDULE).numpy()


def rmse(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Root of the mean squared error."""
    return float(np.sqrt(np.mean(np.square(estimate - truth))))


class Gaussians:
    """Two fitted Gaussians and nothing else: what every estimator should beat where the data are not Gaussian."""

    def __init__(self, numerator: np.ndarray, denominator: np.ndarray) -> None:
        from scipy.stats import multivariate_normal

        self.sides = [multivariate_normal(x.mean(0), np.cov(x.T)) for x in (numerator, denominator)]

    def log_ratio(self, x: np.ndarray) -> np.ndarray:
        """(N, d) to (N,), nats."""
        p, q = (side.logpdf(x) for side in self.sides)
        return p - q


def write_rows(rows: Sequence[Any], path: Path | None) -> None:
    """Dataclasses to ``{"rows": [...]}``; nothing without a path."""
    if path is not None:
        path.write_text(json.dumps({"rows": [asdict(row) for row in rows]}, indent=1) + "\n", encoding="utf-8")
