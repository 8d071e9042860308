"""Data whose density is known at every noise level, and the error of a model's one pass against it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from studies.exact import ExactMixture
from torchcdm.data import DataSource, MemorySplit
from torchcdm.diffusion.schedules import NoiseSchedule
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.units import DataTransform

CHUNK = 2000
"""Samples drawn or scored at a time: in float64 and by component they take much memory."""


def exact_source(
    mixture: ExactMixture, name: str, train: int, validation: int, test: int, seed: int = 0
) -> DataSource:
    """Fresh samples of a distribution; model units are data units.

    Args:
        mixture: The distribution.
        name: Of the data; says all that distinguishes them, as kept models are compared by it.
        train: Samples for training.
        validation: Samples for validation.
        test: Samples for the comparison.
        seed: Seed of all three.
    """
    splits = []
    for number, count in enumerate((train, validation, test)):
        generator = torch.Generator().manual_seed(3 * seed + number)
        sizes = [min(CHUNK, count - first) for first in range(0, count, CHUNK)]
        splits.append(MemorySplit(torch.cat([mixture.sample(size, generator).float() for size in sizes])))
    return DataSource(f"{name}, {train} samples", *splits, DataTransform(mixture.shape))


@dataclass(frozen=True)
class LevelErrors:
    """Predicted less exact log density at some levels, nats; float64 (levels, N).

    Attributes:
        levels: The levels.
        error: At noisy samples of each level; at clean ones at level 0.
        exact: The exact log density there.
    """

    levels: list[int]
    error: Tensor
    exact: Tensor


def noisy_copies(
    x: Tensor, schedule: NoiseSchedule, levels: list[int], seed: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Samples (N, *shape) with the noise of each of some levels, one level after the other; clean ones at level 0."""
    generator = torch.Generator().manual_seed(seed)
    for t in levels:
        yield t, schedule.perturb(x, t, torch.randn(x.shape, generator=generator))


@torch.no_grad()
def level_errors(
    model: ClassificationDiffusion, mixture: ExactMixture, x: Tensor, levels: list[int], seed: int = 0
) -> LevelErrors:
    """One pass against the truth, level by level, each at its own of :func:`noisy_copies`.

    Args:
        model: In eval mode, without units of its own.
        mixture: What it was trained on.
        x: Test samples (N, *shape).
        levels: Of 0 ... T+1.
        seed: Seed of the noise.
    """
    device, schedule = model.schedule.alpha.device, copy.deepcopy(model.schedule).cpu()
    error, exact = (torch.empty(len(levels), len(x), dtype=torch.float64) for _ in range(2))
    for row, (t, x_t) in enumerate(noisy_copies(x, schedule, levels, seed)):
        for rows in torch.arange(len(x)).split(CHUNK):
            truth = mixture.log_prob(x_t[rows], t, schedule)
            exact[row, rows] = truth
            error[row, rows] = model.log_prob_levels(x_t[rows].to(device))[:, t].cpu() - truth
    return LevelErrors(levels, error, exact)


def spread_levels(T: int, count: int) -> list[int]:
    """``count`` levels from 0 to T + 1, both ends among them, the low ones denser."""
    share = torch.linspace(0, 1, count, dtype=torch.float64)
    return sorted({round(float(s) ** 1.5 * (T + 1)) for s in share})
