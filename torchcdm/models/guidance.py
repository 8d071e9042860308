"""Classifier-free guidance (identity 8): denoisers that wrap a class-conditional model."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, final

from torch import Tensor

from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import Level
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser
from torchcdm.models.inputs import check_real

if TYPE_CHECKING:
    from torchcdm.models.cdm import ClassificationDiffusion


LARGEST_WEIGHT = 1000.0
"""Weights beyond it leave nothing of a sample."""


class Guidance(Denoiser):
    """A class-conditional model, pushed towards its class.

    Args:
        model: A class-conditional model that was trained with dropped labels.
        weight: w; 0 is the plain conditional model (diffusers' ``guidance_scale`` is 1 + w).
    """

    def __init__(self, model: Denoiser, weight: float) -> None:
        super().__init__(model.schedule, model.transform)
        if model.classes is None:
            raise UserError("guidance needs a class-conditional model; this one was trained without labels")
        check_real("guidance", weight, -LARGEST_WEIGHT, LARGEST_WEIGHT)
        self.model = model
        self.weight = weight

    @property
    def classes(self) -> int | None:
        return self.model.classes

    def start(self, noise: Tensor) -> Tensor:
        return self.model.start(noise)

    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        return Prediction(x_t, *self.schedule.at(t, x_t), self._eps(x_t, t, self._labels(y)))

    def _labels(self, y: Tensor | None) -> Tensor:
        if y is None:
            raise UserError("guidance needs labels: give y")
        return y

    @abstractmethod
    def _eps(self, x_t: Tensor, t: Level, y: Tensor) -> Tensor:
        """The guided noise, (B, *shape)."""


@final
class GuidedDenoiser(Guidance):
    """eps = (1 + w) eps(x_t, y) - w eps(x_t), by two evaluations."""

    def _eps(self, x_t: Tensor, t: Level, y: Tensor) -> Tensor:
        conditional, plain = (self.model.denoise(x_t, t, label).eps for label in (y, None))
        return (1 + self.weight) * conditional - self.weight * plain

    def differentiable_eps(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Tensor:
        conditional, plain = (self.model.differentiable_eps(x_t, t, label) for label in (self._labels(y), None))
        return (1 + self.weight) * conditional - self.weight * plain


@final
class OnePassGuidance(Guidance):
    """The gradient of one scalar, (1 + w) log p_t(x|y) - w log p_t(x), of a model with joint logits."""

    model: ClassificationDiffusion

    def _eps(self, x_t: Tensor, t: Level, y: Tensor) -> Tensor:
        return self.model.evaluate(x_t, t, y, self.weight).eps

    def differentiable_eps(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Tensor:
        return self.model.evaluate_twice_differentiable(x_t, t, self._labels(y), self.weight).eps
