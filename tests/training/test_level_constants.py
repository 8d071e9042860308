"""Constants of the levels, against a mixture whose densities are known."""

import math

import pytest
import torch
from oracles import MixtureClassifier, labelled_mixture, rng
from torch import nn

import torchcdm
from torchcdm.annealing.ratios import best_constants
from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.training.config_files import make_config, preset_fields
from torchcdm.training.finish import calibrate_levels
from torchcdm.training.loop import train

T = 30


class Off(nn.Module):
    """An exact classifier whose levels are off by constants: ``drift`` nats from each level to the next."""

    def __init__(self, exact, drift):
        super().__init__()
        self.exact, self.drift = exact, drift
        self.classes, self.joint = exact.classes, exact.joint

    def forward(self, x, y=None):
        return self.exact(x, y) + self.drift * torch.arange(T + 2.0, dtype=torch.float64)


def off_by(drift, joint=False):
    schedule, mixture = UniformSigmaSchedule(T), labelled_mixture()
    backbone = Off(MixtureClassifier(mixture, schedule, joint=joint), drift)
    model = ClassificationDiffusion(backbone, schedule, class_prior=mixture.class_prior)
    return model.double().eval(), mixture


@pytest.mark.parametrize(("joint", "labelled"), [(False, False), (False, True), (True, True)])
def test_constants_of_an_exact_model_that_was_shifted_are_found(joint, labelled):
    model, mixture = off_by(0.2, joint)
    (x, y), fresh = mixture.sample_labelled(4000, rng(1)), mixture.sample(50, rng(2))
    y = y if labelled else None
    eps, wrong = model.denoise(fresh, 3).eps, model.log_prob(fresh)
    before, after, change = calibrate_levels(model, x, y, copies=40_000)
    exact = mixture.log_prob_levels(fresh, model.schedule)
    # 31 steps of 0.2 nats; 40 000 copies tell each ratio of neighbours to about a hundredth.
    assert change == pytest.approx(31 * 0.2, abs=0.15) and after < before - 0.05
    assert (exact[:, 0] - wrong).mean() > 6 and (exact[:, 0] - model.log_prob(fresh)).abs().max() < 0.15
    # With joint logits the constants go through a sum over the classes, which rounds.
    assert torch.allclose(model.denoise(fresh, 3).eps, eps, rtol=0, atol=1e-12 if joint else 0)
    # Once more finds nothing.
    assert abs(calibrate_levels(model, x, y, copies=40_000)[2]) < 1e-5


def test_the_best_constants_make_the_mean_posterior_the_share_of_each_level():
    log_p = 3 * torch.randn(500, 7, generator=rng(1), dtype=torch.float64)
    t = torch.randint(7, (500,), generator=rng(2))
    constants = best_constants(log_p, t)
    posterior = (log_p + constants).softmax(1).mean(0)
    assert torch.allclose(posterior, torch.bincount(t, minlength=7).double() / 500, atol=1e-6)
    assert constants[-1] == 0


def test_constants_of_levels_that_are_nowhere_stay_finite():
    log_p, t = torch.zeros(20, 5, dtype=torch.float64), torch.arange(20) % 3
    constants = best_constants(log_p, t)
    assert constants.isfinite().all() and constants[:3].min() > constants[3:].max()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_log_probabilities_that_are_not_finite_are_refused(value):
    model, mixture = off_by(value)
    with pytest.raises(UserError, match="log probabilities of the levels are not finite"):
        calibrate_levels(model, mixture.sample(40, rng(3)))


def test_samples_too_few_to_tell_leave_the_model_as_it_is():
    model, mixture = off_by(0.0)
    before, after, change = calibrate_levels(model, mixture.sample(4, rng(3)), copies=1)
    assert change == 0 and after >= before and not model.level_constants.any()


def test_a_training_ends_with_constants_that_lower_the_cross_entropy(tmp_path):
    layers = [preset_fields("mlp"), {"data": {"spec": "toy:two-moons"}, "sampling": {"n": 0}}]
    layers.append({"model": {"gaussian": False}})
    steps = {"steps": 150, "batch_size": 64, "validate_every": 150, "validation_samples": 200, "lr": 3e-3}
    steps["fallback"] = False
    # The logits come so late that they are not trained.
    loss = {"logits_from": [0.99, 1.0]}
    models = {}
    for copies in (0, 5000):
        out = tmp_path / str(copies)
        train(make_config(*layers, {"train": steps | {"calibration": copies}, "loss": loss}), out, progress=False)
        models[copies] = torchcdm.load(out)
    plain, calibrated = models[0], models[5000]
    x = torchcdm.data.load_data("toy:two-moons").test.tensors()[0][:500]
    assert not plain.level_constants.any() and calibrated.level_constants.any()
    ce = {name: torchcdm.training.evaluation.validate(models[name], x, None)["ce"] for name in models}
    assert ce[5000] < ce[0] - 0.05
    change = calibrated.log_prob(x) - plain.log_prob(x)
    assert change.std() < 1e-4 and math.isclose(change.mean(), calibrated.level_constants[0], abs_tol=1e-3)
