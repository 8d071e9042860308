"""Levels that are read off x: which they are, what they mend, and which samplers read them."""

import pytest
import torch
from oracles import MixtureClassifier, ZeroBackbone, labelled_mixture, normal, rng

import torchcdm
from torchcdm.compose import sampling
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import GuidedDenoiser
from torchcdm.models.density import LevelReader

SCHEDULE = UniformSigmaSchedule(200)
MIXTURE = labelled_mixture()


@pytest.mark.parametrize("t", [40, 100, 160])
def test_an_image_with_other_noise_than_its_level_has_is_denoised_as_what_it_is(t):
    data = normal(4000, 64) @ normal(64, 64, seed=1) / 8
    base = GaussianMarginals.fit(data, SCHEDULE)
    model = ClassificationDiffusion(ZeroBackbone(202), SCHEDULE, gaussian=base)
    x_0 = base.draw((500, 64), rng(2))
    x_t = SCHEDULE.perturb(x_0, t, normal(500, 64, seed=3))
    told = t + 12
    # Where the sampler is told another level, the signal has that level's scale.
    x_told = x_t * SCHEDULE.alpha[told] / SCHEDULE.alpha[t]
    calls = {"known": (model, x_t, t), "told": (model, x_told, told), "read": (LevelReader(model), x_told, told)}
    error = {name: float((of.denoise(x, level).x0 - x_0).square().mean()) for name, (of, x, level) in calls.items()}
    assert error["told"] - error["read"] > 0.3 * (error["told"] - error["known"]) > 0


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("weight", [0.0, 1.5])
def test_the_level_is_the_most_probable_one(joint, weight):
    prior = MIXTURE.class_prior if joint else None
    model = ClassificationDiffusion(MixtureClassifier(MIXTURE, SCHEDULE, None, joint), SCHEDULE, class_prior=prior)
    x, y, t = normal(40, 2), torch.arange(40) % 2, torch.arange(40) * 4 + 20
    log_r, spread = SCHEDULE.ratio.log(), LevelReader.deviation
    expected = torch.tensor([
        max(range(1, 201), key=lambda s: float(levels[s] - ((log_r[s] - log_r[told]) / spread) ** 2 / 2))
        for levels, told in zip(model.log_prob_levels(x, y), t, strict=True)
    ])  # fmt: skip
    assert len((expected - t).unique()) > 5
    plain = GuidedDenoiser(model, weight) if weight else model
    at_level = plain.denoise(x, expected, y).x0
    found = LevelReader(model, weight).denoise(x, t, y)
    assert torch.allclose(found.x0, at_level, atol=1e-9)
    assert torch.equal(found.sigma_t, SCHEDULE.at(t, x)[1]) and torch.equal(found.x_t, x)
    for k in (3, 17):  # one level for the batch, and alone in it
        one = LevelReader(model, weight).denoise(x[k : k + 1], int(t[k]), y[k : k + 1])
        assert torch.allclose(one.x0, at_level[k : k + 1], atol=1e-9)


def test_two_numbers_tell_little_of_their_level():
    model = ClassificationDiffusion(MixtureClassifier(MIXTURE, SCHEDULE), SCHEDULE)
    x = SCHEDULE.perturb(MIXTURE.sample(2000, rng()), 100, normal(2000, 2))
    found, exact = LevelReader(model).denoise(x, 100).x0, model.denoise(x, 100).x0
    assert float((found - exact).square().mean()) < 0.1 * float((exact - x).square().mean())


def test_placed_steps_of_deterministic_samplers_read(monkeypatch):
    model, read = torchcdm.load("zoo:digits"), []
    plain = LevelReader.denoise
    monkeypatch.setattr(LevelReader, "denoise", lambda self, x_t, t, y=None: read.append(t) or plain(self, x_t, t, y))
    for sampler, options in (("ddim", {}), ("sa2", {}), ("ddim", {"spacing": "even"}), ("ddim", {"corrector": 1})):
        sampling.sample(model, 2, sampler, 5, **({"spacing": "adaptive"} | options))
        assert len(read) == (5 if (sampler, options) == ("ddim", {}) else 0)
        read.clear()


def test_unknown_levels_and_labels_are_refused():
    reader = LevelReader(torchcdm.load("zoo:digits"))
    with pytest.raises(UserError, match="level 99 does not exist"):
        reader.denoise(torch.zeros(1, 1, 8, 8), 99)
    assert isinstance(reader.denoise(torch.zeros(1, 1, 8, 8), 5), Prediction)
