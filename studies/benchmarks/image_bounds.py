"""Code lengths of images by few passes: a normalised mixture of the classes at one level, a chain below it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from studies.benchmarks.image_rungs import ByBrightness, Interpolated
from torchcdm.annealing.target import in_batches
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.likelihood import Scoring
from torchcdm.likelihood.one_pass import score_noisy
from torchcdm.likelihood.restricted import COVER
from torchcdm.likelihood.scoring import Batch
from torchcdm.models.density import DensityModel
from torchcdm.random import stream
from torchcdm.units import LogLikelihood
from torchcdm.units.normal import log_normal

CHAIN = 64
"""Images on which the variances of a chain's kernels are measured."""


class Mixture:
    """(1 - delta) sum_y pi_y p_t(x|y) 1[x in A_y] / Z_y + delta N(x): from one pass, and it integrates to one.

    A_y is the fence of a class, where ``targets`` have one, at their lowest rung, the ``level``; delta is
    :data:`COVER`, and N a Gaussian fitted to ``images``, clean ones in model units, which covers what fences leave
    out. ``log_z`` are nats, one of each class.
    """

    def __init__(
        self, model: DensityModel, targets: Sequence[Interpolated], log_z: Tensor, images: Tensor, level: int
    ) -> None:
        self.model, self.targets, self.log_z, self.level = model, targets, log_z, level
        self.wide = GaussianMarginals.fit(images, model.schedule, 1e-4, "cosine")
        self.prior = model.log_class_prior.double() if model.joint else torch.zeros(1, dtype=torch.float64)

    def log_prob(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """log density at the level, nats (B,), and whether no class has mass there, (B,)."""
        x, parts, rung = z.float(), [], torch.ones(len(z), dtype=torch.long)
        joint = self.model.class_log_prob_levels(x) if self.model.joint else self.model.log_prob_levels(x)[:, None]
        for i, target in enumerate(self.targets):
            part = joint[:, i, self.level] + self.prior[i] - self.log_z[i]
            if target.fence is not None:
                part = part.masked_fill(~target.fence.inside(target.schedule.between(joint[:, i]), rung), -math.inf)
            parts.append(part)
        found = torch.stack(parts, 1).logsumexp(1)
        covered = self.wide.log_prob_levels(z)[:, self.level] + math.log(COVER)
        return torch.logaddexp(found + math.log1p(-COVER), covered), found.isinf()


@torch.no_grad()
def bound(
    model: DensityModel, x: Tensor, levels: Sequence[int], top: Mixture, images: Tensor, scoring: Scoring
) -> tuple[LogLikelihood, Tensor]:
    r"""log-likelihood of grey levels k by as many passes as there are rising ``levels``, a lower bound.

    .. math:: -\log P(k) \le E[\log q(x_l|k) - \log q(x_l|x_0) - \log P(k|x_l) + \sum KL(q(x_s|x_t, x_0) \| r(x_s|x_t))
        + \log q(x_\tau|x_0) - \log p_\tau(x_\tau)]

    with the normalised p of ``top`` at the last level, tau, and r by brightness as on clean ``images``. Of one level,
    the decoder of one pass. And which images have no mass but that of the Gaussian.
    """
    if len(levels) > 1:
        target = Interpolated(model, torch.tensor(levels, dtype=torch.float64), images, None)
        kernels = ByBrightness(target, images[:CHAIN], stream(scoring.seed, "chain"))

    def log_q(noise: Tensor, level: int) -> Tensor:
        return log_normal(noise.flatten(1)).sum(1) - noise[0].numel() * model.schedule.sigma[level].log()

    def one(rows: slice) -> tuple[Tensor, Tensor]:
        batch = Batch(model, x, None, rows, scoring.seed)
        noise, (x_0, _) = batch.noise("noise"), batch.clean()
        _, _, nats = score_noisy(model, batch, levels[0])
        nats = nats + log_q(noise, levels[0])
        for rung in range(2, len(levels) + 1):
            noise = batch.noise("chain", levels[rung - 1])
            x_t = model.schedule.perturb(x_0, levels[rung - 1], noise)
            nats = nats - kernels.divergence(x_0, x_t, target.eps(x_t, rung), rung, rung - 1)
        log_p, outside = top.log_prob(model.schedule.perturb(x_0, levels[-1], noise))
        return nats - log_q(noise, levels[-1]) + log_p, outside

    nats, outside = in_batches(model, x, one, scoring.batch_size)
    transform = model.transform
    return LogLikelihood(nats, transform.dim, levels[0], transform.log_bin, len(levels)), outside
