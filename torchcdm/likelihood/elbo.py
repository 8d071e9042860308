"""The evidence lower bound of the reverse chain that a denoiser induces, by terms; for CDM and DDM alike."""

from dataclasses import dataclass

import torch
from torch import Tensor

from torchcdm.annealing.kernels import Kernels, kl_of_step
from torchcdm.annealing.target import ModelTarget, in_batches, reference_gaussian
from torchcdm.errors import UserError
from torchcdm.likelihood.restricted import MeasuredStep, log_q
from torchcdm.likelihood.scoring import ScoredBatch, Scoring, as_data, draw_rows
from torchcdm.models.denoiser import Denoiser
from torchcdm.runtime.validation import Count, checked
from torchcdm.units import LogLikelihood, log_normal


@dataclass(frozen=True)
class ELBO(LogLikelihood):
    """A lower bound on log p(data), and the terms that make up the negative one, nats in model units, (N,).

    The KL of the last level's marginal from the chain's start, the sum over the levels of the KL of one step, and from
    the first level to the data the code length of the grey levels, or the density.
    """

    prior: Tensor
    diffusion: Tensor
    reconstruction: Tensor


@checked
def elbo(
    denoiser: Denoiser, x: Tensor, y: Tensor | None = None, scoring: Scoring = Scoring(),
    kernels: Kernels | None = None, evaluations: Count | None = None,
) -> ELBO:  # fmt: skip
    r"""Lower bound on log p(x) of the chain p(x_T), r(x_{t-1}|x_t), P(k|x_l), over the levels from l to T.

    .. math:: -\log P(k) \le E[KL(q(x_T|x_0) \| p(x_T)) + \sum_{t > l} KL(q(x_{t-1}|x_t, x_0) \| r(x_{t-1}|x_t))
        - \log P(k|x_l) + \log q(x_l|k) - \log q(x_l|x_0)]

    x_0 is the dequantised data where the model has seen those. One draw of noise for each level, independent of the
    others: the terms don't need a path.

    Of ``scoring`` level l, 1 ... T - 1, seed and batch size are used. The chain's ``kernels``, when None, have the
    variances of the reference Gaussian. Network ``evaluations`` of each sample, 2 ... T - l + 1, give an unbiased
    estimate of the same bound from so many strata of the levels, a random level of each; one of each level when None.
    """
    (x, y), transform, level = as_data(denoiser, x, y, scoring), denoiser.transform, scoring.level_of(denoiser)
    schedule, kernels = denoiser.schedule, kernels or Kernels(reference_gaussian(denoiser))
    count = schedule.T - level + 1
    evaluations = count if evaluations is None else evaluations
    if not 2 <= evaluations <= count:
        raise UserError(f"elbo: evaluations is {evaluations}; from level {level} this schedule takes 2 to {count}")
    edges = torch.linspace(level + 1, schedule.T + 1, evaluations).round().long().tolist()
    strata, target = list(zip(edges[:-1], edges[1:], strict=True)), ModelTarget(denoiser, density=False)

    def terms(rows: slice) -> tuple[Tensor, ...]:
        batch = ScoredBatch(denoiser, x, y, rows, scoring.seed)
        (x_0, change), target.y = batch.clean(), batch.y

        def noisy(t: int | Tensor, number: int) -> tuple[Tensor, Tensor]:
            """x_t (B, *shape) by noise of its own, and the denoiser's E[x_0 | x_t]."""
            x_t = schedule.perturb(x_0, t, batch.noise("chain", number))
            return x_t, kernels.x0(x_t, target.eps(x_t, t), t)

        prior = kernels.reference.start_kl(schedule.alpha[-2] * x_0, schedule.sigma[-2])
        diffusion = torch.zeros_like(change)
        for k, ends in enumerate(strata):
            which = range(rows.start, rows.stop)
            t = draw_rows(batch.seed, ("strata", k), which, lambda _, g, at=ends: torch.randint(*at, (), generator=g))
            t = t.to(x_0.device)
            error = kernels.reference.rotation(x_0 - noisy(t, 1 + k)[1])
            nats = kl_of_step(schedule, t, t - 1, error, kernels.variances[t - 1]).sum(1)
            diffusion = diffusion + (ends[1] - ends[0]) * nats
        x_t, mean = noisy(level, 0)
        if transform.bin is None:
            reconstruction = -log_normal(kernels.reference.rotation(x_0 - mean), kernels.variances[level - 1]).sum(1)
        else:
            nats = MeasuredStep(level).code_length(batch, x_t, mean)
            reconstruction = nats - log_q(schedule, batch.noise("chain", 0), level)
        return tuple(part.cpu() for part in (prior, diffusion, reconstruction, change))

    prior, diffusion, reconstruction, change = in_batches(denoiser, x, terms, scoring.batch_size)
    total = prior + diffusion + reconstruction
    return ELBO(change - total, transform.dim, level, transform.log_bin, evaluations, prior, diffusion, reconstruction)
