"""Base densities: known in closed form at every level, and what the logits of a network are a correction to."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.random import normal
from torchcdm.runtime.precision import Float64Module
from torchcdm.units.log_likelihood import log_normal

if TYPE_CHECKING:
    from torchcdm.diffusion.gaussian import GaussianMarginals


class BaseDensity(Float64Module, ABC):
    """A density known in closed form at all levels of a schedule."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule

    @property
    def gaussian(self) -> "GaussianMarginals | None":
        """The one Gaussian of all data in it; None where nothing was fitted."""
        return None

    @abstractmethod
    def log_prob_levels(self, x: Tensor) -> Tensor:
        """log density of ``x`` (B, *shape) at every level: float64 (B, T+2), nats in model units."""

    @abstractmethod
    def eps(self, x_t: Tensor, t: Level) -> Tensor:
        """E[eps | x_t] under this density, shape of ``x_t`` (identity 3)."""

    @abstractmethod
    def log_prob_change(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log density at level t + 1 less that at t - 1, by the slope at level t (identity 11): float64 (B,)."""

    def start(self, eps: Tensor) -> Tensor:
        """x at level T of the one Gaussian, for samplers to start from, by standard normal ``eps`` (B, *shape)."""
        return eps if self.gaussian is None else self.gaussian.sample(eps, self.schedule.T)

    def left(self, x_t: Tensor, t: Level, eps: Tensor) -> Tensor:
        """What E[x_0 | x_t] leaves out along thin directions: a draw of x_0 given x_t less that mean, (B, *shape), by
        standard normal ``eps``. Under noise of ratio r the mean keeps v² / (v + r²) of a variance v."""
        return torch.zeros_like(x_t)

    @abstractmethod
    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Exact draws at level 0, float64 of ``shape`` (n, *event) on the schedule's device; a CPU generator."""

    def class_effects(self, x: Tensor) -> Tensor | None:
        """What joint logits add for each class: its log density less that of all data, 0 at level T+1.

        The network corrects the density of all data; before the first step, joint logits are those of the classes.
        Gives float64 (B, classes, T+2); None where the classes have no density of their own.
        """
        return None


@final
class StandardNormal(BaseDensity):
    """N(x; 0, I) at every level: the base of identity 1, of a model without Gaussian residual."""

    def log_prob_levels(self, x: Tensor) -> Tensor:
        return log_normal(x.flatten(1).double()).sum(1)[:, None].expand(-1, self.schedule.T + 2)

    def eps(self, x_t: Tensor, t: Level) -> Tensor:
        return self.schedule.at(t, x_t)[1] * x_t

    def log_prob_change(self, x_t: Tensor, t: Tensor) -> Tensor:
        return torch.zeros(len(x_t), dtype=torch.float64, device=x_t.device)

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return normal(shape, generator, self.schedule.alpha.device)
