"""Images denoised at some levels, and how far they are from what they should be."""

from __future__ import annotations

import torch
from torch import Tensor

from torchcdm.models.denoiser import Denoiser
from torchcdm.training.evaluation import noisy_batches


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
    noisy, clean = [], []
    for t in levels:
        predictions = [model.denoise(batch.x_t, t) for batch in noisy_batches(model, x, t, seed)]
        noisy.append(model.transform.inverse(torch.cat([at.x_t / at.alpha_t for at in predictions])).cpu())
        clean.append(model.transform.inverse(torch.cat([at.x0 for at in predictions])).cpu())
    return torch.stack(noisy), torch.stack(clean)


def root_mean_square(difference: Tensor) -> float:
    """Of all values."""
    return float(difference.double().square().mean().sqrt())
