"""Probabilities of rare events under a model or a composed density."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, final

import torch
from annotated_types import Ge
from torch import Tensor

from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.splitting import climb
from torchcdm.annealing.target import ModelTarget
from torchcdm.compose.tilted import of_data, one_each
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser, evaluation_mode
from torchcdm.random import stream
from torchcdm.runtime.validation import Count, Float, Seed, checked

FEWEST_FAMILIES = 10
"""Effective number of first particles, below which the interval is said to be unreliable."""


@final
@dataclass(frozen=True)
class Probability:
    """An estimate of P(f(x) > threshold), and the ends of its 95 % interval, of a log-normal distribution.

    Attributes:
        evaluations: Evaluations of the model, one a point.
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
    model: Denoiser,
    event: Callable[[Tensor], Tensor],
    threshold: Float,
    n: Annotated[Count, Ge(50)] = 1000,
    moves: Count = 4,
    y: int | None = None,
    seed: Seed = 0,
    progress: bool = False,
) -> Probability:
    """P(f(x) > threshold) where this may be as small as 1e-30, with a 95 % interval.

    Splitting (:mod:`torchcdm.annealing.splitting`). Of the density at level 1, normalised: that of the data plus the
    noise of the first level. The best that n particles can do is a coefficient of variation of (-log P / n)^½.

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

    Raises:
        UserError: A model without a density, values of another shape or not numbers, or an event that cannot happen.

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

    with evaluation_mode(model):
        kernels = Kernels.of_target(target, seed)
        found = climb(target, kernels, values_of, threshold, n, stream(seed, "splitting"), moves, progress)
    value, width = math.exp(found.log_p), math.exp(1.96 * math.sqrt(math.log1p(found.variance)))
    x = of_data(model, Tensor.cpu)(found.states.x / alpha).to(torch.get_default_dtype())
    interval = value / width, min(1.0, value * width)
    return Probability(value, *interval, found.evaluations, found.thresholds, found.families, x)
