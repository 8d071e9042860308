r"""Densities with closed form at every level: what the logits are a correction to.

.. math:: G_t(x) = \log N(x;\ \alpha_t\mu,\ \alpha_t^2\Sigma + \sigma_t^2 I)

At level T+1 this is the standard normal for any mean and covariance. The model's density is the base plus
the network's output, so before the first training step the model *is* the fitted Gaussian.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from torchcdm.float64 import Float64Module
from torchcdm.schedules import Level, NoiseSchedule

FULL_COVARIANCE_LIMIT = 4096
"""Above this many dimensions ``fit`` takes the diagonal form in a cosine basis."""


class BaseDensity(Float64Module, ABC):
    """A density known in closed form at all levels of a schedule."""

    @abstractmethod
    def log_prob_levels(self, x: Tensor) -> Tensor:
        """log density of ``x`` (B, *shape) at every level: float64 (B, T+2), nats in model units."""

    @abstractmethod
    def eps(self, x_t: Tensor, t: Level) -> Tensor:
        """E[eps | x_t] under this density, shape of ``x_t`` (identity 3)."""

    @abstractmethod
    def log_prob_change(self, x_t: Tensor, t: Tensor) -> Tensor:
        """log density at level t + 1 less that at t - 1, by the slope at level t (identity 11): float64 (B,)."""

    @abstractmethod
    def sample(self, eps: Tensor, t: int) -> Tensor:
        """A draw at level ``t`` from standard normal ``eps`` (B, *shape)."""


@final
class StandardNormal(BaseDensity):
    """log N(x; 0, I) at every level: the base of identity 1, of a model without Gaussian residual."""

    def __init__(self, schedule: NoiseSchedule) -> None:
        super().__init__()
        self.schedule = schedule

    def log_prob_levels(self, x: Tensor) -> Tensor:
        flat = x.flatten(1).double()
        value = -0.5 * flat.square().sum(1) - 0.5 * flat.shape[1] * math.log(2 * math.pi)
        return value[:, None].expand(-1, self.schedule.T + 2)

    def eps(self, x_t: Tensor, t: Level) -> Tensor:
        _, sigma_t = self.schedule.at(t, x_t)
        return sigma_t * x_t

    def log_prob_change(self, x_t: Tensor, t: Tensor) -> Tensor:
        return torch.zeros(len(x_t), dtype=torch.float64, device=x_t.device)

    def sample(self, eps: Tensor, t: int) -> Tensor:
        return eps


class Rotation(Float64Module, ABC):
    """An orthogonal change of basis of the flattened event."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Coordinates (B, d) of ``x`` (B, *shape) in the basis."""

    @abstractmethod
    def inverse(self, z: Tensor) -> Tensor:
        """``x`` (B, *shape) from its coordinates (B, d)."""


@final
class MatrixRotation(Rotation):
    """Any basis, its vectors the columns of a matrix (d, d): the eigenvectors of a covariance."""

    matrix: Tensor

    def __init__(self, shape: Sequence[int], matrix: Tensor) -> None:
        super().__init__()
        self.shape = tuple(shape)
        # eigh gives a transposed layout and a loaded state a plain one: products would differ in the last bit.
        self.register_buffer("matrix", matrix.double().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ self.matrix

    def inverse(self, z: Tensor) -> Tensor:
        return (z @ self.matrix.T).reshape(-1, *self.shape)


@final
class CosineRotation(Rotation):
    """Discrete cosine transform of each axis of an event (C, H, W), the channels included.

    Covariances of natural images are nearly diagonal in it, and it costs no (d, d) matrix.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)
        for axis, size in enumerate(self.shape):
            self.register_buffer(f"axis_{axis}", cosine_matrix(size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self._along_axes(x, transpose=False).flatten(1)

    def inverse(self, z: Tensor) -> Tensor:
        return self._along_axes(z.reshape(-1, *self.shape), transpose=True)

    def _along_axes(self, x: Tensor, transpose: bool) -> Tensor:
        for axis in range(len(self.shape)):
            matrix = getattr(self, f"axis_{axis}")
            matrix = matrix if transpose else matrix.T
            x = torch.movedim(torch.movedim(x, axis + 1, -1) @ matrix, -1, axis + 1)
        return x


def cosine_matrix(size: int) -> Tensor:
    """Orthonormal DCT-II as a float64 matrix (size, size); row k is the k-th cosine."""
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * k[:, None] * (k[None] + 0.5)) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix


@final
class GaussianMarginals(BaseDensity):
    r"""N(x; alpha_t mu, alpha_t² Sigma + sigma_t² I) for all levels, in the eigenbasis of Sigma.

    Args:
        schedule: The noise schedule.
        mean: mu in model units, (*shape).
        variances: Eigenvalues of Sigma, (d,), positive.
        rotation: The eigenbasis.
    """

    mean: Tensor
    variances: Tensor

    def __init__(
        self, schedule: NoiseSchedule, mean: Tensor, variances: Tensor, rotation: Rotation
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.rotation = rotation
        self.register_buffer("mean", mean.double())
        self.register_buffer("variances", variances.double())

    @classmethod
    def blank(
        cls, schedule: NoiseSchedule, shape: Sequence[int], form: str | None = None
    ) -> GaussianMarginals:
        """A standard normal of the right form, to load a saved state into. ``form``: ``full`` or ``cosine``."""
        dim = math.prod(shape)
        rotation: Rotation
        if (form or default_form(shape)) == "full":
            rotation = MatrixRotation(shape, torch.eye(dim, dtype=torch.float64))
        else:
            rotation = CosineRotation(shape)
        zeros, ones = torch.zeros(*shape, dtype=torch.float64), torch.ones(dim, dtype=torch.float64)
        return cls(schedule, zeros, ones, rotation)

    @classmethod
    def fit(
        cls, samples: Tensor, schedule: NoiseSchedule, floor: float = 0.0, form: str | None = None
    ) -> GaussianMarginals:
        """Mean and covariance of ``samples`` (N, *shape), model units, dequantised.

        Args:
            samples: Training data.
            schedule: The noise schedule.
            floor: Smallest eigenvalue, model units squared; bin² / 12 for dequantised data.
            form: ``full`` (eigenvectors) or ``cosine`` (diagonal in a cosine basis); by size when None.
        """
        shape, samples = samples.shape[1:], samples.double()
        mean = samples.mean(0)
        centred = samples - mean
        if (form or default_form(shape)) == "full":
            flat = centred.flatten(1)
            variances, vectors = torch.linalg.eigh(flat.T @ flat / len(flat))
            rotation: Rotation = MatrixRotation(shape, vectors)
        else:
            rotation = CosineRotation(shape).to(samples.device)
            variances = rotation(centred).square().mean(0)
        # A floor of 0 still leaves out directions in which the data do not vary at all.
        smallest = max(floor, 1e-9 * float(variances.max()))
        return cls(schedule, mean, variances.clamp_min(smallest), rotation)

    def _variances_at(self, t: Level | slice) -> Tensor:
        alpha, sigma = self.schedule.alpha[t, None], self.schedule.sigma[t, None]
        return alpha**2 * self.variances + sigma**2

    def log_prob_levels(self, x: Tensor) -> Tensor:
        # x - alpha mu = (x - mu) + (1 - alpha) mu. The square is expanded about the centred x, three matrix
        # products instead of a (B, T+2, d) array; about 0 the terms would cancel to the rounding error.
        z = self.rotation(x.double() - self.mean)
        m = self.rotation(self.mean[None])
        variances = self._variances_at(slice(None))
        precision = (1 / variances).T
        rest = 1 - self.schedule.alpha
        square = (
            z.square() @ precision
            + 2 * rest * ((z * m) @ precision)
            + rest**2 * (m.square() @ precision)
        )
        log_volume = variances.log().sum(1) + variances.shape[1] * math.log(2 * math.pi)
        return -0.5 * (square + log_volume)

    def eps(self, x_t: Tensor, t: Level) -> Tensor:
        alpha_t, sigma_t = self.schedule.at(t, x_t.double())
        z = self.rotation(x_t.double() - alpha_t * self.mean)
        return (sigma_t * self.rotation.inverse(z / self._variances_at(t))).to(x_t.dtype)

    def log_prob_change(self, x_t: Tensor, t: Tensor) -> Tensor:
        eps = self.eps(x_t.double(), t)
        # The posterior of eps has covariance alpha² Sigma (alpha² Sigma + sigma²)^-1.
        variances = self._variances_at(t)
        spread = (1 - self.schedule.sigma[t, None] ** 2 / variances).sum(1)
        return self.schedule.log_prob_change(x_t, t, eps, eps.square().flatten(1).sum(1) + spread)

    def moments(self, t: int) -> tuple[Tensor, Tensor]:
        """Mean (*shape) and eigenvalues (d,) of the marginal at level ``t``."""
        return self.schedule.alpha[t] * self.mean, self._variances_at(t).reshape(-1)

    def sample(self, eps: Tensor, t: int) -> Tensor:
        mean, variances = self.moments(t)
        return (mean + self.rotation.inverse(eps.flatten(1).double() * variances.sqrt())).to(eps.dtype)


def default_form(shape: Sequence[int]) -> str:
    """``full`` up to :data:`FULL_COVARIANCE_LIMIT` dimensions, ``cosine`` above."""
    return "full" if math.prod(shape) <= FULL_COVARIANCE_LIMIT else "cosine"
