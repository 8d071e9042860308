"""Tests of two samples: how often each finds a difference, and how often one where there is none.

    python -m studies.benchmarks.two_samples --json studies/results/two_samples.json

A column of ``TASKS`` is one kind of difference between p and q, in tables of correlated normal, log-normal and uniform
columns, and in scikit-learn's 8x8 digits. Its strength was chosen on other seeds: some test finds it sometimes.
Tests of one repeat see the same samples, and 199 permutations of their sources:

torchcdm
    ``torchcdm.two_sample_test``.
mmd, energy
    Maximum mean discrepancy (Gaussian kernel as wide as the median distance) and energy distance, of standardised
    columns, of pixels.
c2st
    Accuracy of boosted trees (scikit-learn's histogram trees) fitted to half of the samples, on the others.

At 5 % a calibrated test rejects 2.8 to 7.5 % of 400 nulls (95 % of such counts).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ndtr

import torchcdm

Draw = np.random.RandomState
Pair = tuple[np.ndarray, np.ndarray]

PERMUTATIONS = 199
CORRELATION = 0.5
"""Of a column's normal with the next one's."""

# --- tables ------------------------------------------------------------------------------------------------------


def normals(rows: int, columns: int, draw: Draw, correlation: float = CORRELATION) -> np.ndarray:
    """A chain of correlated normals, (rows, columns)."""
    z = draw.normal(size=(rows, columns))
    for k in range(1, columns):
        z[:, k] = correlation * z[:, k - 1] + np.sqrt(1 - correlation**2) * z[:, k]
    return z


def margins(z: np.ndarray) -> np.ndarray:
    """Normal, log-normal and uniform columns in turn."""
    x = z.copy()
    x[:, 1::3] = np.exp(0.75 * z[:, 1::3])
    x[:, 2::3] = np.sqrt(12) * ndtr(z[:, 2::3])
    return x


def shift(rows: int, columns: int, strength: float, draw: Draw) -> np.ndarray:
    """The fourth column moved by so many deviations."""
    z = normals(rows, columns, draw)
    z[:, 3] += strength
    return margins(z)


def scale(rows: int, columns: int, strength: float, draw: Draw) -> np.ndarray:
    """The fourth column stretched."""
    z = normals(rows, columns, draw)
    z[:, 3] *= 1 + strength
    return margins(z)


def correlation(rows: int, columns: int, strength: float, draw: Draw) -> np.ndarray:
    """Neighbouring columns less correlated; every column is distributed as before."""
    return margins(normals(rows, columns, draw, CORRELATION - strength))


def cluster(rows: int, columns: int, strength: float, draw: Draw) -> np.ndarray:
    """One row in twenty from a cluster so many deviations from the centre, where the correlations leave few rows."""
    z = normals(rows, columns, draw)
    rare = draw.uniform(size=rows) < 0.05
    centre = np.resize([1.0, -1.0], columns) * strength / np.sqrt(columns)
    z[rare] = centre + 0.3 * draw.normal(size=(int(rare.sum()), columns))
    return margins(z)


def tails(rows: int, columns: int, strength: float, draw: Draw) -> np.ndarray:
    """Student's t with 1 / strength degrees of freedom in the place of a normal, of the same variance."""
    degrees = 1 / strength
    width = np.sqrt((degrees - 2) / draw.chisquare(degrees, size=(rows, 1)))
    return margins(normals(rows, columns, draw) * width)


def tables(difference: Callable[..., np.ndarray] | None, rows: int, columns: int, strength: float, draw: Draw) -> Pair:
    """Two tables of so many rows each; of one source without a difference."""
    q = margins(normals(rows, columns, draw))
    p = margins(normals(rows, columns, draw)) if difference is None else difference(rows, columns, strength, draw)
    return p, q


# --- images ------------------------------------------------------------------------------------------------------


@cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 1, 8, 8), 0 ... 16, and their classes."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    return x.reshape(-1, 1, 8, 8).astype(np.uint8), y


def halves(x: np.ndarray, count: int, draw: Draw) -> Pair:
    """Two disjoint samples."""
    x = x[draw.permutation(len(x))[: 2 * count]]
    return x[:count].copy(), x[count:]


def other_class(count: int, strength: float, draw: Draw) -> Pair:
    """Threes; a share of those of p are fives."""
    x, y = digits()
    p, q = halves(x[y == 3], count, draw)
    fives = draw.permutation(x[y == 5])[: draw.binomial(count, strength)]
    p[: len(fives)] = fives
    return p, q


def blurred(count: int, strength: float, draw: Draw) -> Pair:
    """All classes; p smoothed by a Gaussian of so many pixels."""
    from scipy.ndimage import gaussian_filter

    p, q = halves(digits()[0], count, draw)
    smooth = gaussian_filter(p.astype(float), (0, 0, strength, strength))
    return smooth.round().astype(np.uint8), q


def moved(count: int, strength: float, draw: Draw) -> Pair:
    """All classes; a share of p lies one pixel further down."""
    p, q = halves(digits()[0], count, draw)
    some = draw.uniform(size=count) < strength
    p[some] = np.pad(p[some, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
    return p, q


@cache
def samples(count: int = 600) -> np.ndarray:
    """Digits of the zoo's model, from one run of its sampler."""
    return torchcdm.sample(torchcdm.load("zoo:digits"), count, seed=0).round().clamp(0, 16).numpy().astype(np.uint8)


def sampled(count: int, strength: float, draw: Draw) -> Pair:
    """Samples of zoo:digits against images that did not train it; both from a fixed set, so repeats are alike."""
    from torchcdm.data import load_data

    real = load_data("digits").test.tensors()[0].numpy().astype(np.uint8)
    return halves(samples(), count, draw)[0], halves(real, count, draw)[0]


def one_source(count: int, strength: float, draw: Draw) -> Pair:
    """All classes."""
    return halves(digits()[0], count, draw)


# --- the list ----------------------------------------------------------------------------------------------------


class Task(NamedTuple):
    """One kind of difference at one strength; ``columns`` is 0 for images."""

    name: str
    columns: int
    rows: int
    strength: float
    pair: Callable[[int, float, Draw], Pair]
    repeats: int


STRENGTHS = {
    ("shift", shift): {(5, 200): 0.3, (20, 200): 0.35, (5, 1000): 0.13, (20, 1000): 0.16},
    ("scale", scale): {(5, 200): 0.25, (20, 200): 0.4, (5, 1000): 0.11, (20, 1000): 0.17},
    ("correlation", correlation): {(5, 200): 0.17, (20, 200): 0.15, (5, 1000): 0.08, (20, 1000): 0.06},
    ("rare cluster", cluster): {(5, 200): 4.5, (20, 200): 4.0, (5, 1000): 1.8, (20, 1000): 2.2},
    ("heavy tails", tails): {(5, 200): 0.15, (20, 200): 0.08, (5, 1000): 0.1, (20, 1000): 0.05},
}
IMAGES = {
    ("threes with fives", other_class): (90, 0.15),
    ("blurred", blurred): (200, 0.35),
    ("moved", moved): (200, 0.12),
    ("samples of zoo:digits", sampled): (140, 0.0),
}


def tasks(repeats: int, nulls: int) -> Iterator[Task]:
    """All of them; nulls are called so."""

    def table(kind: Callable[..., np.ndarray] | None, columns: int) -> Callable[[int, float, Draw], Pair]:
        return lambda rows, strength, draw: tables(kind, rows, columns, strength, draw)

    yield Task("null", 5, 200, 0.0, table(None, 5), nulls)
    cases = [(name, kind, size, strength) for (name, kind), at in STRENGTHS.items() for size, strength in at.items()]
    for count, share in ((200, 1.0), (1000, 0.5)):
        for name, kind, (columns, rows), strength in cases:
            if rows == count:
                yield Task(name, columns, rows, strength, table(kind, columns), round(share * repeats))
        if count == 200:
            for (name, pair), (rows, strength) in IMAGES.items():
                yield Task(name, 0, rows, strength, pair, repeats)
            yield Task("null", 0, 200, 0.0, one_source, nulls // 4)


# --- tests -------------------------------------------------------------------------------------------------------


def ours(p: np.ndarray, q: np.ndarray, seed: int) -> float:
    """p-value of the package's test."""
    return torchcdm.two_sample_test(p, q, permutations=PERMUTATIONS, random_state=seed).p_value


def permuted(values: np.ndarray, counts: tuple[int, int], seed: int, pairs: bool = False) -> float:
    """p-value of a mean difference of values (N,), or of a sum over pairs of values (N, N)."""
    draw, own = Draw(seed), np.repeat([1 / counts[0], -1 / counts[1]], counts)
    sources = np.stack([own, *(draw.permutation(own) for _ in range(PERMUTATIONS))])
    found = ((sources @ values) * sources).sum(1) if pairs else sources @ values
    return float((found >= found[0] - 1e-12).mean())


def distances(kind: str, p: np.ndarray, q: np.ndarray, seed: int) -> float:
    """p-value of the maximum mean discrepancy or of the energy distance."""
    from scipy.spatial.distance import pdist, squareform

    x = np.concatenate([p, q]).astype(float)
    x = x.reshape(len(x), -1) / (16.0 if x.ndim == 4 else x.std(0))
    d = squareform(pdist(x))
    values = -d if kind == "energy" else np.exp(-np.square(d / np.median(d[d > 0])))
    return permuted(values, (len(p), len(q)), seed, pairs=True)


def c2st(p: np.ndarray, q: np.ndarray, seed: int) -> float:
    """p-value of a classifier's accuracy on the other half."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    parts = [np.split(Draw(seed + k).permutation(x.reshape(len(x), -1)), [len(x) // 2]) for k, x in enumerate((p, q))]
    (fitted_p, p), (fitted_q, q) = parts
    model = HistGradientBoostingClassifier(random_state=seed)
    model.fit(np.concatenate([fitted_p, fitted_q]), np.repeat([1.0, -1.0], [len(fitted_p), len(fitted_q)]))
    return permuted(model.predict(np.concatenate([p, q])), (len(p), len(q)), seed)


TESTS: dict[str, Callable[[np.ndarray, np.ndarray, int], float]] = {
    "torchcdm": ours, "mmd": partial(distances, "mmd"), "energy": partial(distances, "energy"),
    "c2st": c2st,
}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nulls", type=int, default=400, help="of tables; a quarter for images and other tests")
    parser.add_argument("--repeats", type=int, default=40, help="of each difference; half of them of 1000 rows")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="differences; all when not given")
    parser.add_argument("--seed", type=int, default=0, help="of the first repeat")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the numbers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: list[dict[str, object]] = []
    if options.only and options.json is not None and options.json.exists():  # the others stay as they are
        found = [r for r in json.loads(options.json.read_text())["rows"] if r["difference"] not in options.only]
    for task in tasks(options.repeats, options.nulls):
        if options.only and task.name not in options.only:
            continue
        values: dict[str, list[float]] = {name: [] for name in TESTS}
        seconds = dict.fromkeys(TESTS, 0.0)
        for k in range(options.seed, options.seed + task.repeats):
            p, q = task.pair(task.rows, task.strength, Draw(k))
            for name, test in TESTS.items():
                if task.name == "null" and name != "torchcdm" and k - options.seed >= options.nulls // 4:
                    continue
                began = time.process_time()
                values[name].append(test(p, q, k))
                seconds[name] += time.process_time() - began
        for name, own in values.items():
            if own:
                rejected, each = float((np.array(own) <= 0.05).mean()), seconds[name] / len(own)
                found.append({"difference": task.name, "columns": task.columns, "rows": task.rows, "test": name,
                              "strength": task.strength, "repeats": len(own), "rejected": rejected,
                              "seconds": round(each, 3)})  # fmt: skip
                print(f"{task.name:22} {task.columns:3} {task.rows:5}  {name:8} {100 * rejected:5.1f} %  {each:.3f} s",
                      flush=True)  # fmt: skip
        if options.json is not None:
            options.json.write_text(json.dumps({"permutations": PERMUTATIONS, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
