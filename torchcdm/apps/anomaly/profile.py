"""What a score sees of an input: log p at every level, from one network pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from torchcdm.annealing.target import in_batches
from torchcdm.diffusion.schedules import NoiseSchedule
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser, working_dtype
from torchcdm.models.density import DensityModel, require_density
from torchcdm.models.inputs import as_numbers, codes_of
from torchcdm.random import stream

COARSE_NOISE = 0.5
"""Noise, in model units, that leaves the coarse picture: data have a scale of about one."""

NOISE_SEED = 0


def level_profile(model: DensityModel, x: Tensor, batch_size: int | None = None) -> Tensor:
    """log p_t(x) at every level, the input itself unchanged from level to level: one forward pass.

    Data on a grid are dequantised by one fixed draw of the noise for all inputs, so that the profile is a function of
    the input alone, not of its place in a batch.

    Args:
        model: The model; put into evaluation mode meanwhile.
        x: Data units, tensor or array (N, *shape).
        batch_size: Inputs at a time; by their size, and what memory holds, when None.

    Returns:
        Nats, float64 (N, T+2) on the CPU; in data units where the model has a transform: what the map to model units
        stretches differs between inputs where it is not affine.

    Raises:
        UserError: What :func:`as_samples` refuses, or a model without density.
    """
    model = require_density(model, "a profile of log p")

    def levels(x: Tensor) -> Tensor:
        if model.transform is None:
            return model.log_prob_levels(x)
        return model.log_prob_levels(model.transform(x)) + model.transform.log_det(x)[:, None]

    return by_batches(model, levels, x, batch_size)


def by_batches(
    model: Denoiser, function: Callable[[Tensor], Tensor], x: Tensor, batch_size: int | None = None
) -> Tensor:
    """``function`` of dequantised batches in data units, on the model's device and in its precision; a CPU tensor."""
    x = as_samples(model, x)
    device, dtype = model.schedule.alpha.device, working_dtype(model, torch.float64)
    places = torch.rand(x.shape[1:], generator=stream(NOISE_SEED, "dequantise"), dtype=torch.float64)

    def one(rows: slice) -> Tensor:
        clean = x[rows].double()
        noisy = clean if model.transform is None else model.transform.spread(clean, places)
        return function(noisy.to(device, dtype)).cpu()

    return in_batches(model, x, one, batch_size)


def as_samples(model: Denoiser, x: Any, smallest: int = 1) -> Tensor:
    """Samples (N, *shape) for the model as a tensor on the CPU.

    Raises:
        UserError: No finite numbers, another shape than the model's, or a reference of fewer than ``smallest``.
    """
    x = as_numbers(codes_of(x, model.transform), torch.device("cpu")).detach()
    model.checked(x)
    if len(x) < smallest:
        raise UserError(f"the reference holds {len(x)} samples; it takes at least {smallest}")
    return x


def coarse_level(schedule: NoiseSchedule) -> int:
    """The first level whose noise-to-signal ratio is at least :data:`COARSE_NOISE`; the last where none is."""
    enough = schedule.ratio[1:-1] >= COARSE_NOISE
    return int(enough.int().argmax()) + 1 if bool(enough.any()) else schedule.T
