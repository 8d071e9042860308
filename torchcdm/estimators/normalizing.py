"""The integral of a one-pass density, by importance sampling from the base density that the network corrects."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchcdm.likelihood import LogZ
from torchcdm.models.density import DensityModel
from torchcdm.random import stream
from torchcdm.runtime.batching import map_rows

DRAWS = 20_000

ESTIMATES = 200
"""Independent estimates of Z from all draws, from whose spread the error comes."""

WIDE = 0.3
"""Half of the draws come from the base density blurred by so much noise, beside the data's scale: the model may have
mass where the base has little, and draws from there alone would never see it."""


@torch.no_grad()
def importance_normalizer(model: DensityModel, seed: int = 0, draws: int = DRAWS) -> LogZ:
    """Z = E_q[p(x) / q(x)], q half the base density and half its blurred copy, both known in closed form.

    Args:
        model: Unconditional, of vectors.
        seed: Seed of the draws.
        draws: Number of draws, rounded up so that each estimate has as many from either half of q.
    """
    schedule, generator, dim = model.schedule, stream(seed, "normaliser"), model.transform.dim
    wide = int((schedule.ratio[:-1] - WIDE).abs().argmin())
    log_alpha = float(schedule.alpha[wide].log())
    half = ESTIMATES * math.ceil(draws / (2 * ESTIMATES))
    x = model.base.draw((2 * half, dim), generator)
    x[half:] += schedule.ratio[wide] * torch.randn(half, dim, generator=generator, dtype=x.dtype).to(x.device)

    def log_weights(rows: slice) -> Tensor:
        base = model.base.log_prob_levels(x[rows])[:, 0]
        blurred = model.base.log_prob_levels(schedule.alpha[wide] * x[rows])[:, wide] + dim * log_alpha
        return (model.log_prob(x[rows], units="model") - torch.logaddexp(base, blurred) + math.log(2)).cpu()

    log_w = map_rows(log_weights, len(x), dim=dim, device=x.device)
    estimates = log_w.view(2, -1, ESTIMATES).logsumexp((0, 1)) - math.log(len(x) / ESTIMATES)
    return LogZ.of_weights(estimates, "importance sampling from the base density", 0, dim, len(x))
