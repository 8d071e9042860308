"""Exact denoisers: of independent Gaussians, with their flow, and of mixtures with classes."""

import torch
from oracles import labelled_mixture
from torch import nn

from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import CosineSchedule
from torchcdm.models.denoiser import Denoiser
from torchcdm.samplers import Curvature


class GaussianDenoiser(Denoiser):
    """The exact denoiser of independent Gaussians, and its exact probability flow. Keeps a log of its calls."""

    def __init__(self, schedule, mean, variance, transform=None):
        super().__init__(schedule, transform)
        self.mean, self.variance = (torch.tensor(v, dtype=torch.float64) for v in (mean, variance))
        self.double_precision = nn.Parameter(torch.zeros(1).double())
        self.visited = []

    classes = None

    def deviation(self, t):
        return (self.schedule.alpha[t] ** 2 * self.variance + self.schedule.sigma[t] ** 2).sqrt()

    def denoise(self, x_t, t, y=None):
        self.visited.append(t)
        alpha_t, sigma_t = self.schedule.at(t, x_t)
        eps = sigma_t * (x_t - alpha_t * self.mean) / self.deviation(t) ** 2
        return Prediction(x_t, alpha_t, sigma_t, eps.to(x_t.dtype))

    def flow(self, x_t, t, s):
        """Where the flow takes x_t: along it the standardised x does not change."""
        z = (x_t - self.schedule.alpha[t] * self.mean) / self.deviation(t)
        return self.schedule.alpha[s] * self.mean + self.deviation(s) * z


class MixtureDenoiser(Denoiser):
    """The exact denoiser of a labelled mixture; label C is the null label."""

    def __init__(self, mixture, schedule, transform=None):
        super().__init__(schedule, transform)
        self.mixture = mixture
        self.double_precision = nn.Parameter(torch.zeros(1).double())

    @property
    def classes(self):
        return self.mixture.classes

    def denoise(self, x_t, t, y=None):
        return Prediction(x_t, *self.schedule.at(t, x_t), self.mixture.eps(x_t, t, self.schedule, y))


def mixture_model(schedule=None, **options):
    return MixtureDenoiser(labelled_mixture(), schedule or CosineSchedule(100), **options)


def placed_levels(denoiser, steps, shape, y=None, weight=0.0):
    return Curvature.of(denoiser, shape, y).levels(steps, denoiser.schedule, weight)
