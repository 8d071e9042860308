"""Denoising diffusion: a network that estimates the noise itself."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from torchcdm.diffusion.base import BaseDensity
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
        super().__init__(schedule, transform, backbone, base)

    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        return Prediction(x_t, *self.schedule.at(t, x_t), self.eps(x_t, t, self.checked(x_t, t, y)))

    def eps(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Tensor:
        """E[eps | x_t] for losses, unchecked; ``y`` may hold the null label ``classes``."""
        levels = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        eps = self.backbone(x_t, levels, y).to(x_t.dtype)
        return eps if self.base is None else eps + self.base.eps(x_t, t)
