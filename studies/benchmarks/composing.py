"""Composed densities against exact draws of them: a classifier's accuracy, and the weights of modes.

    python -m studies.benchmarks.composing --json studies/results/composing.json
    python -m studies.benchmarks.composing --learned --n 1000 --json studies/results/composing_learned.json

Mixtures of four round Gaussians in 2 and 16 dimensions, exact at every level: their product, their mixture, powers of
the first, and the first away from a broad Gaussian, p² / q. Products, such ratios, and powers of whole numbers are
mixtures again; a root is drawn by rejection. Draws end at level 1 and take one denoising step; so do the exact ones.

With ``--learned`` the same is made of two CDMs whose networks have learned the mixtures from draws, with one Gaussian
as base. What stands for exact draws are those of :data:`MANY` particles a draw, and ``exact`` others of another seed;
``truth`` is how they differ from exact draws of the mixtures' composition: an error of learning, not of sampling.

Methods, by evaluations a draw (T = 24 levels):

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
from pathlib import Path

import torch
from torch import Tensor

import torchcdm
from studies.benchmarks.files import write_rows
from studies.benchmarks.posterior_coverage import Nothing, exact_mixture
from studies.exact import GaussianMixture
from studies.quality.measure import two_sample_accuracy
from torchcdm import compose
from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.particles import FIRST_STEP, States, adapted, langevin
from torchcdm.annealing.target import ModelTarget, Target
from torchcdm.diffusion.gaussian import GaussianMarginals, Rotation
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.density import DensityModel
from torchcdm.networks.mlp import MLP
from torchcdm.random import stream
from torchcdm.units import DataTransform

BROAD = 2.0
"""Variance of what ``negation`` keeps away from."""

LEARNED_FROM, MANY = 50_000, 20
"""Draws that a network learns from, and particles for each of what stands for exact draws of what it has learned."""

Parts = tuple[Tensor, Tensor, Tensor]
"""Log weights (K,), means (K, d) and variances (K,) of a mixture of round Gaussians."""


def at_level_1(model: DensityModel) -> Parts:
    """What an exact mixture is at level 1."""
    mixture, alpha, sigma = model.base, model.schedule.alpha[1], model.schedule.sigma[1]
    return mixture.log_weights, alpha * means_of(model), alpha**2 * mixture.parts.variances[:, 0, 0] + sigma**2


def means_of(model: DensityModel) -> Tensor:
    """Means of an exact mixture, (K, d)."""
    return model.base.parts.mean[:, 0]


def multiplied(a: Parts, b: Parts) -> Parts:
    """The product of two mixtures, a mixture of the products of their parts, up to a constant.

    One part of variance -V stands for the inverse of a Gaussian that is broader than all parts of the other mixture.
    """
    (w, m, v), (W, M, V) = a, b
    total, d = v[:, None] + V, m.shape[1]
    apart = (m[:, None] - M).square().sum(2)
    weights = w[:, None] + W - 0.5 * apart / total - 0.5 * d * total.abs().log()
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


def broad(d: int) -> DensityModel:
    """A Gaussian beside the mixtures' centre, broader than all of their parts."""
    schedule = exact_mixture(d).schedule
    mean, shape = torch.full((d,), d**-0.5, dtype=torch.float64), (d,)
    base = GaussianMarginals(schedule, mean, torch.full(shape, BROAD, dtype=torch.float64), Rotation(shape))
    return ClassificationDiffusion(Nothing(schedule.T + 2), schedule, DataTransform(shape), base).double()


def learned(exact: DensityModel, seed: int, steps: int) -> DensityModel:
    """A CDM of draws of a mixture. Its base is one Gaussian: all modes are the network's."""
    schedule, shape = exact.schedule, exact.shape
    x = exact.base.draw((LEARNED_FROM, *shape), stream(seed, "learned from")).float()
    network, base = MLP(shape[0], levels=schedule.T + 2, width=64, depth=2), GaussianMarginals.fit(x, schedule)
    model = ClassificationDiffusion(network, schedule, DataTransform(shape), base)
    how = {"seed": seed, "lr": 2e-3, "batch_size": 512, "select": "loss"}
    return torchcdm.train(model, x, progress=False, device="cpu", steps=steps, **how).double()


def cases(one: DensityModel, two: DensityModel) -> dict[str, DensityModel]:
    """What is made of two densities, by name."""
    return {
        "product": compose.all_of([one, two]), "mixture": compose.any_of([one, two]),
        "negation": compose.none_of(one, [broad(one.shape[0])]), "power 2": compose.tempered(one, 2.0),
        "power 4": compose.tempered(one, 4.0), "power 0.5": compose.tempered(one, 0.5),
    }  # fmt: skip


def exact_draws(case: str, one: DensityModel, two: DensityModel, n: int, generator: torch.Generator) -> Tensor:
    """Draws at level 1 of what :func:`cases` makes of two exact mixtures."""
    a, b, wide = at_level_1(one), at_level_1(two), broad(one.shape[0])
    mean, variances = wide.base.moments(1)
    square = multiplied(a, a)
    parts = {
        "product": lambda: multiplied(a, b), "mixture": lambda: tuple(map(torch.cat, zip(a, b, strict=True))),
        "negation": lambda: multiplied(square, (torch.zeros(1).double(), mean[None], -variances[:1])),
        "power 2": lambda: square, "power 4": lambda: multiplied(square, square),
    }  # fmt: skip
    return root(a, n, generator) if case == "power 0.5" else drawn(parts[case](), n, generator)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, measures and writes."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.benchmarks.composing", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--n", type=int, default=2000, help="draws a side (2000)")
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--learned", action="store_true", help="of densities that networks have learned")
    parser.add_argument("--steps", type=int, default=4000, help="training steps of the networks (4000)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    n, rows = options.n, []
    for d in options.dims:
        exact = one, two = exact_mixture(d), exact_mixture(d, seed=1)
        if options.learned:
            one, two = (learned(model, seed, options.steps) for seed, model in enumerate(exact))
        for case, model in cases(one, two).items():
            target, generator = ModelTarget(model), stream(0, "exact", d)
            truth = clean(ModelTarget(cases(*exact)[case]), exact_draws(case, *exact, 10 * n, generator))
            known, others = truth[:-n], truth[-n:]
            if options.learned:
                known, others = (compose.sample(model, n, particles=MANY * n, seed=seed).double() for seed in (1, 2))
                accuracy, se = two_sample_accuracy(known, truth[:n])
                rows.append({"d": d, "case": case, "method": "truth", "n": n, "c2st": accuracy, "c2st_se": se,
                             "modes": modes(known, truth, exact[0])})  # fmt: skip
            for way in ("exact", "particles", "accepted", "unadjusted", "sum of scores"):
                before, ess = time.process_time(), None
                if way == "particles":
                    found = compose.sample(model, n, particles=2 * n, details=True)
                    x, ess = found.x.double(), found.ess / (2 * n)
                elif way == "exact":
                    x = others
                else:
                    x = clean(target, descended(target, Kernels.of_target(target), n, way, 0))
                accuracy, se = two_sample_accuracy(x, known[:n])
                rows.append({
                    "d": d, "case": case, "method": way, "n": n, "c2st": accuracy, "c2st_se": se,
                    "modes": modes(x, known, exact[0]), "ess": ess, "cpu_seconds": time.process_time() - before,
                })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
            write_rows(rows, options.json)


def modes(x: Tensor, known: Tensor, exact: DensityModel) -> float:
    """The largest error of the share of draws that are nearest to one of a mixture's means."""
    near = [torch.cdist(part, means_of(exact)).argmin(1) for part in (x, known)]
    shares = [torch.bincount(part, minlength=len(means_of(exact))) / len(part) for part in near]
    return float((shares[0] - shares[1]).abs().max())


def clean(target: Target, x: Tensor) -> Tensor:
    """The step from level 1 that draws of ``torchcdm.sample`` have taken."""
    return Kernels(target.reference).x0(x, target.eps(x, 1), 1)


if __name__ == "__main__":
    main()
