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
from torch import Tensor, nn

from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.units.float64 import Float64Module

FULL_COVARIANCE_LIMIT = 4096
"""Above this many dimensions ``fit`` takes the diagonal form in a cosine basis."""


class BaseDensity(Float64Module, ABC):
    """A density known in closed form at all levels of a schedule."""

    @property
    def gaussian(self) -> GaussianMarginals | None:
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

    @abstractmethod
    def start(self, eps: Tensor) -> Tensor:
        """x at level T for samplers to start from, made of standard normal ``eps`` (B, *shape)."""

    @abstractmethod
    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """Exact draws at level 0, float64 of ``shape`` (n, *event) on the schedule's device; a CPU generator."""

    def class_effects(self, x: Tensor) -> Tensor | None:
        """What joint logits add for each class, float64 (B, classes, T+2), 0 at level T+1; None for nothing."""
        return None


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

    def start(self, eps: Tensor) -> Tensor:
        return eps

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return _standard_normal(shape, generator, self.schedule)


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
    constants: Tensor

    def __init__(
        self, schedule: NoiseSchedule, mean: Tensor, variances: Tensor, rotation: Rotation
    ) -> None:
        super().__init__()
        self.schedule = schedule
        self.rotation = rotation
        self.register_buffer("mean", mean.double())
        self.register_buffer("variances", variances.double())
        self.register_buffer("constants", torch.empty(0, dtype=torch.float64), persistent=False)
        self._set_constants()
        self.register_load_state_dict_post_hook(_refresh)

    @property
    def gaussian(self) -> GaussianMarginals:
        return self

    def _set_constants(self) -> None:
        """What log p at each level owes to mean and variances alone, (T+2,): 784 000 logarithms for T = 1000."""
        variances = self._variances_at(slice(None))
        log_volume = variances.log().sum(1) + variances.shape[1] * math.log(2 * math.pi)
        m, rest = self.rotation(self.mean[None]), 1 - self.schedule.alpha
        self.constants = log_volume + rest**2 * (m.square() / variances).sum(1)

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
        cls,
        samples: Tensor,
        schedule: NoiseSchedule,
        floor: float = 0.0,
        form: str | None = None,
        shrinkage: float = 0.0,
    ) -> GaussianMarginals:
        """Mean and covariance of ``samples`` (N, *shape), model units, dequantised.

        Args:
            samples: Training data.
            schedule: The noise schedule.
            floor: Smallest eigenvalue, model units squared; bin² / 12 for dequantised data.
            form: ``full`` (eigenvectors) or ``cosine`` (diagonal in a cosine basis); by size when None.
            shrinkage: Share by which the eigenvalues are moved towards their mean (Ledoit and Wolf 2004): those of
                few samples spread too far, and without samples in a direction they are zero.
        """
        mean, spread = mean_and_spread(samples, form)
        if spread.ndim == 2:
            spread = shrunk(spread, float(spread.diagonal().mean()), shrinkage)
        else:
            spread = torch.lerp(spread, spread.mean(), shrinkage)
        return cls.of_spread(schedule, mean, spread, floor)

    @classmethod
    def of_spread(
        cls, schedule: NoiseSchedule, mean: Tensor, spread: Tensor, floor: float = 0.0
    ) -> GaussianMarginals:
        """The Gaussian of a mean (*shape) and a spread, both as from :func:`mean_and_spread`."""
        if spread.ndim == 2:
            variances, vectors = torch.linalg.eigh(spread)
            rotation: Rotation = MatrixRotation(mean.shape, vectors)
        else:
            variances, rotation = spread, CosineRotation(mean.shape).to(mean.device)
        # A floor of 0 still leaves out directions in which the data do not vary at all.
        smallest = max(floor, 1e-9 * float(variances.max()))
        return cls(schedule, mean, variances.clamp_min(smallest), rotation)

    def _variances_at(self, t: Level | slice) -> Tensor:
        alpha, sigma = self.schedule.alpha[t, None], self.schedule.sigma[t, None]
        return alpha**2 * self.variances + sigma**2

    def log_prob_levels(self, x: Tensor) -> Tensor:
        # x - alpha mu = (x - mu) + (1 - alpha) mu. The square is expanded about the centred x, matrix
        # products instead of a (B, T+2, d) array; about 0 the terms would cancel to the rounding error.
        z = self.rotation(x.double() - self.mean)
        m = self.rotation(self.mean[None])
        precision = self._variances_at(slice(None)).reciprocal().T
        squares, products = (torch.cat([z.square(), z * m]) @ precision).chunk(2)
        return -0.5 * (squares + 2 * (1 - self.schedule.alpha) * products + self.constants)

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
        """A draw at level ``t`` from standard normal ``eps`` (B, *shape)."""
        mean, variances = self.moments(t)
        return (mean + self.rotation.inverse(eps.flatten(1).double() * variances.sqrt())).to(eps.dtype)

    def start(self, eps: Tensor) -> Tensor:
        return self.sample(eps, self.schedule.T)

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return self.sample(_standard_normal(shape, generator, self.schedule), 0)


SHRINKAGE = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0)
"""Shares of the common covariance that :meth:`ClassGaussians.fit` tries."""

HELD_OUT = 5
"""Every fifth sample is held out to choose between them, ..."""

HELD_OUT_LIMIT = 4000
"""... of each class at most so many."""


class ClassDensities(BaseDensity):
    """The density of all classes together, and beside it what tells them apart: joint logits start as the classes'.

    The network still corrects one base density, the common one; the classes enter by :meth:`class_effects`. Before
    the first step the log ratio of two classes is that of their base densities.

    Args:
        common: Of all data together.
    """

    def __init__(self, common: BaseDensity) -> None:
        super().__init__()
        self.common = common

    @property
    def schedule(self) -> NoiseSchedule:
        """The noise schedule."""
        return self.common.schedule

    @property
    def gaussian(self) -> GaussianMarginals | None:
        return self.common.gaussian

    def log_prob_levels(self, x: Tensor) -> Tensor:
        return self.common.log_prob_levels(x)

    def eps(self, x_t: Tensor, t: Level) -> Tensor:
        return self.common.eps(x_t, t)

    def log_prob_change(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.common.log_prob_change(x_t, t)

    def start(self, eps: Tensor) -> Tensor:
        return self.common.start(eps)

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return self.common.draw(shape, generator)

    @abstractmethod
    def class_effects(self, x: Tensor) -> Tensor:
        """log density of each class less that of all together, float64 (B, classes, T+2)."""


@final
class ClassGaussians(ClassDensities):
    """One Gaussian for all classes, and beside it one for each.

    Args:
        common: Gaussian of all data together.
        classes: Gaussian of each class, under the same schedule.
    """

    def __init__(self, common: GaussianMarginals, classes: Sequence[GaussianMarginals]) -> None:
        super().__init__(common)
        self.classes = nn.ModuleList(classes)

    @classmethod
    def blank(cls, schedule: NoiseSchedule, shape: Sequence[int], classes: int) -> ClassGaussians:
        """Standard normals, to load a saved state into."""
        common, *own = (GaussianMarginals.blank(schedule, shape) for _ in range(1 + classes))
        return cls(common, own)

    @classmethod
    def fit(
        cls,
        samples: Tensor,
        labels: Tensor,
        schedule: NoiseSchedule,
        floor: float = 0.0,
        form: str | None = None,
        held_out: tuple[Tensor, Tensor] | None = None,
    ) -> ClassGaussians:
        """Means of the classes, and covariances between each class's own and the one common to them.

        A covariance has d²/2 numbers, and the log ratio of two classes sees the error of both. Where the classes
        differ in the mean alone it is best taken from all of them; the share is the one under which held-out samples
        are most probable (regularised discriminant analysis, Friedman 1989).

        Args:
            samples: Training data (N, *shape), model units, dequantised.
            labels: Classes 0, 1, ..., long (N,); at least two samples of each.
            schedule: The noise schedule.
            floor: As in :meth:`GaussianMarginals.fit`.
            form: Likewise.
            held_out: Samples and classes that choose the share; every fifth of the training data when None. Training
                data that repeat the samples of a small class need some: a copy of a sample would choose its own fit.
        """
        classes = int(labels.max()) + 1
        if held_out is None:
            chosen = torch.arange(len(samples), device=labels.device) % HELD_OUT == 0
            held_out, fitted = (samples[chosen], labels[chosen]), (samples[~chosen], labels[~chosen])
        else:
            fitted = samples, labels
        counts = torch.stack([torch.bincount(y, minlength=classes) for _, y in (held_out, fitted)])
        share = 1.0
        if int(counts.min()) > 1:
            trial = _class_moments(*fitted, form)
            parts = [held_out[0][held_out[1] == y][:HELD_OUT_LIMIT] for y in range(classes)]

            def held_out_log_prob(share: float) -> float:
                gaussians = _blended(trial, share, schedule, floor)
                return sum(float(g.log_prob_levels(x)[:, 0].mean()) for g, x in zip(gaussians, parts, strict=True))

            share = max(SHRINKAGE, key=held_out_log_prob)
        common = GaussianMarginals.fit(samples, schedule, floor, form)
        return cls(common, _blended(_class_moments(samples, labels, form), share, schedule, floor))

    def class_effects(self, x: Tensor) -> Tensor:
        by_class = torch.stack([gaussian.log_prob_levels(x) for gaussian in self.classes], 1)
        return by_class - self.common.log_prob_levels(x)[:, None]


def _refresh(gaussian: GaussianMarginals, _: object) -> None:
    """After a saved state was loaded; a function of the module, so that models can be pickled."""
    gaussian._set_constants()


def _standard_normal(shape: Sequence[int], generator: torch.Generator, schedule: NoiseSchedule) -> Tensor:
    """float64 noise of ``shape``, drawn on the CPU, on the schedule's device."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(schedule.alpha.device)


def mean_and_spread(samples: Tensor, form: str | None = None) -> tuple[Tensor, Tensor]:
    """Mean (*shape) and spread of ``samples`` (N, *shape): float64.

    The spread is the covariance of the flattened event, (d, d), for the form ``full``; the variances in the cosine
    basis, (d,), for ``cosine``. By size when None.
    """
    shape, samples = samples.shape[1:], samples.double()
    mean = samples.mean(0)
    centred = samples - mean
    if (form or default_form(shape)) == "full":
        flat = centred.flatten(1)
        return mean, flat.T @ flat / len(flat)
    return mean, CosineRotation(shape).to(samples.device)(centred).square().mean(0)


def shrunk(covariances: Tensor, variance: float, share: float) -> Tensor:
    """Covariances (..., d, d) moved by ``share`` towards the round one of ``variance``."""
    round_one = variance * torch.eye(covariances.shape[-1], dtype=covariances.dtype, device=covariances.device)
    return torch.lerp(covariances, round_one.expand_as(covariances), share)


def _class_moments(samples: Tensor, labels: Tensor, form: str | None) -> list[tuple[Tensor, Tensor]]:
    return [mean_and_spread(samples[labels == y], form) for y in range(int(labels.max()) + 1)]


def _blended(
    classes: Sequence[tuple[Tensor, Tensor]], share: float, schedule: NoiseSchedule, floor: float
) -> list[GaussianMarginals]:
    """A Gaussian for each class, its spread moved by ``share`` towards the mean spread."""
    common = torch.stack([spread for _, spread in classes]).mean(0)
    return [
        GaussianMarginals.of_spread(schedule, mean, (1 - share) * spread + share * common, floor)
        for mean, spread in classes
    ]


def default_form(shape: Sequence[int]) -> str:
    """``full`` up to :data:`FULL_COVARIANCE_LIMIT` dimensions, ``cosine`` above."""
    return "full" if math.prod(shape) <= FULL_COVARIANCE_LIMIT else "cosine"
