"""The integral of a one-pass density, by importance sampling from the base density that the network corrects."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from torchcdm.models.density import DensityModel

DRAWS = 20_000
BATCH = 1000
WIDE = 0.3
"""Every second draw comes from the base density blurred by so much noise, beside the data's scale: the model may have
mass where the base has little, and a draw from there alone would never see it."""

SMALLEST_SAMPLE = 200
"""Below this effective sample size an estimate isn't used."""


@dataclass(frozen=True)
class Normalizer:
    """log Z of a density that integrates to Z.

    Attributes:
        log_z: The estimate, nats.
        se: Its standard error.
        effective_sample_size: Of the weights; the estimate errs low where it is small.
    """

    log_z: float
    se: float
    effective_sample_size: float

    @property
    def usable(self) -> bool:
        """Whether enough draws carry the weight."""
        return self.effective_sample_size >= SMALLEST_SAMPLE

    @property
    def correction(self) -> float:
        """What to subtract from log p, nats: log Z, or nothing where the estimate isn't usable."""
        return self.log_z if self.usable else 0.0


@torch.no_grad()
def importance_normalizer(model: DensityModel, seed: int = 0, draws: int = DRAWS) -> Normalizer:
    """Z = E_q[p(x) / q(x)], q half the base density and half its blurred copy, both known in closed form.

    Args:
        model: Unconditional, of vectors.
        seed: Seed of the draws.
        draws: Their number.
    """
    schedule, generator = model.schedule, torch.Generator().manual_seed(seed)
    wide = int((schedule.ratio[:-1] - WIDE).abs().argmin())
    log_alpha = float(schedule.alpha[wide].log())
    dim, parts = model.transform.dim, []
    clean = model.base.draw((draws, dim), generator)
    for k, z in enumerate(clean.split(BATCH)):
        if k % 2:
            noise = torch.randn(z.shape, generator=generator, dtype=z.dtype).to(z.device)
            z = z + schedule.ratio[wide] * noise
        base = model.base.log_prob_levels(z)[:, 0]
        blurred = model.base.log_prob_levels(schedule.alpha[wide] * z)[:, wide] + dim * log_alpha
        proposal = torch.logaddexp(base, blurred) - math.log(2)
        parts.append(model.log_prob(z, units="model") - proposal)
    log_w = torch.cat(parts).cpu()
    weights = (log_w - log_w.max()).exp()
    relative = float(weights.std() / weights.mean()) / math.sqrt(len(weights))
    size = float(weights.sum() ** 2 / weights.square().sum())
    return Normalizer(float(log_w.logsumexp(0)) - math.log(len(log_w)), relative, size)
