"""Starts below level T: the law that the moments make, what they are fitted to, and what they save."""

import math

import pytest
import torch
from denoisers import GaussianDenoiser
from oracles import SCHEDULES, normal
from small_runs import small_config
from torch.distributions import Normal

from torchcdm.diffusion.moments import RANK, Moments
from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.models.denoiser import Denoiser, GuidedDenoiser
from torchcdm.samplers import FAR, adaptive_levels, gaussian_levels
from torchcdm.training.checkpoint import load
from torchcdm.training.loop import train

SCHEDULE = UniformSigmaSchedule(200)
SHAPE = (1, 4, 5)


def low_rank(n, seed=0):
    """Draws with a mean and three directions, and the covariance of those."""
    mean, (basis, _) = normal(20, seed=seed), torch.linalg.qr(normal(20, 3, seed=seed + 1))
    factors = basis * torch.tensor([4.0, 2.0, 1.0]).double()
    return (mean + normal(n, 3, seed=seed + 2) @ factors.T).view(n, *SHAPE), mean, factors @ factors.T


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("t", [7, 30])
def test_the_law_of_a_start(name, t):
    schedule = SCHEDULES[name](30)
    x, _, _ = low_rank(500)
    moments = Moments.fit(x, torch.zeros(500).long())
    mean, factors = moments.means[0].double(), moments.directions[0].double()
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    # x is affine in the noise: its value at 0 is the mean, the rest a root of the covariance.
    noise = torch.cat([torch.zeros(1, 20), torch.eye(20)]).double().view(21, *SHAPE)
    x_t, x_0 = (part.flatten(1) for part in moments.start(noise, t, schedule))
    at_zero, *columns = x_t
    root = torch.stack(columns) - at_zero
    assert torch.allclose(at_zero, alpha * mean, atol=1e-12)
    covariance = alpha**2 * factors.T @ factors + sigma**2 * torch.eye(20).double()
    gain = alpha * factors.T @ factors @ torch.linalg.inv(covariance)
    assert torch.allclose(x_0, mean + (x_t - alpha * mean) @ gain.T, atol=2e-2)
    # To the rounding of directions, which are kept in half precision.
    assert torch.allclose(root.T @ root, covariance, atol=2e-3 * float(covariance.max()))


def test_each_class_has_its_own_moments_and_none_those_of_all_data():
    (x, mean, covariance), (other, _, _) = low_rank(4000), low_rank(4000, seed=9)
    labels = torch.arange(8000) // 4000
    labels[:10], labels[-1] = -1, 3  # without a label, and alone in its class
    moments = Moments.fit(torch.cat([x, other]), labels, classes=4)
    assert moments.means.shape == (5, 20) and moments.directions.shape == (5, RANK, 20)
    own = moments.directions[0].double()
    assert torch.allclose(moments.means[0].double(), mean, atol=0.2)
    assert torch.allclose(own.T @ own, covariance, atol=0.6)
    everything = torch.cat([x, other]).flatten(1).mean(0)
    for k in (2, 3, 4):  # no sample, one sample, and the entry of all data
        assert torch.allclose(moments.means[k].double(), everything, atol=1e-2)
    noise = normal(2, *SHAPE)
    both = moments.start(noise, 150, SCHEDULE, torch.tensor([0, 1]))[0]
    for k in (0, 1):
        alone = moments.start(noise[k : k + 1], 150, SCHEDULE, torch.tensor([k]))[0]
        assert torch.allclose(alone, both[k : k + 1], atol=1e-12)
    null = torch.tensor([4, 4])
    of_all, of_null = (moments.start(noise, 150, SCHEDULE, y)[0] for y in (None, null))
    assert torch.equal(of_all, of_null)


def test_the_steps_above_a_start_are_saved_where_the_data_are_gaussian():
    mean, variance = [0.7, -1.0, 0.2], [0.25, 2.0, 0.01]
    denoiser = GaussianDenoiser(SCHEDULE, mean, variance)
    full, _ = adaptive_levels(denoiser, 4, (3,))
    denoiser.moments = Moments(torch.tensor([mean]), torch.tensor(variance).sqrt().diag()[None])
    levels, _ = adaptive_levels(denoiser, 4, (3,))
    assert full[0] == 200 > levels[0] and len(levels) == len(full) == 5 and levels[-1] == 0
    noise = normal(64, 3)
    assert levels == [4, 3, 2, 1, 0]  # no level of a Gaussian needs a step
    there = denoiser.schedule.alpha[levels[0]] * denoiser.mean + denoiser.deviation(levels[0]) * noise
    assert torch.allclose(denoiser.start(noise, levels[0]), there, atol=2e-3)
    assert torch.equal(denoiser.start(noise), noise)


def test_a_model_without_a_base_density_learns_and_keeps_them(tmp_path):
    plain = {"model__gaussian": "false", "model__class_gaussians": "false", "data__gaussianize": "false"}
    config = small_config("digits-conditional", **plain, train__steps="4")
    result = train(config, tmp_path / "run", device="cpu", progress=False)
    model = load(tmp_path / "run")
    x, y = result.source.train.tensors()
    expected = model.transform(x[y == 3].float()).flatten(1).mean(0)
    assert torch.allclose(model.moments.means[3].float(), expected, atol=0.1)
    labels = torch.tensor([3, 5])
    guided, noise = GuidedDenoiser(model, 1.0), normal(2, *model.shape).float()
    start = model.start(noise, 10, labels)
    assert torch.equal(guided.start(noise, 10, labels), start)
    assert torch.equal(model.moments.start(noise, 10, model.schedule, labels)[0], start)
    assert model.sample(2, y=labels, steps=5).shape == (2, 1, 8, 8)


def test_a_start_is_where_the_divergence_of_the_gaussian_says():
    # Two points at +-0.5 in 20 numbers: a Gaussian of the same moments at much noise, another density at little.
    class Points(Denoiser):
        def denoise(self, x_t, t, y=None):
            alpha, sigma = self.schedule.at(t, x_t)
            side = (alpha / 2 / sigma**2 * x_t.sum(1, keepdim=True)).tanh()
            return Prediction.of_x0(x_t, alpha, sigma, side.expand_as(x_t) / 2)

    denoiser, grid = Points(SCHEDULE), SCHEDULE.time_grid(64)
    denoiser.moments = Moments(torch.zeros(1, 20), torch.full((1, 1, 20), 0.5))
    noise = normal(4000, 20)
    first = gaussian_levels(denoiser, grid, noise, None)
    # Along the line of the points, whatever the other numbers: their distance in units of the noise is all.
    z, divergence = normal(100_000, seed=3), []
    for t in grid[first : first + 2]:
        r, far = float(SCHEDULE.ratio[t]), 0.5 * 20**0.5
        x = (r**2 + far**2) ** 0.5 * z
        gaussian, points = Normal(0.0, (r**2 + far**2) ** 0.5), Normal(torch.tensor([far, -far]), r)
        mixture = points.log_prob(x[:, None]).logsumexp(1) - math.log(2)
        divergence.append(float((gaussian.log_prob(x) - mixture).mean()) / 20)
    assert 0 < first < len(grid) - 1 and divergence[0] < 1.1 * FAR and divergence[1] > 0.9 * FAR


def test_a_denoiser_that_is_wrong_at_much_noise_does_not_decide_where_there_is_little_to_know():
    class Young(Denoiser):
        def denoise(self, x_t, t, y=None):
            return Prediction(x_t, *self.schedule.at(t, x_t), torch.zeros_like(x_t))  # all of it is data

    denoiser, grid = Young(SCHEDULE), SCHEDULE.time_grid(64)
    denoiser.moments = Moments(torch.zeros(1, 20), torch.full((1, 1, 20), 0.5))
    # Of one number of variance 5 among 20, under noise r: ½ log(1 + 5 / r²) nats.
    least = math.sqrt(5 / math.expm1(2 * 20 * FAR))
    first = gaussian_levels(denoiser, grid, normal(16, 20), None)
    assert 0 < first < len(grid) - 1
    assert SCHEDULE.ratio[grid[first]] >= least > SCHEDULE.ratio[grid[first + 1]]
