"""timm classifiers: which are refused and why, two derivatives of those that are not, and a missing timm."""

import sys

import pytest
import torch
from torch import nn

from torchcdm.backbones.timm_adapter import TimmBackbone, unfit_layers
from torchcdm.errors import UserError

SMALL_VIT = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def test_unfit_layers_are_found_wherever_they_sit():
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.ReLU6(), nn.Sequential(nn.MaxPool2d(2))))
    network.append(nn.BatchNorm1d(4)).append(nn.SiLU()).append(nn.GroupNorm(2, 4))
    assert set(unfit_layers(network)) == {"ReLU6", "MaxPool2d", "BatchNorm1d"}


def test_a_missing_timm_is_told_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install 'torchcdm\\[vision\\]'"):
        TimmBackbone("vit_tiny_patch16_224", 1, 8, levels=7)


def test_labels_need_joint():
    with pytest.raises(UserError, match="set joint to true"):
        TimmBackbone("vit_tiny_patch16_224", 1, 8, levels=7, classes=3)


@pytest.mark.parametrize("joint", [False, True])
def test_a_transformer_has_two_derivatives_and_keeps_samples_apart(joint):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    network = TimmBackbone("vit_tiny_patch16_224", 2, (8, 4), 7, 3 if joint else None, joint, **SMALL_VIT).double()
    nn.init.normal_(network.head.linear.weight)
    x = torch.randn(2, 2, 8, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(network, (x,), fast_mode=True, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(network(x), torch.cat([network(x[:1]), network(x[1:])]))


def test_a_convolutional_network_fits():
    pytest.importorskip("timm")
    network = TimmBackbone("convnext_atto", 1, 32, 7, dims=(8, 8, 8, 8), depths=(1, 1, 1, 1))
    nn.init.normal_(network.head.linear.weight)
    x = torch.randn(2, 1, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(x)[:, 0].sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("name, options, message", [
    ("resnet10t", {}, "BatchNorm2d mixes the samples.*ReLU has kinks.*MaxPool2d has no second derivative"),
    ("vit_tiny_patch16", {}, "did you mean .*vit_tiny_patch16_"),
    ("vit_tiny_patch16_224", {"bogus": 1}, "bogus"),
    ("vit_tiny_patch16_224", SMALL_VIT | {"patch_size": 16}, "8x8"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_reason(name, options, message):
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=message) as error:
        TimmBackbone(name, 1, 8, levels=7, **options)
    assert "\n" not in str(error.value)
