"""Density ratios of bent mixtures, known exactly: this library beside kernel estimators and classifiers.

    pip install "densratio>=0.4"
    python -m studies.benchmarks.ratio_peers --json ratio_peers.json
    python -m studies.benchmarks.ratio_peers --dims 8 --estimators joint

Numerator and denominator are mixtures of four Gaussians each, whose components differ in place and shape, pushed
through a fixed non-linear invertible map (:class:`ratio_pairs.InvertibleMap`). All estimators see the same rows,
standardised together, and are scored by the RMSE of the log ratio, in nats, on fresh points, half of each source.

Kernel estimators say zero far from their centres: their log ratio is cut at -10 and 10 nats, which helps them; so is
everyone else's. RuLSIF estimates p / (0.1 p + 0.9 q), from which p / q is computed. Both choose their width among
shares of the median distance.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from studies.benchmarks.files import write_rows
from studies.benchmarks.ratio_pairs import (
    Gaussians,
    InvertibleMap,
    log_prob,
    mixture,
    orthogonal,
    rmse,
    sample,
)
from studies.exact import GaussianMixture
from torchcdm import DensityRatio

COMPONENTS = 4
LIMIT = 10.0
"""Nats at which all log ratios are cut, the exact ones too."""

WIDTHS = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.5)
"""Of the kernels, in median distances."""

LogRatio = Callable[[np.ndarray], np.ndarray]
Estimator = Callable[[np.ndarray, np.ndarray, int], LogRatio]
"""Fits to numerator and denominator with a seed."""


@dataclass(frozen=True)
class Row:
    """One estimator in one dimension.

    Attributes:
        dim: d.
        estimator: Its name.
        rmse: Of the log ratio over fresh points, nats.
        correlation: Of estimate and truth.
        seconds: Processor seconds of fitting.
        note: What it chose, if it says so.
    """

    dim: int
    estimator: str
    rmse: float
    correlation: float
    seconds: float
    note: str = ""


def two_mixtures(dim: int, seed: int) -> tuple[GaussianMixture, GaussianMixture]:
    """Numerator and denominator; how far they are apart hardly depends on the dimension."""
    draw = np.random.RandomState(seed)
    places = 2.5 * draw.normal(size=(COMPONENTS, dim)) / dim**0.5
    sides = []
    for _ in range(2):
        covariances = np.empty((COMPONENTS, dim, dim))
        for k in range(COMPONENTS):
            turn = orthogonal(dim, draw)
            covariances[k] = (turn * np.concatenate([[0.3, 2.0], np.full(dim - 2, 0.6)])) @ turn.T
        means = places + 0.8 * draw.normal(size=(COMPONENTS, dim)) / dim**0.5
        sides.append(mixture(draw.dirichlet(np.full(COMPONENTS, 4.0)), means, covariances))
    return sides[0], sides[1]


def own(numerator: np.ndarray, denominator: np.ndarray, seed: int) -> LogRatio:
    """This library with its default settings."""
    return DensityRatio(seed, device="cpu").fit(numerator, denominator).log_ratio


def classifier(name: str) -> Estimator:
    """Log odds of a classifier of scikit-learn, both sources as frequent."""

    def fit(numerator: np.ndarray, denominator: np.ndarray, seed: int) -> LogRatio:
        from sklearn.ensemble import HistGradientBoostingClassifier
        from sklearn.linear_model import LogisticRegression

        model = {
            "logistic": LogisticRegression(max_iter=1000),
            "boosting": HistGradientBoostingClassifier(early_stopping=True, random_state=seed),
        }[name]
        y = np.repeat([1, 0], [len(numerator), len(denominator)])
        return model.fit(np.concatenate([numerator, denominator]), y).decision_function

    return fit


def kernels(method: str, alpha: float = 0.1) -> Estimator:
    """KLIEP or RuLSIF of densratio."""

    def fit(numerator: np.ndarray, denominator: np.ndarray, seed: int) -> LogRatio:
        from densratio import densratio
        from scipy.spatial.distance import pdist

        np.random.seed(seed)
        widths = float(np.median(pdist(np.concatenate([numerator[:300], denominator[:300]])))) * np.array(WIDTHS)
        options = {"alpha": alpha} if method == "RuLSIF" else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = densratio(numerator, denominator, method, sigma_range=widths, verbose=False, **options)

        def log_ratio(x: np.ndarray) -> np.ndarray:
            value = np.maximum(np.asarray(found.compute_density_ratio(x), dtype=np.float64), np.exp(-LIMIT))
            if method == "RuLSIF":
                value = (1 - alpha) * value / np.maximum(1 - alpha * value, np.exp(-LIMIT))
            return np.log(value)

        return log_ratio

    return fit


ESTIMATORS: dict[str, Estimator] = {
    "joint": own,
    "gaussians": lambda numerator, denominator, seed: Gaussians(numerator, denominator).log_ratio,
    "logistic": classifier("logistic"),
    "boosting": classifier("boosting"),
    "kliep": kernels("KLIEP"),
    "rulsif": kernels("RuLSIF"),
}


def compare(dim: int, names: Sequence[str], rows: int, seed: int) -> list[Row]:
    """All estimators in one dimension."""
    numerator, denominator = two_mixtures(dim, seed)
    bend = InvertibleMap(dim)
    latent = [sample(side, rows, seed + k) for k, side in enumerate((numerator, denominator))]
    test = np.concatenate([sample(side, 2000, seed + 10 + k) for k, side in enumerate((numerator, denominator))])
    truth = np.clip(log_prob(numerator, test) - log_prob(denominator, test), -LIMIT, LIMIT)
    train, x = [bend(z) for z in latent], bend(test)
    mean, deviation = np.concatenate(train).mean(0), np.concatenate(train).std(0)
    train, x = [(y - mean) / deviation for y in train], (x - mean) / deviation
    results = [Row(dim, "constant", rmse(np.zeros(len(truth)), truth), 0.0, 0.0)]
    for name in names:
        began = time.process_time()
        log_ratio = ESTIMATORS[name](*train, seed)
        seconds = time.process_time() - began
        estimate = np.clip(log_ratio(x), -LIMIT, LIMIT)
        correlation = float(np.corrcoef(estimate, truth)[0, 1])
        results.append(Row(dim, name, rmse(estimate, truth), correlation, seconds))
        print(table(results[-1:]), flush=True)
    return results


def table(rows: Sequence[Row]) -> str:
    """Lines to read."""
    lines = ["  d  estimator    RMSE  correlation  seconds"]
    lines += [f"{r.dim:3}  {r.estimator:10} {r.rmse:6.3f} {r.correlation:12.3f} {r.seconds:8.1f}" for r in rows]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 8, 32, 64], metavar="D", help="even")
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS))
    parser.add_argument("--rows", type=int, default=4000, metavar="N", help="training rows of each source")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows")
    options = parser.parse_args(arguments)

    rows: list[Row] = []
    for dim in options.dims:
        rows += compare(dim, options.estimators, options.rows, options.seed)
        write_rows(rows, options.json)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
