"""The evidence lower bound of the reverse chain that a denoiser induces, by terms; for CDM and DDM alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.likelihood.cells import noisy_cells
from torchcdm.likelihood.chain import ReverseChain
from torchcdm.likelihood.noise import dithered, draw_cells, draw_normal, draw_rows
from torchcdm.likelihood.scoring import Scoring, as_data, require_transform
from torchcdm.models.denoiser import Denoiser
from torchcdm.runtime.batching import labels_of
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
    chain: ReverseChain | None = None,
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
        chain: The kernels; the reference Gaussian's variances when None.
        evaluations: Network evaluations of each sample, at least 2: an unbiased estimate of the same bound from so
            many strata of the levels. One for each level when None.

    Raises:
        UserError: Data or a level that do not fit the model, or more evaluations than levels.
    """
    (x, y), transform, schedule = as_data(denoiser, x, y), require_transform(denoiser), denoiser.schedule
    level = scoring.level_of(denoiser)
    count = schedule.T - level + 1
    evaluations = count if evaluations is None else evaluations
    if not 2 <= evaluations <= count:
        raise UserError(f"elbo: evaluations is {evaluations}; from level {level} this schedule takes 2 to {count}")
    chain = chain or ReverseChain(denoiser)

    def terms(rows: slice) -> tuple[Tensor, ...]:
        batch = _Batch(chain, x, y, rows, scoring.seed)
        prior = chain.prior_kl(batch.x_0)
        parts = prior, batch.diffusion(level, evaluations - 1), batch.reconstruction(level), batch.change
        return tuple(part.cpu() for part in parts)

    prior, diffusion, reconstruction, change = scoring.by_batches(denoiser, x, terms)
    total = prior + diffusion + reconstruction
    how = f"all {count} levels" if evaluations == count else f"{evaluations} of {count} levels drawn for each sample"
    name = f"ELBO of the reverse chain, {how}"
    return ELBO(
        change - total, transform.dim, level, name, transform.log_bin, evaluations, prior, diffusion, reconstruction
    )


class _Batch:
    """The samples ``rows``: x_0 as the chain sees it, and what makes its log-likelihood one of the data, (B,)."""

    def __init__(self, chain: ReverseChain, x: Tensor, y: Tensor | None, rows: slice, seed: int) -> None:
        self.chain, self.schedule = chain, chain.schedule
        self.transform = require_transform(chain.denoiser)
        device = self.schedule.alpha.device
        self.x, self.y = x[rows].to(device), labels_of(y, rows, device)
        self.rows, self.seed = rows, seed
        if self.transform.bin is None:
            noisy = dithered(self.transform, x, rows, seed).to(device)
            self.x_0, self.change = self.transform(noisy), self.transform.log_det(noisy)
        else:
            # Code lengths need no change of units; a density less the log bin, as everywhere.
            self.change = torch.full((len(self.x),), -self.transform.dim * self.transform.log_bin, dtype=torch.float64)
            self.x_0 = self.transform.place(self.x, draw_cells(seed, rows, self.transform).to(device))

    def diffusion(self, level: int, evaluations: int) -> Tensor:
        """Sum of KLs over the levels above ``level``; one random level for each of so many strata, times its size."""
        total = torch.zeros(len(self.x), dtype=torch.float64, device=self.x.device)
        edges = torch.linspace(level + 1, self.schedule.T + 1, evaluations + 1).round().long()
        for stratum, (low, high) in enumerate(zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)):
            t = draw_rows(
                self.seed,
                ("strata", stratum),
                self.rows,
                lambda i, g: torch.randint(low, high, (), generator=g),  # noqa: B023
            ).to(self.x.device)
            error = self._error(t, stratum)
            total = total + (high - low) * self.chain.kl(error, t)
        return total

    def reconstruction(self, level: int) -> Tensor:
        """From ``level`` to the data."""
        eps = draw_normal(self.seed, ("chain", 0), self.rows, self.x_0)
        x_t = self.schedule.perturb(self.x_0, level, eps)
        x0 = self.chain.x0(x_t, level, self.y)
        if self.transform.bin is None:
            return -self.chain.log_decoder(self.x_0, x0, level)
        cells = noisy_cells(self.transform, self.schedule, level)
        flat = eps.flatten(1)
        normal = (log_normal(flat) - cells.sigma.log()).sum(1)
        return cells.log_q(x_t, self.x) - normal - cells.log_decoder(x_t, self.x, x0)

    def _error(self, t: Tensor, stratum: int) -> Tensor:
        x_t = self.schedule.perturb(self.x_0, t, draw_normal(self.seed, ("chain", 1 + stratum), self.rows, self.x_0))
        return self.x_0 - self.chain.x0(x_t, t, self.y)
