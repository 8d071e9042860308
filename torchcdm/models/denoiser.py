"""Denoisers: what every sampler and likelihood sees of a model, and the one conversion table."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn

from torchcdm.diffusion.gaussian import BaseDensity
from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.errors import UserError
from torchcdm.units import DataTransform


@dataclass(frozen=True)
class Prediction:
    """The posterior mean of the noise given x_t, and all that follows from it (identities 3 to 5).

    Attributes:
        x_t: Noisy input, model units, (B, *shape).
        alpha_t: Signal scale, broadcastable to ``x_t``.
        sigma_t: Noise scale, broadcastable to ``x_t``.
        eps: E[eps | x_t], (B, *shape).
    """

    x_t: Tensor
    alpha_t: Tensor
    sigma_t: Tensor
    eps: Tensor

    @property
    def x0(self) -> Tensor:
        """E[x_0 | x_t] (identity 4); not defined at level T+1, where alpha is 0."""
        return (self.x_t - self.sigma_t * self.eps) / self.alpha_t

    @property
    def score(self) -> Tensor:
        """grad log p_t(x_t) (identity 3); not defined at level 0, where sigma is 0."""
        return -self.eps / self.sigma_t

    @property
    def velocity(self) -> Tensor:
        """E[eps - x_0 | x_t], the velocity of the optimal-transport path (identity 5)."""
        return self.eps - self.x0

    def carried_to(self, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
        """x_s = alpha_s x_0 + sigma_s eps: the same data and noise at another level (identity 7)."""
        return alpha_s * self.x0 + sigma_s * self.eps

    @classmethod
    def from_x0(cls, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, x0: Tensor) -> Prediction:
        """From E[x_0 | x_t]; levels above 0."""
        return cls(x_t, alpha_t, sigma_t, (x_t - alpha_t * x0) / sigma_t)

    @classmethod
    def from_score(cls, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, score: Tensor) -> Prediction:
        """From grad log p_t(x_t)."""
        return cls(x_t, alpha_t, sigma_t, -sigma_t * score)

    @classmethod
    def from_velocity(
        cls, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, velocity: Tensor
    ) -> Prediction:
        """From E[eps - x_0 | x_t]."""
        return cls(x_t, alpha_t, sigma_t, (x_t + alpha_t * velocity) / (alpha_t + sigma_t))


class Denoiser(nn.Module, ABC):
    """Anything that estimates E[eps | x_t] at the levels of a schedule.

    Args:
        schedule: The noise schedule.
        transform: Data units to model units; None where the caller works in model units.
    """

    def __init__(self, schedule: NoiseSchedule, transform: DataTransform | None = None) -> None:
        super().__init__()
        self.schedule = schedule
        self.transform = transform

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Event shape, where known."""
        return None if self.transform is None else self.transform.shape

    @property
    @abstractmethod
    def classes(self) -> int | None:
        """Number of classes; None for an unconditional model."""

    @property
    def context(self) -> int | None:
        """Numbers of the vector that takes the place of a class: ``y`` is then (B, context); None for none."""
        return None

    @property
    def conditional(self) -> bool:
        """Whether there is a ``y``: classes or a context."""
        return self.classes is not None or self.context is not None

    @abstractmethod
    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        """The noise in ``x_t``.

        Args:
            x_t: Noisy input, model units, (B, *shape).
            t: Level, an int or long (B,).
            y: Class of each sample, long (B,); None asks for the unconditional density.
        """

    def start(self, noise: Tensor) -> Tensor:
        """x at level T for samplers to start from, from standard normal ``noise`` (B, *shape).

        Where level T keeps some signal the data's own mean and covariance there are better than N(0, I).
        """
        return noise

    def guided(self, weight: float) -> Denoiser:
        """This denoiser under classifier-free guidance (identity 8); two evaluations a step."""
        return GuidedDenoiser(self, weight)


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

    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        alpha_t, sigma_t = self.schedule.at(t, x_t)
        levels = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        eps = self.backbone(x_t, levels, y).to(x_t.dtype)
        if self.base is not None:
            eps = eps + self.base.eps(x_t, t)
        return Prediction(x_t, alpha_t, sigma_t, eps)

    def start(self, noise: Tensor) -> Tensor:
        return noise if self.base is None else self.base.start(noise)


@final
class GuidedDenoiser(Denoiser):
    """Classifier-free guidance: eps = (1 + w) eps(x_t, y) - w eps(x_t) (identity 8).

    Args:
        denoiser: A class-conditional denoiser that was trained with dropped labels.
        weight: w; 0 is the plain conditional model (diffusers' ``guidance_scale`` is 1 + w).
    """

    def __init__(self, denoiser: Denoiser, weight: float) -> None:
        super().__init__(denoiser.schedule, denoiser.transform)
        if denoiser.classes is None:
            raise UserError("guidance needs a class-conditional model; this one was trained without labels")
        self.denoiser = denoiser
        self.weight = weight

    @property
    def classes(self) -> int | None:
        return self.denoiser.classes

    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        if y is None:
            raise UserError("guidance needs labels: give y")
        conditional = self.denoiser.denoise(x_t, t, y)
        plain = self.denoiser.denoise(x_t, t, None)
        eps = (1 + self.weight) * conditional.eps - self.weight * plain.eps
        return Prediction(x_t, conditional.alpha_t, conditional.sigma_t, eps)

    def start(self, noise: Tensor) -> Tensor:
        return self.denoiser.start(noise)


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Dropout off and no gradient for the weights meanwhile; every part's own mode afterwards."""
    training = [part for part in module.modules() if part.training]
    learning = [weight for weight in module.parameters() if weight.requires_grad]
    module.eval()
    module.requires_grad_(False)
    try:
        yield
    finally:
        for weight in learning:
            weight.requires_grad_()
        for part in training:
            part.training = True


def working_dtype(module: nn.Module, otherwise: torch.dtype) -> torch.dtype:
    """Precision of the network's weights, of its inputs therefore; ``otherwise`` where it has none."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), otherwise)
