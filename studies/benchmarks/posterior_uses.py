"""Posteriors given several observations of one theta, and in two rounds with a truncated proposal.

    pip install --no-deps sbibm
    python -m studies.benchmarks.posterior_uses together --json studies/results/posterior_together.json
    python -m studies.benchmarks.posterior_uses rounds --json studies/results/posterior_rounds.json

``together``: :class:`torchcdm.estimators.CDMConditional` is fitted to 5000 single pairs of three simulators, and
draws from p(theta | x_1 ... x_N); the exact posterior is a Gaussian, or is drawn on a grid. The prior, which counts
N - 1 times, is the true one, or a :class:`CDMDensity` of the training theta. ``sum`` is the sum of the denoisers with
the true prior: 25 steps of the reverse chain without moves, weights or particles. Errors of mean and deviation are in
exact deviations, the mean over theta and parameters. What the file holds already is not run again.

``rounds``: tasks of the benchmark (see :mod:`studies.benchmarks.posteriors`) with 2000 simulations. All are from the
prior; or 1000 are, and for each observation 1000 more from the prior where :meth:`CDMConditional.inside` holds, fitted
with those of the first round that lie there.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.distributions import Independent, Normal, Uniform

from studies.benchmarks.conditional_density import LinearGaussian, c2st, grid
from studies.benchmarks.files import write_rows
from studies.benchmarks.posterior_tasks import TASKS, Task
from torchcdm.estimators import CDMConditional, CDMDensity, conditional

PAIRS, DRAWS, SIDE, PASSES = 5000, 1000, 400, 100
"""Of training; draws of each posterior; cells of a grid along each axis; passes of the classifier of C2ST."""

SECONDS = {"together": 20, "rounds": 8}
"""Processor seconds that a fit may take; the learned integral comes after."""

WAYS = ("true prior", "fitted prior", "sum")

PROPOSED = 100_000
"""Draws of the prior at a time, of which those inside are kept."""

Log = Callable[[np.ndarray, np.ndarray], np.ndarray]


def on_grid(log_likelihood: Log, box: Sequence[Sequence[float]], log_prior: Callable[..., Any], x: np.ndarray,
            draw: np.random.RandomState) -> np.ndarray:  # fmt: skip
    """Draws (DRAWS, p) from the posterior given all rows of x, in a box of one or two parameters."""
    low, high = np.array(box, np.float64)
    if len(low) == 1:
        cell = (high - low) / SIDE**2
        points = low + cell * (np.arange(SIDE**2)[:, None] + 0.5)
    else:
        cell, points = (high - low) / SIDE, grid(low, high, SIDE)[0]
    log_p = sum(log_likelihood(points, row) for row in x) + log_prior(points)
    chosen = draw.choice(len(points), DRAWS, p=np.exp(log_p - np.logaddexp.reduce(log_p)))
    return points[chosen] + cell * (draw.uniform(size=(DRAWS, len(low))) - 0.5)


def normal(residual: np.ndarray, deviation: float) -> np.ndarray:
    """Log-likelihood of a residual, less a constant."""
    return -0.5 * (residual / deviation) ** 2 - np.log(deviation)


class Linear:
    """Five parameters, eight numbers: see :class:`LinearGaussian`."""

    sim = LinearGaussian()
    prior = Independent(Normal(torch.zeros(5), 1), 1)

    def pairs(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return self.sim.pairs(count, seed)

    def simulate(self, theta: np.ndarray, draw: np.random.RandomState) -> np.ndarray:
        return theta @ self.sim.matrix.T + self.sim.deviation * draw.normal(size=(len(theta), 8))

    def exact(self, x: np.ndarray, draw: np.random.RandomState) -> np.ndarray:
        weighted = self.sim.matrix.T / self.sim.deviation**2
        covariance = np.linalg.inv(np.eye(5) + len(x) * weighted @ self.sim.matrix)
        return draw.multivariate_normal(covariance @ weighted @ x.sum(0), covariance, DRAWS)


class HalfLife:
    """The half-life of the guide: uniform on [0.5, 3], three readings with noise of 0.05."""

    prior = Independent(Uniform(torch.tensor([0.5]), torch.tensor([3.0])), 1)
    times = np.array([0.5, 1.0, 2.0])

    def pairs(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        draw = np.random.RandomState(seed)
        theta = draw.uniform(0.5, 3.0, size=(count, 1))
        return theta, self.simulate(theta, draw)

    def simulate(self, theta: np.ndarray, draw: np.random.RandomState) -> np.ndarray:
        return 2.0 ** (-self.times / theta) + 0.05 * draw.normal(size=(len(theta), 3))

    def exact(self, x: np.ndarray, draw: np.random.RandomState) -> np.ndarray:
        def log_p(theta: np.ndarray, row: np.ndarray) -> np.ndarray:
            return normal(row - 2.0 ** (-self.times / theta), 0.05).sum(1)

        return on_grid(log_p, ([0.5], [3.0]), lambda theta: 0.0, x, draw)


class Mixture:
    """The benchmark's mixture: uniform on [-10, 10]², noise of deviation 1 or 0.1."""

    prior = Independent(Uniform(torch.full((2,), -10.0), torch.full((2,), 10.0)), 1)

    def pairs(self, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        return TASKS["gaussian-mixture"].pairs(count, seed)

    def simulate(self, theta: np.ndarray, draw: np.random.RandomState) -> np.ndarray:
        return TASKS["gaussian-mixture"].simulate(theta, draw)

    def exact(self, x: np.ndarray, draw: np.random.RandomState) -> np.ndarray:
        def log_p(theta: np.ndarray, row: np.ndarray) -> np.ndarray:
            return np.logaddexp(*(normal(row - theta, width).sum(1) for width in (1.0, 0.1)))

        box = (np.maximum(x.mean(0) - 4, -10), np.minimum(x.mean(0) + 4, 10))
        return on_grid(log_p, box, lambda theta: 0.0, x, draw)


SIMULATORS = {"linear-gaussian": Linear, "half-life": HalfLife, "gaussian-mixture": Mixture}


def fitted(theta: np.ndarray, x: np.ndarray, seconds: float, seed: int = 0) -> CDMConditional:
    """With the default settings, and processor seconds at most."""
    model = CDMConditional(random_state=seed, device="cpu", max_seconds=seconds)
    model.clock = time.process_time
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.fit(theta, x)


def summed(sample: Callable[..., Any], joint: Any, n: int, seed: int, units: str, **_: Any) -> Any:
    """What draws in place of the library's particles for ``sum``."""
    return sample(joint, n, seed=seed, units=units, corrector=0)


def together(name: str, observations: Sequence[int], thetas: int, rows: list[dict[str, Any]]) -> None:
    """Adds a row for each way and number of observations, the mean over ``thetas``."""
    sim = SIMULATORS[name]()
    pairs = sim.pairs(PAIRS, 0)
    model = fitted(*pairs, SECONDS["together"])
    density = CDMDensity(random_state=0, device="cpu", max_seconds=SECONDS["together"])
    density.clock = time.process_time
    density.fit(pairs[0])
    true = sim.pairs(thetas, 1)[0]
    draw = np.random.RandomState(2)
    seen = [sim.simulate(np.repeat(theta[None], max(observations), 0), draw) for theta in true]
    for n in observations:
        exact = [sim.exact(x[:n], draw) for x in seen]
        for way in WAYS:
            prior = density if way == "fitted prior" else sim.prior
            of = conditional.sample
            replaced = mock.patch.object(conditional, "sample", partial(summed, of) if way == "sum" else of)
            began = time.process_time()
            with replaced, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                draws = [model.sample(DRAWS, x[:n], random_state=0, together=True, prior=prior) for x in seen]
            seconds = (time.process_time() - began) / thetas
            both = list(zip(draws, exact, strict=True))
            off = [np.abs(ours.mean(0) - truth.mean(0)) / truth.std(0) for ours, truth in both]
            wide = [ours.std(0) / truth.std(0) for ours, truth in both]
            found = [c2st(ours, truth, PASSES) for ours, truth in both]
            row = {"simulator": name, "observations": n, "way": way, "c2st": found, "seconds": seconds}
            rows.append(row | {"mean": float(np.mean(off)), "deviation": float(np.mean(wide))})
            print(f"{name:18} {n:3} {way:13} C2ST {np.mean(found):.3f}  mean {np.mean(off):.3f}  "
                  f"deviation {np.mean(wide):.3f}  {seconds:.1f} s", flush=True)  # fmt: skip


def rounds(name: str, each: int, seed: int, numbers: Sequence[int], rows: list[dict[str, Any]]) -> None:
    """Adds a row of one round with twice ``each`` simulations, and one of two rounds."""
    task = TASKS[name]
    theta, x = task.pairs(2 * each, seed)
    first, whole = (fitted(theta[:n], x[:n], SECONDS["rounds"], seed) for n in (each, 2 * each))
    for number in numbers:
        seen, reference = task.observation(number), task.reference(number)[:DRAWS]
        draw = np.random.RandomState(seed + 1000 * number)
        new, proposed = inside(task, first, seen, each, draw)
        kept = first.inside(theta[:each], seen, random_state=0)
        pairs = np.r_[theta[:each][kept], new], np.r_[x[:each][kept], task.simulate(new, draw)]
        second = fitted(*pairs, SECONDS["rounds"], seed)
        for way, model in (("first round", first), ("one round", whole), ("two rounds", second)):
            found = c2st(supported(task, model, seen), reference, PASSES)
            used = {"first round": each, "one round": 2 * each, "two rounds": 2 * each}[way]
            row = {"task": name, "seed": seed, "observation": number, "way": way, "simulations": used, "c2st": found}
            rows.append(row | {"accepted": each / proposed, "fitted": len(pairs[0])})
            print(f"{name} seed {seed} observation {number} {way:12} C2ST {found:.3f}  inside {each / proposed:.4f}  "
                  f"pairs {len(pairs[0])}", flush=True)  # fmt: skip


def inside(
    task: Task, model: CDMConditional, x: np.ndarray, count: int, draw: np.random.RandomState
) -> tuple[np.ndarray, int]:
    """Prior draws (count, p) in the region of highest density, and how many were proposed."""
    found, proposed = [], 0
    while sum(map(len, found)) < count:
        theta = task.prior(PROPOSED, draw)
        found.append(theta[model.inside(theta, x, random_state=0)])
        proposed += PROPOSED
    kept = np.concatenate(found)
    return kept[:count], round(proposed * count / len(kept))


def supported(task: Task, model: CDMConditional, x: np.ndarray) -> np.ndarray:
    """Draws (DRAWS, p) within the bounds of the prior."""
    draws = model.sample(4 * DRAWS, x, random_state=0)
    low, high = task.support
    return draws[((draws >= low) & (draws <= high)).all(1)][:DRAWS]


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("together", "rounds"))
    parser.add_argument("--simulators", nargs="+", choices=SIMULATORS, default=list(SIMULATORS), metavar="NAME")
    parser.add_argument("--observations", type=int, nargs="+", default=[1, 2, 4, 8, 16], metavar="N", help="together")
    parser.add_argument("--thetas", type=int, default=2, metavar="N", help="true parameters to observe")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=["two-moons", "slcp"], metavar="TASK")
    parser.add_argument("--each", type=int, default=1000, metavar="N", help="simulations of a round")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="K", help="of rounds")
    parser.add_argument(
        "--numbers", type=int, nargs="+", default=[1, 2, 3], metavar="K", help="observations of a task"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows; what it holds is kept")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    if options.json is not None and options.json.exists():
        rows = json.loads(options.json.read_text(encoding="utf-8"))["rows"]
    if options.what == "together":
        for name in options.simulators:
            if not any(row["simulator"] == name for row in rows):
                together(name, options.observations, options.thetas, rows)
                write_rows(rows, options.json)
        return
    for name, seed in [(name, seed) for name in options.tasks for seed in options.seeds]:
        if not any((row["task"], row["seed"]) == (name, seed) for row in rows):
            rounds(name, options.each, seed, options.numbers, rows)
            write_rows(rows, options.json)


if __name__ == "__main__":
    main()
