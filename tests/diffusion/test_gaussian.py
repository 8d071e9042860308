"""Gaussian marginals against torch.distributions, at every level."""

import math

import pytest
import torch
from oracles import SCHEDULES, covariance, normal, rng
from torch.distributions import MultivariateNormal

from torchcdm.diffusion.base import StandardNormal
from torchcdm.diffusion.gaussian import (
    CosineRotation,
    GaussianMarginals,
    MatrixRotation,
)
from torchcdm.diffusion.schedules import LogSNRSchedule, UniformSigmaSchedule

T = 30
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


def full(schedule, dim=4):
    """Gaussian marginals, with the dense mean and covariance that they stand for."""
    mean, dense = normal(dim, seed=5), covariance(dim)
    variances, vectors = torch.linalg.eigh(dense)
    return GaussianMarginals(schedule, mean, variances, MatrixRotation((dim,), vectors)), mean, dense


def cosine(schedule, shape=(2, 3, 4)):
    dim = math.prod(shape)
    rotation = CosineRotation(shape)
    variances = torch.rand(dim, generator=rng(1), dtype=torch.float64) + 0.01
    mean = normal(*shape, seed=6)
    basis = rotation.inverse(torch.eye(dim, dtype=torch.float64)).flatten(1)  # rows: vectors of the basis
    dense = basis.T @ torch.diag(variances) @ basis
    return GaussianMarginals(schedule, mean, variances, rotation), mean.flatten(), dense


def marginal(schedule, mean, dense, t):
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    return MultivariateNormal(alpha * mean, alpha**2 * dense + sigma**2 * torch.eye(len(mean)).double())


@every_schedule
@pytest.mark.parametrize("make", [full, cosine])
def test_log_density_and_denoiser_at_every_level(name, make):
    schedule = SCHEDULES[name](T)
    gaussian, mean, dense = make(schedule)
    x = normal(5, *gaussian.mean.shape).requires_grad_()
    levels = gaussian.log_prob_levels(x)
    for t in range(T + 2):
        truth = marginal(schedule, mean, dense, t).log_prob(x.flatten(1))
        assert torch.allclose(levels[:, t], truth, atol=1e-9, rtol=1e-9)
        # Identity 3: E[eps | x_t] = -sigma_t score.
        (score,) = torch.autograd.grad(truth.sum(), x)
        assert torch.allclose(gaussian.eps(x, t), -schedule.sigma[t] * score, atol=1e-9)
    every = torch.arange(T + 2)
    batch = x.detach()[:1].expand(T + 2, *x.shape[1:])
    one_by_one = torch.cat([gaussian.eps(batch[:1], t) for t in range(T + 2)])
    assert torch.allclose(gaussian.eps(batch, every), one_by_one, atol=1e-12)


@pytest.mark.parametrize("make", [full, cosine])
def test_draws_and_moments_are_those_of_the_marginal(make):
    schedule = UniformSigmaSchedule(T)
    gaussian, mean, dense = make(schedule)
    shape = gaussian.mean.shape
    for t in (0, 1, 17, T + 1):
        truth = marginal(schedule, mean, dense, t)
        # A draw is affine in its noise: unit vectors give the columns of a root of the covariance.
        unit = torch.eye(len(mean), dtype=torch.float64).reshape(-1, *shape)
        centre = gaussian.sample(torch.zeros_like(unit), t)
        root = (gaussian.sample(unit, t) - centre).flatten(1)
        assert torch.allclose(centre[0].flatten(), truth.mean, atol=1e-12)
        assert torch.allclose(root.T @ root, truth.covariance_matrix, atol=1e-12)
        centre, variances = gaussian.moments(t)
        assert torch.allclose(centre.flatten(), truth.mean, atol=1e-12)
        assert variances.log().sum() == pytest.approx(float(truth.covariance_matrix.logdet()), abs=1e-10)


def test_fit_recovers_the_moments_of_the_data():
    data = normal(500, 6) @ covariance(6) + normal(6, seed=2)
    gaussian = GaussianMarginals.fit(data, UniformSigmaSchedule(T))
    truth = MultivariateNormal(data.mean(0), torch.cov(data.T, correction=0))
    assert torch.allclose(gaussian.log_prob_levels(data[:9])[:, 0], truth.log_prob(data[:9]), atol=1e-9)


def test_cosine_form_keeps_every_variance_of_its_basis_and_is_exact_for_stationary_data():
    # A covariance that is diagonal in the cosine basis is recovered; all of it, up to sampling error.
    schedule, shape = UniformSigmaSchedule(T), (1, 4, 4)
    truth, _, _ = cosine(schedule, shape)
    data = truth.sample(normal(40_000, *shape), 0)
    fitted = GaussianMarginals.fit(data, schedule, form="cosine")
    assert torch.allclose(fitted.variances, truth.variances, rtol=0.05)
    x = data[:200]
    assert (fitted.log_prob_levels(x) - truth.log_prob_levels(x)).abs().max() < 0.15


@pytest.mark.parametrize("form", ["full", "cosine"])
def test_floor_on_the_variance_and_constant_directions(form):
    data = normal(300, 1, 3, 1).expand(-1, -1, -1, 4) + 3.0  # no variation along the last axis
    schedule = UniformSigmaSchedule(T)
    assert GaussianMarginals.fit(data, schedule, floor=0.01, form=form).variances.min() == 0.01
    bare = GaussianMarginals.fit(data, schedule, form=form)
    assert bare.log_prob_levels(data).isfinite().all() and bare.eps(data, 1).isfinite().all()


def test_float32_images_lose_nothing():
    # 784 correlated pixels, half of them nearly constant, around a mean far from 0: about the origin the
    # expanded square would cancel to a quarter of a nat in float32.
    dim, schedule = 784, LogSNRSchedule(20, r_min=0.002)
    spread = torch.where(torch.arange(dim) % 2 == 0, 0.5, 0.002).double()
    mixing = torch.linalg.qr(normal(dim, dim))[0]
    dense = mixing @ torch.diag(spread**2) @ mixing.T
    mean = torch.full((dim,), -0.9, dtype=torch.float64)
    x = (mean + normal(4, dim, seed=1) * spread @ mixing.T).float().reshape(4, 1, 28, 28)
    variances, vectors = torch.linalg.eigh(dense)
    shape = (1, 28, 28)
    gaussian = GaussianMarginals(schedule, mean.reshape(shape), variances, MatrixRotation(shape, vectors))
    levels = gaussian.log_prob_levels(x)
    for t in (0, 1, 10, 20, 21):
        truth = marginal(schedule, mean, dense, t).log_prob(x.double().flatten(1))
        assert (levels[:, t] - truth).abs().max() < 1e-6
        assert gaussian.eps(x, t).dtype == torch.float32


@pytest.mark.parametrize("make", [full, cosine])
def test_half_precision_around_it_changes_nothing(make):
    gaussian, _, _ = make(UniformSigmaSchedule(T))
    x = normal(3, *gaussian.mean.shape)
    before = gaussian.log_prob_levels(x)
    assert torch.equal(gaussian.half().log_prob_levels(x), before)
    assert {buffer.dtype for buffer in gaussian.buffers()} == {torch.float64}


@pytest.mark.parametrize("form", ["full", "cosine"])
def test_state_loads_into_a_blank(form):
    schedule, x = UniformSigmaSchedule(T), normal(50, 1, 3, 3)
    fitted = GaussianMarginals.fit(x, schedule, form=form)
    blank = GaussianMarginals.blank(schedule, (1, 3, 3), form)
    assert torch.allclose(blank.log_prob_levels(x), StandardNormal(schedule).log_prob_levels(x))
    blank.load_state_dict(fitted.state_dict())
    assert torch.equal(blank.log_prob_levels(x), fitted.log_prob_levels(x))


def test_cosine_basis_is_orthonormal_and_inverts():
    unit = torch.eye(7, dtype=torch.float64)
    cosines = CosineRotation((7,))(unit)
    assert torch.allclose(cosines @ cosines.T, unit, atol=1e-14)
    rotation, x = CosineRotation((3, 4, 5)), normal(2, 3, 4, 5)
    assert torch.allclose(rotation.inverse(rotation(x)), x, atol=1e-14)
    # The first vector of the basis is the constant image.
    assert rotation(torch.ones(1, 3, 4, 5).double())[0, 1:].abs().max() < 1e-14


def test_standard_normal_base():
    schedule, x = UniformSigmaSchedule(T), normal(4, 2, 3)
    truth = MultivariateNormal(torch.zeros(6).double(), torch.eye(6).double()).log_prob(x.flatten(1))
    assert torch.allclose(StandardNormal(schedule).log_prob_levels(x), truth[:, None].expand(4, T + 2))
