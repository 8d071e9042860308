"""Exact mixtures against torch.distributions, and named toys that are what their names say."""

import math

import pytest
import torch
from oracles import SCHEDULES, covariance, labelled_mixture, mixture_at_level, normal, rng

from torchcdm.errors import UserError
from torchcdm.schedules import OptimalTransportSchedule
from torchcdm.toy import TOYS, GaussianMixture, ring_mixture, sample_named

T = 25
every_schedule = pytest.mark.parametrize("name", SCHEDULES)


@every_schedule
def test_density_score_and_denoiser_at_every_level(name):
    mixture, schedule, x = labelled_mixture(), SCHEDULES[name](T), (2 * normal(6, 2)).requires_grad_()
    levels, by_class = mixture.log_prob_levels(x, schedule), mixture.class_log_prob_levels(x, schedule)
    y = torch.arange(6) % 2
    for t in range(T + 2):
        marginal = mixture_at_level(mixture, schedule, t)
        parts = marginal.component_distribution.log_prob(x[:, None]) + mixture.log_weights
        # Components 1 and 2 are class 1; both classes have probability one half.
        given = torch.stack([parts[:, 0], parts[:, 1:].logsumexp(1)], 1) + math.log(2)
        for truth, label in ((marginal.log_prob(x), None), (given[torch.arange(6), y], y)):
            (score,) = torch.autograd.grad(truth.sum(), x, retain_graph=True)
            assert torch.allclose(mixture.log_prob(x, t, schedule, label), truth, atol=1e-9)
            assert torch.allclose(mixture.score(x, t, schedule, label), score, atol=1e-8)
            assert torch.allclose(mixture.eps(x, t, schedule, label), -schedule.sigma[t] * score, atol=1e-8)
        assert torch.allclose(levels[:, t], marginal.log_prob(x), atol=1e-9)
        assert torch.allclose(by_class[:, :, t], given, atol=1e-9)


def test_a_level_for_each_sample():
    mixture, schedule, x = labelled_mixture(), OptimalTransportSchedule(T), normal(4, 2)
    t = torch.tensor([0, 3, T, T + 1])
    for call in (mixture.log_prob, mixture.score, mixture.eps):
        each = torch.cat([call(x[i : i + 1], int(t[i]), schedule) for i in range(4)])
        assert torch.allclose(call(x, t, schedule), each, atol=1e-12)


def test_far_from_the_data_nothing_overflows():
    mixture, schedule = labelled_mixture(), OptimalTransportSchedule(T)
    x = 1e4 * normal(4, 2)
    assert mixture.log_prob_levels(x, schedule).isfinite().all()
    assert mixture.score(x, 0, schedule).isfinite().all()


def test_draws_have_the_moments_and_labels_of_the_mixture():
    mixture, n = labelled_mixture(), 100_000
    x, y = mixture.sample_labelled(n, rng(1))
    assert y.double().mean() == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(n))
    for label, components in ((0, [0]), (1, [1, 2])):
        weights = mixture.log_weights[components].softmax(0)
        means = mixture.means[components]
        dense = (mixture.vectors @ torch.diag_embed(mixture.variances) @ mixture.vectors.mT)[components]
        mean = weights @ means
        spread = (weights[:, None, None] * (dense + torch.einsum("ki,kj->kij", means - mean, means - mean))).sum(0)
        assert torch.allclose(x[y == label].mean(0), mean, atol=0.02)
        assert torch.allclose(torch.cov(x[y == label].T), spread, atol=0.03)


def test_events_of_any_shape():
    means, schedule, x = normal(2, 1, 2, 3), OptimalTransportSchedule(T), normal(5, 1, 2, 3, seed=1)
    dense = torch.stack([covariance(6, 1), covariance(6, 2)])
    image, flat = (GaussianMixture(torch.ones(2), m, dense) for m in (means, means.flatten(1)))
    assert image.sample(7, rng()).shape == (7, 1, 2, 3)
    assert image.score(x, 3, schedule).shape == x.shape
    assert torch.equal(image.score(x, 3, schedule).flatten(1), flat.score(x.flatten(1), 3, schedule))
    assert torch.equal(image.log_prob_levels(x, schedule), flat.log_prob_levels(x.flatten(1), schedule))
    with pytest.raises(UserError, match="no labels"):
        image.sample_labelled(3)


@pytest.mark.parametrize("name", TOYS)
def test_named_toys_repeat_and_their_classes_are_apart(name):
    x, y = sample_named(name, 2000, rng(3))
    again, labels = sample_named(name, 2000, rng(3))
    assert torch.equal(x, again) and torch.equal(y, labels)
    assert x.dtype == torch.float32 and y.dtype == torch.long and x.shape == (2000, 2) and x.abs().max() < 4
    share = y.bincount() / 2000
    assert torch.allclose(share, torch.full_like(share, 1 / len(share)), atol=0.05)
    # The nearest other sample nearly always has the same class.
    distance = torch.cdist(x, x).fill_diagonal_(math.inf)
    assert (y[distance.argmin(1)] == y).double().mean() > 0.95


def test_ring_mixture_is_the_density_of_its_toy():
    # Mean log density of the toy's draws: minus the entropy of eight Gaussians that do not overlap.
    x, y = sample_named("eight-gaussians", 20_000, rng(4))
    mixture = ring_mixture(8, 2.0, 0.2)
    log_p = mixture.log_prob(x, 0, OptimalTransportSchedule(T))
    entropy = math.log(8) + math.log(2 * math.pi * math.e * 0.2**2)
    assert log_p.mean() == pytest.approx(-entropy, abs=0.03)
    nearest = mixture.class_log_prob_levels(x, OptimalTransportSchedule(T))[:, :, 0].argmax(1)
    assert (nearest == y).double().mean() > 0.999


def test_unknown_toy():
    with pytest.raises(UserError, match="two-moons"):
        sample_named("two-moon", 5)
