r"""Samplers: rules that take x_t at level t to x_s at a lower level s; and levels that suit a model.

All follow from coordinates in which the flow of every schedule is one equation (identity 6 of ``docs/method.md``),

.. math:: u = x / \alpha, \qquad r = \sigma / \alpha, \qquad du / dr = E[\epsilon | x],

so that none asks which schedule it runs on. The step to level 0 always returns E[x_0 | x_t].
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Annotated, ClassVar, Literal, final

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor

from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import NoiseSchedule
from torchcdm.errors import UserError, nearest
from torchcdm.models.denoiser import Denoiser, evaluation_mode, working_dtype
from torchcdm.random import stream
from torchcdm.runtime.validation import Int, NotNegative, Share, checked

Visited = tuple[int, Prediction]  # a level that the sampler has been to, and what the denoiser said there
Order = Annotated[Int, Ge(1), Le(4)]
Time = Callable[[Tensor], Tensor]  # function of r in which a polynomial is


@dataclass(frozen=True)
class Step:
    """One step from a level to a lower one."""

    denoiser: Denoiser
    x_t: Tensor  # (B, *shape), model units
    t: int  # its level, 1 ... T
    s: int  # where it goes, 0 ... t - 1
    y: Tensor | None = None  # classes, long (B,), or None
    noise: Tensor | None = None  # standard normal, shape of ``x_t``, for stochastic samplers alone
    previous: tuple[Visited, ...] = ()  # what the step before returned, for multistep rules, the latest first
    known: Prediction | None = None  # what the denoiser says of ``x_t``, where it is known already


class Sampler(ABC):
    """One rule for a step from level t to level s < t. Holds settings, never a state."""

    evaluations: ClassVar[int] = 1  # of the denoiser in a step; the step to level 0 always takes one
    spacing: ClassVar[Literal["even", "adaptive"]] = "even"  # where the steps are, unless a caller says
    weight: ClassVar[float] = 0.0  # power of r that weighs a step's error where steps are placed, see Curvature
    stochastic: bool = False  # whether a step adds fresh noise
    memory: int = 0  # number of levels before this one that a step uses

    def step(self, step: Step) -> tuple[Tensor, tuple[Visited, ...]]:
        """x_s, (B, *shape), which is E[x_0 | x_t] at level 0, and what the next step may use.

        UserError where there is no noise for a sampler that adds some.
        """
        if step.s and self.stochastic and step.noise is None:
            raise UserError("this sampler adds noise at every step; give the step its noise")
        now = self.corrected(step, step.known or step.denoiser.denoise(step.x_t, step.t, step.y))
        x_s = self.rule(step, now) if step.s else now.x0
        return x_s, ((step.t, now), *step.previous)[: max(1, self.memory)]

    def cost(self, steps: int) -> int:
        """Evaluations of the denoiser for each sample in ``steps`` steps that end at level 0."""
        return self.evaluations * (steps - 1) + 1

    def corrected(self, step: Step, now: Prediction) -> Prediction:
        """What a rule that predicts and corrects makes of the prediction at level t; by default the same."""
        return now

    def suited(self, variance: float) -> "Sampler":
        """The same for data of a ``variance`` per value, in model units; by default no other."""
        return self

    @abstractmethod
    def rule(self, step: Step, now: Prediction) -> Tensor:
        """x_s at a level s > 0, (B, *shape), from what the denoiser said at level t."""


@final
class DDIM(Sampler):
    """x_s = alpha_s x_0 + sigma_s ((1 - q)^½ eps + q^½ noise), q = eta² (1 - r_s² / r_t²) (identity 7).

    Of the chain that visits only the levels asked for (Song et al., 2021, arXiv 2010.02502).

    Args:
        eta: Share of fresh noise, 0 ... 1: 0 is the deterministic first-order solver, 1 is ancestral sampling, DDPM,
            x_s ~ q(x_s | x_t, x_0 = E[x_0|x_t]) (Ho et al., 2020, arXiv 2006.11239).
    """

    @checked
    def __init__(self, eta: Share = 0.0) -> None:
        self.eta, self.stochastic = eta, eta > 0

    def rule(self, step: Step, now: Prediction) -> Tensor:
        r, (alpha_s, sigma_s) = step.denoiser.schedule.ratio, step.denoiser.schedule.at(step.s, step.x_t)
        fresh = self.eta**2 * (1 - (r[step.s] / r[step.t]) ** 2)
        x_s = now.carried_to(alpha_s, sigma_s * (1 - fresh).sqrt())
        return x_s + sigma_s * fresh.sqrt() * step.noise if self.stochastic else x_s


@final
class DPMSolverPP2M(Sampler):
    """DPM-Solver++(2M): second-order multistep in data prediction (Lu et al., 2022, arXiv 2211.01095).

    x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - r_s / r_t) D, D extrapolating x_0 half a step ahead from two levels.
    """

    memory = 1

    def rule(self, step: Step, now: Prediction) -> Tensor:
        r, (alpha_s, sigma_s) = step.denoiser.schedule.ratio, step.denoiser.schedule.at(step.s, step.x_t)
        ahead, t, s = now.x0, step.t, step.s
        if step.previous:
            q, before = step.previous[0]
            ahead = ahead + (r[t] / r[s]).log() / (r[q] / r[t]).log() / 2 * (now.x0 - before.x0)
        return sigma_s / now.sigma_t * step.x_t + alpha_s * (1 - r[s] / r[t]) * ahead


@final
class Heun(Sampler):
    r"""Heun's method (Karras et al., 2022, arXiv 2206.00364) over an angle: two evaluations a step.

    With :math:`\theta = \arctan r` and :math:`v = x / (\alpha^2 + \sigma^2)^{1/2}` the probability flow is
    :math:`dv / d\theta = \cos\theta\,\epsilon - \sin\theta\,x_0`: a quarter turn, where r covers decades.
    """

    evaluations: ClassVar[int] = 2

    def rule(self, step: Step, now: Prediction) -> Tensor:
        schedule = step.denoiser.schedule
        alpha_s, sigma_s = schedule.at(step.s, step.x_t)
        there, angle = step.denoiser.denoise(now.carried_to(alpha_s, sigma_s), step.s, step.y), schedule.ratio.atan()
        slopes = [(p.alpha_t * p.eps - p.sigma_t * p.x0) / torch.hypot(p.alpha_t, p.sigma_t) for p in (now, there)]
        turn = (angle[step.t] - angle[step.s]) * (sum(slopes) / 2)
        return torch.hypot(alpha_s, sigma_s) * (step.x_t / torch.hypot(now.alpha_t, now.sigma_t) - turn)


@final
class IPNDM(Sampler):
    """Improved pseudo numerical methods (Zhang and Chen, 2023, arXiv 2204.13902; Liu et al., 2022, arXiv 2202.09778).

    A DDIM step with the noise that Adams-Bashforth extrapolates for equal steps, whatever the steps are: of its order
    where the steps in r are equal, of first order elsewhere, and robust. The first steps are of lower order.

    Args:
        order: 2, 3 or 4.
    """

    WEIGHTS = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))

    @checked
    def __init__(self, order: Annotated[Order, Ge(2)] = 4) -> None:
        self.memory = order - 1

    def rule(self, step: Step, now: Prediction) -> Tensor:
        noises = [now.eps, *(before.eps for _, before in step.previous)]
        eps = sum(w * e for w, e in zip(self.WEIGHTS[len(noises) - 1], noises, strict=True))
        r, alpha_s = step.denoiser.schedule.ratio, step.denoiser.schedule.at(step.s, step.x_t)[0]
        return alpha_s * (step.x_t / now.alpha_t + (r[step.s] - r[step.t]) * eps)


@final
class DEIS(Sampler):
    r"""Exponential integrator with a polynomial noise (tAB-DEIS; Zhang and Chen, 2023, arXiv 2204.13902).

    u_s = u_t - the integral over r of the polynomial through eps at this level and the ones before, by default in the
    angle :math:`\arctan r`, the cosine schedule's time. Of its order (tAB2: 3, tAB3: 4) but for the first steps.

    Args:
        order: 2, 3 or 4.
        time: Function of r in which the polynomial is. In ``torch.log``, of order 2, it is the multistep DPM-Solver in
            noise prediction (Lu et al., 2022, arXiv 2206.00927), the solver of the CDM paper.
    """

    @checked
    def __init__(self, order: Annotated[Order, Ge(2)] = 3, time: Time = torch.atan) -> None:
        self.memory, self.time = order - 1, time

    def rule(self, step: Step, now: Prediction) -> Tensor:
        change = _integral(step, ((step.t, now), *step.previous), step.t, step.s, self.time, 1)
        return step.denoiser.schedule.at(step.s, step.x_t)[0] * (step.x_t / now.alpha_t + change)


@final
class UniPC(Sampler):
    r"""Predictor and corrector in data prediction at one evaluation a step (Zhao et al., 2023, arXiv 2302.04867).

    Both integrate :math:`d(x / \sigma) = E[x_0 | x]\, d(1 / r)` with the polynomial through the data predicted at
    ``order`` levels. The corrector takes the step again when the prediction at its end is known, with that level as
    one more: the next step starts from there. The first steps are of lower order.

    Args:
        order: Order of the predictor, 1 to 4; corrected it is one higher.
        time: Function of r in which the polynomial is. The paper's, ``torch.log``, fails if steps cover decades.
    """

    @checked
    def __init__(self, order: Order = 3, time: Time = torch.atan) -> None:
        self.memory, self.time = order, time

    def corrected(self, step: Step, now: Prediction) -> Prediction:
        if not step.previous:
            return now
        q, before = step.previous[0]
        change = _integral(step, ((step.t, now), *step.previous), q, step.t, self.time, -1)
        x_t = now.sigma_t * (before.x_t / before.sigma_t + change)
        return Prediction.of_x0(x_t, now.alpha_t, now.sigma_t, now.x0)

    def rule(self, step: Step, now: Prediction) -> Tensor:
        visited = ((step.t, now), *step.previous)[: self.memory]
        change = _integral(step, visited, step.t, step.s, self.time, -1)
        return step.denoiser.schedule.at(step.s, step.x_t)[1] * (now.x_t / now.sigma_t + change)


@final
class SASolver(Sampler):
    r"""Stochastic Adams solver in data prediction, its predictor alone (Xue et al., 2023, arXiv 2309.05019).

    :math:`x_s = q \frac{\sigma_s}{\sigma_t} x_t + \alpha_s r_s^{1 + \eta} \int D\, d(r^{-1 - \eta})
    + \sigma_s (1 - q^2)^{1/2} \text{noise}`, with :math:`q = (r_s / r_t)^\eta` and D the polynomial through the data
    predicted at ``order`` levels, fewer in the first steps. Of every eta the marginals are those of the probability
    flow (0) and of the reverse diffusion (1), if the denoiser is exact; else much noise mends errors of steps before.

    Args:
        order: 1 to 4; 1 with eta 1 is DDPM.
        eta: Noise, tau² of the paper, 0 ... 20.
        variance: Of data, per value in model units. When None, 1; in :func:`torchcdm.sample` that of the pilots that
            place the steps. The polynomial is in log(variance / 4 + r²): in log r at much noise, as the paper's is
            everywhere (0), and in r² at little, where E[x_0 | x_t] is smooth in it.

    A step k times as long in that variable as the one before takes 1 / k of what the polynomial adds to the last
    estimate, if k > 1: with fresh noise the errors of two estimates are independent, and far away they would count k
    times. So with noise, where steps lengthen, it is of second order at most.
    """

    spacing = "adaptive"
    weight = 0.5
    stochastic = True

    @checked
    def __init__(
        self, order: Order = 2, eta: Annotated[NotNegative, Le(20)] = 4, variance: NotNegative | None = None
    ) -> None:
        self.memory, self.eta, self.variance = order - 1, eta, variance

    def suited(self, variance: float) -> Sampler:
        known = self.variance is not None or not math.isfinite(variance)
        return self if known else SASolver(self.memory + 1, self.eta, variance)

    def time(self, r: Tensor) -> Tensor:
        """The variable of the polynomial, of ratios of noise to signal."""
        return ((1.0 if self.variance is None else self.variance) / 4 + r**2).log()

    def rule(self, step: Step, now: Prediction) -> Tensor:
        r, (alpha_s, sigma_s) = step.denoiser.schedule.ratio, step.denoiser.schedule.at(step.s, step.x_t)
        t, s, kept = step.t, step.s, (r[step.s] / r[step.t]) ** self.eta
        visited = ((t, now), *step.previous)[: self.memory + 1]
        over = self.time, -1 - self.eta, float(r[s]) ** (1 + self.eta)
        data = _integral(step, visited, t, s, *over)
        if self.eta and len(visited) > 1:
            ends = self.time(r[[s, t, visited[1][0]]])
            reach = float(((ends[2] - ends[1]) / (ends[1] - ends[0])).clamp(max=1))
            data = torch.lerp(_integral(step, visited[:1], t, s, *over), data, reach)
        return sigma_s / now.sigma_t * kept * step.x_t + alpha_s * data + sigma_s * (1 - kept**2).sqrt() * step.noise


def _integral(
    step: Step, visited: tuple[Visited, ...], t: int, s: int, time: Time, power: float, scale: float = 1.0
) -> Tensor:
    """The integral from level t to s, over r to the ``power``, of the polynomial in ``time`` of r through what was
    ``visited``, eps (power 1) or x_0 (below 0), shape of x; by Gauss-Legendre quadrature over log r, all but exact.
    Times the ``scale``: half precision does not hold the integral where r is small.
    """
    ratio = step.denoiser.schedule.ratio
    start, end = ratio[[t, s]].double().cpu().log()
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(24))
    r = ((start + end) / 2 + nodes * (end - start) / 2).exp()
    weights = scale * weights * (end - start) / 2 * power * r**power
    at, known, total = time(r), time(ratio[[level for level, _ in visited]].double().cpu()), 0.0
    for j, (_, prediction) in enumerate(visited):
        polynomial = math.prod((at - other) / (known[j] - other) for k, other in enumerate(known) if k != j)
        total = total + float((weights * polynomial).sum()) * (prediction.eps if power == 1 else prediction.x0)
    return total


SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "sa2": SASolver, "ddpm": partial(DDIM, 1.0), "ddim": DDIM, "dpm2": partial(DEIS, 2, torch.log),
    "dpm++": DPMSolverPP2M, "heun": Heun, "deis3": partial(DEIS, 3), "deis4": partial(DEIS, 4),
    "ipndm3": partial(IPNDM, 3), "ipndm4": partial(IPNDM, 4), "unipc2": partial(UniPC, 2), "unipc3": partial(UniPC, 3),
}  # fmt: skip
"""What :func:`torchcdm.sample` knows by name. Each takes one evaluation a step but ``heun``, which takes two."""


def make_sampler(sampler: str | Sampler) -> Sampler:
    """The sampler of a name in :data:`SAMPLERS`, or a sampler itself; UserError for others."""
    if isinstance(sampler, Sampler):
        return sampler
    name = str(sampler).replace("pp", "++")  # dpmpp, as diffusers spells it
    if name not in SAMPLERS:
        raise UserError(f"unknown sampler '{sampler}'; {nearest(name, SAMPLERS)}")
    return SAMPLERS[name]()


PILOTS = 16  # trajectories that go first, to place steps or to adapt moves
FINE = 64  # levels at most on which they are solved to place steps, and among which the steps are chosen
FAR = 0.005  # nats a value that coarse data may lack of a denoiser's density at the start


def pilot_labels(y: Tensor | None) -> Tensor | None:
    """Labels of ``PILOTS`` trajectories that go first, spread over all different ones of ``y``; None for none."""
    if y is None:
        return None
    known = y.unique(dim=0)
    return known[torch.arange(PILOTS, device=y.device) * max(1, len(known) // PILOTS) % len(known)]


@dataclass(frozen=True)
class Curvature:
    """How the trajectories of a model bend, from which steps are placed (GITS, arXiv 2405.11326)."""

    # Of one DDIM step from the i-th fine level to the j-th, level 0 the last, in units of the spread of x at its end,
    # float32 (K+1, K+1); infinite for j <= i.
    errors: Tensor
    first: int  # which fine level steps begin at
    variance: float  # of the data per value, model units

    @classmethod
    def of(cls, denoiser: Denoiser, shape: Sequence[int], y: Tensor | None = None) -> "Curvature":
        """From ``PILOTS`` trajectories of event ``shape`` that are solved in ``FINE`` steps, an evaluation each.

        ``y`` are classes or contexts asked for, (n, ...), which share them.
        """
        schedule = denoiser.schedule
        fine = schedule.time_grid(min(FINE, schedule.T))
        dtype = working_dtype(denoiser, torch.float32)
        noise = torch.randn(PILOTS, *shape, generator=stream(0, "pilots"), dtype=dtype)
        rule, y, previous, points, noises = DEIS(3), pilot_labels(y), (), [], []
        with evaluation_mode(denoiser), torch.no_grad():
            x = denoiser.start(noise.to(schedule.alpha.device))
            for t, s in pairwise([*fine, 0]):
                points.append(x / schedule.at(t, x)[0])
                x, previous = rule.step(Step(denoiser, x, t, s, y, previous=previous))
                noises.append(previous[0][1].eps)
            first = coarse_levels(denoiser, fine, noise.to(x), y)
        u, eps = torch.stack([*points, x]).flatten(2), torch.stack(noises).flatten(2)
        r, count = schedule.ratio[[*fine, 0]].to(u), len(fine) + 1
        spread = u.std(1).square().mean(1).sqrt()
        errors = torch.full((count, count), torch.inf)
        for i in range(count - 1):
            reached = u[i] - (r[i] - r[i + 1 :, None, None]) * eps[i]
            error = (reached - u[i + 1 :]).square().mean((1, 2)).sqrt()
            errors[i, i + 1 :] = (error / spread[i + 1 :]).cpu()
        return cls(errors, first, float(spread[-1]) ** 2)

    def levels(self, steps: int, schedule: NoiseSchedule, weight: float = 0.0) -> list[int]:
        """Levels of ``steps`` steps that leave the curved parts short: ``steps`` + 1 of them, falling to 0 from T, or
        from a lower start of a denoiser with coarse data, see :func:`coarse_levels`.

        The cost of a step is its error times r at its start to the power ``weight``; dynamic programming finds the
        steps of least total cost. Levels are evenly spaced where more are asked for than there are fine ones, and all
        are taken where there are fewer from the start on.
        """
        fine = schedule.time_grid(len(self.errors) - 1)
        if steps >= len(fine) - self.first:
            return [*schedule.time_grid(min(steps, fine[self.first]), fine[self.first]), 0]
        cost = self.errors.clone()
        cost[:-1] *= schedule.ratio[fine].to(cost)[:, None] ** weight
        best, choices = cost[self.first], []
        for _ in range(steps - 1):
            best, choice = (best[:, None] + cost).min(0)
            choices.append(choice)
        path = [len(fine)]
        for choice in reversed(choices):
            path.append(int(choice[path[-1]]))
        return [[*fine, 0][k] for k in (self.first, *reversed(path))]


def coarse_levels(denoiser: Denoiser, levels: Sequence[int], noise: Tensor, y: Tensor | None) -> int:
    """The number of falling ``levels`` at which ``denoiser.coarse`` with noise can stand for the data, less one.

    What it lacks is across its directions. The divergence there is the integral over log r, from much noise on, of the
    mean of |D - mean|² / r², of the part of D, estimates of the data, across them, over its draws, made of ``noise``
    (B, *shape), as both densities obey the heat equation (de Bruijn's identity). It is at most ``FAR`` nats a value. A
    young denoiser is wrong where there is little to know; so where the noise leaves no more than that much information
    along the directions coarse data stay, whatever the denoiser says. 0 without coarse data.
    """
    schedule, coarse = denoiser.schedule, denoiser.coarse
    if coarse is None:
        return 0
    choice = torch.randn(len(noise), generator=stream(0, "pilots", 1), dtype=noise.dtype).to(noise.device)
    log_r, slopes, divergence = schedule.ratio.log().tolist(), [], 0.0
    for k, t in enumerate(levels):
        x_t = coarse.start(noise, choice, t, schedule, y)
        missed = coarse.across(denoiser.denoise(x_t, t, y).x0, y).square().mean()
        slopes.append(float(missed / schedule.ratio[t] ** 2))
        divergence += (log_r[levels[k - 1]] - log_r[t]) * (slopes[-1] + slopes[k - 1]) / 2 if k else 0.0
        if min(divergence, coarse.information(float(schedule.ratio[t]), y)) > FAR:
            return k - 1
    return len(levels) - 1
