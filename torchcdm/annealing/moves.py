"""States of the engine, and the Langevin move with accept-reject that leaves each level's density as it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.target import Evaluated, Target
from torchcdm.diffusion.gaussian import MatrixRotation
from torchcdm.diffusion.schedules import Level

BEST_ACCEPTANCE = 0.57
"""Of Langevin moves in many dimensions (Roberts and Rosenthal 1998)."""

FIRST_STEP, SMALLEST_STEP, LARGEST_STEP = 0.5, 1e-3, 2.0
"""Step sizes in units of the squared scale of each direction; beyond 2 a move overshoots even a Gaussian."""


@dataclass
class States:
    """Points at their levels, and what a target says of them.

    Attributes:
        x: Model units, float64 (B, *shape).
        t: Their levels, an int or long (B,).
        at: The target there.
        origin: Which of the first particles each descends from, long (B,); None where nobody keeps count.
    """

    x: Tensor
    t: Level
    at: Evaluated
    origin: Tensor | None = None

    @classmethod
    def of(cls, target: Target, x: Tensor, t: Level) -> States:
        """Points where the target has been evaluated, by one pass."""
        return cls(x, t, target.evaluate(x, t))

    def take(self, rows: Tensor | slice) -> States:
        """Those of some rows: of a slice they share memory."""
        return States(self.x[rows], self.t if isinstance(self.t, int) else self.t[rows],
                      Evaluated(*(None if part is None else part[rows] for part in self.at)),
                      None if self.origin is None else self.origin[rows])  # fmt: skip

    def put(self, rows: Tensor, other: States) -> None:
        """Takes points, not levels, from ``other``, which has as many rows as ``rows`` names."""
        self.x[rows] = other.x
        for mine, new in zip(self.at, other.at, strict=True):
            if mine is not None:
                mine[rows] = new


def langevin(
    target: Target,
    kernels: Kernels,
    states: States,
    step: Tensor | float,
    generator: torch.Generator | None,
    draws: tuple[Tensor, Tensor] | None = None,
    metric: tuple[MatrixRotation, Tensor] | None = None,
) -> Tensor:
    """One Langevin move of each state, accepted or rejected; one evaluation. The states are changed.

    Of points at levels 1 ... T. The move is scaled by direction in the eigenbasis of the reference:
    E[eps²] = 1 - V_t / r_t² is the information of a Gaussian with as much posterior variance. Another eigenbasis, with
    the squared scales of its directions, (d,), is a ``metric``. The ``step`` is in units of each direction's squared
    scale, one or (B,). Standard normal (B, d) and uniform (B,) numbers of the move and its acceptance may be given as
    ``draws``.

    Returns:
        Which moves were accepted, boolean (B,).
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
    noise = draws[0] if draws else torch.randn(scale.shape, generator=generator, dtype=x.dtype).to(x.device)
    moved = -0.5 * scale * rotation(states.at.eps) / sigma + scale.sqrt() * noise
    proposed = States.of(target, x + rotation.inverse(moved), t)
    returned = moved - 0.5 * scale * rotation(proposed.at.eps) / sigma
    log_back, log_forth = -0.5 * (returned.square() / scale).sum(1), -0.5 * noise.square().sum(1)
    log_ratio = proposed.at.log_gamma - states.at.log_gamma + log_back - log_forth
    accepted = draws[1].log() < log_ratio if draws else chance(log_ratio, generator)
    states.put(accepted, proposed.take(accepted))
    return accepted


def chance(log_ratio: Tensor, generator: torch.Generator) -> Tensor:
    """True with probability min(1, exp(log_ratio)), never where it is nan, (B,)."""
    uniform = torch.rand(len(log_ratio), generator=generator, dtype=torch.float64).to(log_ratio.device)
    return uniform.log() < log_ratio


def adapted(step: Tensor | float, accepted: Tensor) -> Tensor | float:
    """The step size for the next move, towards :data:`BEST_ACCEPTANCE`; ``accepted`` the share of this one's."""
    change = accepted - BEST_ACCEPTANCE
    if isinstance(step, Tensor):
        return (step * change.exp()).clamp(SMALLEST_STEP, LARGEST_STEP)
    return min(max(step * math.exp(change), SMALLEST_STEP), LARGEST_STEP)
