"""Terms of the loss that tie neighbouring levels to each other, against densities that are known."""

import pytest
import torch
from oracles import SCHEDULES, ZeroBackbone, covariance, labelled_mixture, normal, rng
from torch import nn

from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.schedules import CosineSchedule, UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.losses import CDMLoss
from torchcdm.models.cdm import ClassificationDiffusion


@pytest.mark.parametrize("name", SCHEDULES)
def test_change_over_levels_is_that_of_the_mixture(name):
    # Identity 11: the target's mean, weighted by any function of x, is that of the true change of log p.
    schedule, mixture, t = SCHEDULES[name](200), labelled_mixture(), 100
    x_0 = mixture.sample(50_000, rng(1))
    eps = normal(*x_0.shape, seed=3)
    x_t = schedule.perturb(x_0, t, eps)
    levels = mixture.log_prob_levels(x_t, schedule)
    eps_hat = mixture.eps(x_t, t, schedule)
    energy = eps_hat.square().sum(1) + (eps - eps_hat).square().sum(1)
    target = schedule.log_prob_change(x_t, torch.full((len(x_t),), t), eps_hat, energy)
    for weight in (torch.ones(len(x_t)), x_t[:, 0].tanh(), x_t[:, 1].sin()):
        residual = (levels[:, t + 1] - levels[:, t - 1] - target) * weight
        assert residual.mean().abs() < 4 * residual.std() / len(x_t) ** 0.5 + 1e-5


class Shift(nn.Module):
    """A constant added to log p at every second pair of 52 levels: the gradient does not notice."""

    def __init__(self, size):
        super().__init__()
        self.size = nn.Parameter(torch.tensor(size, dtype=torch.float64))

    def forward(self, x):
        steps = (torch.arange(52) // 2 % 2).double()
        return self.size * steps.expand(len(x), -1) + 0 * x.sum(1, keepdim=True)


def test_time_term_vanishes_for_an_exact_gaussian_and_sees_a_shifted_level():
    schedule = UniformSigmaSchedule(50)
    x_0 = normal(4000, 3, seed=2) @ covariance(3)
    gaussian = GaussianMarginals.fit(x_0, schedule)

    def time_error(size):
        model = ClassificationDiffusion(Shift(size), schedule, gaussian=gaussian)
        return CDMLoss(model, time_weight=1.0)(x_0, generator=rng(4))["time"].mean()

    # What is left of an exact model is the noise of one draw of eps.
    assert time_error(0.5) > 5 * time_error(0.0)
    loss = CDMLoss(ClassificationDiffusion(Shift(0.5), schedule, gaussian=gaussian), ce_weight=0.0, time_weight=1.0)
    loss(x_0, generator=rng(4))["loss"].mean().backward()
    assert loss.model.backbone.size.grad > 0


def test_without_inner_levels_there_is_nothing_to_compare():
    model = ClassificationDiffusion(nn.Linear(3, 4), UniformSigmaSchedule(2))
    terms = CDMLoss(model, time_weight=1.0)(torch.randn(8, 3, generator=rng(1)), generator=rng(4))
    terms["loss"].mean().backward()
    assert not terms["time"].any() and model.backbone.weight.grad.isfinite().all()


def test_a_time_weight_needs_a_squared_error():
    model = ClassificationDiffusion(ZeroBackbone(14), CosineSchedule(12))
    with pytest.raises(UserError, match="with mse_weight 0"):
        CDMLoss(model, 1.0, 0.0, time_weight=1.0)
