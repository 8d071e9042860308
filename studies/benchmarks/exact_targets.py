"""Mixtures of round Gaussians as targets, exact at every level and cheap."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from torchcdm.annealing.target import Evaluated, Target
from torchcdm.diffusion.schedules import Level, NoiseSchedule


@final
class RoundMixture(Target):
    """Sum over k of w_k N(mu_k, v_k I) at every level.

    Args:
        schedule: The noise schedule.
        weights: w_k, (K,), normalised here.
        means: mu_k, (K, d).
        variances: v_k, (K,).
    """

    def __init__(self, schedule: NoiseSchedule, weights: Tensor, means: Tensor, variances: Tensor) -> None:
        super().__init__(schedule, means.shape[1:])
        self.log_weights, self.means, self.variances = (weights / weights.sum()).log(), means, variances

    @classmethod
    def random(cls, schedule: NoiseSchedule, d: int, components: int, seed: int = 0) -> RoundMixture:
        """Means from a standard normal, variances from 0.1 to 0.4."""
        generator = torch.Generator().manual_seed(seed)
        means = torch.randn(components, d, generator=generator, dtype=torch.float64)
        weights, spread = torch.rand(2, components, generator=generator, dtype=torch.float64)
        return cls(schedule, weights + 0.3, means, 0.1 + 0.3 * spread)

    def evaluate(self, x_t: Tensor, t: Level) -> Evaluated:
        at = torch.as_tensor(t).expand(len(x_t))
        alpha, sigma = self.schedule.alpha[at][:, None], self.schedule.sigma[at][:, None]
        variances = alpha**2 * self.variances + sigma**2
        squares = x_t.square().sum(1, keepdim=True) - 2 * alpha * (x_t @ self.means.T)
        squares = squares + alpha**2 * self.means.square().sum(1)
        dim = self.means.shape[1]
        log_joint = self.log_weights - 0.5 * squares / variances - 0.5 * dim * (2 * math.pi * variances).log()
        log_p = log_joint.logsumexp(1)
        share = (log_joint - log_p[:, None]).exp() / variances
        eps = sigma * (x_t * share.sum(1, keepdim=True) - alpha * (share @ self.means))
        return Evaluated(log_p, eps)
