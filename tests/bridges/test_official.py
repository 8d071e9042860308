"""Checkpoints of the published code: against its recorded outputs, and against its network written out by names."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from published_checkpoint import (
    CLASSES,
    LEVELS,
    OPTIONS,
    SIZE,
    published_output,
    write_checkpoint,
)

from torchcdm import losses
from torchcdm.bridges.official import load_official
from torchcdm.cli import main
from torchcdm.diffusion.schedules import LinearSchedule
from torchcdm.errors import UserError
from torchcdm.losses import CDMLoss
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.networks.unet import CDMUNet
from torchcdm.training.checkpoint import load

OFFICIAL = Path(__file__).parents[3] / "shared" / "official"
recorded = pytest.mark.skipif(not OFFICIAL.exists(), reason="the recorded outputs are not beside this project")

# --- a small file in the published format, made here -------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("classes", [None, CLASSES], ids=["unconditional", "conditional"])
def test_a_converted_file_computes_what_the_published_network_does(tmp_path, classes, prefix):
    weights = write_checkpoint(tmp_path / "model.pt", classes, prefix)
    network = CDMUNet(1, SIZE, LEVELS, **OPTIONS, classes=classes).eval()
    load_official(tmp_path / "model.pt", network)
    x = torch.randn(4, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    y = None if classes is None else torch.tensor([0, 2, 1, 3])
    torch.testing.assert_close(network(x, y), published_output(weights, x, y), rtol=1e-5, atol=1e-4)


def test_a_checkpoint_of_celeba_has_the_size_of_its_images(tmp_path):
    write_checkpoint(tmp_path / "model.pt")
    # Attention at the second of two resolutions.
    backbone = {"name": "unet", **OPTIONS, "multipliers": [1, 2], "attention": [32]}
    model = {"gaussian": False, "backbone": backbone, "schedule": {"name": "linear", "T": LEVELS - 2}}
    model["schedule"] |= {"beta_max": 0.005, "beta_min": 0.001}
    config = {"data": {"spec": "celeba", "channels": 1, "dequantize": False}, "model": model}
    (tmp_path / "celeba.yaml").write_text(json.dumps(config))
    words = ["convert", tmp_path / "model.pt", tmp_path / "run", "--config", tmp_path / "celeba.yaml"]
    assert main([str(word) for word in words]) == 0
    assert load(tmp_path / "run").shape == (1, 64, 64)


@pytest.mark.parametrize("change, message", [
    ({"channels": 64}, r"conv_in.weight is \(32, 1, 3, 3\) in the file, \(64, 1, 3, 3\) in the model"),
    ({"multipliers": (1, 2, 2)}, "is missing in the file"),
    ({"blocks": 2}, r"unet.down_stages.0.1.block.*is missing in the file"),
    ({"attention": (8,)}, "attention.norm.weight is missing in the file"),
    ({"classes": CLASSES}, "label.weight is missing in the file"),
    ({"head_channels": 512}, r"conv_out.weight is \(64, .*; channels, multipliers, blocks, attention, head_channels"),
    ({"levels": 1002}, r"head.linear.weight is \(12, 64\) in the file, \(1002, 64\)"),
    ({"in_channels": 3}, r"conv_in.weight is \(32, 1, 3, 3\) in the file, \(32, 3, 3, 3\)"),
])  # fmt: skip
def test_a_configuration_that_is_not_the_files_is_named(tmp_path, change, message):
    write_checkpoint(tmp_path / "model.pt")
    arguments = {"in_channels": 1, "image_size": SIZE, "levels": LEVELS} | OPTIONS | change
    with pytest.raises(UserError, match=f"model.pt: .*{message}") as error:
        load_official(tmp_path / "model.pt", CDMUNet(**arguments))
    assert "\n" not in str(error.value)


def test_files_that_are_no_checkpoint_are_refused_in_one_line(tmp_path):
    network = CDMUNet(1, SIZE, LEVELS, **OPTIONS)
    (tmp_path / "text.pt").write_text("not weights")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    torch.save({"ema_model_state_dict": {}}, tmp_path / "empty.pt")
    torch.save({"ema_model_state_dict": {"fc.weight": torch.zeros(2)}}, tmp_path / "foreign.pt")
    weights = write_checkpoint(tmp_path / "model.pt")
    del weights["mid.attn_1.q.bias"]
    torch.save({"ema_model_state_dict": weights}, tmp_path / "partial.pt")
    good = write_checkpoint(tmp_path / "model.pt")
    torch.save({"ema_model_state_dict": {3: torch.zeros(2)}}, tmp_path / "numbers.pt")
    torch.save({"ema_model_state_dict": good | {"conv_in.weight": torch.zeros(())}}, tmp_path / "scalar.pt")
    torch.save({"ema_model_state_dict": {"up.\u00b2.upsample.conv.weight": torch.zeros(2)}}, tmp_path / "digit.pt")
    os.mkfifo(tmp_path / "pipe.pt")
    reasons = {
        "absent.pt": "no such file",
        "pipe.pt": "a pipe, a device or a socket",
        "numbers.pt": "no weights",
        "scalar.pt": r"conv_in.weight is \(\) in the file",
        "digit.pt": "is no weight of the published network",
        "text.pt": "cannot be read as weights .torch reports",
        "other.pt": "ema_model_state_dict",
        "empty.pt": "missing",
        "foreign.pt": "'fc.weight' is no weight of the published network",
        "partial.pt": "attention.query.bias is missing in the file",
    }
    for name, reason in reasons.items():
        with pytest.raises(UserError, match=f"{name}: .*{reason}") as error:
            load_official(tmp_path / name, network)
        assert "\n" not in str(error.value) and str(error.value).count("give a checkpoint") < 2


# --- against outputs that the published code recorded ------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    with np.load(OFFICIAL / "unconditional_linear_golden.npz") as content:
        return {name: torch.from_numpy(np.asarray(content[name])) for name in content}


@pytest.fixture(scope="module")
def model():
    network = CDMUNet(3, 32, levels=1002, channels=32, multipliers=(1, 1, 1), direction="data")
    assert sum(p.numel() for p in network.parameters()) == 566_154
    load_official(OFFICIAL / "unconditional_linear.pt", network)
    return ClassificationDiffusion(network, LinearSchedule(1000)).eval()


@recorded
def test_recorded_outputs_before_and_after_the_sum_over_levels(golden, model):
    network = model.backbone
    with torch.no_grad():
        features = network.features(golden["x0"])
        torch.testing.assert_close(network.head.linear(features), golden["raw_x0"], rtol=0, atol=1e-5)
        # Sums of up to 1002 terms reach 900, where float32 resolves 6e-5; another processor adds in another order.
        torch.testing.assert_close(network(golden["x0"]), golden["logits_x0"], rtol=1e-5, atol=1e-5)


@recorded
def test_recorded_schedule_and_noise_estimates(golden, model):
    torch.testing.assert_close(model.schedule.alpha.square(), golden["alpha_hat"].double(), rtol=0, atol=1e-6)
    for t in golden["ts"].tolist():
        eps = model.denoise(golden[f"xt_{t}"], t).eps
        torch.testing.assert_close(eps, golden[f"eps_{t}"], rtol=0, atol=1e-5)


@recorded
@pytest.mark.parametrize(("differences", "within"), [(False, 1e-5), (True, 0.02)])
def test_recorded_losses_and_gradients(differences, within, golden, model, monkeypatch):
    monkeypatch.setattr(losses, "differences_suffice", lambda x: differences)
    model.zero_grad()
    terms = CDMLoss(model, ce_weight=0.001 * 3072)(golden["x0"], t=golden["train_t"], eps=golden["noise"])
    for name in ("ce", "mse", "loss"):
        assert terms[name].mean().item() == pytest.approx(golden[f"train_{name}"].item(), abs=1e-5)
    terms["loss"].mean().backward()
    network = model.backbone
    for name, parameter in {
        "conv_in.weight": network.unet.conv_in.weight,
        "linear_layer.weight": network.head.linear.weight,
        "mid.attn_1.q.weight": network.unet.middle[0].attention.query.weight,
        "norm_out.weight": network.unet.norm_out.weight,
    }.items():
        expected = golden[f"grad_{name}"]
        assert (parameter.grad - expected).norm() < within * expected.norm(), name
