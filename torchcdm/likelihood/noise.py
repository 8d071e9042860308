"""Batches of samples, and noise of them that depends on the seed and on a sample's index alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchcdm.models.denoiser import Denoiser
from torchcdm.random import stream
from torchcdm.runtime.batching import labels_of
from torchcdm.units import DataTransform

Purpose = tuple[str | int, ...]
"""What noise is drawn for, and for which level where there is one for each."""


def draw_rows(seed: int, purpose: Purpose, rows: slice, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
    """``draw(index, generator)`` for each sample, stacked (B, ...), each with a CPU generator of its own.

    The generator is that of (seed, purpose, index), so that batches do not change the noise.
    """
    return torch.stack([draw(i, stream(seed, *purpose, i)) for i in range(rows.start, rows.stop)])


def dithered(transform: DataTransform, x: Tensor, seed: int, first: int = 0) -> Tensor:
    """Samples with noise over their cells where they are discrete, data units, float64 (B, *shape).

    Args:
        transform: Says which are discrete.
        x: Data units, (B, *shape).
        seed: Seed of the noise.
        first: Index of the first sample.
    """
    if not transform.dequantize:
        return x.double()
    rows = slice(first, first + len(x))
    noisy = draw_rows(
        seed, ("dequantise",), rows, lambda i, g: transform.add_noise(x[i - first].cpu().double(), g)
    )
    return noisy.to(x.device)


class Batch:
    """Some samples of a data set on their way into a network.

    Args:
        model: With a transform.
        x: All samples, data units, (N, *shape).
        y: Their labels, or None.
        rows: Which of them.
        seed: Seed of the noise.

    Attributes:
        x: Data units, float64 (B, *shape), on the model's device as all that follows.
        y: Labels, or None.
    """

    def __init__(self, model: Denoiser, x: Tensor, y: Tensor | None, rows: slice, seed: int) -> None:
        self.transform, self.schedule, self.rows, self.seed = model.transform, model.schedule, rows, seed
        device = model.schedule.alpha.device
        self.x, self.y = x[rows].to(device).double(), labels_of(y, rows, device)

    def normal(self, *purpose: str | int) -> Tensor:
        """Standard normal noise, float64 (B, *shape)."""
        return self._drawn(torch.randn, purpose)

    def dithered(self) -> Tensor:
        """:func:`dithered` samples."""
        return dithered(self.transform, self.x, self.seed, self.rows.start)

    def clean(self) -> tuple[Tensor, Tensor]:
        """x_0 as a noisy level sees it, and what makes its log density one in data units.

        Returns:
            Draws from the cells of data on a grid, dithered values else: model units, float64 (B, *shape). And nats to
            add, (B,): code lengths need no change of units, but as densities they are given less the log bin.
        """
        if self.transform.bin is None:
            noisy = self.dithered()
            return self.transform(noisy), self.transform.log_det(noisy)
        change = torch.full((len(self.x),), -self.transform.dim * self.transform.log_bin, dtype=torch.float64)
        return self.transform.place(self.x, self._drawn(torch.rand, ("cell",))), change.to(self.x.device)

    def noised(self, level: int) -> Tensor:
        """x_t at a level above 0, model units, float64 (B, *shape): the same for all likelihoods of one seed."""
        return self.schedule.perturb(self.clean()[0], level, self.normal("noise"))

    def _drawn(self, kind: Callable[..., Tensor], purpose: Purpose) -> Tensor:
        shape = self.x.shape[1:]
        drawn = draw_rows(self.seed, purpose, self.rows, lambda i, g: kind(shape, generator=g, dtype=torch.float64))
        return drawn.to(self.x.device)
