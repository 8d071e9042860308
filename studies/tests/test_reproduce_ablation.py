"""The paper's loss ablation at its smallest scale, and the parts that it is made of."""

import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from oracles import MixtureClassifier, rng
from torch import nn

from studies.cli import main
from studies.exact import ring_mixture
from studies.reproduce import fig4, fig9, models, table1
from studies.reproduce.bound import BoundLoss, bound_weights
from studies.reproduce.denoised import denoised, root_mean_square
from studies.reproduce.tre import TRELoss
from torchcdm.annealing.kernels import Kernels, kl_of_step
from torchcdm.annealing.target import reference_gaussian
from torchcdm.diffusion.schedules import LinearSchedule, UniformSigmaSchedule
from torchcdm.losses import DDMLoss
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import DenoisingDiffusion
from torchcdm.units import DataTransform


class Tilted(nn.Module):
    """An exact classifier whose logits are off by ``slope`` nats a level."""

    def __init__(self, backbone, slope):
        super().__init__()
        self.backbone, self.slope = backbone, slope

    def forward(self, x):
        h = self.backbone(x)
        return h + self.slope * torch.arange(h.shape[1])


def exact(slope=0.0, T=8):
    mixture, schedule = ring_mixture(4), UniformSigmaSchedule(T)
    backbone = Tilted(MixtureClassifier(mixture, schedule), slope)
    return mixture, ClassificationDiffusion(backbone, schedule, DataTransform((2,)))


def test_the_ratio_estimators_loss_is_least_at_the_exact_ratios():
    values = {}
    for slope in (-0.3, 0.0, 0.3):
        mixture, model = exact(slope)
        loss, x = TRELoss(model), mixture.sample(6000, rng())
        t = loss.draw_levels(len(x), rng(1))
        eps = torch.randn(x.shape, generator=rng(2), dtype=x.dtype)
        values[slope] = float(loss(x, None, t, eps)["loss"].mean())
    assert values[0.0] < min(values[-0.3], values[0.3])


def test_the_ratio_estimators_loss_of_a_blind_classifier():
    # All logits equal: log 2 for each pair, and levels 0 and T+1 have one of two.
    mixture, model = exact()
    model.backbone = type("Blind", (nn.Module,), {"forward": lambda self, x: x.new_zeros(len(x), 10)})()
    t = torch.tensor([0, 1, 5, 9])
    terms = TRELoss(model)(mixture.sample(4, rng()), None, t, torch.zeros(4, 2, dtype=torch.float64))
    expected = math.log(2) * torch.tensor([0.5, 1, 1, 0.5], dtype=torch.float64)
    assert torch.allclose(terms["loss"], expected)


def test_bound_weights_are_those_of_the_reverse_chain():
    schedule, shape = LinearSchedule(30), (5,)
    model = DenoisingDiffusion(nn.Identity(), schedule, DataTransform(shape))
    chain = Kernels(reference_gaussian(model), torch.zeros(30, 5, dtype=torch.float64))
    eps_error = torch.randn(29, 5, dtype=torch.float64, generator=rng())
    t = torch.arange(2, 31)
    error = chain.reference.rotation(schedule.ratio[t, None] * eps_error)
    kl = kl_of_step(schedule, t, t - 1, error, chain.variances[t - 1]).sum(1)
    assert torch.allclose(bound_weights(schedule)[1:] * eps_error.square().sum(1), kl)


def test_the_bound_loss_is_l_simple_but_for_its_weights():
    class Network(nn.Module):
        def forward(self, x, t, y):
            return 0.3 * x

    schedule = LinearSchedule(30)
    model = DenoisingDiffusion(Network(), schedule, DataTransform((5,)))
    x, eps = (torch.randn(30, 5, dtype=torch.float64, generator=rng(seed)) for seed in (0, 1))
    t = torch.arange(1, 31)
    bound, simple = BoundLoss(model)(x, None, t, eps), DDMLoss(model)(x, None, t, eps)
    ratio = bound["loss"] / simple["loss"]
    weights = bound_weights(schedule)
    assert torch.allclose(ratio, weights / weights.mean()) and torch.equal(bound["mse"], simple["mse"])
    assert float(ratio.mean()) == pytest.approx(1)


def test_confusion_of_an_exact_classifier_beats_any_shift_of_it():
    mixture, model = exact(T=30)
    found = fig9.confusion(model, mixture.sample(2000, rng()), draws=4)
    matrix = found.matrix(8)
    assert torch.allclose(matrix.sum(1), torch.ones(8, dtype=torch.float64))
    assert found.last == 31 and int(found.true.max()) == 31
    # The Bayes classifier is right more often than chance, and than the same one with tilted logits.
    accuracy = float((found.true == found.found).double().mean())
    _, worse = exact(slope=0.5, T=30)
    shifted = fig9.confusion(worse, mixture.sample(2000, rng()), draws=4)
    assert accuracy > max(1.5 / 32, float((shifted.true == shifted.found).double().mean()))


def test_groups_of_levels_leave_out_the_ends():
    sums = {"mse": [50.0, 1.0, 2.0, 9.0, 12.0, 99.0], "count": [1, 1, 1, 3, 3, 1]}
    edges, mean, overall = fig4.grouped(sums)
    assert edges == [(1, 1), (2, 2), (3, 3), (4, 4)]
    assert mean.tolist() == [1.0, 2.0, 3.0, 4.0] and float(overall) == pytest.approx(24 / 8)


@pytest.mark.parametrize("scale", ["smoke", "small", "paper"])
def test_variants_differ_in_what_they_are_named_after(scale):
    config = partial(models.config_of, models.SETTINGS[scale])
    both, ce, mse, tre = (config(name) for name in ("both", "ce", "mse", "tre"))
    assert both.loss.ce_weight > 0 and both.loss.mse_weight > 0
    assert ce == replace(both, loss=replace(both.loss, mse_weight=0.0)) == tre
    assert mse == replace(both, loss=replace(both.loss, ce_weight=0.0))
    assert both.model.schedule.name == "linear" and not both.data.dequantize and not both.model.gaussian
    uniform, ot = (config(name).model.schedule for name in ("uniform", "ot"))
    assert uniform.name == "uniform-sigma" and uniform.T == both.model.schedule.T
    assert ot.name == "optimal-transport" and ot.T == both.model.schedule.T - 1
    ddm, bound, guided = (config(name) for name in ("ddm", "ddm-bound", "ddm-conditional"))
    assert ddm.model.kind == "ddm" and ddm.model.backbone.name == "unet" and ddm.train == both.train
    assert bound == ddm and models.LOSSES["ddm-bound"] is BoundLoss
    assert guided.model == replace(ddm.model, labels="input") and guided.loss.label_dropout > 0
    assert config("conditional").model == replace(both.model, labels="input")


def test_denoised_images_of_an_exact_model_go_to_the_mean():
    mixture, model = exact(T=60)
    x = mixture.sample(3000, rng())
    noisy, clean = denoised(model, x, [1, 60])
    assert noisy.shape == clean.shape == (2, 3000, 2)
    # With little noise the image itself, within the noise; with much nearly the mean, 0: the best linear denoiser's
    # output has the variance v² / (v + r²) of data of variance v under noise r.
    assert root_mean_square(clean[0] - x) < root_mean_square(noisy[0] - x) < 0.02
    variance, noise = float(x.square().mean()), float(model.schedule.ratio[60]) ** 2
    assert root_mean_square(clean[1]) == pytest.approx(variance / math.sqrt(variance + noise), rel=0.05)


@pytest.fixture
def short(monkeypatch):
    """Few sampling steps and test images."""
    setting = models.SETTINGS["smoke"]
    monkeypatch.setitem(models.SETTINGS, "smoke", replace(setting, steps=dict.fromkeys(setting.steps, 2), test=20))


@pytest.mark.slow
def test_smoke_of_all_shares_its_models(tmp_path, short, capsys):
    for name in ("table1", "fig3", "fig4", "fig5", "fig8", "fig9"):
        assert main(["reproduce", name, "--steps", "3", "--samples", "4", "--out", str(tmp_path), "--quiet"]) == 0
        content = json.loads((tmp_path / f"{name}-smoke.json").read_text())
        assert content["scaled_down"] and content["figures"]
        assert all((tmp_path / "figures" / figure["file"]).exists() for figure in content["figures"])
    capsys.readouterr()
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == [
        f"digits-{name}-smoke" for name in ("both", "ce", "ddm", "mse", "tre", "uniform")
    ]
    assert [path.name.split("-")[0] for path in (tmp_path / "features").glob("*.json")] == ["reference"]
    table = json.loads((tmp_path / "table1-smoke.json").read_text())["tables"][0]
    assert [row[0] for row in table["rows"]] == list(table1.ROWS.values())
    assert table["rows"][0][-2] == 3 and "distance of 4 samples" in table["title"]
    both = dict(zip(range(len(table["columns"])), table["rows"][2], strict=True))
    # Published and measured side by side; no Fréchet distance of four samples.
    assert table["columns"][1:5] == ["accuracy of the level, %", "published", "CE, nats", "published"]
    assert (both[2], both[4], both[6], both[8], both[10]) == (8.34, 4.37, 0.028, 7.56, 3.38)
    assert both[7] is None and 0 < both[5] < 1.5
