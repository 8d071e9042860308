"""Regression under covariate shift: least squares weighted by estimated ratios beside exact and no weights.

    python -m studies.benchmarks.covariate_shift --json covariate_shift.json
    python -m studies.benchmarks.covariate_shift --columns 20 --rows 2000

Labelled rows come from the source, rows without labels from the target, and the error is the mean squared one on fresh
labelled rows of the target. Source: N(0, I); target: half N(a, I) and half N(b, I), shifts orthogonal and 1.5 long,
which leaves exact weights 19 % of the effective sample size; both pushed through a fixed invertible map
(:class:`ratio_pairs.InvertibleMap`). The label bends along the shifts, so that the best line is another one on either
side, and a line is what is fitted. The ratio has the target as numerator, and sees no label.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from studies.benchmarks.files import write_rows
from studies.benchmarks.ratio_pairs import Gaussians, InvertibleMap, log_prob, mixture, rmse, sample
from torchcdm import DensityRatio
from torchcdm.apps.ratio import effective_sample_size, importance_weights

SHIFT = 1.5
"""Length of both shifts, in deviations."""

NOISE = 0.3
"""Deviation of the labels."""

TEST_ROWS = 20_000

CLIP = 0.999
"""Quantile at which the weights of the second row of this library are clipped."""

LogRatio = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Row:
    """One kind of weights.

    Attributes:
        columns: Of the table.
        weights: ``none``, ``exact``, or what estimated them.
        error: Mean squared error on the target.
        relative: That over the error with exact weights, less 1.
        effective: Effective sample size of the weights as a share of the rows.
        rmse: Of the log ratio on the source rows; None without one.
        seconds: Processor seconds of estimating the ratio.
    """

    columns: int
    weights: str
    error: float
    relative: float
    effective: float
    rmse: float | None
    seconds: float


def labels(latent: np.ndarray, draw: np.random.RandomState) -> np.ndarray:
    """(N,): bent along both shifts, straight along all columns."""
    a, b = latent[:, 0], latent[:, 1]
    bent = 0.5 * a**2 - 0.5 * b**2 + np.sin(2 * a) + np.cos(2 * b)
    return bent + latent.sum(1) / latent.shape[1] ** 0.5 + NOISE * draw.normal(size=len(latent))


def line(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Weighted least squares."""
    from sklearn.linear_model import LinearRegression

    return LinearRegression().fit(x, y, weights).predict


def estimators(seed: int) -> dict[str, Callable[[np.ndarray, np.ndarray], LogRatio]]:
    """What estimates log target / source from rows of both."""

    def own(target: np.ndarray, source: np.ndarray) -> LogRatio:
        return DensityRatio(seed, device="cpu", progress=True).fit(target, source).log_ratio

    def logistic(target: np.ndarray, source: np.ndarray) -> LogRatio:
        from sklearn.linear_model import LogisticRegression

        y = np.repeat([1, 0], [len(target), len(source)])
        return LogisticRegression(max_iter=1000).fit(np.concatenate([target, source]), y).decision_function

    return {"torchcdm": own, "gaussians": lambda *sides: Gaussians(*sides).log_ratio, "logistic": logistic}


def compare(columns: int, rows: int, seed: int) -> list[Row]:
    """All kinds of weights for one number of columns."""
    draw = np.random.RandomState(seed)
    source = mixture(np.ones(1), np.zeros((1, columns)), np.ones(1))
    target = mixture(np.ones(2), SHIFT * np.eye(columns)[:2], np.ones(2))
    move = InvertibleMap(columns)
    latent, unlabelled = sample(source, rows, seed), sample(target, rows, seed + 1)
    test = sample(target, TEST_ROWS, seed + 2)
    x, y, x_test, y_test = move(latent), labels(latent, draw), move(test), labels(test, draw)
    truth = log_prob(target, latent) - log_prob(source, latent)

    def row(name: str, log_ratio: np.ndarray, seconds: float = 0.0, clip: float | None = None) -> Row:
        weights = importance_weights(log_ratio, clip)
        error = float(np.mean(np.square(line(x, y, weights)(x_test) - y_test)))
        off = None if name in ("none", "exact") else rmse(log_ratio, truth)
        relative = error / results[0].error - 1 if results else 0.0
        return Row(columns, name, error, relative, effective_sample_size(weights) / rows, off, seconds)

    results: list[Row] = []
    results.append(row("exact", truth))
    results.append(row("none", np.zeros(rows)))
    for name, fit in estimators(seed).items():
        began = time.process_time()
        log_ratio = fit(move(unlabelled), x)
        seconds = time.process_time() - began
        results.append(row(name, log_ratio(x), seconds))
        if name == "torchcdm":
            results.append(row(f"{name}, {CLIP}", log_ratio(x), seconds, CLIP))
    return results


def table(rows: Sequence[Row]) -> str:
    """Lines to read."""
    lines = ["columns  weights          error  against exact  sample size  log ratio RMSE  seconds"]
    lines += [
        f"{r.columns:7}  {r.weights:15} {r.error:6.3f} {100 * r.relative:+12.1f} % {100 * r.effective:10.1f} % "
        f"{'' if r.rmse is None else f'{r.rmse:.3f}':>15} {r.seconds:8.1f}"
        for r in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, nargs="+", default=[5, 20, 50], metavar="D")
    parser.add_argument("--rows", type=int, default=4000, metavar="N", help="rows of source and of target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows")
    options = parser.parse_args(arguments)

    rows: list[Row] = []
    for columns in options.columns:
        rows += compare(columns, options.rows, options.seed)
        print(table([row for row in rows if row.columns == columns]), flush=True)
        write_rows(rows, options.json)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
