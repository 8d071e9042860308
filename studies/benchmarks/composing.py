"""Composed densities against exact draws of them: a classifier's accuracy, and the weights of modes.

    python -m studies.benchmarks.composing --json studies/results/composing.json

Mixtures of four round Gaussians in 2 and 16 dimensions, exact at every level: their product, their mixture, and powers
of the first. Products and powers of whole numbers are mixtures again; a root is drawn by rejection. Draws end at level
1 and take one denoising step; so do the exact ones. Methods, by evaluations a draw (T = 24 levels):

- ``particles``: ``torchcdm.sample(target, n, particles=2 n)``, 2 T for each of 2 n particles;
- ``accepted``: a step down and an accepted Langevin move at each level, 2 T;
- ``unadjusted``: the same moves, of the same sizes, all taken, 2 T;
- ``sum of scores``: steps down alone, T.

A classifier of fixed form (``studies.quality.measure.two_sample_accuracy``) tells draws from exact ones; 0.5 if it
sees no difference. ``modes``: the largest error of the share of draws nearest to one of the first mixture's means.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from studies.benchmarks.files import write_rows
from studies.benchmarks.posterior_coverage import exact_mixture
from studies.exact import GaussianMixture
from studies.quality.measure import two_sample_accuracy
from torchcdm import compose
from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.particles import FIRST_STEP, States, adapted, langevin
from torchcdm.annealing.target import ModelTarget, Target
from torchcdm.models.density import DensityModel
from torchcdm.random import stream

Parts = tuple[Tensor, Tensor, Tensor]
"""Log weights (K,), means (K, d) and variances (K,) of a mixture of round Gaussians."""


def at_level_1(model: DensityModel) -> Parts:
    """What an exact mixture is at level 1."""
    mixture, alpha, sigma = model.base, model.schedule.alpha[1], model.schedule.sigma[1]
    return mixture.log_weights, alpha * mixture.means, alpha**2 * mixture.variances[:, 0] + sigma**2


def multiplied(a: Parts, b: Parts) -> Parts:
    """The product of two mixtures, a mixture of the products of their parts, up to a constant."""
    (w, m, v), (W, M, V) = a, b
    total, d = v[:, None] + V, m.shape[1]
    apart = (m[:, None] - M).square().sum(2)
    weights = w[:, None] + W - 0.5 * apart / total - 0.5 * d * total.log()
    means = (m[:, None] * V[None, :, None] + M * v[:, None, None]) / total[..., None]
    return weights.flatten(), means.flatten(0, 1), (v[:, None] * V / total).flatten()


def drawn(parts: Parts, n: int, generator: torch.Generator) -> Tensor:
    """Draws of a mixture."""
    weights, means, variances = parts
    return GaussianMixture(weights.softmax(0), means, variances).sample(n, generator)


def root(parts: Parts, n: int, generator: torch.Generator) -> Tensor:
    """Draws of the square root of a mixture: of the sum of its parts' roots, which is above it, by rejection."""
    weights, means, variances = parts
    d = means.shape[1]
    wide = 0.5 * weights + 0.25 * d * variances.log(), means, 2 * variances
    kept = []
    while sum(map(len, kept)) < n:
        x = drawn(wide, 4 * n, generator)
        squares = (x[:, None] - means).square().sum(2)
        log_parts = weights - 0.5 * squares / variances - 0.5 * d * variances.log()
        log_share = 0.5 * log_parts.logsumexp(1) - (0.5 * log_parts).logsumexp(1)
        uniform = torch.rand(len(x), generator=generator, dtype=torch.float64)
        kept.append(x[uniform.log() < log_share])
    return torch.cat(kept)[:n]


def descended(target: Target, kernels: Kernels, n: int, way: str, seed: int) -> Tensor:
    """Draws at level 1 without weights: steps down alone, or each with a move that is accepted or simply taken."""
    generator, schedule, step = stream(seed, "descent"), target.schedule, FIRST_STEP
    x, d = target.start(n, generator)[0], math.prod(target.shape)
    states = States.of(target, x, schedule.T)
    for s in range(schedule.T - 1, 0, -1):
        noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
        states = States.of(target, kernels.down(states.x, states.at.eps, states.t, s, noise), s)
        if way != "sum of scores":
            noise, uniform = torch.randn(n, d, generator=generator, dtype=torch.float64), torch.zeros(n)
            if way == "accepted":
                uniform = torch.rand(n, generator=generator, dtype=torch.float64)
            # The size that suits accepted moves: a tenth of the states tells it.
            trial = states.take(torch.arange(max(1, n // 10)))
            step = adapted(step, float(langevin(target, kernels, trial, step, generator).double().mean()))
            langevin(target, kernels, states, step, None, (noise, uniform))
    return states.x


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, measures and writes."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.benchmarks.composing", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--n", type=int, default=2000, help="draws a side (2000)")
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    n, rows = options.n, []
    for d in options.dims:
        one, two = exact_mixture(d), exact_mixture(d, seed=1)
        a, b = at_level_1(one), at_level_1(two)
        square = multiplied(a, a)
        both = torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]), torch.cat([a[2], b[2]])
        cases = {
            "product": (compose.all_of([one, two]), multiplied(a, b)), "mixture": (compose.any_of([one, two]), both),
            "power 2": (compose.tempered(one, 2.0), square),
            "power 4": (compose.tempered(one, 4.0), multiplied(square, square)),
            "power 0.5": (compose.tempered(one, 0.5), None),
        }  # fmt: skip
        for (case, (model, parts)), way in product(
            cases.items(), ("exact", "particles", "accepted", "unadjusted", "sum of scores")
        ):
            target, generator, before = ModelTarget(model), stream(0, "exact", d), time.process_time()
            truth = [root(a, 10 * n, generator) if parts is None else drawn(parts, 10 * n, generator),
                     root(a, n, generator) if parts is None else drawn(parts, n, generator)]  # fmt: skip
            ess = None
            if way == "particles":
                found = compose.sample(model, n, particles=2 * n, details=True)
                x, ess = found.x.double(), found.ess / (2 * n)
            else:
                x = truth[1] if way == "exact" else descended(target, Kernels.of_target(target), n, way, 0)
                x = clean(target, x)
            real = clean(target, truth[0])
            accuracy, se = two_sample_accuracy(x, real[:n])
            near = [torch.cdist(part, one.base.means).argmin(1) for part in (x, real)]
            shares = [torch.bincount(part, minlength=4) / len(part) for part in near]
            rows.append({
                "d": d, "case": case, "method": way, "n": n, "c2st": accuracy, "c2st_se": se,
                "modes": float((shares[0] - shares[1]).abs().max()), "ess": ess,
                "cpu_seconds": time.process_time() - before,
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
            write_rows(rows, options.json)


def clean(target: Target, x: Tensor) -> Tensor:
    """The step from level 1 that draws of ``torchcdm.sample`` have taken."""
    return Kernels(target.reference).x0(x, target.eps(x, 1), 1)


if __name__ == "__main__":
    main()
