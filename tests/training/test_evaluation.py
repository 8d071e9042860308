"""Noisy copies of data: what their noise depends on, where they are, and what is measured on them."""

import math

import pytest
import torch
from oracles import ZeroBackbone, normal, rng
from pretended_device import pretended_device

from studies.reproduce import fig9
from studies.reproduce.denoised import denoised
from studies.reproduce.fig3 import log_posteriors
from torchcdm.data import load_data
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.likelihood import single_pass
from torchcdm.losses import CDMLoss
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import DenoisingDiffusion
from torchcdm.training.checkpoint import load
from torchcdm.training.evaluation import BATCH, at_all_levels, evaluate, level_sums, noisy_batches, validate
from torchcdm.units import DataTransform

SCHEDULE = UniformSigmaSchedule(10)
N = BATCH + 44


def model_of_images():
    """The Gaussian of noise images, with a schedule of its own."""
    schedule = UniformSigmaSchedule(10)
    base = GaussianMarginals.fit(normal(200, 1, 3, 3), schedule)
    return ClassificationDiffusion(ZeroBackbone(12), schedule, DataTransform.images((1, 3, 3), 17), base)


def images(n=N):
    return torch.randint(0, 17, (n, 1, 3, 3), generator=rng()).to(torch.uint8)


def test_measurements_are_those_of_evaluation_mode():
    digits, model = load_data("digits").validation, load("zoo:digits")
    found = evaluate(model, digits, 20, draws=1)
    assert evaluate(model.train(), digits, 20, draws=1) == found and model.training


def joined(batches, name):
    return torch.cat([getattr(batch, name) for batch in batches])


def test_noise_is_a_function_of_seed_and_copy():
    model, x = model_of_images(), images()
    whole, few = list(noisy_batches(model, x, 4)), list(noisy_batches(model, x[:-7], 4))
    assert [len(batch.t) for batch in whole] == [BATCH, 44]
    for name in ("rows", "x_t", "t", "eps"):
        assert torch.equal(joined(whole, name)[:-7], joined(few, name))
    # Another level has the same noise and the same dequantisation, another seed has others.
    alpha, sigma = SCHEDULE.alpha, SCHEDULE.sigma
    higher = list(noisy_batches(model, x, 6))
    assert torch.equal(joined(higher, "eps"), joined(whole, "eps"))
    x_0 = [(joined(part, "x_t") - sigma[t] * joined(part, "eps")) / alpha[t] for part, t in ((whole, 4), (higher, 6))]
    assert torch.allclose(*x_0, atol=1e-9)
    other = joined(noisy_batches(model, x, 4, seed=1), "eps")
    assert abs(float((other * joined(whole, "eps")).mean())) < 0.1


def test_copies_have_noise_of_their_own_and_are_spread_over_their_cells():
    model, x, draws = model_of_images(), images(), 3
    batches = list(at_all_levels(model, x, draws))
    rows, t, eps = (joined(batches, name) for name in ("rows", "t", "eps"))
    assert torch.equal(rows, torch.arange(N).repeat(draws))
    counts = torch.bincount(t, minlength=SCHEDULE.T + 2)
    assert int((counts - draws * N / 12).abs().max()) <= 1
    first, second, _ = eps.chunk(3)
    assert float(eps.std()) == pytest.approx(1, abs=0.03) and abs(float((first * second).mean())) < 0.1
    inner = (t > 0) & (t <= SCHEDULE.T)
    alpha, sigma = SCHEDULE.at(t[inner], eps[inner])
    x_0 = (joined(batches, "x_t")[inner] - sigma * eps[inner]) / alpha
    off = model.transform.inverse(x_0) - x[rows[inner]]
    assert float(off.abs().max()) <= 0.5 + 1e-6 and float(off.std()) == pytest.approx(12**-0.5, rel=0.05)


def test_no_more_than_a_batch_is_noised_at_once(monkeypatch):
    model, sizes = model_of_images(), []
    monkeypatch.setattr(model.transform, "add_noise", lambda x, g: sizes.append(len(x)) or x)
    level_sums(model, images(), draws=4)
    assert max(sizes) == BATCH and sum(sizes) == 4 * N


def test_model_units_where_there_is_no_transform():
    model, x = ClassificationDiffusion(ZeroBackbone(12), SCHEDULE), normal(5, 2)
    (batch,) = noisy_batches(model, x, 0)
    assert torch.equal(batch.x_t, x) and batch.t.tolist() == [0] * 5


def test_errors_of_gaussian_data_are_the_posterior_variances():
    # eps given x_t has variance alpha² v / (alpha² v + sigma²), whoever denoises.
    x = 0.5 * normal(4000, 2)
    base = GaussianMarginals.fit(x, SCHEDULE)
    cdm = ClassificationDiffusion(ZeroBackbone(12), SCHEDULE, DataTransform((2,)), base)
    ddm = DenoisingDiffusion(lambda x, t, y: torch.zeros_like(x), SCHEDULE, DataTransform((2,)), base)
    v, r = base.variances, SCHEDULE.ratio[:-1, None]
    truth = (v / (v + r**2)).mean(1)
    for model in (cdm, ddm):
        sums = level_sums(model, x, draws=12)
        assert sums["count"].tolist() == [4000] * 12 and float(sums["mse"][-1]) < 1e-9
        assert torch.allclose((sums["mse"] / sums["count"])[:-1], truth, rtol=0.08)


def test_posteriors_are_means_over_inputs_of_each_level():
    schedule, x = UniformSigmaSchedule(3), 0.5 * normal(4000, 2)
    model = ClassificationDiffusion(
        ZeroBackbone(5), schedule, DataTransform((2,)), GaussianMarginals.fit(x, schedule)
    )
    found = log_posteriors(model, x)
    assert list(found) == [0, 1, 2, 3, 4]
    p = torch.stack([log_p.exp().mean(0) for log_p in found.values()])
    assert torch.allclose(p.sum(1), torch.ones(5).double())
    # With every level as frequent the mean over all inputs of p(t | x) is that of t: symmetric, as p(s | x_t) is.
    assert torch.allclose(p.mean(0), torch.full((5,), 0.2).double(), atol=0.01) and torch.allclose(p, p.T, atol=0.02)


def test_validation_is_the_loss_of_training_and_the_density():
    # A standard normal is one at every level, so that the cross-entropy is the same at all of them: validation, whose
    # squared error leaves out both ends, has the loss of the levels between them.
    x = normal(500, 3).double()
    model = ClassificationDiffusion(ZeroBackbone(12), SCHEDULE, DataTransform((3,)))
    values, loss = validate(model, x, None, 2.0, 3.0), CDMLoss(model, 2.0, 3.0)
    terms = [loss(x[batch.rows], t=batch.t, eps=batch.eps) for batch in at_all_levels(model, x)]
    each, t = (torch.cat([part[name] for part in terms]) for name in ("loss", "t"))
    assert values["loss"] == pytest.approx(float(each[(t > 0) & (t <= SCHEDULE.T)].mean()))
    assert values["ce"] == pytest.approx(math.log(12))
    assert values["nll"] == pytest.approx(-float(torch.distributions.Normal(0, 1).log_prob(x).sum(1).mean()))


@pytest.mark.parametrize(
    "measure",
    [level_sums, log_posteriors, single_pass, fig9.confusion, lambda m, x: denoised(m, x, [1, 5])],
)
def test_models_on_another_device_than_the_data(measure):
    with pretended_device() as device:
        measure(model_of_images().to(device), images())
