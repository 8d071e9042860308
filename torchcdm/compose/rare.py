r"""Probabilities of rare events by splitting: particles that climb a ladder of thresholds.

:math:`P(f(x) > \tau) = \prod_k P(f > \tau_k \mid f > \tau_{k-1})`. Each threshold is a quantile of the particles that
are above the last one; those below are replaced by copies of the others, and all are moved so that the density above
the threshold stays as it is (Cerou and Guyader 2007). A move is a Langevin step, or a *jump*: up to a random level by
the noise, down again by the denoiser's kernel. Which levels jumps go to follows from how far they get.

The error is estimated by the descendants of the first particles (Lee and Whiteley 2018), for systematic resampling.
"""

import math
from dataclasses import dataclass, replace
from itertools import count
from typing import Annotated, final

import torch
from annotated_types import Ge
from torch import Generator, Tensor

from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.particles import FIRST_STEP, States, adapted, chance, langevin, smc, systematic
from torchcdm.annealing.target import Evaluated, ModelTarget, Target
from torchcdm.compose.tilted import Map, of_data, one_each
from torchcdm.diffusion.gaussian import MatrixRotation
from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import Level
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser, evaluation_mode
from torchcdm.random import normal, stream
from torchcdm.runtime.processes import progress_bar
from torchcdm.runtime.validation import Count, Float, Seed, checked

KEEP = 0.75  # share of the particles above the next threshold
LEAST = 1e-30  # probabilities below are not looked for
FORGET = 0.7  # share of what jumps to a level have reached that is kept from one threshold to the next
FEWEST_FAMILIES = 10  # effective number of first particles, below which the interval is said to be unreliable


@final
@dataclass(frozen=True)
class Probability:
    """An estimate of P(f(x) > threshold), and the ends of its 95 % interval, of a log-normal distribution.

    Attributes:
        evaluations: Evaluations of the model, one a point, but for those that measure the proposals.
        thresholds: The ladder that was climbed.
        families: Effective number of first particles that the last ones descend from.
        x: Samples where the event happens, (m, *shape), data units, on the CPU. They are not independent.
    """

    value: float
    low: float
    high: float
    evaluations: int
    thresholds: list[float]
    families: float
    x: Tensor

    @property
    def believe(self) -> bool:
        """Whether enough first particles have descendants for the interval to be trusted."""
        return self.families >= FEWEST_FAMILIES

    def __str__(self) -> str:
        doubt = "" if self.believe else f"; only {self.families:.0f} first particles have descendants: use more (n)"
        return f"{self.value:.3g} [{self.low:.2g}, {self.high:.2g}], {self.evaluations} evaluations{doubt}"


@checked
def probability(
    model: Denoiser, event: Map, threshold: Float, n: Annotated[Count, Ge(50)] = 1000,
    moves: Count = 4, y: int | None = None, seed: Seed = 0, progress: bool = False,
) -> Probability:  # fmt: skip
    """P(f(x) > threshold) where this may be as small as 1e-30, with a 95 % interval.

    By splitting. Of the density at level 1, normalised: that of the data plus the noise of the first level. The best
    that n particles can do is a coefficient of variation of (-log P / n)^½. UserError for a model without a density,
    values of another shape or not numbers, or an event that cannot happen.

    Args:
        model: The density, or a composed one.
        event: f, of samples in data units (B, *shape), float64, to (B,); needs no derivative. It is climbed in small
            steps, so it must not be constant below the threshold.
        threshold: The threshold.
        n: Particles, at least 50.
        moves: Langevin moves and jumps after each step, as many of both: three evaluations a particle each.
        y: A class that is given.
        seed: Seed, not negative.
        progress: Shows progress bars.

    Example:
        >>> bright = torchcdm.compose.probability(model, lambda x: x.flatten(1).sum(1), 600.0)
        >>> print(bright)
    """
    target = ModelTarget(model, y)
    alpha, of = model.schedule.alpha[1], of_data(model, event)

    def values_of(x_1: Tensor) -> Tensor:
        values = one_each(of(x_1 / alpha), x_1, "probability: the event").detach().double()
        if values.isnan().any():
            raise UserError("probability: the event's values are not numbers (nan)")
        return values

    values_of(target.reference.draw((2, *target.shape), stream(0, "event")).double())  # mistakes, before the long work
    with evaluation_mode(model):
        kernels = Kernels.of_target(target, seed)
        found = climb(target, kernels, values_of, threshold, n, stream(seed, "splitting"), moves, progress)
    return replace(found, x=of_data(model, Tensor.cpu)(found.x / alpha).to(torch.get_default_dtype()))


@torch.no_grad()
def climb(
    target: Target, kernels: Kernels, event: Map, threshold: float, n: int, generator: Generator, moves: int,
    progress: bool = False,
) -> Probability:  # fmt: skip
    """P(f(x_1) > threshold) under the normalised target at level 1, by ``n`` particles; ``x`` are model units there.

    The ``event`` is f, of float64 (B, *shape) to (B,). After each threshold particles make as many jumps as Langevin
    ``moves``. UserError where f has nothing above some value, or the probability is below 1e-30.
    """
    half = -(-n // 2)
    counted = _Above(target, event)
    found = smc(counted, kernels, 1, 2, half, generator, moves=1, progress=progress)
    states, weights = found.states, found.log_weights.softmax(1) * found.log_estimates.softmax(0)[:, None]
    first = torch.bincount(states.origin, weights.flatten())
    jumps, step, log_p, spurious, thresholds = _Jumps(counted, kernels, states), FIRST_STEP, 0.0, 0.0, []
    for _ in progress_bar(count(), "thresholds", progress):
        values = event(states.x)
        # The highest value above which there is KEEP of the weight; with ties less may be above it.
        ordered, index = values.sort(descending=True)
        reached = int((weights.flatten()[index].cumsum(0) < KEEP).sum())
        least = min(threshold, float(ordered[min(reached + 1, len(values) - 1)]))
        alive = values > least
        share = float(weights.flatten()[alive].sum())
        if not share > 0:
            why = "the event cannot happen, or its values are steps too high to climb"
            raise UserError(f"probability: no particle is above {least:.6g}, the largest value found: {why}")
        log_p, weights = log_p + math.log(share), weights * alive.view(2, -1) / share
        thresholds.append(least)
        if least >= threshold:
            break
        if log_p < math.log(LEAST):
            raise UserError(f"probability: below {LEAST:g}; values reach {float(values.max()):.6g} of {threshold:g}")
        states, weights, pairs = _resampled(states, weights, generator)
        counted.least, spurious = least, spurious + pairs
        parts = states.take(slice(half)), states.take(slice(half, None))  # they share memory with the states
        metrics = [_metric(target, part) for part in reversed(parts)]
        for _ in range(moves):
            accepted = [langevin(counted, kernels, part, step, generator, metric=metric)
                        for part, metric in zip(parts, metrics, strict=True)]  # fmt: skip
            step = adapted(step, float(torch.cat(accepted).double().mean()))
            jumps.move(states, generator)
        jumps.adapt()
    last = torch.bincount(states.origin, weights.flatten(), minlength=len(first))
    # A population of n tells nothing finer than 1 / n from certainty.
    variance = max(float((last - first).square().sum()) - spurious, 1 / n**2)
    families = 1 / float(last.square().sum())
    value, width = math.exp(min(log_p, 0.0)), math.exp(1.96 * math.sqrt(math.log1p(variance)))
    interval = value / width, min(1.0, value * width)
    return Probability(value, *interval, counted.evaluations, thresholds, families, states.x[alive])


def _resampled(states: States, weights: Tensor, generator: Generator) -> tuple[States, Tensor, float]:
    """Systematic resampling within each half; and the share of pairs of one parent that weights do not account for.

    In random order: in theirs, relatives would be neighbours, and families of nearly the expected size.
    """
    half, chosen, spurious, mass = weights.shape[1], [], 0.0, weights.sum(1)
    for k, row in enumerate(weights):
        order = torch.randperm(half, generator=generator).to(row.device)
        share = row[order] / mass[k] if mass[k] > 0 else torch.full_like(row, 1 / half)
        picked = systematic(share[None], torch.rand(1, generator=generator, dtype=torch.float64).to(row.device))[0]
        copies = torch.bincount(picked, minlength=half)
        pairs = float((copies * (copies - 1)).sum()) / half**2 - float(share.square().sum()) + 1 / half
        spurious += float(mass[k]) ** 2 * pairs
        chosen.append(order[picked] + k * half)
    return states.take(torch.cat(chosen)), (mass[:, None] / half).expand(-1, half).clone(), spurious


def _metric(target: Target, states: States) -> tuple[MatrixRotation, Tensor]:
    """Axes and squared scales of moves that suit the states: the inverse of the scores' second moments there.

    In a tail it is small along the gradient of log gamma, which is where the threshold limits the moves. Moments of n
    scores are noise in the directions where they are least: shrunk by d / (n + d) towards round ones.
    """
    scores = Prediction(states.x, *target.schedule.at(1, states.x), states.at.eps).score.flatten(1)
    n, d = scores.shape
    moments, share = scores.T @ scores / n, d / (n + d)
    values, axes = torch.linalg.eigh(moments)
    values = (1 - share) * values + share * values.mean()
    return MatrixRotation(target.shape, axes), 1 / values.clamp_min(1e-12)


@final
class _Above(Target):
    """A target without mass at level 1 where f is at most ``least``, and what it has been asked."""

    def __init__(self, inner: Target, event: Map) -> None:
        super().__init__(inner.schedule, inner.shape, inner.reference)
        self.inner, self.event, self.least, self.evaluations = inner, event, -math.inf, 0

    def evaluate(self, x_t: Tensor, t: Level) -> Evaluated:
        log_gamma, eps = torch.full_like(x_t.flatten(1)[:, 0], -math.inf), torch.zeros_like(x_t)
        limited = isinstance(t, int) and t == 1 and self.least > -math.inf
        inside = self.event(x_t) > self.least if limited else log_gamma < 0
        if inside.any():
            log_gamma[inside], eps[inside] = self.inner.evaluate(x_t[inside], t)[:2]
        self.evaluations += int(inside.sum())
        return Evaluated(log_gamma, eps)


@final
class _Jumps:
    """Moves from level 1 up to another level and down again."""

    def __init__(self, target: _Above, kernels: Kernels, states: States) -> None:
        self.target, self.kernels = target, kernels
        T, rotation = target.schedule.T, target.reference.rotation
        self.levels = torch.tensor(sorted({min(T, round(1.4**k) + 1) for k in range(40) if 1.4**k < 1.4 * T}))
        self.spread = rotation(states.x).var(0).clamp_min(1e-12)
        self.odds = torch.ones(len(self.levels), dtype=torch.float64)
        self.way, self.tried = torch.zeros_like(self.odds), torch.zeros_like(self.odds)

    def move(self, states: States, generator: Generator) -> None:
        """One jump of each state, two evaluations or, where it ends below the threshold, one."""
        kernels, target, x, n, d = self.kernels, self.target, states.x, len(states.x), self.spread.numel()
        which = torch.multinomial(self.odds, n, replacement=True, generator=generator)
        up, down = (normal((n, d), generator, x.device) for _ in range(2))
        t, s = self.levels[which].to(x.device), torch.ones(n, dtype=torch.long, device=x.device)
        x_t = kernels.up(x, s, t, up.reshape(x.shape))
        eps = target.evaluate(x_t, t).eps
        proposed = States.of(target, kernels.down(x_t, eps, t, s, down), states.t)
        log_ratio = proposed.at.log_gamma - states.at.log_gamma
        log_ratio = log_ratio + kernels.log_ratio(proposed.x, x_t, eps, s, t) - kernels.log_ratio(x, x_t, eps, s, t)
        accepted = chance(log_ratio, generator)
        way = (target.reference.rotation(proposed.x - x).square() / self.spread).mean(1) * accepted
        self.way.index_add_(0, which, way.cpu())
        self.tried.index_add_(0, which, torch.ones(n, dtype=torch.float64))
        states.put(accepted, proposed.take(accepted))

    def adapt(self) -> None:
        """Levels by how far their jumps have got."""
        self.odds = (self.way / self.tried.clamp_min(1)).clamp_min(1e-12)
        self.odds = self.odds / self.odds.sum() + 0.2 / len(self.odds)
        self.way, self.tried = FORGET * self.way, FORGET * self.tried
