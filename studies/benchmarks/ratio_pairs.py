"""Density ratios of correlated pairs, bent and rotated, and what all benchmarks of density ratios share.

    python -m studies.benchmarks.ratio_pairs --json studies/results/ratio_pairs.json
    python -m studies.benchmarks.ratio_pairs --cases sinh+rotated:10:20000 plain:2:5000

A case KIND:NATS:ROWS has 20 independent pairs of columns with the correlation rho, rho² = 1 - exp(-nats / 10),
over 40 columns of N(0, I); then every column is bent, then all are turned by one random orthogonal matrix,
as KIND says. The mean of the log ratio over the numerator is NATS whatever the kind. ROWS are those of each source.

``ours`` is DensityRatio with its defaults, ``gaussians`` two fitted Gaussians, ``classifier`` the log odds of a
network of two hidden layers (scikit-learn, 128 and 128, early stopping) on standardised columns. For each: the mean
over fresh points of the numerator, and the RMSE of single points of the numerator and of the denominator.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from studies.benchmarks.files import write_rows
from studies.exact import GaussianMixture
from torchcdm import DensityRatio
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


def correlated(dim: int, nats: float, count: int, draw: np.random.RandomState) -> np.ndarray:
    """(count, dim): the columns 2k and 2k+1 are a pair."""
    rho = correlation(dim, nats)
    first, noise = draw.normal(size=(2, count, dim // 2))
    return np.stack([first, rho * first + np.sqrt(1 - rho**2) * noise], 2).reshape(count, dim)


def correlation(dim: int, nats: float) -> float:
    """Of each pair."""
    return float(np.sqrt(-np.expm1(-4 * nats / dim)))


def exact_log_ratio(x: np.ndarray, nats: float) -> np.ndarray:
    """log p/q of rows (N, d), nats (N,)."""
    rho = correlation(x.shape[1], nats)
    a, b = x[:, ::2], x[:, 1::2]
    pairs = (2 * rho * a * b - rho**2 * (a**2 + b**2)) / (2 * (1 - rho**2))
    return pairs.sum(1) - 0.25 * x.shape[1] * np.log1p(-(rho**2))


class Gaussians:
    """Two fitted Gaussians and nothing else: what every estimator should beat where the data are not Gaussian."""

    def __init__(self, numerator: np.ndarray, denominator: np.ndarray) -> None:
        from scipy.stats import multivariate_normal

        self.sides = [multivariate_normal(x.mean(0), np.cov(x.T)) for x in (numerator, denominator)]

    def log_ratio(self, x: np.ndarray) -> np.ndarray:
        """(N, d) to (N,), nats."""
        p, q = (side.logpdf(x) for side in self.sides)
        return p - q


BENDS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "plain": lambda x: x,
    "asinh": np.arcsinh,
    "sinh": np.sinh,
    "half-cube": lambda x: np.sign(x) * np.abs(x) ** 1.5,
}
DIM = 40
BENT = tuple(BENDS)[1:]
CASES = (
    *(f"{kind}:10:20000" for kind in ("plain", "rotated", *BENT, *(f"{bend}+rotated" for bend in BENT))),
    *(f"{kind}:{nats}:20000" for nats in (2, 20) for kind in ("rotated", "sinh", "sinh+rotated")),
    *(f"{kind}:10:{rows}" for rows in (5000, 50_000) for kind in ("rotated", "sinh", "sinh+rotated")),
)


@dataclass(frozen=True)
class Row:
    """One estimator in one case: see the head of this file; ``seconds`` of processor time are those of fitting."""

    kind: str
    nats: float
    rows: int
    estimator: str
    exact: float
    estimate: float
    error: float
    rmse: float
    rmse_denominator: float
    seconds: float
    note: str = ""


def classifier(numerator: np.ndarray, denominator: np.ndarray, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """Log odds of a network that tells the sources apart."""
    from sklearn.neural_network import MLPClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    network = MLPClassifier((128, 128), early_stopping=True, random_state=seed)
    model = make_pipeline(StandardScaler(), network)
    model.fit(np.concatenate([numerator, denominator]), np.repeat([1, 0], [len(numerator), len(denominator)]))

    def log_odds(x: np.ndarray) -> np.ndarray:
        """Of the last layer: probabilities would be cut at float64's."""
        hidden = model[0].transform(x)
        for weights, bias in zip(network.coefs_[:-1], network.intercepts_[:-1], strict=True):
            hidden = np.maximum(hidden @ weights + bias, 0)
        return (hidden @ network.coefs_[-1] + network.intercepts_[-1])[:, 0]

    return log_odds


def compare(case: str, estimators: Sequence[str], seed: int, points: int = 10_000) -> list[Row]:
    """All estimators in one case."""
    kind, nats, count = case.split(":")
    bend = BENDS[kind.removesuffix("rotated").removesuffix("+") or "plain"]
    turn = orthogonal(DIM, np.random.RandomState(1)) if kind.endswith("rotated") else np.eye(DIM)
    draw, rows = np.random.RandomState(seed), int(count)
    latent = [correlated(DIM, float(nats), rows, draw), draw.normal(size=(rows, DIM))]
    tests = [correlated(DIM, float(nats), points, draw), draw.normal(size=(points, DIM))]
    truths = [exact_log_ratio(x, float(nats)) for x in tests]
    (p, q), tests = ([bend(x) @ turn for x in part] for part in (latent, tests))
    found = []
    for name in estimators:
        began, note = time.process_time(), ""
        if name == "ours":
            ratio = DensityRatio(seed, device="cpu").fit(p, q)
            log_ratio, note = ratio.log_ratio, " ".join(f"{name} {weight:.2f}" for name, weight in ratio.blend.items())
        else:
            log_ratio = Gaussians(p, q).log_ratio if name == "gaussians" else classifier(p, q, seed)
        seconds = time.process_time() - began
        estimates = [log_ratio(x) for x in tests]
        mean, exact = float(estimates[0].mean()), float(truths[0].mean())
        errors = [rmse(estimate, truth) for estimate, truth in zip(estimates, truths, strict=True)]
        found.append(Row(kind, float(nats), rows, name, exact, mean, mean / exact - 1, *errors, seconds, note))
        print(table(found[-1:]), flush=True)
    return found


def table(rows: Sequence[Row]) -> str:
    """Lines to read."""
    return "\n".join(
        f"{r.kind:18} {r.nats:4g} {r.rows:6} {r.estimator:10} {r.exact:7.2f} {r.estimate:7.2f} "
        f"{100 * r.error:+7.1f} % {r.rmse:8.3f} {r.rmse_denominator:8.3f} {r.seconds:6.0f} s  {r.note}"
        for r in rows
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES, metavar="KIND:NATS:ROWS")
    parser.add_argument("--estimators", nargs="+", default=("ours", "gaussians", "classifier"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[Row] = []
    for case in options.cases:
        rows += compare(case, options.estimators, options.seed)
        write_rows(rows, options.json)


if __name__ == "__main__":
    main()
