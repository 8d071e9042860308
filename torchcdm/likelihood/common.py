"""What the likelihoods share: batches, noise that does not depend on them, evaluation mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from torchcdm.denoisers import Denoiser
from torchcdm.errors import UserError
from torchcdm.units import DataTransform


def require_transform(model: Denoiser) -> DataTransform:
    """The model's data transform.

    Raises:
        UserError: It has none, so that data units are not defined.
    """
    if model.transform is None:
        raise UserError("likelihoods are in data units: give the model a DataTransform (identity will do)")
    return model.transform


def batches(n: int, size: int) -> Iterator[slice]:
    """Slices that cover ``n`` samples, the last one too."""
    if n < 1:
        raise UserError("there is nothing to score: the data are empty")
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def draw_rows(seed: int, rows: slice, draw: Callable[[int, torch.Generator], Tensor]) -> Tensor:
    """``draw(index, generator)`` for each sample, stacked (B, ...), each with a CPU generator of its own.

    The generator is seeded by (seed, index), so that batches do not change the noise.
    """
    generator = torch.Generator()
    return torch.stack([draw(i, generator.manual_seed(hash((seed, i)))) for i in range(rows.start, rows.stop)])


def working_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the model's parameters, at least float32; float64 where it has none."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float64)
    return torch.promote_types(dtype, torch.float32)


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off meanwhile; every module's own mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
