r"""Rules that take x_t at level t to x_s at a lower level s.

All follow from the coordinates in which the probability flow of every schedule is the same equation
(identity 6 of ``docs/method.md``),

.. math:: u = x / \alpha, \qquad r = \sigma / \alpha, \qquad du / dr = E[\epsilon | x],

so that none asks which schedule it runs on. The step to level 0 always returns E[x_0 | x_t].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from torchcdm.diffusion.prediction import Prediction
from torchcdm.errors import UserError, nearest
from torchcdm.models.denoiser import Denoiser
from torchcdm.models.inputs import check_real

Visited = tuple[int, Prediction]
"""A level that the sampler has been to, and what the denoiser said there."""


@dataclass(frozen=True)
class Step:
    """One step, from level t to level s.

    Attributes:
        denoiser: Any denoiser.
        x_t: Model units, (B, *shape).
        t: The level of ``x_t``, 1 ... T.
        s: The level to reach, 0 ... t - 1.
        y: Classes, long (B,), or None.
        noise: Standard normal, shape of ``x_t``; for stochastic samplers alone.
        previous: What the step before returned, for multistep rules; None at the first step.
    """

    denoiser: Denoiser
    x_t: Tensor
    t: int
    s: int
    y: Tensor | None = None
    noise: Tensor | None = None
    previous: Visited | None = None


class Sampler(ABC):
    """One rule for a step from level t to level s < t. Holds settings, never a state.

    Attributes:
        evaluations: Denoiser evaluations in a step; the step to level 0 always takes one.
        stochastic: Whether a step adds fresh noise.
    """

    evaluations: ClassVar[int] = 1
    stochastic: bool = False

    def step(self, step: Step) -> tuple[Tensor, Visited]:
        """x_s, (B, *shape), which is E[x_0 | x_t] at level 0, and what the next step may use.

        Raises:
            UserError: No noise for a sampler that adds some.
        """
        now = step.denoiser.denoise(step.x_t, step.t, step.y)
        if step.s and self.stochastic and step.noise is None:
            raise UserError("this sampler adds noise at every step; give the step its noise")
        return self.rule(step, now) if step.s else now.x0, (step.t, now)

    @abstractmethod
    def rule(self, step: Step, now: Prediction) -> Tensor:
        """x_s at a level s > 0, (B, *shape), from what the denoiser said at level t."""


@final
class DDPM(Sampler):
    """Ancestral sampling, x_s ~ q(x_s | x_t, x_0 = E[x_0|x_t]) (Ho et al., 2020, arXiv 2006.11239).

    The kernel is that of the chain that visits only the levels asked for, alpha_{t|s} = alpha_t / alpha_s.
    """

    stochastic = True

    def rule(self, step: Step, now: Prediction) -> Tensor:
        a, b, deviation = step.denoiser.schedule.reverse_kernel(step.t, step.s, step.x_t)
        return a * step.x_t + b * now.x0 + deviation * step.noise


@final
class DDIM(Sampler):
    """x_s = alpha_s x_0 + (sigma_s² - c²)^½ eps + c noise (Song et al., 2021, arXiv 2010.02502; identity 7).

    c is ``eta`` times the deviation of the ancestral step: 0 is the deterministic first-order solver, 1 is DDPM.

    Args:
        eta: Share of fresh noise, 0 ... 1.
    """

    def __init__(self, eta: float = 0.0) -> None:
        check_real("ddim: eta", eta, 0, 1)
        self.eta, self.stochastic = eta, eta > 0

    def rule(self, step: Step, now: Prediction) -> Tensor:
        schedule = step.denoiser.schedule
        alpha_s, sigma_s = schedule.at(step.s, step.x_t)
        if not self.stochastic:
            return now.carried_to(alpha_s, sigma_s)
        c = self.eta * schedule.reverse_kernel(step.t, step.s, step.x_t)[2]
        return now.carried_to(alpha_s, (sigma_s**2 - c**2).sqrt()) + c * step.noise


@final
class DPMSolver2(Sampler):
    r"""Second-order multistep DPM-Solver in noise prediction (Lu et al., 2022, arXiv 2206.00927).

    With :math:`\lambda = -\log r`, eps linear in lambda through this level and the one before:
    u_s = u_t - (r_t - r_s) eps_t - (r_t - r_s - (lambda_s - lambda_t) r_s) (eps_t - eps_q) / (lambda_t - lambda_q),
    q the level before. The first step is DDIM. The solver of the CDM paper.
    """

    def rule(self, step: Step, now: Prediction) -> Tensor:
        r, (alpha_s, sigma_s) = step.denoiser.schedule.ratio, step.denoiser.schedule.at(step.s, step.x_t)
        x_s, t, s = now.carried_to(alpha_s, sigma_s), step.t, step.s
        if step.previous is None:
            return x_s
        q, before = step.previous
        curvature = r[t] - r[s] - r[s] * (r[t] / r[s]).log()
        return x_s - alpha_s * curvature * ((now.eps - before.eps) / (r[q] / r[t]).log())


@final
class DPMSolverPP2M(Sampler):
    r"""DPM-Solver++(2M): second-order multistep in data prediction (Lu et al., 2022, arXiv 2211.01095).

    x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - r_s / r_t) D, D extrapolating x_0 half a step ahead from this
    level and the one before. The first step is DDIM.
    """

    def rule(self, step: Step, now: Prediction) -> Tensor:
        r, (alpha_s, sigma_s) = step.denoiser.schedule.ratio, step.denoiser.schedule.at(step.s, step.x_t)
        ahead, t, s = now.x0, step.t, step.s
        if step.previous is not None:
            q, before = step.previous
            ahead = ahead + (r[t] / r[s]).log() / (r[q] / r[t]).log() / 2 * (now.x0 - before.x0)
        return sigma_s / now.sigma_t * step.x_t + alpha_s * (1 - r[s] / r[t]) * ahead


@final
class Heun(Sampler):
    r"""Heun's method (Karras et al., 2022, arXiv 2206.00364) over an angle: two evaluations a step.

    With :math:`\theta = \arctan r` and :math:`v = x / (\alpha^2 + \sigma^2)^{1/2}` the probability flow is
    :math:`dv / d\theta = \cos\theta\,\epsilon - \sin\theta\,x_0`. The whole path is a quarter turn, so that few
    steps are accurate; in r, as Karras et al. have it, the first steps of most schedules cover decades.
    """

    evaluations: ClassVar[int] = 2

    def rule(self, step: Step, now: Prediction) -> Tensor:
        schedule = step.denoiser.schedule
        alpha_s, sigma_s = schedule.at(step.s, step.x_t)
        there = step.denoiser.denoise(now.carried_to(alpha_s, sigma_s), step.s, step.y)
        angle = schedule.ratio.atan()
        slope = (_angular_velocity(now) + _angular_velocity(there)) / 2
        v_s = step.x_t / torch.hypot(now.alpha_t, now.sigma_t) - (angle[step.t] - angle[step.s]) * slope
        return torch.hypot(alpha_s, sigma_s) * v_s


def _angular_velocity(at: Prediction) -> Tensor:
    """dv / dtheta of :class:`Heun`, shape of x."""
    return (at.alpha_t * at.eps - at.sigma_t * at.x0) / torch.hypot(at.alpha_t, at.sigma_t)


SAMPLERS: dict[str, type[Sampler]] = {
    "ddpm": DDPM, "ddim": DDIM, "dpm2": DPMSolver2, "dpm++": DPMSolverPP2M, "heun": Heun
}  # fmt: skip

def make_sampler(sampler: str | Sampler) -> Sampler:
    """The sampler of a name in :data:`SAMPLERS`; a sampler itself passes through.

    Raises:
        UserError: Another name.
    """
    if isinstance(sampler, Sampler):
        return sampler
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler '{sampler}'; {nearest(sampler, SAMPLERS)}")
    return SAMPLERS[sampler]()
