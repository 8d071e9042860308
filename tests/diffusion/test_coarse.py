"""Starts below level T: where coarse data draw, what they are fitted to, and what they save."""

import math

import pytest
import torch
from denoisers import GaussianDenoiser, placed_levels
from oracles import SCHEDULES, normal
from small_runs import small_config

from torchcdm.compose.sampling import sample, trajectories
from torchcdm.diffusion.coarse import POINTS, RANK, CoarseData
from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.models.denoiser import Denoiser, GuidedDenoiser
from torchcdm.samplers import DDIM, FAR, coarse_levels
from torchcdm.training.checkpoint import load
from torchcdm.training.loop import train

SCHEDULE = UniformSigmaSchedule(200)
SHAPE = (1, 4, 5)


def low_rank(n, seed=0):
    """Draws with a mean and three directions, and the covariance of those."""
    mean, (basis, _) = normal(20, seed=seed), torch.linalg.qr(normal(20, 3, seed=seed + 1))
    factors = basis * torch.tensor([4.0, 2.0, 1.0]).double()
    return (mean + normal(n, 3, seed=seed + 2) @ factors.T).view(n, *SHAPE), mean, factors @ factors.T


def coarse(directions, positions, means=None):
    """Coarse data of one class from ``directions`` (k, d) and ``positions`` (n, k), with as many as are kept."""
    rows = torch.arange(POINTS) * len(positions) // POINTS
    means = torch.zeros(directions.shape[1]) if means is None else means
    return CoarseData(means[None], directions[None], positions[rows][None])


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("t", [7, 30])
def test_a_start_is_one_of_the_samples_along_the_directions_with_the_noise_of_its_level(name, t):
    schedule = SCHEDULES[name](30)
    x = low_rank(100)[0]
    data = CoarseData.fit(x, torch.zeros(100).long())
    noise, choice = normal(400, *SHAPE), normal(400, seed=3)
    clean = (data.start(noise, choice, t, schedule) - schedule.sigma[t] * noise) / schedule.alpha[t]
    # The data have three directions, so that nothing of a sample is lost but the rounding to half precision.
    distance, nearest = torch.cdist(clean.flatten(1), x.flatten(1)).min(1)
    assert float(distance.max()) < 0.02 and len(nearest.unique()) == 100
    assert float(data.across(x).abs().max()) < 0.02
    noisy = data.across(x + noise[:100])
    basis = torch.linalg.svd((x - x.mean(0)).flatten(1), full_matrices=False)[2][:3]
    assert float((noisy @ basis.T).abs().max()) < 0.05
    assert torch.allclose(noisy, data.across(data.means[0].double().view(1, *SHAPE) + noise[:100]), atol=0.02)
    left = float(noisy.square().mean() / noise[:100].square().mean())
    assert left == pytest.approx(1 - RANK / 20, abs=0.05)  # noise is as large along every direction


def test_the_samples_that_are_kept_have_the_law_of_all():
    x = torch.cat([normal(3000, 2), normal(1000, 2) + 8.0])  # sorted, as data of classes are
    data = CoarseData.fit(x, torch.zeros(4000).long())
    draws = data.start(torch.zeros(4000, 2).double(), normal(4000), 10, SCHEDULE) / SCHEDULE.alpha[10]
    assert float((draws.mean(1) > 4).double().mean()) == pytest.approx(0.25, abs=0.02)


def test_each_class_has_its_own_and_none_those_of_all_data():
    (x, mean, covariance), (other, _, _) = low_rank(4000), low_rank(4000, seed=9)
    labels = torch.arange(8000) // 4000
    labels[:10], labels[-1] = -1, 3  # without a label, and alone in its class
    data = CoarseData.fit(torch.cat([x, other]), labels, classes=4)
    assert data.means.shape == (5, 20) and data.directions.shape == (5, RANK, 20)
    assert torch.allclose(data.directions @ data.directions.mT, torch.eye(RANK).half(), atol=2e-3)
    own = (data.positions[0].double() @ data.directions[0].double()).T.cov(correction=0)
    assert torch.allclose(data.means[0].double(), mean, atol=0.2)
    assert torch.allclose(own, covariance, atol=0.25 * float(covariance.diagonal().max()))
    everything = torch.cat([x, other]).flatten(1).mean(0)
    for k in (2, 3, 4):  # no sample, one sample, and the entry of all data
        assert torch.allclose(data.means[k].double(), everything, atol=1e-2)
    noise, choice = normal(2, *SHAPE), normal(2)
    both = data.start(noise, choice, 150, SCHEDULE, torch.tensor([0, 1]))
    for k in (0, 1):
        alone = data.start(noise[k : k + 1], choice[k : k + 1], 150, SCHEDULE, torch.tensor([k]))
        assert torch.allclose(alone, both[k : k + 1], atol=1e-12)
    null = torch.tensor([4, 4])
    of_all, of_null = (data.start(noise, choice, 150, SCHEDULE, y) for y in (None, null))
    assert torch.equal(of_all, of_null)


def test_the_steps_above_a_start_are_saved():
    mean, variance = torch.tensor([0.7, -1.0, 0.2]), torch.tensor([0.25, 2.0, 0.01])
    denoiser = GaussianDenoiser(SCHEDULE, mean.tolist(), variance.tolist())
    full = placed_levels(denoiser, 4, (3,))
    denoiser.coarse = coarse(torch.eye(3), variance.sqrt() * normal(256, 3), mean)
    levels = placed_levels(denoiser, 4, (3,))
    assert full[0] == 200 > levels[0] and len(full) == 5
    assert levels == [1, 0]  # nothing is across the directions, and below level 1 is the end
    x = trajectories(denoiser, 2000, DDIM(), levels, (3,))
    assert torch.allclose(x.mean(0), mean.double(), atol=0.15)
    assert torch.allclose(x.std(0), variance.sqrt().double(), rtol=0.1)
    alone = trajectories(denoiser, 5, DDIM(), levels, (3,), batch_size=2)
    assert torch.allclose(alone, x[:5], atol=1e-12)
    assert not torch.allclose(trajectories(denoiser, 5, DDIM(), levels, (3,), seed=1), x[:5])


def test_a_model_without_a_base_density_learns_and_keeps_them(tmp_path):
    plain = {"model__gaussian": "false", "model__class_gaussians": "false", "data__gaussianize": "false"}
    config = small_config("digits-conditional", **plain, train__steps="4")
    result = train(config, tmp_path / "run", device="cpu", progress=False)
    model = load(tmp_path / "run")
    x, y = result.source.train.tensors()
    expected = model.transform(x[y == 3].float()).flatten(1).mean(0)
    assert torch.allclose(model.coarse.means[3].float(), expected, atol=0.1)
    assert all(bool(part.any()) for part in model.coarse.state_dict().values())
    assert GuidedDenoiser(model, 1.0).coarse is model.coarse
    assert model.sample(2, y=torch.tensor([3, 5]), steps=5).shape == (2, 1, 8, 8)


def test_a_start_is_where_the_divergence_across_the_directions_says():
    # One direction is kept of 20; across it the data are Gaussian, and their draws in their place have noise alone.
    variance = torch.tensor([2.0] + [0.25] * 19).double()
    denoiser, grid = GaussianDenoiser(SCHEDULE, [0.0] * 20, variance.tolist()), SCHEDULE.time_grid(64)
    denoiser.coarse = coarse(torch.eye(20)[:1], 2**0.5 * normal(256, 1))
    first = coarse_levels(denoiser, grid, normal(4000, 20), None)
    noise, wide = (SCHEDULE.ratio[grid].double().square()[:, None] + part for part in (0, variance[1:]))
    divergence = ((wide / noise).log() + noise / wide - 1).sum(1) / 2 / 20
    assert 0 < first < len(grid) - 1 and divergence[first] < 1.1 * FAR and divergence[first + 1] > 0.9 * FAR


def test_more_steps_than_levels_below_the_start_are_all_of_these():
    # From level T on, as many as there are levels, clothes have twice the distance (docs/results/pictures.md).
    denoiser = GaussianDenoiser(SCHEDULE, [0.0] * 20, [2.0] + [0.25] * 19)
    denoiser.coarse = coarse(torch.eye(20)[:1], 2**0.5 * normal(256, 1))
    start = placed_levels(denoiser, 10, (20,))[0]
    assert placed_levels(denoiser, SCHEDULE.T, (20,)) == list(range(start, -1, -1))
    with pytest.warns(UserWarning, match=f"^{start} steps, not 200: no more levels lie below {start}, where"):
        draws = sample(denoiser, 2, "ddim", SCHEDULE.T, shape=(20,), spacing="adaptive", details=True)
    assert draws.evaluations == start < SCHEDULE.T


def test_a_denoiser_that_is_wrong_at_much_noise_does_not_decide_where_there_is_little_to_know():
    class Young(Denoiser):
        def denoise(self, x_t, t, y=None):
            return Prediction(x_t, *self.schedule.at(t, x_t), torch.zeros_like(x_t))  # all of it is data

    denoiser, grid = Young(SCHEDULE), SCHEDULE.time_grid(64)
    positions = 5**0.5 * torch.tensor([[1.0], [-1.0]])
    denoiser.coarse = coarse(torch.eye(20)[:1], positions)
    # Of one number of variance 5 among 20, under noise r: ½ log(1 + 5 / r²) nats.
    least = math.sqrt(5 / math.expm1(2 * 20 * FAR))
    first = coarse_levels(denoiser, grid, normal(16, 20), None)
    assert 0 < first < len(grid) - 1
    assert SCHEDULE.ratio[grid[first]] >= least > SCHEDULE.ratio[grid[first + 1]]
