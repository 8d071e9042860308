"""Losses of the plain diffusion model: the Bayes error, the weights of the bound, and a schedule that is learned."""

import math

import pytest
import torch
from oracles import ZeroBackbone, normal, rng
from torch import nn

from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.schedules import (
    CosineSchedule,
    LearnedSchedule,
    LinearSchedule,
)
from torchcdm.errors import UserError
from torchcdm.likelihood.chain import ReverseChain
from torchcdm.losses import CDMLoss, DDMLoss, bound_weights
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.ddm import DenoisingDiffusion
from torchcdm.training.build import build_loss
from torchcdm.training.settings import LossConfig
from torchcdm.units import DataTransform

T = 12


class ExactNoise(nn.Module):
    """E[eps | x_t] of N(0, variance), as the network of a ddm; ``factor`` (1 when exact) is a weight."""

    def __init__(self, schedule, variance):
        super().__init__()
        # In a list: the schedule is the model's, not a part of the network.
        self.schedule, self.variance = [schedule], variance
        self.factor = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x, t, y=None):
        # A network sees levels and no schedule.
        alpha_t, sigma_t = (value.detach() for value in self.schedule[0].at(t, x))
        return self.factor * sigma_t * x / (alpha_t**2 * self.variance + sigma_t**2)


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


def test_bound_weights_are_those_of_the_reverse_chain():
    schedule, shape = LinearSchedule(30), (5,)
    model = DenoisingDiffusion(nn.Identity(), schedule, DataTransform.identity(shape))
    chain = ReverseChain(model, torch.zeros(30, 5, dtype=torch.float64))
    eps_error = torch.randn(29, 5, dtype=torch.float64, generator=rng())
    t = torch.arange(2, 31)
    kl = chain.kl(schedule.ratio[t, None] * eps_error, t)
    assert torch.allclose(bound_weights(schedule)[1:] * eps_error.square().sum(1), kl)


def test_the_bound_loss_is_l_simple_but_for_its_weights():
    class Network(nn.Module):
        def forward(self, x, t, y):
            return 0.3 * x

    schedule = LinearSchedule(30)
    model = DenoisingDiffusion(Network(), schedule, DataTransform.identity((5,)))
    x, eps = (torch.randn(30, 5, dtype=torch.float64, generator=rng(seed)) for seed in (0, 1))
    t = torch.arange(1, 31)
    bound, simple = DDMLoss(model, weighting="bound")(x, None, t, eps), DDMLoss(model)(x, None, t, eps)
    ratio = bound["loss"] / simple["loss"]
    weights = bound_weights(schedule)
    assert torch.allclose(ratio, weights / weights.mean()) and torch.equal(bound["mse"], simple["mse"])
    assert float(ratio.mean()) == pytest.approx(1)


def test_a_learned_schedule_makes_all_levels_weigh_alike():
    schedule, variance, levels = LearnedSchedule(20, 0.01, 10.0), 0.25, torch.arange(1, 21)
    model = DenoisingDiffusion(ExactNoise(schedule, variance), schedule)
    loss, optimizer = DDMLoss(model, weighting="bound"), torch.optim.Adam([schedule.log_steps], 0.05)

    def terms():
        """The bound's terms at the levels 2 ... T: weight times Bayes error."""
        signal = schedule.alpha[levels] ** 2 * variance
        return (bound_weights(schedule) * signal / (signal + schedule.sigma[levels] ** 2)).detach()[1:]

    before = terms()
    for step in range(300):
        optimizer.zero_grad()
        loss(math.sqrt(variance) * normal(200, 8, seed=2 * step), generator=rng(step))["loss"].mean().backward()
        optimizer.step()
    after = terms()
    assert before.max() / before.min() > 20 and after.max() / after.min() < 1.3
    ratio = schedule.ratio[1:-1]
    assert (ratio.diff() > 0).all() and torch.allclose(ratio[[0, -1]], torch.tensor([0.01, 10.0]).double())


def test_only_the_schedule_is_trained_by_squares():
    schedule = LearnedSchedule(20, 0.01, 10.0)
    model = DenoisingDiffusion(ExactNoise(schedule, 0.25), schedule)
    x, eps, t = normal(20, 3), normal(20, 3, seed=1), torch.arange(1, 21)
    loss = DDMLoss(model, weighting="bound")(x, None, t, eps)["loss"]
    loss.mean().backward()
    of_schedule, of_network = schedule.log_steps.grad.clone(), model.backbone.factor.grad.clone()
    model.zero_grad()
    # Recomputed without hooks.
    weights = bound_weights(schedule)
    x_t = schedule.perturb(x, t, eps)
    plain = (weights / weights.mean().detach())[t - 1] * (eps - model.backbone(x_t, t)).square().mean(1)
    assert torch.allclose(plain, loss)
    (expected,) = torch.autograd.grad((plain.square() / 2).mean() / plain.mean().detach(), schedule.log_steps,
                                      retain_graph=True)  # fmt: skip
    assert torch.allclose(of_schedule, expected, rtol=1e-4)
    assert torch.allclose(of_network, torch.autograd.grad(plain.mean(), model.backbone.factor)[0])


def test_losses_that_no_learned_schedule_has():
    schedule = LearnedSchedule(20)
    with pytest.raises(UserError, match="needs --loss.weighting bound"):
        DDMLoss(DenoisingDiffusion(nn.Identity(), schedule))
    with pytest.raises(UserError, match="takes no base density"):
        base = GaussianMarginals.blank(schedule, (2,))
        DDMLoss(DenoisingDiffusion(nn.Identity(), schedule, base=base), weighting="bound")
    with pytest.raises(UserError, match="a learned schedule is for --model.kind ddm"):
        CDMLoss(ClassificationDiffusion(ZeroBackbone(22), schedule))


def test_an_unknown_weighting_is_refused():
    with pytest.raises(UserError, match="weighting is 'l2'; choose simple or bound"):
        DDMLoss(DenoisingDiffusion(nn.Identity(), CosineSchedule(T)), weighting="l2")


def test_a_weighting_of_a_ddm_is_refused_for_a_cdm():
    with pytest.raises(UserError, match="loss.weighting is bound; it is for --model.kind ddm"):
        build_loss(LossConfig(weighting="bound"), ClassificationDiffusion(ZeroBackbone(T + 2), CosineSchedule(T)))
