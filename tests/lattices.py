"""Data on a grid whose code lengths are known, and the exact classifier of their noise levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchcdm.cdm import ClassificationDiffusion
from torchcdm.schedules import NoiseSchedule
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
        alpha, sigma = (v[1:-1] for v in (self.schedule.alpha, self.schedule.sigma))
        distance = x.double()[:, None, :, None] - alpha * self.centres[None, :, :, None]
        if self.transform.dequantize:
            half = (alpha * self.transform.model_bin / 2).expand_as(distance)
            # The mass of a Gaussian between two points, from the side where its tail is small.
            lower, upper = (torch.special.log_ndtr((-distance.abs() + e * half) / sigma) for e in (-1, 1))
            log_q = upper + torch.log1p(-(lower - upper).exp().clamp_max(1 - 1e-16)) - (2 * half).log()
        else:
            log_q = -0.5 * (distance / sigma) ** 2 - sigma.log() - 0.5 * math.log(2 * math.pi)
        noisy = (log_q.sum(2) + self.log_probs[:, None]).logsumexp(1)
        normal = (-0.5 * x.double() ** 2 - 0.5 * math.log(2 * math.pi)).sum(1)
        inside = ((x.double()[:, None] - self.centres).abs() <= self.transform.model_bin / 2).all(2)
        clean = self.log_probs.masked_fill(~inside, -1e4).logsumexp(1)
        clean = clean - x.shape[1] * torch.as_tensor(self.transform.model_bin).log()
        return torch.cat([clean[:, None], noisy, normal[:, None]], 1) - normal[:, None]


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
