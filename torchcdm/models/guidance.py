"""Classifier-free guidance (identity 8): a denoiser that wraps a class-conditional model."""

from __future__ import annotations

from typing import final

from torch import Tensor

from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import Level
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser
from torchcdm.models.inputs import check_real

LARGEST_WEIGHT = 1000.0
"""Weights beyond it leave nothing of a sample."""


@final
class GuidedDenoiser(Denoiser):
    """A class-conditional model, pushed towards its class by :meth:`Denoiser.guided_eps`.

    Args:
        model: A class-conditional model that was trained with dropped labels.
        weight: w; 0 is the plain conditional model (diffusers' ``guidance_scale`` is 1 + w).

    Raises:
        UserError: A model without classes, or no weight; in calls, no labels.
    """

    def __init__(self, model: Denoiser, weight: float) -> None:
        super().__init__(model.schedule, model.transform)
        if model.classes is None:
            raise UserError("guidance needs a class-conditional model; this one was trained without labels")
        check_real("guidance", weight, -LARGEST_WEIGHT, LARGEST_WEIGHT)
        self.model, self.weight = model, weight

    @property
    def classes(self) -> int | None:
        return self.model.classes

    def start(self, noise: Tensor) -> Tensor:
        return self.model.start(noise)

    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        return Prediction(x_t, *self.schedule.at(t, x_t), self._eps(x_t, t, y, graph=False))

    def differentiable_eps(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Tensor:
        return self._eps(x_t, t, y, graph=True)

    def _eps(self, x_t: Tensor, t: Level, y: Tensor | None, graph: bool) -> Tensor:
        if y is None:
            raise UserError("guidance needs labels: give y")
        return self.model.guided_eps(x_t, t, y, self.weight, graph)
