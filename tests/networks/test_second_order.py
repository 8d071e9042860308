"""A layer with second derivatives by hand: equal to PyTorch's and to finite differences, float64."""

import pytest
import torch
from torch import nn

from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.losses import CDMLoss
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import evaluation_mode
from torchcdm.networks.blocks import SiLU
from torchcdm.networks.encoder import Encoder


@pytest.fixture
def layer_and_input():
    torch.manual_seed(0)
    return SiLU(), 2 * torch.randn(2, 3, 4, 2, dtype=torch.float64) + 0.5


def test_both_derivatives_are_those_of_finite_differences(layer_and_input):
    layer, x = layer_and_input
    assert torch.autograd.gradcheck(layer, x.requires_grad_())
    assert torch.autograd.gradgradcheck(layer, x)


def test_a_loss_of_a_gradient_has_the_same_gradients_as_with_the_layers_of_pytorch(layer_and_input):
    layer, x = layer_and_input
    x.requires_grad_()

    def gradients(layer):
        slope = torch.func.grad(lambda z: layer(z).sin().sum())(x)
        each = torch.func.vmap(torch.func.grad(lambda z: layer(z).sin().sum()))(x)
        assert torch.allclose(slope, each)
        loss = slope.cos().sum() + layer(x).square().sum()
        return torch.autograd.grad(loss, x)[0]

    assert torch.allclose(gradients(layer), gradients(nn.SiLU()), rtol=1e-10, atol=1e-10)


def small_loss(**options):
    torch.manual_seed(0)
    network = Encoder(1, 8, levels=12, width=8, multipliers=(1, 2), energy_maps=4, **options)
    for weight in network.parameters():
        nn.init.normal_(weight, std=0.3)
    return CDMLoss(ClassificationDiffusion(network, UniformSigmaSchedule(10)).double())


def test_the_training_loss_has_the_same_gradients_with_and_without(monkeypatch):
    loss = small_loss()
    x, t = torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6)
    eps = torch.randn_like(x)

    def gradients():
        loss.zero_grad()
        loss(x, None, t, eps)["loss"].sum().backward()
        return [weight.grad.clone() for weight in loss.parameters()]

    by_hand = gradients()
    monkeypatch.setattr(SiLU, "forward", nn.SiLU.forward)
    plain = gradients()
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(by_hand, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_under_autocast_a_layer_gives_what_that_of_pytorch_gives(layer_and_input, dtype):
    layer, x = layer_and_input
    x = x.to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = nn.SiLU()(x), layer(x)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_under_autocast_the_gradients_of_a_loss_are_as_near_to_the_true_ones_as_those_of_pytorch(monkeypatch):
    loss = small_loss().float()
    x, t = torch.randn(32, 1, 8, 8), torch.arange(32) % 12
    eps = torch.randn_like(x)

    def gradients(half):
        loss.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=half, cache_enabled=False):
            terms = loss(x, None, t, eps)
        terms["loss"].mean().backward()
        return torch.cat([weight.grad.flatten() for weight in loss.parameters()])

    true, by_hand = gradients(half=False), gradients(half=True)
    monkeypatch.setattr(SiLU, "forward", nn.SiLU.forward)
    plain = gradients(half=True)
    assert not torch.equal(by_hand, plain)
    error, error_of_pytorch = (float((found - true).norm() / true.norm()) for found in (by_hand, plain))
    assert 0 < error < 1.2 * error_of_pytorch < 0.1


def test_weights_take_no_gradient_in_evaluation_and_are_as_they_were_afterwards():
    model = small_loss().model
    first = next(model.parameters())
    first.requires_grad_(False)
    with evaluation_mode(model), evaluation_mode(model):
        result = model.evaluate(torch.randn(2, 1, 8, 8, dtype=torch.float64), 3, None, graph=True)
        assert not any(weight.requires_grad for weight in model.parameters())
        assert not result.log_prob_levels.requires_grad
    assert [weight for weight in model.parameters() if not weight.requires_grad] == [first]
