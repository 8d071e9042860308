"""Weights of 40 far modes, read off a density ratio and off densities.

    python -m studies.benchmarks.mixture_weights --json mixture_weights.json
    python -m studies.benchmarks.mixture_weights --dims 128 --contenders ratio-mixture --steps 50

40 Gaussians of unit variance with centres uniform in a cube of side 80; their weights are drawn from a Dirichlet
distribution (1, ..., 1), so that some hold a tenth and some a thousandth. Far modes are the trial of anything learned
from scores: between them there is nothing that tells their weights.

``ratio``: against the same modes with equal weights; ``ratio-mixture``: the same, started from 60 fitted Gaussians
with weights of each source instead of one Gaussian for each; ``start``: these without the network. ``density``: a
model of the mixture alone, which starts from one Gaussian; ``mixture``: one that starts from 60 fitted ones. Either
gives points of the equal mixture weights p/q, under which they stand for the model's density; the modes' weights are
those under which the modes' mixture makes the weighted points most probable (EM): where modes overlap, a point belongs
to more than one. ``exact``: the same from the exact ratio, what this reading and so many points allow. ``counts``: the
share of training rows in each mode.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import torchcdm
from studies.benchmarks.files import write_rows
from studies.benchmarks.ratio_pairs import SCHEDULE, mixture
from studies.exact import GaussianMixture
from torchcdm import DensityRatio
from torchcdm.data import from_object
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.mixture import MixtureMarginals, best_mixture, fit_gaussians

MODES, SIDE = 40, 80.0

POINTS = 50
"""Fresh points of each mode at which ratios and densities are taken."""

STARTED = 60
"""Gaussians that a contender starts from: more than the modes, as some pairs of these overlap in the plane. In many
dimensions each has few rows, so that the shrinkage of the covariances is chosen by rows held out."""

EM_STEPS = 500
"""Cheap ones: only the weights move."""


@dataclass(frozen=True)
class Row:
    """One contender in one dimension.

    Attributes:
        dim: d.
        contender: Its name.
        largest: Largest error of a weight.
        mean: Mean error of a weight.
        log_error: Root mean square error of the log weights.
        steps: Training steps at most.
        seconds: Processor seconds.
    """

    dim: int
    contender: str
    largest: float
    mean: float
    log_error: float
    steps: int
    seconds: float


@dataclass(frozen=True)
class Task:
    """The mixture, that of equal weights, training rows, their modes, and points of every mode (MODES, POINTS, d)."""

    truth: GaussianMixture
    equal: GaussianMixture
    rows: np.ndarray
    modes: np.ndarray
    points: torch.Tensor
    steps: int
    seed: int

    def of_equal(self) -> np.ndarray:
        """As many rows of the mixture of equal weights."""
        return self.equal.sample(len(self.rows), torch.Generator().manual_seed(self.seed + 1)).numpy()


def make_task(dim: int, count: int, steps: int, seed: int) -> Task:
    """The task in one dimension."""
    draw = np.random.RandomState(seed)
    centres, weights = SIDE * (draw.uniform(size=(MODES, dim)) - 0.5), draw.dirichlet(np.ones(MODES))
    truth, equal = (mixture(w, centres, np.ones(MODES)) for w in (weights, np.ones(MODES)))
    generator = torch.Generator().manual_seed(seed)
    rows, modes = truth.sample_components(count, generator)
    points = truth.draw(torch.arange(MODES).repeat_interleave(POINTS), generator).unflatten(0, (MODES, POINTS))
    return Task(truth, equal, rows.numpy(), modes.numpy(), points, steps, seed)


def modes_of(task: Task, log_ratio: np.ndarray) -> np.ndarray:
    """Log weights of the modes, (MODES,), from log p/q at the points, up to a constant; q has equal weights."""
    x = task.points.flatten(0, 1)
    own = task.equal.component_log_prob(x, 0, SCHEDULE)
    # In the logarithm: under a poor ratio one mode may have all of the sum.
    log_ratio, log_weights = torch.from_numpy(log_ratio).log_softmax(0), torch.full((MODES,), -np.log(MODES)).double()
    for _ in range(EM_STEPS):
        log_weights = (log_ratio[:, None] + (own + log_weights).log_softmax(1)).logsumexp(0)
    return log_weights.numpy()


def by_ratio(components: int) -> Callable[[Task], np.ndarray]:
    """Log weights, (MODES,), from a ratio that starts from so many Gaussians."""

    def log_weights(task: Task) -> np.ndarray:
        model = {"components": components}
        if components > 1:
            rows, _, _ = standardised(task)
            model |= {"shrinkage": shrinkage_of(rows)}
        ratio = DensityRatio(task.seed, device="cpu", progress=True, steps=task.steps, model=model)
        ratio.fit(task.rows, task.of_equal())
        print(*ratio.notes, sep="\n", flush=True)
        return modes_of(task, ratio.log_ratio(task.points.flatten(0, 1).numpy()))

    return log_weights


def standardised(task: Task) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """All rows, those of equal weights first, in units of their deviation; their mean and deviation."""
    rows = torch.from_numpy(np.concatenate([task.of_equal(), task.rows])).double()
    mean, scale = rows.mean(0), rows.std(0)
    return (rows - mean) / scale, mean, scale


def shrinkage_of(rows: torch.Tensor) -> float:
    """Of the covariances of so many Gaussians, as a tenth of the rows would have it."""
    held_out = torch.arange(len(rows)) % 10 == 0
    return best_mixture(rows[~held_out], rows[held_out], (STARTED,), rows=len(rows))[1]


def by_start(task: Task) -> np.ndarray:
    """Likewise, from what ``ratio-mixture`` starts from, without a network."""
    rows, mean, scale = standardised(task)
    sources, shrinkage = torch.arange(2).repeat_interleave(len(task.rows)), shrinkage_of(rows)
    print(f"shrinkage {shrinkage}", flush=True)
    fitted = fit_gaussians(rows, STARTED, shrinkage=shrinkage, rows=len(rows))
    common = MixtureMarginals(SCHEDULE, *fitted, GaussianMarginals.fit(rows, SCHEDULE, shrinkage=shrinkage))
    start = common.with_classes(rows, sources, 2)
    log_p = start.class_effects((task.points.flatten(0, 1) - mean) / scale)[..., 0]
    return modes_of(task, (log_p[:, 1] - log_p[:, 0]).numpy())


def by_density(components: int) -> Callable[[Task], np.ndarray]:
    """Likewise, from a density that starts from so many Gaussians."""

    def log_weights(task: Task) -> np.ndarray:
        options = {"model": {"components": components}, "sampling": {"n": 0}, "seed": task.seed, "steps": task.steps}
        source = from_object(torch.from_numpy(task.rows).float(), validation_fraction=0.1, test_fraction=0.0)
        model = torchcdm.fit(source, preset="mlp", device="cpu", **options)
        x = task.points.flatten(0, 1)
        with torch.no_grad():
            log_p = model.log_prob(x.float())
        return modes_of(task, (log_p - task.equal.log_prob(x, 0, SCHEDULE)).numpy())

    return log_weights


def by_truth(task: Task) -> np.ndarray:
    """Likewise, from the exact ratio."""
    x = task.points.flatten(0, 1)
    return modes_of(task, (task.truth.log_prob(x, 0, SCHEDULE) - task.equal.log_prob(x, 0, SCHEDULE)).numpy())


def by_counting(task: Task) -> np.ndarray:
    """Likewise, from the modes that the rows came from."""
    return np.log(np.bincount(task.modes, minlength=MODES) + 0.5)


CONTENDERS: dict[str, Callable[[Task], np.ndarray]] = {
    "ratio": by_ratio(1), "ratio-mixture": by_ratio(STARTED), "start": by_start, "density": by_density(1),
    "mixture": by_density(STARTED), "exact": by_truth, "counts": by_counting,
}  # fmt: skip


def compare(dim: int, contender: str, task: Task) -> Row:
    """One contender."""
    began = time.process_time()
    log_weights = CONTENDERS[contender](task)
    seconds = time.process_time() - began
    log_weights = log_weights - np.logaddexp.reduce(log_weights)
    truth = task.truth.log_weights.numpy()
    errors = np.abs(np.exp(log_weights) - np.exp(truth))
    log_error = float(np.sqrt(np.mean(np.square(log_weights - truth))))
    return Row(dim, contender, float(errors.max()), float(errors.mean()), log_error, task.steps, seconds)


def table(rows: Sequence[Row]) -> str:
    """Lines to read."""
    lines = ["  d  contender      largest error  mean error  RMSE of log weight  steps  seconds"]
    lines += [
        f"{r.dim:3}  {r.contender:13} {r.largest:14.4f} {r.mean:11.4f} {r.log_error:19.3f} {r.steps:6} "
        f"{r.seconds:8.1f}"
        for r in rows
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 16, 128], metavar="D")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rows", type=int, default=8000, metavar="N", help="training rows of each source")
    parser.add_argument("--steps", type=int, default=500, metavar="N", help="most training steps")
    parser.add_argument("--mixture-steps", type=int, metavar="N", help="those of contenders that start from a mixture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows")
    options = parser.parse_args(arguments)

    rows: list[Row] = []
    for dim in options.dims:
        task = make_task(dim, options.rows, options.steps, options.seed)
        for contender in options.contenders:
            starts_from_mixture = options.mixture_steps and "mixture" in contender
            steps = options.mixture_steps if starts_from_mixture else options.steps
            rows.append(compare(dim, contender, replace(task, steps=steps)))
            print(table(rows[-1:]), flush=True)
            write_rows(rows, options.json)
    print("\n" + table(rows))


if __name__ == "__main__":
    main()
