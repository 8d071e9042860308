r"""A mixture of Gaussians at every noise level.

It stays one under the forward process, so that its density and denoiser have a closed form:

.. math:: p_t(x) = \sum_k w_k N(x;\ \alpha_t\mu_k,\ \alpha_t^2\Sigma_k + \sigma_t^2 I)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.units.float64 import Float64Module
from torchcdm.units.normal import log_normal


class GaussianMixture(Float64Module):
    """Sum over k of w_k N(mu_k, Sigma_k), in float64 at every level of every schedule.

    Args:
        weights: w_k, (K,), normalised here.
        means: mu_k, (K, *shape).
        covariances: Sigma_k of the flattened event, (K, d, d); or variances, (K, d), or (K,) of round components.
    """

    log_weights: Tensor
    means: Tensor
    variances: Tensor
    vectors: Tensor | None

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        super().__init__()
        self.shape = tuple(means.shape[1:])
        means = means.double().flatten(1)
        if covariances.ndim == 3:
            variances, vectors = torch.linalg.eigh(covariances.double())
        else:
            variances, vectors = covariances.double().reshape(len(means), -1).expand_as(means).clone(), None
        self.register_buffer("log_weights", (weights / weights.sum()).double().log())
        self.register_buffer("means", means)
        self.register_buffer("variances", variances)
        self.register_buffer("vectors", vectors)

    def log_prob_levels(self, x: Tensor, schedule: NoiseSchedule) -> Tensor:
        """log p_t(x) at every level: (B, T+2)."""
        return (self.component_log_prob_levels(x, schedule) + self.log_weights[:, None]).logsumexp(1)

    def eps(self, x_t: Tensor, t: Level, schedule: NoiseSchedule) -> Tensor:
        """E[eps | x_t], shape of ``x_t`` (identity 3)."""
        share = (self.component_log_prob(x_t, t, schedule) + self.log_weights).softmax(1)
        score = (share[..., None] * self.component_scores(x_t, t, schedule)).sum(1)
        return -schedule.at(t, x_t)[1] * score.reshape(x_t.shape).to(x_t.dtype)

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """(n, *shape), float64."""
        components = torch.multinomial(self.log_weights.cpu().exp(), n, replacement=True, generator=generator)
        return self.draw(components.to(self.log_weights.device), generator)

    def component_log_prob_levels(self, x: Tensor, schedule: NoiseSchedule) -> Tensor:
        """log density of every component at every level: (B, K, T+2)."""
        z = self._rotate(x.double().flatten(1)[:, None] - self.means)
        m = self._rotate(self.means[None])[0]
        rest, parts = 1 - schedule.alpha, []
        # One component after the other, whose (d, T+2) array stays in the cache. As in gaussian.py, the square is
        # expanded about the mean, so that no (B, T+2, d) array is made.
        for k, spread in enumerate(self.variances):
            variances = schedule.alpha**2 * spread[:, None] + schedule.sigma**2
            precision = variances.reciprocal()
            squares, products = torch.stack([z[:, k].square(), z[:, k] * m[k]]) @ precision
            constant = rest**2 * (m[k].square() @ precision) + (2 * math.pi * variances).log().sum(0)
            parts.append(squares + 2 * rest * products + constant)
        return -0.5 * torch.stack(parts, 1)

    def component_log_prob(self, x: Tensor, t: Level, schedule: NoiseSchedule) -> Tensor:
        """log density of every component at one level, an int or long (B,): (B, K)."""
        z, variances = self._standardise(x, t, schedule)
        return log_normal(z, variances).sum(2)

    def component_scores(self, x: Tensor, t: Level, schedule: NoiseSchedule) -> Tensor:
        """Gradient of :meth:`component_log_prob` with respect to the flattened ``x``: (B, K, d)."""
        z, variances = self._standardise(x, t, schedule)
        scores = -z / variances
        return scores if self.vectors is None else torch.einsum("bkd,ked->bke", scores, self.vectors)

    def draw(self, components: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One draw from each component of ``components``, long (n,): (n, *shape)."""
        noise = torch.randn(len(components), self.means.shape[1], generator=generator, dtype=torch.float64)
        spread = noise.to(components.device) * self.variances[components].sqrt()
        if self.vectors is not None:
            for k in components.unique():  # not by one (n, d, d) array of all their axes
                spread[components == k] = spread[components == k] @ self.vectors[k].T
        return (self.means[components] + spread).reshape(-1, *self.shape)

    def _rotate(self, x: Tensor) -> Tensor:
        """Coordinates of ``x`` (B, K, d) in the eigenbasis of each component."""
        return x if self.vectors is None else torch.einsum("bke,ked->bkd", x, self.vectors)

    def _standardise(self, x: Tensor, t: Level, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        """x - alpha_t mu_k in the eigenbasis, and the variances along it: each (B or 1, K, d)."""
        flat = x.double().flatten(1)
        alpha_t, sigma_t = schedule.at(t, flat[:, None])
        return self._rotate(flat[:, None] - alpha_t * self.means), alpha_t**2 * self.variances + sigma_t**2
