"""Density of tables: the CDM by one pass and by its probability flow, beside flows, kernels and mixtures.

    python -m studies.benchmarks.table_density --budget 60 --json table_density.json
    python -m studies.benchmarks.table_density --tables wine coast --contenders cdm nsf

Every contender sees the same rows: the test rows are a fold that nobody trains on, the validation rows those that
:class:`torchcdm.estimators.CDMDensity` holds out, and the rest are for training. All see the columns as the
estimator's own model does (:class:`torchcdm.units.ColumnTransform` of the training rows: dequantised, and each brought
near a normal), stop on the validation rows, and choose among their settings there. All have the same budget of
processor seconds a fold, for all settings together, of which early stopping may leave some. The unit is nats a row, in
the units of the table; the error is the standard error over test rows.

One pass is the estimator's: less log Z, estimated from the base density. The estimate comes after the budget, some
seconds that are in the time shown; the flow beside it needs none. In up to three dimensions the integral of one
pass is printed.

Tables: digits, breast cancer and wine of scikit-learn, and two that are drawn from a density known in closed form
(:class:`Houses`), in the manner of the California housing table: ``coast``, the two columns of the place, and
``houses``, eight columns.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.model_selection import KFold
from torch import Tensor

from studies.benchmarks.flows import score_rows, train_flow
from studies.budget import Budget
from studies.compare.sklearn_peers import choose
from torchcdm.apps.baselines import Candidates, gaussians, kernels, mixtures
from torchcdm.estimators import CDMDensity
from torchcdm.estimators.base import data_frame, noise_draws, noisy_copies
from torchcdm.runtime.files import write_json
from torchcdm.units import ColumnTransform
from torchcdm.units.lattice import spread

FLOW_ROWS = 300
"""The probability flow scores at most so many test rows: it takes some hundred passes."""

FLOOR = 1e-5
"""Added to the variances of mixtures, model units."""

Density = Callable[[np.ndarray], np.ndarray]
"""log-density of rows (N, d) in model units, nats."""


# --- tables ----------------------------------------------------------------------------------------------------------


class Houses:
    """Rows in the manner of the California housing table, from a density that is known in closed form.

    Column k is ``start + g(m + s n)``: an increasing g, a start, a mean m and a width s that depend on the columns
    before it, and n from a mixture of two normals. So its conditional density is that of n over the slope of g.

    Columns: latitude (degrees), longitude (a curved coast, which is sharp, and a long way inland), income, age of the
    house (0 ... 52 years), rooms, share of bedrooms, occupants, value (0 ... 5).
    """

    names = ("latitude", "longitude", "income", "age", "rooms", "bedrooms", "occupants", "value")
    tops: ClassVar[dict[int, float]] = {0: 10.0, 3: 52.0, 7: 5.0}
    """Columns with an upper end, and where it is: g is a sigmoid; elsewhere exp."""

    def rows(self, count: int, seed: int) -> np.ndarray:
        """(count, 8)."""
        draw = np.random.RandomState(seed)
        x = np.empty((count, len(self.names)))
        for k in range(len(self.names)):
            start, mean, width, share, shift = self._conditional(x, k)
            noise = draw.normal(size=count) + shift * (draw.uniform(size=count) < share)
            x[:, k] = start + self._link(k, mean + width * noise)[0]
        return x

    def log_prob(self, x: np.ndarray) -> np.ndarray:
        """Of all columns, or of the first ones where there are no more: (N,)."""
        total = np.zeros(len(x))
        for k in range(x.shape[1]):
            start, mean, width, share, shift = self._conditional(x, k)
            latent = self._inverse_link(k, x[:, k] - start)
            n = (latent - mean) / width
            parts = [np.log(p) - 0.5 * (n - s) ** 2 for p, s in ((1 - share, 0.0), (share, shift))]
            total += np.logaddexp(*parts) - 0.5 * math.log(2 * math.pi) - np.log(width * self._link(k, latent)[1])
        return total

    @staticmethod
    def _conditional(x: np.ndarray, k: int) -> tuple[Any, Any, Any, float, float]:
        """Start, mean, width, and the share and shift of the second normal of column k."""
        if k == 0:
            return 32.0, -1.2, 0.35, 0.45, 5.0
        coast = -117 - 0.75 * (x[:, 0] - 32) - 1.2 * np.sin(0.9 * (x[:, 0] - 32))
        if k == 1:
            return coast, -0.9 + 0.8 * np.cos(0.7 * (x[:, 0] - 32)), 0.6, 0.25, 2.5
        inland = np.log(x[:, 1] - coast)
        if k == 2:
            return 0.0, 1.3 - 0.2 * np.tanh(inland), 0.35, 0.2, 1.5
        log_income = np.log(x[:, 2])
        if k == 3:
            return 0.0, 0.6 - 0.4 * inland, 0.7 + 0.2 * np.tanh(inland), 0.1, 3.0
        if k == 4:
            return 0.0, 1.2 + 0.35 * log_income + 0.05 * inland, 0.15, 0.05, 4.0
        if k == 5:
            return 0.0, 0.1 - 0.8 * np.log(x[:, 4]), 0.1 + 0.05 / x[:, 2], 0.05, 3.0
        if k == 6:
            return 0.0, 0.9 + 0.1 * np.log(x[:, 4]) - 0.1 * log_income, 0.2, 0.05, 3.0
        mean = -1.4 + 1.4 * log_income - 0.3 * inland + 0.01 * x[:, 3] - 0.8 * np.log(x[:, 6])
        return 0.0, mean, 0.4, 0.1, 3.0

    def _link(self, k: int, latent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The increasing map g of a column, and its slope."""
        if k in self.tops:
            sigmoid = 1 / (1 + np.exp(-latent))
            return self.tops[k] * sigmoid, self.tops[k] * sigmoid * (1 - sigmoid)
        return np.exp(latent), np.exp(latent)

    def _inverse_link(self, k: int, value: np.ndarray) -> np.ndarray:
        if k in self.tops:
            return np.log(value / (self.tops[k] - value))
        return np.log(value)


@dataclass(frozen=True)
class Table:
    """Rows to learn from.

    Attributes:
        x: (N, columns).
        folds: Test folds of five that are used.
        truth: The density that the rows were drawn from, where it is known.
    """

    x: np.ndarray
    folds: int
    truth: Density | None = None


def load_table(name: str) -> Table:
    """A table by its name in :data:`TABLES`."""
    from sklearn import datasets

    houses = Houses()
    match name:
        case "digits":
            return Table(datasets.load_digits().data, 1)
        case "breast-cancer":
            return Table(datasets.load_breast_cancer().data, 3)
        case "wine":
            return Table(datasets.load_wine().data, 5)
        case "coast":
            return Table(houses.rows(5000, 0)[:, :2], 1, houses.log_prob)
    return Table(houses.rows(20_000, 0), 1, houses.log_prob)


TABLES = ("wine", "breast-cancer", "digits", "coast", "houses")


# --- contenders --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Rows of one fold in model units, dequantised: training and validation."""

    train: np.ndarray
    validation: np.ndarray


@dataclass(frozen=True)
class Fitted:
    """What a contender chose.

    Attributes:
        setting: In words.
        validation: Mean log-likelihood of the validation rows.
        log_prob: The density.
    """

    setting: str
    validation: float
    log_prob: Density


Contender = Callable[[Rows, Budget, int], Fitted]
"""Fits to rows, within a budget that runs already, with a seed."""


def classical(candidates: Callable[[np.ndarray, float, int], Candidates]) -> Contender:
    """A family of scikit-learn, of which validation chooses one."""

    def contender(rows: Rows, budget: Budget, seed: int) -> Fitted:
        choice = choose(candidates(rows.train, FLOOR, seed), rows.validation, budget)
        return Fitted(choice.name, choice.validation, choice.model.score_samples)

    return contender


def zuko_flow(kind: str) -> Contender:
    """A normalising flow of zuko: two sizes, of which the second has what the first leaves of the budget."""

    def contender(rows: Rows, budget: Budget, seed: int) -> Fitted:
        import zuko

        train, validation = as_float(rows.train), as_float(rows.validation)
        found = []
        for transforms, width, share in ((3, 64, 0.5), (5, 128, 1.0)):
            torch.manual_seed(seed)
            build = {"nsf": zuko.flows.NSF, "maf": zuko.flows.MAF}[kind]
            flow = build(train.shape[1], 0, transforms=transforms, hidden_features=(width, width))
            left = share * (budget.seconds - budget.elapsed)
            value = train_flow(flow, [train], [validation], left, seed)
            found.append((value, f"{transforms} x ({width}, {width})", flow))
        value, name, flow = max(found, key=lambda item: item[0])
        return Fitted(name, value, lambda x: score_rows(flow, [as_float(x)]))

    return contender


def gaussian_mixtures(train: np.ndarray, floor: float, seed: int) -> Candidates:
    """Mixtures of one component and more."""
    yield from gaussians(train, floor, seed)
    yield from mixtures(train, floor, seed)


def as_float(x: np.ndarray) -> Tensor:
    return torch.from_numpy(x).float()


PEERS: dict[str, Contender] = {
    "nsf": zuko_flow("nsf"),
    "maf": zuko_flow("maf"),
    "gmm": classical(gaussian_mixtures),
    "kde": classical(kernels),
}
TITLES = {
    "truth": "the density itself", "cdm": "CDM, one pass", "cdm-flow": "CDM, probability flow", "nsf": "zuko NSF",
    "maf": "zuko MAF", "gmm": "Gaussian mixture", "kde": "kernel density",
}  # fmt: skip


# --- the comparison ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One contender on one table.

    Attributes:
        table: Its name.
        name: The contender.
        nats: Mean test log-likelihood.
        se: Standard error over test rows.
        rows: Test rows.
        seconds: Processor seconds of fitting, mean over folds.
        validation: Mean log-likelihood of the validation rows, mean over folds; None where there is none.
        setting: What validation chose in the last fold.
        integral: Integral of the density, where it was computed.
    """

    table: str
    name: str
    nats: float
    se: float
    rows: int
    seconds: float
    validation: float | None
    setting: str
    integral: float | None = None


def compare(name: str, contenders: Sequence[str], budget: float, seed: int, folds: int | None = None) -> list[Row]:
    """All contenders on one table, fold after fold, each with a budget of processor seconds."""
    table = load_table(name)
    values: dict[str, list[np.ndarray]] = {}
    seconds: dict[str, list[float]] = {}
    validation: dict[str, list[float]] = {}  # of those that have one
    settings: dict[str, str] = {}
    integral = None
    splits = list(KFold(5, shuffle=True, random_state=seed).split(table.x))[: folds or table.folds]
    for fold, (rest, test) in enumerate(splits):

        def record(
            who: str, scores: np.ndarray, took: float, watched: float | None = None, setting: str = ""
        ) -> None:
            values.setdefault(who, []).append(scores)
            if watched is not None:
                validation.setdefault(who, []).append(watched)
            seconds.setdefault(who, []).append(took)
            settings[who] = setting

        x, x_test = table.x[rest], table.x[test]
        if table.truth is not None:
            record("truth", table.truth(x_test), 0.0)
        # Without the CDM in the comparison it is only asked for the rows that it holds out.
        options = {} if "cdm" in contenders else {"steps": 1, "components": 1}
        density = CDMDensity(random_state=seed + fold, device="cpu", max_seconds=budget, **options)
        clock = Budget(budget, "processor")
        density.clock = clock.now
        density.fit(x)
        took = clock.elapsed
        columns, held_out = density.columns_, density.validation_indices_
        if "cdm" in contenders:
            watched = float(density.score_samples(x[held_out]).mean())
            z = density.normalizer_
            setting = f"log Z {z.value:.3f} +- {z.se:.3f}, effective sample size {z.ess:.0f}"
            record("cdm", density.score_samples(x_test), took, watched, setting)
            integral = integrate(density, x) if x.shape[1] <= 3 else None
            density.set_params(likelihood="flow")
            record("cdm-flow", density.score_samples(x_test[:FLOW_ROWS]), took)
        codes = lambda rows, table=density.columns_: table.encode(data_frame(rows, name, like=table)).x  # noqa: E731
        train = noisy_copies(columns, codes(np.delete(x, held_out, 0)), seed + fold)
        transform = ColumnTransform.fit(train, columns.cells)
        prepare = lambda rows, transform=transform: transform(rows).numpy()  # noqa: E731
        log_det = lambda rows, transform=transform: transform.log_det(rows).numpy()  # noqa: E731
        held_out_rows = noisy_copies(columns, codes(x[held_out]), seed + fold, 1)
        rows = Rows(prepare(train), prepare(held_out_rows))
        noise = noise_draws(columns, seed + fold)
        for peer in [key for key in contenders if key in PEERS]:
            clock = Budget(budget, "processor")
            fitted = PEERS[peer](rows, clock, seed + fold)
            took = clock.elapsed
            draws = [spread(codes(x_test), draw, columns.cells) for draw in noise]
            scores = np.mean([fitted.log_prob(prepare(rows)) + log_det(rows) for rows in draws], axis=0)
            watched = fitted.validation + float(log_det(held_out_rows).mean())
            record(peer, scores, took, watched, fitted.setting)
    result = []
    for who, parts in values.items():
        scores = np.concatenate(parts)
        mean, error = float(scores.mean()), float(scores.std() / math.sqrt(len(scores)))
        took = float(np.mean(seconds[who]))
        watched = float(np.mean(validation[who])) if who in validation else None
        mass = integral if who == "cdm" else None
        result.append(Row(name, who, mean, error, len(scores), took, watched, settings[who], mass))
    return result


def integrate(density: CDMDensity, x: np.ndarray, points: int = 90_000) -> float:
    """Integral of one pass over a box of three times the data's range, by the midpoint rule."""
    low, high = x.min(0), x.max(0)
    low, high = low - (high - low), high + (high - low)
    dim = x.shape[1]
    side = round(points ** (1 / dim))
    axes = [lo + (hi - lo) * (np.arange(side) + 0.5) / side for lo, hi in zip(low, high, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, dim)
    return float(np.exp(density.score_samples(grid)).sum() * np.prod((high - low) / side))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Test log-likelihood of tables, nats a row.",
        epilog="example: python -m studies.benchmarks.table_density --tables wine --budget 20",
    )
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--contenders", nargs="+", choices=["cdm", *PEERS], default=["cdm", *PEERS])
    parser.add_argument("--budget", type=float, default=60.0, help="processor seconds of each contender, a fold")
    parser.add_argument("--folds", type=int, help="test folds of five, instead of each table's own number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for name in options.tables:
        for row in compare(name, options.contenders, options.budget, options.seed, options.folds):
            rows.append(row)
            extra = "" if row.integral is None else f"  integral {row.integral:.4f}"
            watched = "" if row.validation is None else f"  validation {row.validation:.3f}"
            title = TITLES[row.name]
            print(f"{name:14} {title:22} {row.nats:10.3f} +- {row.se:.3f}  {row.rows:5} rows  {row.seconds:6.1f} s"
                  f"{watched}  {row.setting}{extra}", flush=True)  # fmt: skip
        if options.json is not None:
            settings = {key: getattr(options, key) for key in ("budget", "seed", "threads")}
            write_json(options.json, settings | {"rows": [asdict(row) for row in rows]})


if __name__ == "__main__":
    main()
