"""The loss of the plain diffusion model is the Bayes error at the exact denoiser."""

import math

import torch
from oracles import normal, rng
from torch import nn

from torchcdm.diffusion.schedules import CosineSchedule
from torchcdm.losses import DDMLoss
from torchcdm.models.denoiser import DenoisingDiffusion

T = 12


class ExactNoise(nn.Module):
    """E[eps | x_t] of N(0, variance), as the network of a ddm."""

    def __init__(self, schedule, variance):
        super().__init__()
        self.schedule, self.variance = schedule, variance

    def forward(self, x, t, y=None):
        alpha_t, sigma_t = self.schedule.at(t, x)
        return sigma_t * x / (alpha_t**2 * self.variance + sigma_t**2)


def test_baseline_loss_is_the_bayes_error_at_the_exact_denoiser():
    schedule, n, variance = CosineSchedule(T), 20_000, 0.25
    model = DenoisingDiffusion(ExactNoise(schedule, variance), schedule)
    terms = DDMLoss(model)(math.sqrt(variance) * normal(n, 1), generator=rng())
    assert terms["t"].min() == 1 and terms["t"].max() == T
    signal = schedule.alpha[1:-1] ** 2 * variance
    truth = signal / (signal + schedule.sigma[1:-1] ** 2)
    for t in range(1, T + 1):
        mse = terms["mse"][terms["t"] == t]
        assert abs(mse.mean() - truth[t - 1]) < 4 * mse.std() / math.sqrt(len(mse))
    assert torch.equal(terms["loss"], terms["mse"])
