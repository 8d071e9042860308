r"""Gaussians fitted to the data, at every level.

.. math:: G_t(x) = \log N(x;\ \alpha_t\mu,\ \alpha_t^2\Sigma + \sigma_t^2 I)

At level T+1 this is the standard normal for any mean and covariance. The model's density is this base plus
the network's output: before the first training step the model *is* the fitted Gaussian.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import final

import numpy as np
import torch
from scipy.fft import dct
from torch import Tensor, nn

from torchcdm.diffusion.base import BaseDensity
from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.random import normal, stream
from torchcdm.runtime.precision import Float64Module
from torchcdm.units.log_likelihood import log_normal

FULL_COVARIANCE_LIMIT = 4096  # above this many dimensions ``fit`` takes the diagonal form in a cosine basis


class Rotation(Float64Module):
    """An orthogonal change of basis of the flattened event; here none, for a Gaussian without correlations."""

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__()
        self.shape = tuple(shape)

    def forward(self, x: Tensor) -> Tensor:
        """Coordinates (..., d) of ``x`` (..., *shape) in the basis."""
        return x.flatten(-len(self.shape))

    def inverse(self, z: Tensor) -> Tensor:
        """``x`` (..., *shape) from its coordinates (..., d)."""
        return z.reshape(*z.shape[:-1], *self.shape)


@final
class MatrixRotation(Rotation):
    """Any basis, its vectors the columns of a matrix (..., d, d): the eigenvectors of a covariance."""

    def __init__(self, shape: Sequence[int], matrix: Tensor) -> None:
        super().__init__(shape)
        # eigh gives a transposed layout and a loaded state a plain one: products would differ in the last bit.
        self.matrix = nn.Buffer(matrix.double().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) @ self.matrix

    def inverse(self, z: Tensor) -> Tensor:
        return super().inverse(z @ self.matrix.mT)


@final
class CosineRotation(Rotation):
    """Orthonormal discrete cosine transform (DCT-II) of each axis of an event (C, H, W), the channels included.

    Covariances of natural images are nearly diagonal in it, and it costs no (d, d) matrix.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(shape)
        for axis, size in enumerate(self.shape, -len(self.shape)):
            cosines = torch.from_numpy(dct(np.eye(size), axis=0, norm="ortho"))  # row k is the k-th cosine
            self.register_buffer(f"axis_{axis}", cosines, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for axis in range(-len(self.shape), 0):
            x = torch.movedim(torch.movedim(x, axis, -1) @ getattr(self, f"axis_{axis}").T, -1, axis)
        return super().forward(x)

    def inverse(self, z: Tensor) -> Tensor:
        x = super().inverse(z)
        for axis in range(-len(self.shape), 0):
            x = torch.movedim(torch.movedim(x, axis, -1) @ getattr(self, f"axis_{axis}"), -1, axis)
        return x


DIAGONAL = {"cosine": CosineRotation, "diagonal": Rotation}
"""Forms of a Gaussian with one variance a number in a basis that is known."""


@final
class GaussianMarginals(BaseDensity):
    r"""N(x; alpha_t mu, alpha_t² Sigma + sigma_t² I) for all levels, in the eigenbasis of Sigma.

    Of the ``mean`` mu, (*shape) in model units, the ``variances``, positive eigenvalues of Sigma, (d,), and their
    basis, the ``rotation``. Several are one of mean (K, 1, *shape), variances (K, 1, d) and a rotation of matrix
    (K, d, d); what the methods give has the axis K in front then. ``classes`` may have Gaussians of their own.
    """

    def __init__(self, schedule: NoiseSchedule, mean: Tensor, variances: Tensor, rotation: Rotation) -> None:
        super().__init__(schedule)
        self.rotation, self.classes = rotation, nn.ModuleList()
        self.mean = nn.Buffer(mean.double())
        self.variances = nn.Buffer(variances.double())

    @property
    def gaussian(self) -> GaussianMarginals:
        return self

    @classmethod
    def blank(
        cls, schedule: NoiseSchedule, shape: Sequence[int], form: str | None = None, classes: int = 0
    ) -> GaussianMarginals:
        """A standard normal of the right form, to load a saved state into; ``form`` as in :func:`mean_and_spread`."""
        mean, variances = torch.zeros(*shape), torch.ones(math.prod(shape))
        form = form or default_form(shape)
        rotation = MatrixRotation(shape, torch.eye(len(variances))) if form == "full" else DIAGONAL[form](shape)
        found = cls(schedule, mean, variances, rotation)
        found.classes.extend(cls.blank(schedule, shape, form) for _ in range(classes))
        return found

    @classmethod
    def fit(
        cls, samples: Tensor, schedule: NoiseSchedule, floor: float = 0, form: str | None = None, shrinkage: float = 0
    ) -> GaussianMarginals:
        """Mean and spread of ``samples`` (N, *shape), model units, dequantised, as by :func:`mean_and_spread`.

        ``floor`` is the smallest eigenvalue, model units squared: bin² / 12 for dequantised data. ``shrinkage`` is the
        share by which the eigenvalues are moved towards their mean (Ledoit and Wolf 2004): those of few samples spread
        too far, and without samples in a direction they are zero.
        """
        mean, spread = mean_and_spread(samples, form)
        return cls.of_spread(schedule, mean, shrunk(spread, shrinkage), floor, form)

    @classmethod
    def of_spread(
        cls, schedule: NoiseSchedule, mean: Tensor, spread: Tensor, floor: float = 0.0, form: str | None = None
    ) -> GaussianMarginals:
        """The Gaussian of a mean (*shape) and a spread, both as from :func:`mean_and_spread` for the same form."""
        if spread.ndim == 2:
            variances, vectors = torch.linalg.eigh(spread)
            rotation: Rotation = MatrixRotation(mean.shape, vectors)
        else:
            variances, rotation = spread, DIAGONAL[form or "cosine"](mean.shape).to(mean.device)
        # A floor of 0 still leaves out directions in which the data do not vary at all.
        return cls(schedule, mean, variances.clamp_min(max(floor, 1e-9 * float(variances.max()))), rotation)

    def _variances_at(self, t: Level) -> Tensor:
        alpha, sigma = self.schedule.alpha[t, None], self.schedule.sigma[t, None]
        return alpha**2 * self.variances + sigma**2

    def log_prob_levels(self, x: Tensor) -> Tensor:
        # x - alpha mu = (x - mu) + (1 - alpha) mu. The square is expanded about the centred x, matrix
        # products instead of a (B, T+2, d) array; about 0 the terms would cancel to the rounding error.
        z, m = self.rotation(x.double() - self.mean), self.rotation(self.mean)
        given = z, m, self.variances
        # One of several after the other, whose (T+2, d) array stays in the cache.
        return self._levels(*given) if z.ndim == 2 else torch.stack(list(map(self._levels, *given)))

    def _levels(self, z: Tensor, m: Tensor, variances: Tensor) -> Tensor:
        alpha, sigma = self.schedule.alpha, self.schedule.sigma
        marginal, rest = alpha[:, None] ** 2 * variances + sigma[:, None] ** 2, 1 - alpha
        precision = marginal.reciprocal().T
        squares, products = torch.stack([z.square(), z * m]) @ precision
        log_volume = (2 * math.pi * marginal).log().sum(1)
        return -0.5 * (squares + 2 * rest * products + rest**2 * (m.square() @ precision) + log_volume)

    def eps(self, x_t: Tensor, t: Level) -> Tensor:
        alpha_t, sigma_t = self.schedule.at(t, x_t.double())
        z = self.rotation(x_t.double() - alpha_t * self.mean)
        return (sigma_t * self.rotation.inverse(z / self._variances_at(t))).to(x_t.dtype)

    def log_prob(self, x_t: Tensor, t: Level) -> Tensor:
        """log density of ``x_t`` (B, *shape) at one level, or at one for each: float64 (B,), nats in model units."""
        alpha_t, _ = self.schedule.at(t, x_t.double())
        return log_normal(self.rotation(x_t.double() - alpha_t * self.mean), self._variances_at(t)).sum(-1)

    def noise(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """E[eps | x_t], (B, *shape), and E[|eps|² | x_t], (B,); float64."""
        eps = self.eps(x_t.double(), t)
        # The trace of the covariance of eps given x_t, alpha² Sigma (alpha² Sigma + sigma²)^-1, beside its mean.
        spread = (1 - self.schedule.sigma[t, None] ** 2 / self._variances_at(t)).sum(-1)
        return eps, eps.square().flatten(-len(self.rotation.shape)).sum(-1) + spread

    def log_prob_change(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.schedule.log_prob_change(x_t, t, *self.noise(x_t, t))

    def moments(self, t: int) -> tuple[Tensor, Tensor]:
        """Mean (*shape) and eigenvalues (d,) of the marginal at level ``t``."""
        return self.schedule.alpha[t] * self.mean, self._variances_at(t)

    def start_kl(self, mean: Tensor, deviation: Tensor) -> Tensor:
        """KL(N(mean, deviation² I) || this Gaussian at level T), nats (B,), from ``mean`` (B, *shape)."""
        start, variances = self.moments(self.schedule.T)
        square = self.rotation(mean - start).square()
        return 0.5 * ((deviation**2 + square) / variances - 1 + (variances / deviation**2).log()).sum(1)

    def left(self, x_t: Tensor, t: Level, eps: Tensor) -> Tensor:
        share = 1 / (1 + self.variances / self.schedule.ratio[t] ** 2)
        # All along directions up to twice as wide as the noise; where they are wider a network may know thinner ones.
        return self.rotation.inverse(eps.double() * (self.variances * share * (5 * share).clamp(max=1)).sqrt())

    def sample(self, eps: Tensor, t: int) -> Tensor:
        """A draw at level ``t`` from standard normal ``eps`` (B, *shape)."""
        mean, variances = self.moments(t)
        return (mean + self.rotation.inverse(eps.flatten(1).double() * variances.sqrt())).to(eps.dtype)

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return self.sample(normal(shape, generator, self.mean.device), 0)

    def class_effects(self, x: Tensor) -> Tensor | None:
        if not self.classes:
            return None
        by_class = torch.stack([gaussian.log_prob_levels(x) for gaussian in self.classes], 1)
        return by_class - self.log_prob_levels(x)[:, None]


def mean_and_spread(samples: Tensor, form: str | None = None) -> tuple[Tensor, Tensor]:
    """Mean (*shape) and spread of ``samples`` (N, *shape): float64.

    The spread is the covariance of the flattened event, (d, d), for the form ``full``; the variances in the cosine
    basis, (d,), for ``cosine``; those of the numbers themselves for ``diagonal``. By size when None.
    """
    shape, samples = samples.shape[1:], samples.double()
    form = form or default_form(shape)
    mean = samples.mean(0)
    centred = samples - mean
    if form == "full":
        flat = centred.flatten(1)
        return mean, flat.T @ flat / len(flat)
    return mean, DIAGONAL[form](shape).to(samples.device)(centred).square().mean(0)


def shrunk(spread: Tensor, share: float, variance: float | None = None) -> Tensor:
    """Covariances (..., d, d), or variances (d,), moved by ``share`` towards a round one: of their mean when None."""
    variances = spread if spread.ndim == 1 else spread.diagonal(dim1=-2, dim2=-1)
    round_one = torch.full_like(variances, float(variances.mean()) if variance is None else variance)
    return torch.lerp(spread, round_one if spread.ndim == 1 else round_one.diag_embed(), share)


def default_form(shape: Sequence[int]) -> str:
    """``full`` up to ``FULL_COVARIANCE_LIMIT`` dimensions, ``cosine`` above."""
    return "full" if math.prod(shape) <= FULL_COVARIANCE_LIMIT else "cosine"


def within_error(deficit: Tensor) -> bool:
    """Whether the mean of paired differences is at most its standard error."""
    return float(deficit.mean()) <= float(deficit.std(correction=0)) / math.sqrt(len(deficit))


# Shares that are tried of moving covariances towards a round one, and of the common one in those of classes, rising.
SHRINKAGES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7)
SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0)
HELD_OUT = 5  # every fifth sample is held out to choose between them
HELD_OUT_LIMIT, DRAWS = 2000, 4  # most held-out samples of a class, and noisy copies of each


def fit_class_gaussians(
    samples: Tensor, labels: Tensor, schedule: NoiseSchedule, floor: float = 0.0,
    held_out: tuple[Tensor, Tensor] | None = None, classes: int = 0,
) -> GaussianMarginals:  # fmt: skip
    """The Gaussian of all data, with one for each class: its own mean, and a covariance partly common to all.

    Where classes differ in the mean alone, the covariance is best taken from all of them (regularised discriminant
    analysis, Friedman 1989). Held-out samples choose the share in common, and how far all are moved to a round one: by
    how well they tell their class at all noise levels, among those under which they are as probable as under the best,
    to a standard error. Their likelihood alone would hardly see what makes a ratio of few samples wrong; without noise
    classes that are far apart would be told by any share.

    ``samples`` (N, *shape) are in model units, dequantised, of the classes ``labels``, long (N,). Those of at least so
    many ``classes`` that have no sample take the Gaussian of all. ``held_out`` are samples and classes that choose,
    every fifth of the training data when None: not of data that repeat samples, as a copy would choose its own fit.
    """
    present, fitted = labels.unique().tolist(), (samples, labels)
    if held_out is None:
        held = torch.arange(len(samples), device=labels.device) % HELD_OUT == 0
        held_out, fitted = (samples[held], labels[held]), (samples[~held], labels[~held])
    share, shrinkage = 1.0, 0.0
    if all(int((y == label).sum()) > 1 for _, y in (held_out, fitted) for label in present):
        own, unseen = ([x[labels == y] for y in present] for x, labels in (fitted, held_out))
        share, shrinkage = _best_share(list(map(mean_and_spread, own)), unseen, schedule, floor)
    spreads = [mean_and_spread(samples[labels == y]) for y in present]
    own = dict(zip(present, _blended(spreads, share, shrinkage, schedule, floor), strict=True))
    common = GaussianMarginals.of_spread(schedule, *mean_and_spread(samples), floor)
    common.classes.extend([own.get(y) or deepcopy(common) for y in range(max(classes, present[-1] + 1))])
    return common


def _best_share(
    classes: Sequence[tuple[Tensor, Tensor]], held_out: Sequence[Tensor], schedule: NoiseSchedule, floor: float
) -> tuple[float, float]:
    """The arguments of :func:`_blended` that suit held-out samples of each class best: share and shrinkage."""
    # A sample that is repeated says no more than once.
    parts = [x[:HELD_OUT_LIMIT].unique(dim=0).double() for x in held_out]
    truth = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(x) for x in parts]))
    rare = torch.tensor([len(truth) / len(parts) / len(x) for x in parts]).double()[truth]
    x, generator = torch.cat(parts).repeat(DRAWS, *[1] * (parts[0].ndim - 1)), stream(0, "classes held out")
    t = (torch.randperm(len(x), generator=generator) * (schedule.T + 2) // len(x)).to(x.device)
    x = schedule.perturb(x, t, normal(x.shape, generator, x.device))

    def judged(share: float, shrinkage: float) -> tuple[Tensor, float]:
        """log p of the samples, and mean log probability of their class with noise, classes equally frequent."""
        gaussians = _blended(classes, share, shrinkage, schedule, floor)
        log_p = torch.cat([g.log_prob_levels(part)[:, 0].cpu() for g, part in zip(gaussians, parts, strict=True)])
        logits = torch.cat([g.log_prob_levels(x).gather(1, t[:, None]) for g in gaussians], 1).cpu()
        told = logits.log_softmax(1).gather(1, truth.repeat(DRAWS)[:, None])[:, 0]
        return rare * log_p, float((rare.repeat(DRAWS) * told).mean())

    def best_of(tried: dict[float, tuple[Tensor, float]]) -> float:
        best = max((log_p for log_p, _ in tried.values()), key=lambda log_p: float(log_p.mean()))
        return max((k for k in tried if within_error(best - tried[k][0])), key=lambda k: tried[k][1])

    share = best_of({tried: judged(tried, 0.0) for tried in SHARES})
    if classes[0][1].ndim < 2:
        return share, 0.0
    return share, best_of({tried: judged(share, tried) for tried in SHRINKAGES})


def _blended(
    classes: Sequence[tuple[Tensor, Tensor]], share: float, shrinkage: float, schedule: NoiseSchedule, floor: float
) -> list[GaussianMarginals]:
    """A Gaussian for each class, its spread moved by ``share`` to the mean spread, and further to a round one."""
    common = torch.stack([spread for _, spread in classes]).mean(0)
    variance, found = float((common if common.ndim == 1 else common.diagonal()).mean()), []
    for mean, spread in classes:
        spread = shrunk(torch.lerp(spread, common, share), shrinkage, variance)
        found.append(GaussianMarginals.of_spread(schedule, mean, spread, floor))
    return found
