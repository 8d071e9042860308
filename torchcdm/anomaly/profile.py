"""What a score sees of an input: log p at every level, from one network pass."""

from __future__ import annotations

import torch
from torch import Tensor

from torchcdm.cdm import ClassificationDiffusion
from torchcdm.denoisers import evaluation_mode, working_dtype
from torchcdm.schedules import NoiseSchedule

COARSE_NOISE = 0.5
"""Noise, in model units, that leaves the coarse picture: data have a scale of about one."""

NOISE_SEED = 0
BATCH_SIZE = 500


@torch.no_grad()
def level_profile(model: ClassificationDiffusion, x: Tensor, batch_size: int = BATCH_SIZE) -> Tensor:
    """log p_t(x) at every level, the input itself unchanged from level to level: one forward pass.

    Data on a grid are dequantised by one fixed draw of the noise for all inputs, so that the profile is a function of
    the input alone, not of its place in a batch.

    Args:
        model: The model; put into evaluation mode meanwhile.
        x: Data units, (N, *shape).
        batch_size: Inputs evaluated at once.

    Returns:
        Nats in model units, float64 (N, T+2) on the CPU.
    """
    device, dtype = model.schedule.alpha.device, working_dtype(model, torch.float64)
    with evaluation_mode(model):
        parts = [model.log_prob_levels(_encode(model, part.to(device)).to(dtype)) for part in x.split(batch_size)]
    return torch.cat(parts).cpu()


def _encode(model: ClassificationDiffusion, x: Tensor) -> Tensor:
    """Data units to model units, with the fixed dequantisation."""
    transform = model.transform
    if transform is None:
        return x
    nothing = torch.zeros(transform.shape, dtype=torch.float64)
    noise = transform.add_noise(nothing, torch.Generator().manual_seed(NOISE_SEED))
    return transform(x.double() + noise.to(x.device))


def coarse_level(schedule: NoiseSchedule) -> int:
    """The first level whose noise-to-signal ratio is at least :data:`COARSE_NOISE`; the last where none is."""
    enough = schedule.ratio[1:-1] >= COARSE_NOISE
    return int(enough.int().argmax()) + 1 if bool(enough.any()) else schedule.T
