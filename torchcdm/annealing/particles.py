r"""Points, the Langevin move with accept-reject that leaves each level's density as it is, and particles.

Sequential Monte Carlo from the noise down gives weighted particles, and estimates of the normaliser,

.. math:: \log w = \log\gamma_T(x_T) - \log p_{start}(x_T) + \sum_t w(x_{t-1}, x_t), \qquad E[e^{\log w}] = Z

for any target. Resampling between the steps keeps the mean. The log of a mean errs low.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor

from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.target import Evaluated, Target
from torchcdm.diffusion.gaussian import MatrixRotation
from torchcdm.diffusion.schedules import Level
from torchcdm.errors import UserError
from torchcdm.random import normal
from torchcdm.runtime.processes import alone, progress_bar

BEST_ACCEPTANCE = 0.57  # of Langevin moves in many dimensions (Roberts and Rosenthal 1998)
# Step sizes in units of the squared scale of each direction; beyond 2 a move overshoots even a Gaussian.
FIRST_STEP, SMALLEST_STEP, LARGEST_STEP = 0.5, 1e-3, 2.0


@dataclass
class States:
    """Points at their levels, and what a target says of them."""

    x: Tensor  # model units, float64 (B, *shape)
    t: Level
    at: Evaluated
    origin: Tensor | None = None  # which of the first particles each descends from, long (B,); None: nobody counts

    @classmethod
    def of(cls, target: Target, x: Tensor, t: Level) -> States:
        """Points where the target has been evaluated, by one pass."""
        return cls(x, t, target.evaluate(x, t))

    def take(self, rows: Tensor | slice) -> States:
        """Those of some rows: of a slice they share memory."""
        t, origin = (part[rows] if isinstance(part, Tensor) else part for part in (self.t, self.origin))
        return States(self.x[rows], t, Evaluated(*(None if part is None else part[rows] for part in self.at)), origin)

    def put(self, rows: Tensor, other: States) -> None:
        """Takes points, not levels, from ``other``, which has as many rows as ``rows`` names."""
        self.x[rows] = other.x
        for mine, new in zip(self.at, other.at, strict=True):
            if mine is not None:
                mine[rows] = new


def langevin(
    target: Target, kernels: Kernels, states: States, step: Tensor | float, generator: Generator | None,
    draws: tuple[Tensor, Tensor] | None = None, metric: tuple[MatrixRotation, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """One Langevin move of each state, accepted or rejected; one evaluation. The states are changed.

    Of points at levels 1 ... T. Gives which moves were accepted, boolean (B,). The move is scaled by direction in the
    eigenbasis of the reference: E[eps²] = 1 - V_t / r_t² is the information of a Gaussian with as much posterior
    variance. Another eigenbasis, with the squared scales of its directions, (d,), is a ``metric``. The ``step``, one
    or (B,), is in units of the squared scales. ``draws`` are standard normal (B, d) and uniform (B,) numbers to use.
    """
    rotation, schedule, t, x = target.reference.rotation, target.schedule, states.t, states.x
    level = torch.as_tensor(t, device=x.device).expand(len(x))
    sigma = schedule.sigma[level, None]
    if metric is None:
        information = 1 - kernels.variances[level - 1] / schedule.ratio[level, None] ** 2
        squares = sigma**2 / information.clamp(0.05, 1)
    else:
        rotation, squares = metric
    scale = torch.as_tensor(step, dtype=x.dtype, device=x.device).reshape(-1, 1) * squares
    scale = scale.expand(len(x), -1)
    noise = draws[0] if draws else normal(scale.shape, generator, x.device)
    moved = -0.5 * scale * rotation(states.at.eps) / sigma + scale.sqrt() * noise
    proposed = States.of(target, x + rotation.inverse(moved), t)
    returned = moved - 0.5 * scale * rotation(proposed.at.eps) / sigma
    log_back, log_forth = -0.5 * (returned.square() / scale).sum(1), -0.5 * noise.square().sum(1)
    log_ratio = proposed.at.log_gamma - states.at.log_gamma + log_back - log_forth
    accepted = draws[1].log() < log_ratio if draws else chance(log_ratio, generator)
    states.put(accepted, proposed.take(accepted))
    return accepted


def chance(log_ratio: Tensor, generator: Generator) -> Tensor:
    """True with probability min(1, exp(log_ratio)), never where it is nan, (B,)."""
    uniform = torch.rand(len(log_ratio), generator=generator, dtype=torch.float64).to(log_ratio.device)
    return uniform.log() < log_ratio


def adapted(step: Tensor | float, accepted: Tensor | float) -> Tensor:
    """The step size for the next move, towards ``BEST_ACCEPTANCE``; ``accepted`` the share of this one's."""
    change = torch.as_tensor(accepted, dtype=torch.float64) - BEST_ACCEPTANCE
    return (step * change.exp()).clamp(SMALLEST_STEP, LARGEST_STEP)


class Particles(NamedTuple):
    """Particles at the level where they ended, islands times size; those of one island are neighbours."""

    states: States
    log_weights: Tensor  # within each island, (islands, size)
    log_estimates: Tensor  # logarithm of an unbiased estimate of Z by each island, (islands,)
    least: Tensor  # its smallest effective sample size before resampling, (islands,)


@torch.no_grad()
def smc(
    target: Target, kernels: Kernels, level: int, islands: int, size: int, generator: Generator, moves: int = 1,
    below: float = 0.5, spacing: float | None = None, progress: bool = False,
    seen: Callable[[States, Tensor | float], None] | None = None,
) -> Particles:  # fmt: skip
    """Particles from the start density at T down to ``level``, 1 ... T, proposed by r.

    ``islands`` populations of ``size`` particles are independent but for the step size of their moves, adapted to all
    of them. Langevin ``moves`` follow each step, an evaluation each. An island is resampled where its effective sample
    size is ``below`` that share of its size; 0 for never, which is annealed importance sampling. A step is of one
    level, or as long as the deviation of its works is at most ``spacing`` nats: these are found by trial, so that the
    estimates are only nearly unbiased. The states of every level, and the step size of their moves, are ``seen``.
    UserError where no island has any weight left, or weights are infinite.
    """
    schedule, step, length, n = target.schedule, FIRST_STEP, 1, islands * size
    x, log_start = target.start(n, generator)
    bar = progress_bar(None, "particles", progress, total=schedule.T - level, unit="level")
    # Particles depend on each other: were there differences in rounding between processes, resampling would turn
    # them into other particles.
    with alone(), bar:
        states = States.of(target, x, schedule.T)
        states.origin = torch.arange(n, device=states.x.device)
        log_w = (states.at.log_gamma - log_start).reshape(islands, size)
        log_z, least = torch.zeros_like(log_w[:, 0]), effective(log_w)
        while True:
            if seen is not None:
                seen(states, step)
            if states.t == level:
                break
            length = min(length, states.t - level)
            while True:
                noise = normal((n, math.prod(target.shape)), generator, x.device)
                s = states.t - length
                lower = States.of(target, kernels.down(states.x, states.at.eps, states.t, s, noise), s)
                works = kernels.work(lower.x, states.x, lower.at, states.at, s, states.t)
                if spacing is None or length == 1 or float(works.std()) <= spacing:
                    break
                length = 2 * length // 3
            if spacing is not None and float(works.std()) < spacing / 1.5:
                length = -(-3 * length // 2)
            bar.update(states.t - s)
            # Both may be infinite: a particle without weight never gets any back.
            log_w = (log_w + works.reshape(islands, size)).nan_to_num(-math.inf, math.inf, -math.inf)
            lower.origin = states.origin
            states = lower
            least = torch.minimum(least, effective(log_w))
            states, log_w, log_z = resampled(states, log_w, log_z, below, generator)
            for _ in range(moves):
                accepted = langevin(target, kernels, states, step, generator)
                step = adapted(step, float(accepted.double().mean()))
    log_estimates = log_z + log_w.logsumexp(1) - math.log(size)
    if not bool((log_estimates < math.inf).all() and log_estimates.isfinite().any()):  # neither is true of nan
        raise UserError("no particle has a finite weight: the density contradicts itself")
    return Particles(states, log_w, log_estimates, least)


def effective(log_w: Tensor) -> Tensor:
    """Effective sample size of the weights of each island, (islands,) of (islands, size); 0 where none has any."""
    return (1 / log_w.softmax(1).square().sum(1)).nan_to_num(0)


def resampled(
    states: States, log_w: Tensor, log_z: Tensor, below: float, generator: Generator
) -> tuple[States, Tensor, Tensor]:
    """Systematic resampling of the islands whose effective sample size is ``below`` that share of their size.

    Points have weights ``log_w``, (islands, size); ``log_z``, (islands,), is what was taken out of them before.
    """
    (islands, size), weights, device = log_w.shape, log_w.softmax(1), log_w.device
    poor = effective(log_w) < below * size
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
