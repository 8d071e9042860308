"""Data on a grid whose code lengths are known, and the exact classifier of their noise levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchcdm.diffusion.schedules import NoiseSchedule
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.units import DataTransform


class LatticeClassifier(nn.Module):
    """h_t(x) = log p_t(x) - log N(x; 0, I) for grey levels k with probability P(k), dequantised or not.

    Args:
        cells: Grey levels of the states, data units, (S, d).
        log_probs: log P(state), (S,).
    """

    def __init__(self, cells: Tensor, log_probs: Tensor, schedule: NoiseSchedule, transform: DataTransform) -> None:
        super().__init__()
        self.centres, self.log_probs = transform(cells.double()), log_probs.double()
        self.schedule, self.transform = schedule, transform

    def forward(self, x: Tensor) -> Tensor:
        log_q = noisy_cell(x.double()[:, None, :, None], self.centres[None, :, :, None], self.schedule, self.transform)
        log_p = (log_q.sum(2) + self.log_probs[:, None]).logsumexp(1)
        return log_p - (-0.5 * x.double() ** 2 - 0.5 * math.log(2 * math.pi)).sum(1)[:, None]


OUTSIDE = -1e4
"""log density at level 0 outside a cell, or off the grid: minus infinity would make gradients undefined."""


def noisy_cell(x: Tensor, centre: Tensor, schedule: NoiseSchedule, transform: DataTransform) -> Tensor:
    """log density of one coordinate at every level, given its grey level: (..., T+2).

    Args:
        x: Model units, (..., 1).
        centre: The grey level, model units, (..., 1).
        schedule: The noise schedule.
        transform: Its bin, and whether the grey level fills its cell.
    """
    alpha, sigma = (v[1:-1] for v in (schedule.alpha, schedule.sigma))
    distance, bin = x - alpha * centre, torch.as_tensor(transform.model_bin)
    if transform.dequantize:
        half = (alpha * bin / 2).expand_as(distance)
        # The mass of a Gaussian between two points, from the side where its tail is small.
        lower, upper = (torch.special.log_ndtr((-distance.abs() + e * half) / sigma) for e in (-1, 1))
        noisy = upper + torch.log1p(-(lower - upper).exp().clamp_max(1 - 1e-16)) - (2 * half).log()
    else:
        noisy = -0.5 * (distance / sigma) ** 2 - sigma.log() - 0.5 * math.log(2 * math.pi)
    inside = (x - centre).abs() <= bin / 2
    clean = torch.where(inside, -bin.log(), torch.full_like(inside, OUTSIDE, dtype=torch.float64))
    normal = (-0.5 * x**2 - 0.5 * math.log(2 * math.pi)).expand_as(clean)
    return torch.cat([clean, noisy, normal], -1)


def lattice(dim: int = 2, levels: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """All grey levels in ``dim`` dimensions, data units (S, dim), and a log probability for each, far from uniform."""
    cells = torch.cartesian_prod(*[torch.arange(float(levels))] * dim).reshape(-1, dim)
    scores = 1.5 * torch.randn(len(cells), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return cells, scores.log_softmax(0)


def draw(cells: Tensor, log_probs: Tensor, n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Grey levels (n, d) and the true code length of each, bits/dim."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.multinomial(log_probs.exp(), n, replacement=True, generator=generator)
    return cells[picked], -log_probs[picked] / (cells.shape[1] * math.log(2))


def lattice_model(
    schedule: NoiseSchedule, dim: int = 2, levels: int = 4, dequantize: bool = True
) -> tuple[ClassificationDiffusion, Tensor, Tensor]:
    """The exact model of a lattice, its states and their log probabilities."""
    cells, log_probs = lattice(dim, levels)
    transform = DataTransform.images((dim,), levels, dequantize)
    backbone = LatticeClassifier(cells, log_probs, schedule, transform)
    return ClassificationDiffusion(backbone, schedule, transform), cells, log_probs


class MarkovImages:
    """Images whose pixels, row by row, each depend on the one before: a code length for every image.

    P(k_i | k_{i-1}) is a Gaussian around ``middle + memory (k_{i-1} - middle)``, discretised to the grey levels; the
    first pixel's is that of a middle grey before it. With ``memory`` 0 the pixels are independent.

    Args:
        shape: (C, H, W).
        levels: Number of grey levels.
        memory: Of the pixel before.
        deviation: Of the Gaussian, grey levels.
    """

    def __init__(
        self, shape: tuple[int, ...] = (1, 4, 4), levels: int = 256, memory: float = 0.9, deviation: float = 12.0
    ) -> None:
        self.shape, self.dim, self.levels = shape, math.prod(shape), levels
        grey, middle = torch.arange(levels, dtype=torch.float64), (levels - 1) / 2
        centre = middle + memory * (grey - middle)
        upper, lower = (torch.special.ndtr((grey + e - centre[:, None]) / deviation) for e in (0.5, -0.5))
        # A floor, so that no grey level is impossible.
        weights = upper - lower + 1e-9
        self.transition = weights / weights.sum(1, keepdim=True)
        upper, lower = (torch.special.ndtr((grey + e - middle) / deviation) for e in (0.5, -0.5))
        start = upper - lower
        self.start = (start + 1e-9) / (start + 1e-9).sum()

    def log_prob(self, x: Tensor) -> Tensor:
        """log P of images (n, *shape) of grey levels: nats (n,)."""
        k = x.flatten(1).long()
        return self.start.log()[k[:, 0]] + self.transition.log()[k[:, :-1], k[:, 1:]].sum(1)

    def draw(self, n: int, seed: int = 1) -> tuple[Tensor, Tensor]:
        """Images (n, *shape) and the true code length of each, bits/dim."""
        generator = torch.Generator().manual_seed(seed)
        pixels = [torch.multinomial(self.start, n, replacement=True, generator=generator)]
        for _ in range(self.dim - 1):
            pixels.append(torch.multinomial(self.transition[pixels[-1]], 1, generator=generator)[:, 0])
        x = torch.stack(pixels, 1).reshape(n, *self.shape).float()
        return x, -self.log_prob(x) / (self.dim * math.log(2))

    def model(self, schedule: NoiseSchedule, dequantize: bool = True) -> ClassificationDiffusion:
        """The exact model of the images under a schedule."""
        transform = DataTransform.images(self.shape, self.levels, dequantize)
        return ClassificationDiffusion(MarkovClassifier(self, schedule, transform), schedule, transform)


class MarkovClassifier(nn.Module):
    """h_t(x) = log p_t(x) - log N(x; 0, I) of :class:`MarkovImages`: the forward algorithm of a Markov chain."""

    def __init__(self, images: MarkovImages, schedule: NoiseSchedule, transform: DataTransform) -> None:
        super().__init__()
        self.images, self.schedule, self.transform = images, schedule, transform
        grey = torch.arange(images.levels, dtype=torch.float64).reshape(-1, *[1] * len(images.shape))
        self.centres = transform(grey).flatten(1)[:, :1]

    def forward(self, x: Tensor) -> Tensor:
        flat, log_a = x.double().flatten(1), None
        for i in range(flat.shape[1]):
            emitted = noisy_cell(flat[:, i, None, None], self.centres, self.schedule, self.transform)
            if log_a is None:
                log_a = self.images.start.log()[:, None] + emitted
                continue
            largest = log_a.amax(1, keepdim=True)
            ahead = torch.einsum("bkt,kj->bjt", (log_a - largest).exp(), self.images.transition)
            log_a = ahead.log() + largest + emitted
        return log_a.logsumexp(1) + 0.5 * flat.square().sum(1)[:, None] + 0.5 * flat.shape[1] * math.log(2 * math.pi)


class FewLevels(NoiseSchedule):
    """Some levels of another schedule, as an exact model costs its states times its levels."""

    def __init__(self, full: NoiseSchedule, levels: list[int]) -> None:
        self._kept = [full.alpha[levels], full.sigma[levels]]
        super().__init__(len(levels))

    def inner_levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return self._kept[0], self._kept[1]
