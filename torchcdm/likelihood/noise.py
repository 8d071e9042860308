"""Noise for likelihoods that depends on the seed and the sample alone, and the noisy inputs that they score."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchcdm.likelihood.cells import noisy_cells
from torchcdm.likelihood.scoring import require_transform
from torchcdm.models.denoiser import Denoiser
from torchcdm.random import stream
from torchcdm.units import DataTransform

Purpose = tuple[str | int, ...]
"""What noise is drawn for, and for which level where there is one for each."""


def draw_rows(seed: int, purpose: Purpose, rows: slice, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
    """``draw(index, generator)`` for each sample, stacked (B, ...), each with a CPU generator of its own.

    The generator is that of (seed, purpose, index), so that batches do not change the noise.
    """
    return torch.stack([draw(i, stream(seed, *purpose, i)) for i in range(rows.start, rows.stop)])


def draw_normal(seed: int, purpose: Purpose, rows: slice, like: Tensor) -> Tensor:
    """Standard normal noise by :func:`draw_rows`, of the shape, dtype and device of ``like`` (B, ...)."""
    shape, dtype = like.shape[1:], like.dtype
    return draw_rows(seed, purpose, rows, lambda i, g: torch.randn(shape, generator=g, dtype=dtype)).to(like.device)


def draw_cells(seed: int, rows: slice, transform: DataTransform) -> Tensor:
    """Places within the cells of grey levels, uniform on [0, 1], float64 (B, *shape) on the CPU."""
    shape = transform.shape
    return draw_rows(seed, ("cell",), rows, lambda i, g: torch.rand(shape, generator=g, dtype=torch.float64))


def dithered(transform: DataTransform, x: Tensor, rows: slice, seed: int) -> Tensor:
    """The samples ``rows`` with noise over their cells where they are discrete, data units, float64 (B, *shape)."""
    if not transform.dequantize:
        return x[rows].double()
    noisy = draw_rows(seed, ("dequantise",), rows, lambda i, g: transform.add_noise(x[i].cpu().double(), g))
    return noisy.to(x.device)


def noised(model: Denoiser, x: Tensor, rows: slice, level: int, seed: int) -> Tensor:
    """The samples ``rows`` at a level above 0: dequantised where they are discrete, model units, float64 (B, *shape).

    Several likelihoods of one seed score the very same noisy inputs.
    """
    transform, schedule = require_transform(model), model.schedule
    device = schedule.alpha.device
    clean = x[rows].to(device).double()
    eps = draw_normal(seed, ("noise",), rows, clean)
    if transform.bin is None:
        return schedule.perturb(transform(dithered(transform, x, rows, seed).to(device)), level, eps)
    return noisy_cells(transform, schedule, level).noised(clean, draw_cells(seed, rows, transform).to(device), eps)
