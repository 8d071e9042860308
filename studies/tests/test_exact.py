"""Exact mixtures against torch.distributions, and named toys that are what their names say."""

import math

import pytest
import torch
from oracles import SCHEDULES, MixtureClassifier, covariance, labelled_mixture, mixture_at_level, normal, rng

from studies.exact import BoxMixture, GaussianMixture, named, ring_mixture
from torchcdm.data.named import TOYS
from torchcdm.diffusion.schedules import OptimalTransportSchedule
from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion

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


def boxes():
    low = torch.tensor([[-1.5, 0.0], [0.2, -1.0], [0.5, 0.5]])
    high = torch.tensor([[-0.5, 1.0], [1.0, 1.0], [0.6, 2.0]])
    return BoxMixture(torch.tensor([0.5, 0.3, 0.2]), low, high, torch.tensor([0, 1, 1]))


@every_schedule
def test_boxes_are_what_their_points_blur_into(name):
    mixture, schedule = boxes(), SCHEDULES[name](T)
    x = torch.cat([mixture.sample(6, rng()), 3 * normal(6, 2)])
    levels = mixture.log_prob_levels(x, schedule)
    inside = ((x[:, None] > mixture.low) & (x[:, None] < mixture.high)).all(2)
    density = (inside * mixture.log_weights.exp() / (mixture.high - mixture.low).prod(1)).sum(1)
    assert torch.allclose(levels[:, 0].exp(), density) and 6 <= inside.any(1).sum() < 12
    # Midpoint rule over the points of each box: the noise is wide beside their spacing.
    share = (torch.arange(3000).double() + 0.5) / 3000
    points = mixture.low[:, None] + share[:, None] * (mixture.high - mixture.low)[:, None]
    for t in range(1, T + 2):
        kernel = torch.distributions.Normal(schedule.alpha[t] * points, schedule.sigma[t])
        blurred = kernel.log_prob(x[:, None, None]).exp().mean(2).prod(2) @ mixture.log_weights.exp()
        assert torch.allclose(levels[:, t].exp(), blurred, rtol=1e-3, atol=1e-12), t


@every_schedule
def test_boxes_score_is_the_gradient_of_their_density(name):
    mixture, schedule, x = boxes(), SCHEDULES[name](T), (1.5 * normal(8, 2)).requires_grad_()
    y = torch.arange(8) % 2
    for t in (*range(1, T + 2), torch.tensor([1, 2, 3, T, T + 1, 5, 6, 7])):
        for label in (None, y):
            (score,) = torch.autograd.grad(mixture.log_prob(x, t, schedule, label).sum(), x)
            assert score.isfinite().all()
            assert torch.allclose(mixture.score(x, t, schedule, label), score, rtol=1e-6, atol=1e-6)
    far = 1e3 * normal(8, 2)
    assert mixture.log_prob_levels(far, schedule).isfinite().all()
    assert mixture.score(far, 0, schedule).isfinite().all()
    # However far away x_t is, its origin lies in a box.
    origin = (far + schedule.sigma[T] ** 2 * mixture.score(far, T, schedule)) / schedule.alpha[T]
    assert ((origin > mixture.low.amin(0) - 1e-3) & (origin < mixture.high.amax(0) + 1e-3)).all()


def test_boxes_under_a_model_denoise_like_their_formula():
    mixture, schedule, x = boxes(), OptimalTransportSchedule(T), 2 * normal(20, 2)
    model = ClassificationDiffusion(MixtureClassifier(mixture, schedule), schedule)
    for t in range(T + 2):
        assert torch.allclose(model.denoise(x, t).eps, mixture.eps(x, t, schedule), atol=1e-6), t


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("level", [0, 5])
def test_the_density_of_a_named_toy_is_that_of_its_draws(name, level):
    schedule, toy, side, n = OptimalTransportSchedule(T), named(name), 200, 2000
    axis = 5 * ((torch.arange(side).double() + 0.5) / side * 2 - 1)
    log_p = toy.log_prob(torch.cartesian_prod(axis, axis), level, schedule)
    p = log_p.exp() * (10 / side) ** 2
    assert p.sum() == pytest.approx(1, abs=1e-4)
    x, y = TOYS[name].sample(n, rng(5))
    x_t = schedule.perturb(x.double(), torch.full((n,), level), normal(n, 2, seed=6))
    drawn = toy.log_prob(x_t, level, schedule)
    assert abs(drawn.mean() - (p * log_p).nansum()) < 4 * drawn.std() / math.sqrt(n) + 1e-3
    if level == 0:
        given = toy.class_log_prob_levels(x, schedule)[:, :, 0] + toy.class_prior.log()
        assert (given.argmax(1) == y).double().mean() > 0.99


@pytest.mark.parametrize("name", ["two-moons", "rings"])
def test_curves_show_no_single_points(name):
    toy = named(name)
    spacing = torch.cat([
        (toy.means[toy.labels == y][1:] - toy.means[toy.labels == y][:-1]).norm(dim=1) for y in range(toy.classes)
    ])  # fmt: skip
    limit = 1.3 * toy.variances.max().sqrt()
    assert (spacing <= limit).all()


@pytest.mark.parametrize("name", TOYS)
def test_named_toys_repeat_and_their_classes_are_apart(name):
    x, y = TOYS[name].sample(2000, rng(3))
    again, labels = TOYS[name].sample(2000, rng(3))
    assert torch.equal(x, again) and torch.equal(y, labels)
    assert x.dtype == torch.float32 and y.dtype == torch.long and x.shape == (2000, 2) and x.abs().max() < 4
    share = y.bincount() / 2000
    assert torch.allclose(share, torch.full_like(share, 1 / len(share)), atol=0.05)
    # The nearest other sample nearly always has the same class.
    distance = torch.cdist(x, x).fill_diagonal_(math.inf)
    assert (y[distance.argmin(1)] == y).double().mean() > 0.95


def test_ring_mixture_is_the_density_of_its_toy():
    # Mean log density of the toy's draws: minus the entropy of eight Gaussians that do not overlap.
    x, y = TOYS["eight-gaussians"].sample(20_000, rng(4))
    mixture = ring_mixture(8, 2.0, 0.2)
    log_p = mixture.log_prob(x, 0, OptimalTransportSchedule(T))
    entropy = math.log(8) + math.log(2 * math.pi * math.e * 0.2**2)
    assert log_p.mean() == pytest.approx(-entropy, abs=0.03)
    nearest = mixture.class_log_prob_levels(x, OptimalTransportSchedule(T))[:, :, 0].argmax(1)
    assert (nearest == y).double().mean() > 0.999
