"""What a score sees of an input: log p at every level, from one network pass."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchcdm.diffusion.schedules import NoiseSchedule
from torchcdm.models.denoiser import evaluation_mode, working_dtype
from torchcdm.models.density import DensityModel
from torchcdm.runtime.batching import map_rows

COARSE_NOISE = 0.5
"""Noise, in model units, that leaves the coarse picture: data have a scale of about one."""

NOISE_SEED = 0


def level_profile(model: DensityModel, x: Tensor, batch_size: int | None = None) -> Tensor:
    """log p_t(x) at every level, the input itself unchanged from level to level: one forward pass.

    Data on a grid are dequantised by one fixed draw of the noise for all inputs, so that the profile is a function of
    the input alone, not of its place in a batch.

    Args:
        model: The model; put into evaluation mode meanwhile.
        x: Data units, (N, *shape).
        batch_size: Inputs at a time; by their size, and what memory holds, when None.

    Returns:
        Nats, float64 (N, T+2) on the CPU; in data units where the model has a transform: what the map to model units
        stretches differs between inputs where it is not affine.
    """

    def levels(x: Tensor) -> Tensor:
        if model.transform is None:
            return model.log_prob_levels(x)
        return model.log_prob_levels(model.transform(x)) + model.transform.log_det(x)[:, None]

    return _evaluate(model, levels, x, batch_size)


def log_density(model: DensityModel, x: Tensor, batch_size: int | None = None) -> Tensor:
    """log p_0(x) in data units, float64 (N,) on the CPU; arguments and dequantisation as in :func:`level_profile`."""
    return _evaluate(model, model.log_prob, x, batch_size)


@torch.no_grad()
def _evaluate(
    model: DensityModel, density: Callable[[Tensor], Tensor], x: Tensor, batch_size: int | None
) -> Tensor:
    """``density`` of dequantised batches in data units, on the model's device and in its precision."""
    device, dtype = model.schedule.alpha.device, working_dtype(model, torch.float64)
    noise = torch.zeros(x.shape[1:], dtype=torch.float64)
    if model.transform is not None:
        noise = model.transform.add_noise(noise, torch.Generator().manual_seed(NOISE_SEED))

    def one(rows: slice) -> Tensor:
        return density((x[rows].cpu().double() + noise).to(device, dtype)).cpu()

    with evaluation_mode(model):
        return map_rows(one, len(x), batch_size, dim=x.shape[1:].numel(), device=device)


def coarse_level(schedule: NoiseSchedule) -> int:
    """The first level whose noise-to-signal ratio is at least :data:`COARSE_NOISE`; the last where none is."""
    enough = schedule.ratio[1:-1] >= COARSE_NOISE
    return int(enough.int().argmax()) + 1 if bool(enough.any()) else schedule.T
