"""The integral of a one-pass density, by importance sampling from the base density that the network corrects."""

from __future__ import annotations

import math

import torch

from torchcdm.likelihood import LogZ
from torchcdm.models.density import DensityModel
from torchcdm.random import stream

DRAWS, BATCH = 20_000, 1000

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
        draws: Their number, rounded up to whole pairs of batches: as many come from one half of q as from the other.
    """
    schedule, generator = model.schedule, stream(seed, "normaliser")
    wide = int((schedule.ratio[:-1] - WIDE).abs().argmin())
    log_alpha = float(schedule.alpha[wide].log())
    pairs, dim, parts = math.ceil(draws / (2 * BATCH)), model.transform.dim, []
    clean = model.base.draw((2 * BATCH * pairs, dim), generator)
    for k, z in enumerate(clean.split(BATCH)):
        if k % 2:
            noise = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
            z = z + schedule.ratio[wide] * noise
        base = model.base.log_prob_levels(z)[:, 0]
        blurred = model.base.log_prob_levels(schedule.alpha[wide] * z)[:, wide] + dim * log_alpha
        proposal = torch.logaddexp(base, blurred) - math.log(2)
        parts.append(model.log_prob(z, units="model") - proposal)
    log_w = torch.cat(parts).cpu()
    estimates = log_w.view(2 * pairs, ESTIMATES, -1).logsumexp((0, 2)) - math.log(len(log_w) / ESTIMATES)
    return LogZ.of_weights(estimates, "importance sampling from the base density", 0, dim, len(log_w))
