"""Tables of ADBench: CDMOutlierDetector beside ten detectors of PyOD, all with default settings.

    python -m studies.benchmarks.anomaly_tables --json studies/results/anomaly_tables.json --plot ranks.png

A row that the file holds already is not run again. The protocol is that of ADBench (Han et al. 2022) without labels:
70 % of the rows, outliers among them, are what is fitted, 30 % are scored; classes are split evenly.
``cdm-contaminated`` is ``CDMOutlierDetector(contamination=0.1)``, the number that is PyOD's default; ``cdm`` and
``cdm-levels`` take the rows for normal. PyOD's detectors see standardised columns, those that vary. The tables are
those of :mod:`studies.benchmarks.anomaly_sets`, half of them for design. The plot is the critical-difference diagram
of Demsar (2006): detectors whose mean ranks differ by less than the bar (Nemenyi, 5 %) cannot be told apart.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from studies.benchmarks.anomaly_sets import TABLES
from studies.benchmarks.files import write_rows
from torchcdm.estimators import CDMOutlierDetector

ROWS = 3000
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


# --- detectors ----------------------------------------------------------------------------------------------------

Scores = Callable[[np.ndarray, np.ndarray, int], np.ndarray]
"""From rows of training and test and a seed: anomaly scores of the test rows."""


def own(**options: Any) -> Scores:
    def scores(train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
        model = CDMOutlierDetector(random_state=seed, device="cpu", **options).fit(train)
        return -model.score_samples(test)

    return scores


def pyod(path: str) -> Scores:
    def scores(train: np.ndarray, test: np.ndarray, seed: int) -> np.ndarray:
        from importlib import import_module

        module, name = path.split(".")
        options = {"random_state": seed} if path in SEEDED else {}
        detector = getattr(import_module(f"pyod.models.{module}"), name)(**options)
        varies = train.std(0) > 0  # some give no score else
        centre, scale = train[:, varies].mean(0), train[:, varies].std(0)
        detector.fit((train[:, varies] - centre) / scale)
        return detector.decision_function((test[:, varies] - centre) / scale)

    return scores


DETECTORS: dict[str, Scores] = {
    "cdm": own(),
    "cdm-levels": own(anomaly_score="levels"),
    "cdm-contaminated": own(contamination=0.1),
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
            own, label = name.startswith("cdm"), name.removesuffix("-contaminated")
            axes.plot([ranks[name]] * 2, [0, -1 - place % 6], color="C3" if own else "0.6", lw=1)
            axes.text(
                ranks[name], -1 - place % 6, f" {label} {ranks[name]:.1f}", color="C3" if own else "k", fontsize=8
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
    if options.json is not None and options.json.exists():
        rows = json.loads(options.json.read_text(encoding="utf-8"))["rows"]
    for table, seed in product(options.tables, options.seeds):
        known = {row["name"] for row in rows if (row["table"], row["seed"]) == (table, seed)}
        for row in compare(table, [name for name in options.detectors if name not in known], seed):
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
