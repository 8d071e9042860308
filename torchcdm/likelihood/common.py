"""What the likelihoods share: where data are scored, and noise that does not depend on batches."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser
from torchcdm.units import DataTransform, GaussianizedTransform

DEQUANTISE, NOISE, CELL, START, PROBES, CHAIN, STRATA = range(7)
"""What noise is drawn for: the streams of :func:`draw_rows`."""


SCORING_NOISE = 0.5
"""Noise at which data on a grid are scored, in bins. On digits the ELBO through 0.08, 0.17, 0.34, 0.5, 0.7 and 0.9
bins was 2.10, 2.04, 1.98, 1.95, 1.94 and 1.94 bits/dim, and one pass lowest at 0.5."""

SCORING_NOISE_GAUSSIANIZED = 1 / 3
"""The same for Gaussianised data, in typical cells of the pixel whose cells are narrowest. There are no edges to
stay away from; on the validation split of digits one pass through 0.07, 0.22, 0.36, 0.58 and 0.73 of them read 1.808,
1.798, 1.793, 1.796 and 1.806 bits/dim."""


def require_transform(model: Denoiser) -> DataTransform:
    """The model's data transform.

    Raises:
        UserError: It has none, so that data units are not defined.
    """
    if model.transform is None:
        raise UserError("likelihoods are in data units: give the model a DataTransform (identity will do)")
    return model.transform


def scoring_level(model: Denoiser) -> int:
    """The level through which data are scored: the first with noise of so much of a cell, :data:`SCORING_NOISE`.

    With less noise the density still has the edges of the cells, which a smooth network cannot draw, and its mean
    says too little about which cell it is. Level 1 for continuous data.
    """
    transform, ratio = require_transform(model), model.schedule.ratio[1:-1]
    if transform.bin is None:
        return 1
    if isinstance(transform, GaussianizedTransform):
        enough = ratio >= SCORING_NOISE_GAUSSIANIZED * float(transform.cell_width.min())
    else:
        enough = ratio >= SCORING_NOISE * float(transform.model_bin.max())
    # Below T, as a flow and a chain need somewhere to go.
    return min(int(enough.double().argmax()) + 1, max(1, model.schedule.T - 1))


def dithered(transform: DataTransform, x: Tensor, rows: slice, seed: int) -> Tensor:
    """The samples ``rows`` with noise over their cells, data units, float64; a function of (seed, index) alone."""
    if not transform.dequantize:
        return x[rows].double()
    return draw_rows(seed, DEQUANTISE, rows, lambda i, g: transform.add_noise(x[i].cpu().double(), g)).to(x.device)


def draw_rows(
    seed: int, stream: int | tuple[int, int], rows: slice, draw: Callable[[int, torch.Generator], Tensor]
) -> Tensor:
    """``draw(index, generator)`` for each sample, stacked (B, ...), each with a CPU generator of its own.

    The generator is seeded by (seed, stream, index), so that batches do not change the noise. Uses of noise that
    must be independent take different streams, (use, level) where there is one for each level.
    """
    generator = torch.Generator()
    return torch.stack([draw(i, generator.manual_seed(hash((seed, stream, i)))) for i in range(rows.start, rows.stop)])


def labels_of(y: Tensor | None, rows: slice, device: torch.device) -> Tensor | None:
    """The classes of a batch, where there are any."""
    return None if y is None else y[rows].to(device)


def draw_normal(seed: int, stream: int | tuple[int, int], rows: slice, like: Tensor) -> Tensor:
    """Standard normal noise by :func:`draw_rows`, of the shape, dtype and device of ``like`` (B, ...)."""
    shape, dtype = like.shape[1:], like.dtype
    return draw_rows(seed, stream, rows, lambda i, g: torch.randn(shape, generator=g, dtype=dtype)).to(like.device)
