"""Images denoised at some levels, and how far they are from what they should be."""

from __future__ import annotations

import torch
from torch import Tensor

from torchcdm.denoisers import Denoiser


@torch.no_grad()
def denoised(model: Denoiser, x: Tensor, levels: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noisy images and E[x_0 | x_t] of each, all with the same noise.

    Args:
        model: In eval mode, with a transform.
        x: Data units, (N, *shape).
        levels: Of 1 ... T.
        seed: Seed of the noise.

    Returns:
        x_t / alpha_t and the estimates, data units, each (levels, N, *shape).
    """
    transform, schedule = model.transform, model.schedule
    generator = torch.Generator().manual_seed(seed)
    z = transform(transform.add_noise(x, generator).to(schedule.alpha.device))
    eps = torch.randn(x.shape, generator=generator).to(z.device)
    noisy, clean = [], []
    for t in levels:
        x_t = schedule.perturb(z, t, eps)
        noisy.append(transform.inverse(x_t / schedule.at(t, x_t)[0]).cpu())
        clean.append(transform.inverse(model.denoise(x_t, t).x0).cpu())
    return torch.stack(noisy), torch.stack(clean)


def root_mean_square(difference: Tensor) -> float:
    """Of all values."""
    return float(difference.double().square().mean().sqrt())
