"""Posteriors of measurements, against those of Gaussians and mixtures in closed form."""

import math
from importlib import import_module

import pytest
import torch
from oracles import ZeroBackbone, normal
from scipy.ndimage import gaussian_filter
from test_combinations import SCHEDULE, exact, gaussian
from test_corrected import FAR

from torchcdm import compose
from torchcdm.diffusion.gaussian import GaussianMarginals, MatrixRotation
from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.units import DataTransform, GaussianizedTransform

FIRST = compose.mask(torch.tensor([True, False]))


def test_the_posterior_of_a_gaussian():
    model, base = gaussian()
    y, std = torch.tensor([1.6], dtype=torch.float64), 0.5
    found = compose.sample(compose.posterior(model, FIRST, y, std), 8, particles=2048, details=True, seed=3)
    directions = base.rotation.inverse(torch.eye(2, dtype=torch.float64))
    covariance = directions.T @ torch.diag(base.variances.double()) @ directions
    gain = covariance[:, 0] / (covariance[0, 0] + std**2)
    mean, weights = base.mean.double() + gain * (y - base.mean[0]), found.log_weights.exp()
    centred = found.particles.double() - mean
    assert torch.allclose(weights @ centred, torch.zeros(2, dtype=torch.float64), atol=0.06)
    spread = (weights[:, None] * centred).T @ centred
    assert torch.allclose(spread, covariance - gain[:, None] * covariance[0], atol=0.1)
    assert found.ess > 0.3 * 2048
    marginal = torch.distributions.Normal(base.mean[0].double(), (covariance[0, 0] + std**2).sqrt())
    assert found.log_z.value == pytest.approx(float(marginal.log_prob(y)), abs=0.1)


def test_measurements_of_each_sample_and_masks_of_truth_values():
    model = gaussian()[0]
    with pytest.raises(UserError, match=r"2 sample\(s\) measure as \(1, 1\)"):
        compose.posterior(model, lambda x: x.mean(0)[None, :1], [0.3], 0.5)
    with pytest.raises(UserError, match="mask: gives other numbers than 0 and 1"):
        compose.mask([0, 2])


def test_the_posterior_of_a_mixture_has_its_modes():
    y, std = torch.tensor([0.1], dtype=torch.float64), 1.0
    found = compose.sample(compose.posterior(exact(FAR), FIRST, y, std), 8, particles=1600, details=True)
    variance = 0.3 + std**2
    log_odds = math.log(0.8 / 0.2) - ((y + 2).square() - (y - 2).square()) / (2 * variance)
    left = found.log_weights.exp()[found.particles[:, 0] < 0].sum()
    assert float(left) == pytest.approx(float(log_odds.sigmoid()), abs=0.06)


def test_measurements_of_images():
    images = normal(2, 3, 12, 12)
    truth = gaussian_filter(images.numpy(), (0, 0, 1.5, 1.5), mode="constant", radius=(0, 0, 5, 5))
    assert torch.allclose(compose.blur(1.5)(images), torch.from_numpy(truth), atol=1e-9)
    with pytest.raises(UserError, match="downsampling: factor is 0; it must be"):
        compose.downsampling(0)
    squares = compose.downsampling(4)(images)
    assert squares.shape == (2, 3, 3, 3)
    assert torch.allclose(squares[1, 2, 0, 2], images[1, 2, :4, 8:].mean())
    kept = torch.zeros(12, 12, dtype=torch.bool)
    kept[3, 4:6] = True
    for same in (kept, kept.numpy(), kept.tolist()):
        assert torch.equal(compose.mask(same)(images), images[:, :, 3, 4:6].flatten(1))
    for wrong, message in (("x", "mask: not an array"), ({}, "mask: not an array"), (kept[:3], "its shape is")):
        with pytest.raises(UserError, match=message):
            compose.mask(wrong)(images)


@pytest.mark.parametrize("shape", [(2, 3), (2, 1, 8, 3), (2, 1, 3, 8)])
def test_squares_that_do_not_fit_are_refused(shape):
    with pytest.raises(UserError, match="squares of 4 pixels do not fit"):
        compose.downsampling(4)(torch.zeros(shape))
    with pytest.raises(UserError, match=r"blur: samples of shape \(3,\) are no images"):
        compose.blur(1.0)(torch.zeros(2, 3))


@pytest.mark.parametrize("y, std, message", [
    (torch.zeros(2), 0.5, r"1 sample\(s\) measure as \(1, 1\), and y has shape \(2,\)"),
    (torch.zeros(1), 1e-4, "give at least as much"),
    (torch.zeros(1), math.nan, "noise_std is nan"),
    (torch.zeros(1), math.inf, "noise_std is inf"),
    ([1.0, 2.0], 0.5, r"\(1, 2\) is needed"),
    (["x"], 0.5, "posterior: y: not an array of numbers"),
])  # fmt: skip
def test_measurements_that_are_refused(y, std, message):
    with pytest.raises(UserError, match=message):
        compose.posterior(gaussian()[0], FIRST, y, std)


def test_an_unknown_noise_is_integrated_out():
    """Two numbers measured of two: the integral over s of N(y; x, s² I) / s, by quadrature."""
    everything = compose.mask(torch.tensor([True, True]))
    y = torch.tensor([1.0, -1.0], dtype=torch.float64)
    known = compose.posterior(gaussian()[0], everything, y).known
    x0 = y + torch.tensor([[0.5, 0.0], [1.0, 2.0], [3.0, -4.0]], dtype=torch.float64)
    found = known(x0, torch.ones(3, dtype=torch.long))
    log_s = torch.linspace(-8, 8, 20_001, dtype=torch.float64)
    squares = (x0 - y).square().sum(1)[:, None]
    truth = (-2 * log_s - squares / 2 * (-2 * log_s).exp()).logsumexp(1)  # ds / s is d log s
    assert torch.allclose(found - found[0], truth - truth[0], atol=0.02)


@pytest.mark.parametrize(("measurement", "matrices"), [(compose.blur(1.0), 1), (lambda x: x.square(), 16)])
def test_a_linear_measurement_has_one_matrix(measurement, matrices, monkeypatch):
    made, tilted = [], import_module("torchcdm.compose.tilted")
    jacobian = tilted.jacobian
    monkeypatch.setattr(tilted, "jacobian", lambda *given: made.append(given) or jacobian(*given))
    model = ClassificationDiffusion(ZeroBackbone(len(SCHEDULE.alpha)), SCHEDULE, DataTransform((1, 4, 4)))
    compose.posterior(model, measurement, normal(1, 4, 4), 0.5)
    assert len(made) == matrices


def test_a_bent_measurement_keeps_its_particles():
    """Linearised at one point alone, a curve that is flat there says that more is known than is."""
    model, base = gaussian()

    def cube(x):
        return ((x - base.mean) ** 3)[:, :1]

    with pytest.raises(UserError, match="noise_std is 1e-09"):  # the cube is flat at the mean alone
        compose.posterior(model, cube, torch.tensor([1.0]), 1e-9)
    bent = compose.posterior(model, cube, torch.tensor([1.0]), 0.2)
    found = compose.sample(bent, 8, particles=512, details=True, seed=2)
    axes = base.rotation(torch.eye(2, dtype=torch.float64))[0]
    variance = float((axes.square() * base.moments(1)[1]).sum())
    grid = torch.linspace(-4, 4, 4001, dtype=torch.float64)
    posterior = (-0.5 * grid.square() / variance - 0.5 * ((grid**3 - 1.0) / 0.2).square()).softmax(0)
    weights, x = found.log_weights.exp(), found.particles[:, 0].double() - float(base.mean[0])
    assert float(weights @ x) == pytest.approx(float(posterior @ grid), abs=0.1)
    assert found.ess > 100


def grey(d=6):
    """Grey levels 0 ... 16, mostly 0, that a Gaussian in model units makes: the model, which is exact."""
    covariance = torch.full((d, d), 0.5, dtype=torch.float64).fill_diagonal_(1.0)
    variances, vectors = torch.linalg.eigh(covariance)
    levels = (3 * (normal(20_000, 1, 1, d, seed=5) - 1.2)).clamp(0, 16).round()
    transform = GaussianizedTransform.fit(DataTransform.images((1, 1, d), 17), [levels])
    base = GaussianMarginals(SCHEDULE, torch.zeros(1, 1, d), variances, MatrixRotation((1, 1, d), vectors))
    return ClassificationDiffusion(ZeroBackbone(SCHEDULE.T + 2), SCHEDULE, transform, base)


@pytest.mark.parametrize("bright", [0.0, 6.0])
def test_grey_levels_that_are_rare_are_measured(bright):
    """A pixel of mostly 0 was taken for a line through its mean slope: a bright one had log Z wrong by many nats."""
    model = grey()
    half = compose.mask(torch.arange(6) < 3)
    y = torch.tensor([bright, 0.2, 1.0], dtype=torch.float64)
    found = compose.sample(compose.posterior(model, half, y, 0.5), 64, particles=512, details=True)
    mean, variances = model.base.moments(1)
    z = mean + model.base.rotation.inverse(normal(400_000, 6, seed=6) * variances.sqrt())
    x = model.transform.inverse(z / SCHEDULE.alpha[1]).flatten(1)
    log_w = torch.distributions.Normal(y, 0.5).log_prob(x[:, :3]).sum(1)
    truth = (log_w.softmax(0) @ x)[3:]
    assert found.log_z.value == pytest.approx(float(log_w.logsumexp(0)) - math.log(400_000), abs=0.5)
    assert torch.allclose(found.mean().flatten()[3:].double(), truth, atol=0.35)
    assert "2 x 256" in found.log_z.estimator
