"""Mutual information of correlated pairs by their density ratio to independent ones: a ladder with known rungs.

    python -m studies.benchmarks.mutual_information --json mutual_information.json
    python -m studies.benchmarks.mutual_information --rungs 20 40 --kinds rotated --residual off --steps 2000

A rung (d, nats) has d/2 independent pairs with the correlation rho, rho² = 1 - exp(-4 nats / d); the numerator holds
the pairs, the denominator N(0, I). The mean of the log ratio over the numerator is then the mutual information. The
error is that of the estimated mean against the exact one on the same test points, RMSE that of single points.

Kinds: ``plain``; ``rotated``, both sides turned by one random orthogonal matrix; ``bent``, both pushed through a fixed
non-linear invertible map (:class:`ratio_pairs.InvertibleMap`), which leaves the ratio as it is. With the residual
``on`` the network corrects one fitted Gaussian for each source, ``off`` it has to learn all. The column ``Gaussians``
is what two fitted Gaussians say alone, and ``weight`` the network's in the blend. ``information`` is what
:func:`torchcdm.mutual_information` says of such pairs, x and y each turned or bent by a map of its own: a map of both
together would change it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from studies.benchmarks.files import write_rows
from studies.benchmarks.ratio_pairs import (
    Gaussians,
    InvertibleMap,
    correlated,
    exact_log_ratio,
    orthogonal,
    rmse,
)
from torchcdm import DensityRatio, mutual_information

NATS = {20: 5.0, 40: 10.0, 80: 20.0, 160: 40.0, 320: 80.0}
KINDS = ("plain", "rotated", "bent")


@dataclass(frozen=True)
class Row:
    """One rung.

    Attributes:
        kind: See above.
        residual: ``on`` or ``off``.
        dim: d.
        exact: Mean of the exact log ratio over the test points, nats.
        estimate: Mean of the estimated one.
        error: Share by which the estimate is off.
        rmse: Of the log ratio of single test points, nats.
        gaussians: Estimate of two fitted Gaussians without a network.
        weight: Of the network in the blend, 0 ... 1.
        information: Mutual information of x and y by :func:`torchcdm.mutual_information`, nats.
        rows: Training rows of each source, held-out ones included.
        steps: Most training steps.
        seconds: Processor seconds of fitting.
        information_seconds: Those of ``information``.
    """

    kind: str
    residual: str
    dim: int
    exact: float
    estimate: float
    error: float
    rmse: float
    gaussians: float
    weight: float
    information: float
    rows: int
    steps: int
    seconds: float
    information_seconds: float


WITHOUT_RESIDUAL: dict[str, Any] = {
    "model": {"gaussian": False, "class_gaussians": False, "backbone": {"width": 256, "dropout": 0.0}},
    "lr": 2e-3,
}
"""A wider network that may fit as it likes: there is much to learn, and any number of rows to learn it from."""


def rung(kind: str, residual: str, dim: int, options: argparse.Namespace) -> Row:
    """Fits one rung and compares."""
    nats, draw = NATS[dim], np.random.RandomState(options.seed)
    move = moves(kind, dim)
    test = correlated(dim, nats, options.test, draw)
    truth = exact_log_ratio(test, nats)
    numerator = move(correlated(dim, nats, options.rows, draw))
    denominator = move(draw.normal(size=(options.rows, dim)))
    settings = WITHOUT_RESIDUAL if residual == "off" else {}
    began = time.process_time()
    ratio = DensityRatio(options.seed, device="cpu", progress=True, steps=options.steps, **settings)
    ratio.fit(numerator, denominator)
    seconds = time.process_time() - began
    estimate = ratio.log_ratio(move(test))
    exact, mean = float(truth.mean()), float(estimate.mean())
    gaussians = float(Gaussians(numerator, denominator).log_ratio(move(test)).mean())
    pairs, began = correlated(dim, nats, options.pairs, draw), time.process_time()
    x, y = (moves(kind, dim // 2, 1 + side)(pairs[:, side::2]) for side in (0, 1))
    information = mutual_information(x, y, options.seed).value
    return Row(
        kind, residual, dim, exact, mean, mean / exact - 1, rmse(estimate, truth), gaussians,
        ratio.blend.get("network", 0.0), information, options.rows, options.steps, seconds,
        time.process_time() - began,
    )  # fmt: skip


def moves(kind: str, dim: int, seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The map of a kind."""
    turn = orthogonal(dim, np.random.RandomState(1 + seed))
    return {"plain": lambda x: x, "rotated": lambda x: x @ turn, "bent": InvertibleMap(dim, seed)}[kind]


def table(rows: Sequence[Row]) -> str:
    """Lines to read."""
    lines = ["kind     residual    d    exact  estimate  error %    RMSE  Gaussians weight seconds information"]
    lines += [
        f"{r.kind:8} {r.residual:8} {r.dim:4} {r.exact:8.3f} {r.estimate:9.3f} {100 * r.error:+8.2f} {r.rmse:7.2f} "
        f"{r.gaussians:10.3f} {r.weight:6.2f} {r.seconds:7.0f} {r.information:11.3f}"
        for r in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rungs", type=int, nargs="+", choices=NATS, default=list(NATS), help="dimensions")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--residual", nargs="+", choices=("on", "off"), default=["on"])
    parser.add_argument("--rows", type=int, default=50_000, metavar="N", help="training rows of each source")
    parser.add_argument("--test", type=int, default=10_000, metavar="N", help="test points of the numerator")
    parser.add_argument("--pairs", type=int, default=10_000, metavar="N", help="rows that information is read from")
    parser.add_argument("--steps", type=int, default=200, metavar="N", help="most training steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows")
    options = parser.parse_args(arguments)

    rows: list[Row] = []
    for residual in options.residual:
        for kind in options.kinds:
            for dim in options.rungs:
                rows.append(rung(kind, residual, dim, options))
                print(table(rows[-1:]), flush=True)
                write_rows(rows, options.json)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
