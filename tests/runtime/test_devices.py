"""Everything that meets lies on one device: whole commands under a pretended GPU."""

import numpy as np
import pytest
import torch
from pretended_device import MixedDevices, pretended_device
from small_runs import small_flags

import torchcdm
from torchcdm import DensityRatio
from torchcdm.cli import main
from torchcdm.data import load_data
from torchcdm.errors import UserError
from torchcdm.estimators import CDMConditional, CDMDensity, CDMOutlierDetector
from torchcdm.runtime.processes import chosen_device

TABLE = np.random.RandomState(0).normal(size=(60, 3))
SCHEDULE = "{name: log-snr, T: 10, r_min: 0.05, r_max: 20.0}"


@pytest.mark.parametrize("name", ["meta", "cuda:99", "", "gpu", "cuda:x", "cpu\n", "hpu", "mkldnn", 3.5])
def test_devices_that_are_not_there_are_refused_in_one_line(name, recwarn):
    with pytest.raises(UserError, match=r"device '.*' cannot be used: .*; leave --device out") as caught:
        chosen_device(name)
    assert "\n" not in str(caught.value) and not recwarn


@pytest.fixture
def any_device(monkeypatch):
    """Takes every device, also where a module has the function that refuses it: imported, so that none keeps ours."""
    commands = (f"cli.{name}" for name in ("sampling", "training", "scoring", "measuring"))
    for module in (*commands, "training.checkpoint", "runtime.processes"):
        monkeypatch.setattr(f"torchcdm.{module}.chosen_device", torch.device)


@pytest.fixture
def cdm(tmp_path, monkeypatch, any_device):
    """A command on the device, in a folder of its own that holds a table and twelve digits."""
    monkeypatch.chdir(tmp_path)
    np.savetxt("table.csv", TABLE, delimiter=",", header="a,b,c", comments="")
    np.save("digits.npy", load_data("digits").test.tensors(12)[0][:, 0].numpy())

    def run(words, *more):
        with pretended_device() as device:
            assert main([*words.split(), *more, "--device", str(device)]) == 0

    return run


def test_a_mix_is_noticed():
    layer, x = torch.nn.Linear(3, 2), torch.randn(4, 3)
    with pretended_device() as device:
        layer.to(device)
        y = layer(x.to(device))
        y.square().sum().backward()
        assert y.device == layer.weight.grad.device == torch.zeros(1, device=device).device == device
        assert (y.cpu() + torch.zeros(4, 2)).device == x.device == torch.device("cpu")
        assert y.new_tensor([1.0]).device == device
        assert (y + torch.tensor(1.0)).device == device and y[torch.tensor([0])].device == device
        for mix in (lambda: layer(x), lambda: y + torch.zeros(4, 2), lambda: x[torch.tensor([0], device=device)],
                    lambda: x * y.sum(), lambda: y.detach().numpy()):  # fmt: skip
            with pytest.raises(MixedDevices):
                mix()


@pytest.mark.parametrize("labels", ["joint", pytest.param("none", marks=pytest.mark.slow),
                                    pytest.param("input", marks=pytest.mark.slow)])  # fmt: skip
def test_images_from_training_to_scores(cdm, labels):
    flags = small_flags(report__methods="[]", model__labels=labels, train__steps="4", report__limit="4",
                        model__schedule="{name: uniform-sigma, T: 8}")  # fmt: skip
    cdm("train digits --out run --quiet", *flags)
    cdm("train digits --out run --quiet --resume", *flags)
    guided = [] if labels == "none" else ["--guidance", "1", "--label", "3"]
    for sampler in ("ddpm", "heun"):
        cdm(f"sample run --n 3 --steps 3 --sampler {sampler} --out {sampler} --quiet", *guided)
    cdm("nll run --limit 2 --flow-steps 2 --methods single,elbo,flow,logz --sweeps 4 --quiet")
    cdm("score run digits.npy --reference digits.npy digits.npy --fpr 0.5")


def test_a_model_that_is_made_or_loaded_is_trained(any_device):
    with pretended_device() as device:
        model = torchcdm.load("zoo:two-moons")
        for _ in range(2):  # the second time it is on the device already
            model = torchcdm.train(model, TABLE[:, :2], steps=2, device=str(device), progress=False)
        assert model.transform.shift.device == device


def test_denoising(cdm):
    flags = small_flags(report__methods="[]", data__gaussianize="false", train__steps="2", sampling__n="0")
    cdm("train digits --out run --quiet", *flags)
    for strength in ("", "--level 4", "--noise-std 2"):
        cdm(f"denoise run digits.npy --out clean {strength}")


@pytest.mark.slow
def test_a_plain_diffusion_model(cdm):
    network = "{name: unet, channels: 8, multipliers: [1, 2], attention: [], dropout: 0.1}"
    flags = small_flags(report__methods="[]", report__limit="4", train__steps="4", model__backbone=network,
                        model__schedule="{name: uniform-sigma, T: 8}")  # fmt: skip
    cdm("train digits --model ddm --out run --quiet", *flags)
    cdm("nll run --limit 2 --flow-steps 2 --methods elbo,flow --quiet")


@pytest.mark.parametrize("components", ["1", pytest.param("3", marks=pytest.mark.slow)])
def test_tables(cdm, components):
    cdm("train table --data table:table.csv --out run --quiet --train.steps 4 --report.methods [] --sampling.steps 3",
        "--sampling.n", "4", "--model.components", components, "--model.schedule", SCHEDULE)  # fmt: skip
    cdm("nll run --limit 4 --flow-steps 2 --methods single,elbo,flow,logz --sweeps 4 --quiet")
    cdm("score run table.csv --reference table.csv --fpr 0.3")
    cdm("train table --data table:table.csv --out affine --quiet --train.steps 2 --report.methods [] --sampling.n 0",
        "--data.gaussianize", "false", "--model.schedule", SCHEDULE)  # fmt: skip
    cdm("denoise affine table.csv --out clean")


def test_estimators_and_ratios(any_device):
    with pretended_device() as device:
        options = {"random_state": 0, "device": str(device), "steps": 6}
        few = {"schedule": {"T": 8}}
        small = options | {"width": 16, "depth": 1, "overrides": {"model": few}}
        density = CDMDensity(**small).fit(TABLE)
        assert density.score_samples(TABLE[:5]).shape == (5,) and density.sample(3).shape == (3, 3)
        assert density.set_params(likelihood="flow").score_samples(TABLE[:5]).shape == (5,)
        assert set(CDMOutlierDetector(**small).fit(TABLE).predict(TABLE[:9])) <= {-1, 1}
        theta, x = TABLE[:, :1], TABLE[:, 1:]
        assert CDMConditional(**small).fit(theta, x).log_prob(theta[:4], x[:4]).shape == (4,)
        ratio = DensityRatio(**options, model=few).fit(TABLE, TABLE + 0.2)
        assert ratio.log_ratio(TABLE[:5]).shape == (5,)
