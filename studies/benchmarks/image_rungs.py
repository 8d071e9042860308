"""Rungs between the levels of a density of images: the target, its fence, kernels, and where rungs are placed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.target import Evaluated, Target, in_batches
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.models.density import DensityModel

EDGES = torch.tensor([-0.99, -0.98, -0.96, -0.93, -0.9, -0.8, -0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95])
"""Edges of brightness, model units, between which the variance of r is constant."""

BATCH = 32
"""Images a pass."""

COMPARED, DISTANCE = 11, 6.0
"""Rungs whose log p a fence looks at, and the largest Mahalanobis distance of their profile that it lets in."""


class Rungs(NoiseSchedule):
    """The levels of a schedule at real numbers, where a precision 1 / sigma² between two is interpolated."""

    def __init__(self, schedule: NoiseSchedule, at: Tensor) -> None:
        self.lower = at.floor().long().clamp_max(schedule.T - 1)
        self.share = at - self.lower
        precision = schedule.sigma**-2.0
        self._sigma = torch.lerp(precision[self.lower], precision[self.lower + 1], self.share) ** -0.5
        super().__init__(len(at))

    def between(self, levels: Tensor) -> Tensor:
        """log p at the rungs, (B, rungs), from that at the levels, (B, T+2)."""
        return torch.lerp(levels[:, self.lower], levels[:, self.lower + 1], self.share)

    def inner_levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return (1 - self._sigma**2).sqrt(), self._sigma


class Interpolated(Target):
    """A model at levels of real numbers, of one class ``y`` or of all (None): log p is interpolated between levels."""

    def __init__(self, model: DensityModel, at: Tensor, images: Tensor, y: int | None) -> None:
        schedule = Rungs(model.schedule, at)
        super().__init__(schedule, model.shape, GaussianMarginals.fit(images, schedule, 1e-4, "cosine"))
        self.model, self.y = model, y
        self.fence: Fence | None = None

    def log_gamma(self, x_t: Tensor) -> Tensor:
        """log p of the class at every rung, without the fence, (B, rungs)."""
        y = None if self.y is None else torch.full((len(x_t),), self.y)
        return self.schedule.between(self.model.conditional_and_marginal(x_t, y)[0])

    def evaluate(self, x_t: Tensor, t: Level) -> Evaluated:
        rung = torch.as_tensor(t).expand(len(x_t))

        def part(rows: slice) -> tuple[Tensor, ...]:
            own = rung[rows, None]
            with torch.enable_grad():
                x = x_t[rows].float().requires_grad_()
                levels = self.log_gamma(x)
                log_gamma = levels.gather(1, own - 1)[:, 0]
                (score,) = torch.autograd.grad(log_gamma.sum(), x)
            log_gamma, eps = log_gamma.detach(), -self.schedule.at(own[:, 0], score)[1].double() * score
            if self.fence is not None:
                log_gamma = log_gamma.masked_fill(~self.fence.inside(levels.detach(), own[:, 0]), -math.inf)
            return log_gamma, eps

        return Evaluated(*in_batches(self.model, x_t, part, BATCH))


class Fence:
    """Where the density of a rung has mass: the profile of log p, at that rung and above, is that of images.

    Of every rung ``middle``, (rungs, some), is the mean of log p at some rungs, and ``whiten``, (rungs, some, some),
    what gives the rest unit covariance, on training images with the rung's noise; 0 for the rungs below.
    """

    def __init__(self, middle: Tensor, whiten: Tensor) -> None:
        self.middle, self.whiten = middle, whiten
        self.some = Fence.compared(len(middle))

    @staticmethod
    def compared(rungs: int) -> Tensor:
        """Indices of the rungs that are compared."""
        return torch.linspace(0, rungs - 1, min(rungs, COMPARED)).round().long()

    @classmethod
    def of(cls, target: Interpolated, images: Tensor, generator: torch.Generator) -> Fence:
        """From clean ``images``, noised to every rung."""
        some, middles, whitens = cls.compared(target.schedule.T), [], []
        for t in range(1, target.schedule.T + 1):
            noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
            x_t = target.schedule.perturb(images, t, noise).float()
            seen = torch.cat([target.log_gamma(part)[:, some] for part in x_t.split(2 * BATCH)])
            own = some >= t - 1
            # A ten-thousandth of the variance: neighbouring levels of much noise hardly differ.
            covariance = torch.cov(seen[:, own].T).reshape(int(own.sum()), -1)
            covariance = covariance + 1e-4 * covariance.diag().mean() * torch.eye(len(covariance))
            whiten = torch.zeros(len(some), len(some), dtype=torch.float64)
            whiten[own.nonzero(), own.nonzero().T] = torch.linalg.inv(torch.linalg.cholesky(covariance))
            middles.append(seen.mean(0))
            whitens.append(whiten)
        return cls(torch.stack(middles), torch.stack(whitens))

    def inside(self, profile: Tensor, rung: Tensor) -> Tensor:
        """Whether log p of all rungs, (B, rungs), is usual at points of the rungs 1, 2, ..., (B,); boolean (B,)."""
        off = profile[:, self.some] - self.middle[rung - 1]
        return torch.einsum("bij,bj->bi", self.whiten[rung - 1], off).square().sum(1) <= DISTANCE**2


class ByBrightness(Kernels):
    """r with a variance of each pixel that depends on its denoised brightness; measured on images.

    ``variances`` in the cosine basis, for moves, are of the same errors.
    """

    def __init__(self, target: Target, images: Tensor, generator: torch.Generator) -> None:
        super().__init__(target.reference)
        blank = GaussianMarginals.blank(target.schedule, target.shape, "diagonal")
        rotation, T, self.table = target.reference.rotation, target.schedule.T, []
        for t in range(1, T + 1):
            noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
            x_t = target.schedule.perturb(images, t, noise)
            x_0 = self.x0(x_t, target.eps(x_t, t), t)
            squares, where = (images - x_0).square(), torch.bucketize(x_0, EDGES.double()).flatten()
            total = torch.zeros(len(EDGES) + 1, dtype=torch.float64).index_add(0, where, squares.flatten())
            count = torch.bincount(where, minlength=len(EDGES) + 1)
            # A brightness that hardly occurs has the variance of all pixels.
            self.table.append((total + 100 * squares.mean()) / (count + 100))
            self.variances[t - 1] = rotation(images - x_0).square().mean(0)
        self.table, self.reference = torch.stack(self.table), blank

    def divergence(self, x_0: Tensor, x_t: Tensor, eps: Tensor, t: int, s: int) -> Tensor:
        """KL(q(x_s | x_t, x_0) || r(x_s | x_t)), nats (B,)."""
        _, b, c = self.schedule.reverse_kernel(t, s, x_t)
        _, variance = self._reverse(x_t, eps, t, s)
        moved = (c**2 + (b * (x_0 - self.x0(x_t, eps, t))).flatten(1).square()) / variance
        return 0.5 * (moved - 1 + (variance / c**2).log()).sum(1)

    def _reverse(self, x_t: Tensor, eps: Tensor, t: Level, s: Level) -> tuple[Tensor, Tensor]:
        a, b, c = self.schedule.reverse_kernel(t, s, x_t)
        x_0 = self.x0(x_t, eps, t)
        rung = torch.as_tensor(t).expand(len(x_t)).reshape(-1, *[1] * (x_t.ndim - 1))
        spread = self.table[rung - 1, torch.bucketize(x_0, EDGES.double())]
        return a * x_t + b * x_0, (c**2 + b**2 * spread).flatten(1)


def deviations(target: Target, kernels: Kernels, images: Tensor, generator: torch.Generator) -> Tensor:
    """Deviation of the works upwards from noised images between neighbouring rungs, nats, (T-1,)."""
    found = []
    for s in range(1, target.schedule.T):
        noise = torch.randn(2, *images.shape, generator=generator, dtype=torch.float64)
        x_s = target.schedule.perturb(images, s, noise[0])
        x_t = kernels.up(x_s, s, s + 1, noise[1])
        at_s, at_t = target.evaluate(x_s, s), target.evaluate(x_t, s + 1)
        found.append(float(kernels.work(x_s, x_t, at_s, at_t, s, s + 1).std()))
    return torch.tensor(found, dtype=torch.float64)


def placed(at: Tensor, deviation: Tensor, spacing: float) -> Tensor:
    """Real levels at about equal deviations, from those measured between the levels ``at``."""
    way = torch.cat([deviation.new_zeros(1), deviation.cumsum(0)])
    wanted = torch.linspace(0, float(way[-1]), int(way[-1] / spacing) + 2, dtype=torch.float64)
    upper = torch.searchsorted(way, wanted).clamp(1, len(way) - 1)
    share = (wanted - way[upper - 1]) / (way[upper] - way[upper - 1])
    return torch.lerp(at[upper - 1], at[upper], share.clamp(0, 1))
