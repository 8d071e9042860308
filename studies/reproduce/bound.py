"""The plain diffusion model trained on its likelihood bound: L of arXiv 2006.11239, beside L_simple of the presets."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from torchcdm.diffusion.schedules import NoiseSchedule
from torchcdm.losses import DDMLoss, Loss, Terms
from torchcdm.models.denoiser import DenoisingDiffusion


def bound_weights(schedule: NoiseSchedule) -> Tensor:
    r"""Weight of the squared error of eps at the levels 1 ... T in the likelihood bound, nats; float64 (T,).

    .. math:: KL(q(x_{t-1}|x_t, x_0) \| r(x_{t-1}|x_t)) = \tfrac12 (r_t^2 / r_{t-1}^2 - 1) |\epsilon - \hat\epsilon|^2

    with the variance of the exact kernel in r, and 1/2 at level 1, where a Gaussian of deviation r_1 decodes.
    """
    square = schedule.ratio[1:-1].square()
    return 0.5 * torch.cat([square.new_ones(1), square[1:] / square[:-1] - 1])


@final
class BoundLoss(Loss):
    """Squared error of the noise, each level by its weight in the bound; the mean weight is 1.

    Args:
        model: The plain diffusion model to train.
    """

    def __init__(self, model: DenoisingDiffusion) -> None:
        super().__init__(model)
        self.simple = DDMLoss(model)

    def draw_levels(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Levels of a batch, 1 ... T, long (n,)."""
        return self.simple.draw_levels(n, generator)

    def terms(self, x_t: Tensor, t: Tensor, y: Tensor | None, eps: Tensor) -> Terms:
        """As :meth:`torchcdm.losses.DDMLoss.terms`: ``loss``, ``mse`` (without weights), ``t``."""
        terms = self.simple.terms(x_t, t, y, eps)
        weights = bound_weights(self.simple.model.schedule)
        share = (weights / weights.mean()).to(x_t.dtype)
        return terms | {"loss": share[t - 1] * terms["mse"]}
