"""timm classifiers: which are refused and why, smoothness of those that are not, and a missing timm."""

import json
import socket
import sys

import pytest
import torch
from small_runs import small_config
from torch import nn

from torchcdm.errors import UserError
from torchcdm.networks.timm_adapter import TimmBackbone, unfit_operations
from torchcdm.runtime.validation import read_as
from torchcdm.training.build import build_model
from torchcdm.training.checkpoint import load
from torchcdm.training.loop import train
from torchcdm.training.settings import ModelConfig
from torchcdm.units import DataTransform

SMALL_VIT = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}


def test_unfit_operations_are_found_wherever_they_sit():
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    weight = torch.randn(4, 4, 1, 1)
    standardised = nn.functional.batch_norm(weight, None, None, training=True)
    smooth = nn.functional.conv2d(nn.GroupNorm(2, 4)(nn.functional.silu(x)), standardised + weight.relu())
    assert unfit_operations(smooth.softmax(1).mean((2, 3))) == {}
    # One of two branches is enough.
    kinked = smooth + nn.Sequential(nn.ReLU6(), nn.BatchNorm2d(4).eval(), nn.Conv2d(4, 4, 1), nn.GELU())(x)
    found = unfit_operations(nn.functional.max_pool2d(kinked, 2).flatten(2).amax(2))
    assert [name.rstrip("0") for name in found] == ["Amax", "Hardtanh", "MaxPool2DWithIndices", "NativeBatchNorm"]
    for layer in (nn.ReLU(inplace=True), nn.LeakyReLU(), nn.PReLU(), nn.Hardswish(), nn.Hardsigmoid(), nn.Softshrink(),
                  nn.Threshold(0.0, 0.0), nn.AdaptiveMaxPool2d(1), nn.BatchNorm2d(4)):  # fmt: skip
        assert len(unfit_operations(layer(2 * x))) == 1, layer


def jump(network, size):
    """Change of the gradient over the last of 16 halvings of a line, each time the half where it changes most.

    Of the size of the interval, 1e-6 of the first, where the gradient is continuous; relative to the gradient.
    """
    generator = torch.Generator().manual_seed(0)
    start, direction = torch.randn(2, 1, 3, size, size, generator=generator, dtype=torch.float64)
    weights = torch.randn(network(start).shape, generator=generator, dtype=torch.float64)

    def gradient(position):
        x = (start + position * direction).requires_grad_()
        return torch.autograd.grad((weights * network(x)).sum(), x)[0]

    low, high = 0.0, 0.1
    at_low, at_high = gradient(low), gradient(high)
    for _ in range(16):
        middle = (low + high) / 2
        here = gradient(middle)
        if (here - at_low).norm() > (at_high - here).norm():
            high, at_high = middle, here
        else:
            low, at_low = middle, here
    return float((at_high - at_low).norm() / at_low.norm())


@pytest.mark.parametrize("name, size, options", [
    ("vit_relpos_small_patch16_224", 16, SMALL_VIT),
    ("swinv2_tiny_window8_256", 16, {"patch_size": 4, "embed_dim": 8, "depths": (1, 1), "num_heads": (2, 2),
                                     "window_size": 2}),
    ("eca_nfnet_l0", 32, {"depths": (1, 1, 1, 1), "channels": (16, 16, 16, 16), "group_size": 8}),
])  # fmt: skip
def test_kinks_and_batch_norm_that_never_see_the_image_do_not_matter(name, size, options):
    # ReLU acts on tables of positions, batch_norm on weights: the gradient with respect to the image is continuous.
    pytest.importorskip("timm")
    torch.manual_seed(0)
    network = TimmBackbone(3, size, 7, name, options).network.double().eval()
    assert jump(network, size) < 1e-4


@pytest.mark.parametrize("name, size, options, message", [
    ("hiera_tiny_224", 64, {"embed_dim": 8, "stages": (1, 1, 1, 1)}, "Amax has kinks where another element"),
    ("mobilenetv2_035", 32, {}, "Hardtanh has kinks, where the denoiser, its derivative, would jump"),
])  # fmt: skip
def test_networks_whose_gradient_jumps_are_refused(name, size, options, message):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    with pytest.raises(UserError, match=message):
        TimmBackbone(3, size, 7, name, options)
    options = options | {"img_size": (size, size)} if "hiera" in name else options
    assert jump(timm.create_model(name, num_classes=0, **options).double().eval(), size) > 1e-2


def test_a_missing_timm_is_told_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install 'torchcdm\\[vision\\]'"):
        TimmBackbone(1, 8, levels=7)


@pytest.mark.parametrize("options", [
    {"checkpoint_path": "evil.pt"}, {"pretrained": True}, {"pretrained_cfg": {"url": "http://x"}}, {"cache_dir": "x"},
    {"pretrained_cfg_overlay": {"file": "evil.pt"}}, {"in_chans": 1},
])  # fmt: skip
def test_options_that_name_files_or_hubs_are_refused_before_timm_is_called(monkeypatch, options):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="no option that timm's models take here"):
        TimmBackbone(1, 8, 7, options=options)


@pytest.mark.parametrize("name", ["hf-hub:someone/model", "hf_hub:someone/model", "local-dir:/tmp/model", "../model"])
def test_no_model_comes_from_a_hub_or_a_folder(monkeypatch, name):
    pytest.importorskip("timm")

    def connect(*_, **__):
        raise AssertionError("the network is cut")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    with pytest.raises(UserError, match="timm has no model"):
        TimmBackbone(1, 8, 7, name)
    assert TimmBackbone(1, 8, 7, options=SMALL_VIT).features(torch.zeros(1, 1, 8, 8)).shape == (1, 24)


def test_a_strangers_run_calls_nothing(tmp_path, monkeypatch):
    run, evil = tmp_path / "run", tmp_path / "evil.pt"
    train(small_config(train__steps="2"), run, progress=False, device="cpu")
    path = run / "config.json"
    content = json.loads(path.read_text())
    options = {"checkpoint_path": str(evil)}
    content["model"]["backbone"] = {"name": "timm", "model": "vit_tiny_patch16_224", "options": options}
    content["sha256"] = "0"
    path.write_text(json.dumps(content))
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="config.json"):
        load(run)
    info = read_as(ModelConfig, content["model"])
    with pytest.raises(UserError, match="'checkpoint_path' is no option"):
        build_model(info, DataTransform((1, 8, 8)))


def test_labels_need_joint():
    with pytest.raises(UserError, match="set joint to true"):
        TimmBackbone(1, 8, levels=7, classes=3)


@pytest.mark.parametrize("joint", [False, True])
def test_a_transformer_has_two_derivatives_and_keeps_samples_apart(joint):
    pytest.importorskip("timm")
    torch.manual_seed(0)
    network = TimmBackbone(2, (8, 4), 7, options=SMALL_VIT, classes=3 if joint else None, joint=joint).double()
    nn.init.normal_(network.head.linear.weight)
    x = torch.randn(2, 2, 8, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(network, (x,), fast_mode=True, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(network(x), torch.cat([network(x[:1]), network(x[1:])]))
    with torch.no_grad():
        TimmBackbone(2, (8, 4), 7, options=SMALL_VIT)


def test_a_convolutional_network_fits():
    pytest.importorskip("timm")
    network = TimmBackbone(1, 32, 7, "convnext_atto", {"dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1)})
    nn.init.normal_(network.head.linear.weight)
    x = torch.randn(2, 1, 32, 32, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(x)[:, 0].sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().max() > 0


@pytest.mark.parametrize("name, options, message", [
    ("resnet10t", {}, "MaxPool2D.* has kinks.*BatchNorm mixes the samples.*Relu has kinks"),
    ("vit_tiny_patch16", {}, "did you mean .*vit_tiny_patch16_"),
    ("vit_tiny_patch16_224", {"bogus": 1}, "bogus"),
    ("vit_tiny_patch16_224", SMALL_VIT | {"patch_size": 16}, "8x8"),
])  # fmt: skip
def test_what_does_not_fit_is_refused_with_the_reason(name, options, message):
    pytest.importorskip("timm")
    with pytest.raises(UserError, match=message) as error:
        TimmBackbone(1, 8, 7, name, options)
    assert "\n" not in str(error.value)
