"""Denoising diffusion: a network that estimates the noise itself."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from torchcdm.diffusion.gaussian import BaseDensity, GaussianMarginals
from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.models.denoiser import Denoiser
from torchcdm.units import DataTransform


@final
class DenoisingDiffusion(Denoiser):
    """A plain denoising diffusion model (DDM): the network estimates eps itself.

    Args:
        backbone: ``(x_t (B, *shape), t (B,), y (B,) or None) -> eps (B, *shape)``.
        schedule: The noise schedule.
        transform: Data units to model units.
        base: A closed-form density whose eps the network corrects; None for none.
    """

    def __init__(
        self,
        backbone: nn.Module,
        schedule: NoiseSchedule,
        transform: DataTransform | None = None,
        base: BaseDensity | None = None,
    ) -> None:
        super().__init__(schedule, transform)
        self.backbone = backbone
        self.base = base

    @property
    def classes(self) -> int | None:
        return getattr(self.backbone, "classes", None)

    @property
    def gaussian(self) -> GaussianMarginals | None:
        return None if self.base is None else self.base.gaussian

    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        alpha_t, sigma_t = self.schedule.at(t, x_t)
        levels = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        eps = self.backbone(x_t, levels, y).to(x_t.dtype)
        if self.base is not None:
            eps = eps + self.base.eps(x_t, t)
        return Prediction(x_t, alpha_t, sigma_t, eps)

    def start(self, noise: Tensor) -> Tensor:
        return noise if self.base is None else self.base.start(noise)
