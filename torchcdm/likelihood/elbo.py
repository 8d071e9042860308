"""The evidence lower bound of the reverse chain that a denoiser induces, by terms; for CDM and DDM alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchcdm.annealing.kernels import Kernels, denoiser_x0
from torchcdm.annealing.target import reference_gaussian
from torchcdm.errors import UserError
from torchcdm.likelihood.cells import noisy_cells
from torchcdm.likelihood.scoring import Batch, Scoring, as_data, draw_rows
from torchcdm.models.denoiser import Denoiser
from torchcdm.units import LogLikelihood
from torchcdm.units.normal import log_normal


@dataclass(frozen=True)
class ELBO(LogLikelihood):
    """A lower bound on log p(data) and what it is made of: terms in nats, (N,), the negative bound in model units.

    Attributes:
        prior: KL of the last level's marginal from the chain's start.
        diffusion: Sum over the levels of the KL of one step.
        reconstruction: From the first level to the data: the code length of the grey levels, or the density.
    """

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor


def elbo(
    denoiser: Denoiser,
    x: Tensor,
    y: Tensor | None = None,
    scoring: Scoring = Scoring(),
    kernels: Kernels | None = None,
    evaluations: int | None = None,
) -> ELBO:
    r"""Lower bound on log p(x) of the chain p(x_T), r(x_{t-1}|x_t), P(k|x_l), over the levels from l to T.

    .. math:: -\log P(k) \le E[KL(q(x_T|x_0) \| p(x_T)) + \sum_{t > l} KL(q(x_{t-1}|x_t, x_0) \| r(x_{t-1}|x_t))
        - \log P(k|x_l) + \log q(x_l|k) - \log q(x_l|x_0)]

    x_0 is the dequantised data where the model has seen those. One draw of noise for each level, independent of the
    others: the terms don't need a path.

    Args:
        denoiser: Any denoiser with a transform; put into evaluation mode meanwhile.
        x: Data units, (N, *shape).
        y: Classes, long (N,), or None.
        scoring: Level l from which the data are decoded, 1 ... T - 1; seed and batch size.
        kernels: The chain's; with the reference Gaussian's variances when None.
        evaluations: Network evaluations of each sample, at least 2: an unbiased estimate of the same bound from so
            many strata of the levels. One for each level when None.

    Raises:
        UserError: Data or a level that do not fit the model, or more evaluations than levels.
    """
    (x, y), transform, level = as_data(denoiser, x, y), denoiser.transform, scoring.level_of(denoiser)
    count = denoiser.schedule.T - level + 1
    evaluations = count if evaluations is None else evaluations
    if not 2 <= evaluations <= count:
        raise UserError(f"elbo: evaluations is {evaluations}; from level {level} this schedule takes 2 to {count}")
    kernels = kernels or Kernels(reference_gaussian(denoiser))

    def terms(rows: slice) -> tuple[Tensor, ...]:
        batch = Batch(denoiser, x, y, rows, scoring.seed)
        x_0, change = batch.clean()
        diffusion = _diffusion(denoiser, kernels, batch, x_0, level, evaluations - 1)
        parts = kernels.prior_kl(x_0), diffusion, _reconstruction(denoiser, kernels, batch, x_0, level), change
        return tuple(part.cpu() for part in parts)

    prior, diffusion, reconstruction, change = scoring.by_batches(denoiser, x, terms)
    total = prior + diffusion + reconstruction
    return ELBO(change - total, transform.dim, level, transform.log_bin, evaluations, prior, diffusion, reconstruction)


def _diffusion(denoiser: Denoiser, kernels: Kernels, batch: Batch, x_0: Tensor, level: int, strata: int) -> Tensor:
    """Sum of KLs over the levels above ``level``, (B,): one random level for each stratum, times its size."""
    total = torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
    edges = torch.linspace(level + 1, kernels.schedule.T + 1, strata + 1).round().long().tolist()
    for k, ends in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        t = draw_rows(
            batch.seed, ("strata", k), batch.rows, lambda i, g, ends=ends: torch.randint(*ends, (), generator=g)
        ).to(x_0.device)
        x_t = kernels.schedule.perturb(x_0, t, batch.normal("chain", 1 + k))
        total = total + (ends[1] - ends[0]) * kernels.kl(x_0 - denoiser_x0(denoiser, x_t, t, batch.y), t)
    return total


def _reconstruction(denoiser: Denoiser, kernels: Kernels, batch: Batch, x_0: Tensor, level: int) -> Tensor:
    """From ``level`` to the data, (B,)."""
    eps = batch.normal("chain", 0)
    x_t = kernels.schedule.perturb(x_0, level, eps)
    mean = denoiser_x0(denoiser, x_t, level, batch.y)
    if batch.transform.bin is None:
        return -kernels.log_decoder(x_0, mean, level)
    cells = noisy_cells(batch.transform, kernels.schedule, level)
    normal = (log_normal(eps.flatten(1)) - cells.sigma.log()).sum(1)
    return cells.log_q(x_t, batch.x) - normal - cells.log_decoder(x_t, batch.x, mean)
