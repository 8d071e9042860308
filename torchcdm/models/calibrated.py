"""A model whose values of log p are calibrated, beside a denoiser that is not."""

from __future__ import annotations

from typing import NoReturn, final

import torch
from torch import Tensor

from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import Level
from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.density import DensityModel
from torchcdm.units.float64 import Float64Module

PREFIX = "readout."
"""Of the tensors of a saved model that are not the classifier's own."""

LIMIT = 6.0
"""Deviations within which a feature counts: data hardly ever exceed them, images unlike all data do by far."""

VALUES_HELD = 2**22
"""Numbers (B, levels, features) that a readout works on at once."""


@final
class Readout(Float64Module):
    """What the network adds to the base density, linear in its features f at each level.

    .. math:: w_t \\cdot \\mathrm{clamp}((f - m_t) / s_t, \\pm L) + b_t

    The ``mean`` m of each feature over data, their deviations ``scale`` s and the ``weight`` w are (T+2, features),
    the ``offset`` b is (T+2,).
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    offset: Tensor

    def __init__(self, mean: Tensor, scale: Tensor, weight: Tensor, offset: Tensor) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("scale", scale), ("weight", weight), ("offset", offset)):
            self.register_buffer(name, value.double())

    @classmethod
    def blank(cls, levels: int, features: int) -> Readout:
        """One that is 0 everywhere, to be filled by ``load_state_dict``."""
        zeros = torch.zeros(levels, features)
        return cls(zeros, torch.ones_like(zeros), zeros, torch.zeros(levels))

    def forward(self, features: Tensor) -> Tensor:
        """h - h_{T+1} with the constants of the levels, float64 (B, T+2), from (B, features)."""
        slope = self.weight / self.scale
        linear = features.double() @ slope.T + (self.offset - (self.mean * slope).sum(1))
        # What lies within the limit, nearly all, is in the product above: the rest needs no double precision. Some
        # levels at a time, as (B, T+2, features) is more than all else that a pass takes.
        mean, scale, weight = (value.float() for value in (self.mean, self.scale, self.weight))
        excess = []
        for rows in torch.arange(len(mean), device=mean.device).split(max(1, VALUES_HELD // features.numel())):
            z = (features.float()[:, None] - mean[rows]) / scale[rows]
            excess.append(((z - z.clamp(-LIMIT, LIMIT)) * weight[rows]).sum(2))
        return linear - torch.cat(excess, 1)


@final
class Calibrated(DensityModel):
    """A classification diffusion model with values of log p from a readout of its features.

    :mod:`torchcdm.training.path_calibration` fits the readout. Denoiser, samples and flow are those of ``model``.
    So ``log_prob`` is no longer the potential of the denoiser, and refuses to be differentiated.

    Args:
        model: The model, without classes or context; its network has ``features`` and a linear ``head`` on them.
        readout: What takes the place of the network's output in the values.

    Raises:
        UserError: A model of classes or contexts, or a network without these parts.
    """

    def __init__(self, model: ClassificationDiffusion, readout: Readout) -> None:
        super().__init__(model.schedule, model.transform, base=model.base)
        require_features(model)
        self.model, self.readout = model, readout

    @property
    def uncalibrated(self) -> ClassificationDiffusion:
        return self.model

    def tensors(self) -> dict[str, Tensor]:
        return self.model.tensors() | {f"{PREFIX}{key}": value for key, value in self.readout.state_dict().items()}

    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        return self.model.denoise(x_t, t, y)

    def differentiable_eps(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Tensor:
        return self.model.differentiable_eps(x_t, t, y)

    def log_prob_levels(self, x_t: Tensor, y: Tensor | None = None) -> Tensor:
        values = super().log_prob_levels(x_t, y)
        if values.requires_grad:
            values.register_hook(_refuse_gradient)
        return values

    def corrections(self, x_t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Those of any density: the values of the readout, with the gradient of the network."""
        features = self.model.backbone.features(x_t)
        h = self.model.correction(self.model.backbone.head(features))
        values = h + (self.readout(features.detach()).to(h.dtype) - h).detach()
        return values, values


def require_features(model: ClassificationDiffusion) -> None:
    """Refuses a model of classes or contexts, and a network without ``features`` and a ``head`` on them."""
    if model.conditional:
        raise UserError("calibration on paths: the model has classes or a context; it is for models of one density")
    if not (hasattr(model.backbone, "features") and hasattr(model.backbone, "head")):
        raise UserError("calibration on paths: the network must have `features` and a linear `head` on them")


def _refuse_gradient(gradient: Tensor) -> NoReturn:
    raise UserError(
        "the calibrated values of log p are not the potential of the denoiser and have no gradient: "
        "differentiate `.model`, the model without calibration"
    )
