"""No likelihood of images of known code length may fall below it: paired over the images, at three standard errors."""

import math

import pytest
import torch
from lattices import FewLevels, LatticeClassifier, MarkovImages
from torch import nn

import torchcdm
from torchcdm.diffusion.schedules import LogSNRSchedule, UniformSigmaSchedule
from torchcdm.likelihood import FlowSolver, Scoring, elbo, log_normalizer, probability_flow, report, single_pass
from torchcdm.likelihood.one_pass import score_noisy
from torchcdm.likelihood.scoring import ScoredBatch
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.units import DataTransform

# The paper's CDM (unif.): its first level is 0.127 of an 8-bit bin.
UNIFORM = FewLevels(UniformSigmaSchedule(1000), [1, 4, 12, 40, 120, 400, 1000])

INDEPENDENT, AUTOREGRESSIVE = MarkovImages((1, 2, 3), memory=0.0), MarkovImages((1, 2, 3), memory=0.9)
FLOWS = 200
"""Images whose flow is followed."""

IMAGES = pytest.mark.parametrize("images", [INDEPENDENT, AUTOREGRESSIVE], ids=["independent", "autoregressive"])


def excess(bits, true, extra=0.0):
    """Mean excess over the true code length, and its standard error with that of a normaliser."""
    difference = bits - true
    return float(difference.mean()), math.hypot(float(difference.std()) / math.sqrt(len(difference)), extra)


def test_the_exact_model_agrees_with_enumeration():
    images = MarkovImages((1, 1, 3), levels=3, memory=0.8, deviation=0.7)
    states = torch.cartesian_prod(*[torch.arange(3.0)] * 3).reshape(-1, 1, 1, 3)
    log_probs = images.log_prob(states)
    assert float(log_probs.logsumexp(0)) == pytest.approx(0, abs=1e-12)
    schedule = UniformSigmaSchedule(12)
    x = 0.7 * torch.randn(20, 1, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for dequantize in (True, False):
        flat = DataTransform.images((3,), 3, dequantize)
        enumerated = LatticeClassifier(states.flatten(1), log_probs, schedule, flat)(x.flatten(1))
        h = images.model(schedule, dequantize).backbone(x)
        assert torch.allclose(h[:, 1:], enumerated[:, 1:], atol=1e-9)


@IMAGES
def test_the_published_convention_falls_below_the_code_length(images):
    x, true = images.draw(60)
    model = images.model(UNIFORM, dequantize=False)
    at_peak = model.schedule.alpha[1] * model.transform(x.double())
    nats = model.log_prob(at_peak, t=1, units="model") + model.transform.log_det(x)
    mean, error = excess(-nats / (images.dim * math.log(2)), true)
    # The height of a Gaussian of 0.127 bins, whatever the images.
    assert mean == pytest.approx(-1.65, abs=0.01) and mean < -3 * error


@IMAGES
@pytest.mark.parametrize("dequantize", [True, False], ids=["dequantised", "undithered"])
def test_bounds_do_not_fall_below_the_code_length(images, dequantize):
    x, true = images.draw(40)
    model = images.model(UNIFORM, dequantize)
    for level in (1, 4):
        mean, error = excess(single_pass(model, x, None, Scoring(level, draws=2)).values(), true)
        assert -3 * error < mean < 0.4, f"level {level}"
    mean, error = excess(elbo(model, x, None, Scoring(level=1)).values(), true)
    assert mean > -3 * error


@IMAGES
def test_dequantisation_of_the_exact_density_is_the_code_length(images):
    x, true = images.draw(60)
    bits = single_pass(images.model(UNIFORM), x, None, Scoring(level=0)).values()
    assert torch.allclose(bits, true, atol=1e-9)


def test_the_flow_does_not_fall_below_the_code_length():
    images = MarkovImages((1, 1, 3), levels=8, deviation=1.5)
    model = images.model(LogSNRSchedule(24, 0.07, 40))
    x, true = images.draw(30)
    z, _, offset = score_noisy(model, ScoredBatch(model, x, None, slice(0, len(x)), 0), 2)
    flow = FlowSolver(model, Scoring(level=2)).log_prob(z).log_prob + offset
    mean, error = excess(-flow / (images.dim * math.log(2)), true)
    assert -3 * error - 0.01 < mean < 0.2


class Boaster(nn.Module):
    """A classifier that is too sure of the data by some nats at every noisy level but the last."""

    def __init__(self, backbone, nats):
        super().__init__()
        self.backbone, self.nats = backbone, nats

    def forward(self, x):
        h = self.backbone(x)
        boast = torch.full_like(h, self.nats)
        boast[:, -1] = 0
        return h + boast


@pytest.mark.parametrize("boast", [0.0, 1.0], ids=["exact", "unnormalised"])
def test_the_headline_is_not_below_the_code_length_where_one_pass_is(boast):
    images = MarkovImages((1, 1, 2), levels=6, deviation=1.5)
    exact = images.model(UniformSigmaSchedule(12))
    model = ClassificationDiffusion(Boaster(exact.backbone, boast), exact.schedule, exact.transform)
    x, true = images.draw(200)
    result = report(model, x, None, Scoring(level=1), ["single", "logz"], sweeps=40)
    bits = single_pass(model, x, None, Scoring(level=1)).values()
    mean, error = excess(bits, true)
    assert (mean < -3 * error) == bool(boast), "an unnormalised density must show"
    headline, z = result.row("one-pass-normalized"), result.log_z
    assert headline.value is not None, result.why
    unit = 1 / (images.dim * math.log(2))
    mean, error = excess(bits + unit * z.value, true, unit * (z.high - z.low) / 3.92)
    assert headline.value == pytest.approx(float((bits + unit * z.value).mean()))
    assert mean > -3 * error


@pytest.mark.slow
def test_a_trained_model_is_not_below_the_code_length():
    # 4 x 4 images of 8 bits, two minutes of one core: the ELBO and the flow need no normaliser, the headline has one.
    images = MarkovImages(deviation=20.0)
    train, (x, true) = images.draw(20_000, seed=2)[0], images.draw(1000, seed=3)
    model = torchcdm.fit(
        train.to(torch.uint8),
        progress=False,
        steps=1500,
        batch_size=128,
        validate_every=250,
        sampling={"n": 1, "steps": 1},
        model={"backbone": {"width": 32, "multipliers": [1, 2], "positions": True},
               "schedule": {"name": "log-snr", "T": 60, "r_max": 20.0}},
    )  # fmt: skip
    x = x.to(torch.uint8)
    z, unit = log_normalizer(model), 1 / (images.dim * math.log(2))
    bits = single_pass(model, x).values()
    normalised = excess(bits + unit * z.value, true, unit * (z.high - z.low) / 3.92)
    found = {
        "one pass": excess(bits, true),
        "one pass, normalised": normalised,
        "ELBO": excess(elbo(model, x).values(), true),
        "flow": excess(probability_flow(model, x[:FLOWS]).values(), true[:FLOWS]),
    }
    print(f"\ncode length {float(true.mean()):.4f} bits/dim; log2 Z/d {z.value * unit:.4f}, "
          f"effective sample size {z.ess:.0f}")  # fmt: skip
    for name, (mean, error) in found.items():
        print(f"{name:22}{mean:+.4f} +- {error:.4f} bits/dim over it")
    assert z.ess >= 20, "without log Z there is no headline, and nothing to guard"
    for name in ("one pass, normalised", "ELBO", "flow"):
        mean, error = found[name]
        assert -3 * error < mean < 0.5, name
