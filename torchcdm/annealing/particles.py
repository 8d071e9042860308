r"""Sequential Monte Carlo from the noise down: weighted particles, and estimates of the normaliser.

.. math:: \log w = \log\gamma_T(x_T) - \log p_{start}(x_T) + \sum_t w(x_{t-1}, x_t), \qquad E[e^{\log w}] = Z

for any target. Resampling between the steps keeps the mean. The log of a mean errs low.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from torchcdm.annealing.kernels import Kernels, denoised
from torchcdm.annealing.moves import FIRST_STEP, States, adapted, langevin
from torchcdm.annealing.target import Target
from torchcdm.runtime.processes import alone


class Particles(NamedTuple):
    """Particles at the level where they ended; those of one island are neighbours.

    Attributes:
        states: Islands times size points.
        log_weights: Of the points within each island, (islands, size).
        log_estimates: Logarithms of unbiased estimates of Z, one of each island, (islands,).
    """

    states: States
    log_weights: Tensor
    log_estimates: Tensor


@torch.no_grad()
def smc(
    target: Target,
    kernels: Kernels,
    level: int,
    islands: int,
    size: int,
    generator: torch.Generator,
    moves: int = 1,
    below: float = 0.5,
    seen: Callable[[States, Tensor], None] | None = None,
    progress: bool = False,
) -> Particles:
    """Particles from the start density at T down to ``level``.

    Args:
        target: The target.
        kernels: r proposes.
        level: 1 ... T.
        islands: Independent populations but for the step size of their moves, which is adapted to all of them.
        size: Particles in each.
        generator: A CPU generator.
        moves: Langevin moves after each level, an evaluation each. Without any the particles see only what r proposes.
        below: An island is resampled where its effective sample size is below that share of its size; 0 for never,
            which is annealed importance sampling.
        seen: Called at each level with the states and their weights, (islands, size).
        progress: Shows a progress bar over the levels.
    """
    from tqdm.auto import tqdm

    T, step = target.schedule.T, FIRST_STEP
    x, log_start = target.start(islands * size, generator)
    # Particles depend on each other: were there differences in rounding between processes, resampling would turn
    # them into other particles.
    with alone():
        states = States.of(target, x, T)
        log_w = (states.at.log_gamma - log_start).reshape(islands, size)
        log_z = torch.zeros_like(log_w[:, 0])
        if seen is not None:
            seen(states, log_w)
        for t in tqdm(range(T, level, -1), desc="log Z", unit="level", disable=not progress, leave=False):
            noise = torch.randn(len(x), math.prod(target.shape), generator=generator, dtype=x.dtype).to(x.device)
            x0 = denoised(target.schedule, states.x, t, states.at.eps)
            below_x = kernels.down(states.x, x0, t, t - 1, noise)
            lower = States.of(target, below_x, t - 1)
            work = kernels.work(lower.x, states.x, lower.at, states.at, t - 1, t)
            states, log_w = lower, log_w + work.reshape(islands, size)
            states, log_w, log_z = resampled(states, log_w, log_z, below, generator)
            for _ in range(moves):
                accepted = langevin(target, kernels, states, step, generator)
                step = adapted(step, float(accepted.double().mean()))
            if seen is not None:
                seen(states, log_w)
    return Particles(states, log_w, log_z + log_w.logsumexp(1) - math.log(size))


def resampled(
    states: States, log_w: Tensor, log_z: Tensor, below: float, generator: torch.Generator
) -> tuple[States, Tensor, Tensor]:
    """Systematic resampling of the islands whose effective sample size is ``below`` that share of their size.

    Args:
        states: Points of all islands.
        log_w: Their weights, (islands, size).
        log_z: What earlier resampling has taken out of the weights, (islands,).
        below: The share; infinite for all islands.
        generator: A CPU generator.
    """
    (islands, size), weights, device = log_w.shape, log_w.softmax(1), log_w.device
    poor = 1 / weights.square().sum(1) < below * size
    offset = torch.rand(islands, generator=generator, dtype=torch.float64).to(device)
    chosen = torch.where(poor[:, None], systematic(weights, offset), torch.arange(size, device=device))
    index = (chosen + size * torch.arange(islands, device=device)[:, None]).flatten()
    gained = log_w.logsumexp(1) - math.log(size)
    return states.take(index), log_w.where(~poor[:, None], 0), log_z + gained.where(poor, 0)


def systematic(weights: Tensor, offset: Tensor) -> Tensor:
    """Indices of n draws from each row of ``weights`` (k, n), at evenly spaced points from ``offset`` (k,) on."""
    n = weights.shape[1]
    points = (torch.arange(n, device=weights.device) + offset[:, None]) / n
    return torch.searchsorted(weights.cumsum(1).contiguous(), points).clamp_max(n - 1)
