"""The engine on targets whose normalisers are known: works, moves, particles and replicas."""

import math
import weakref

import pytest
import torch
from oracles import MixtureClassifier, covariance, labelled_mixture, normal, rng

from studies.exact import GaussianMixture
from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.particles import States, adapted, langevin, smc
from torchcdm.annealing.replicas import Replicas, ladder
from torchcdm.annealing.target import Evaluated, ModelTarget, Target
from torchcdm.diffusion.schedules import CosineSchedule
from torchcdm.errors import UserError
from torchcdm.likelihood import LogZ
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.units import DataTransform


class MixtureTarget(Target):
    """An exact mixture, or one of its classes, at every level: normalised."""

    def __init__(self, mixture, schedule, y=None):
        super().__init__(schedule, mixture.shape)
        self.mixture, self.y = mixture, y

    def evaluate(self, x_t, t):
        y = None if self.y is None else torch.full((len(x_t),), self.y)
        if y is None:
            levels = self.mixture.log_prob_levels(x_t, self.schedule)
        else:
            levels = self.mixture.class_log_prob_levels(x_t, self.schedule)[:, self.y]
        at = torch.as_tensor(t).expand(len(x_t))
        return Evaluated(levels.gather(1, at[:, None])[:, 0], self.mixture.eps(x_t, t, self.schedule, y), levels)


class Tilted(Target):
    """A mixture times exp(slope . x + constant) at every level, without mass beyond a half space if one is given."""

    def __init__(self, mixture, schedule, slope, constant=0.0, beyond=math.inf):
        super().__init__(schedule, mixture.shape)
        self.inner, self.slope, self.constant = MixtureTarget(mixture, schedule), slope, constant
        self.beyond = beyond

    def evaluate(self, x_t, t):
        found, flat = self.inner.evaluate(x_t, t), x_t.flatten(1)
        tilt = flat @ self.slope + self.constant
        tilt = tilt.masked_fill(flat[:, 0] > self.beyond, -math.inf)
        sigma = self.schedule.sigma[torch.as_tensor(t)].reshape(-1, 1)
        eps = found.eps - (sigma * self.slope).reshape(-1, *self.shape)
        return Evaluated(found.log_gamma + tilt, eps, found.levels + tilt[:, None])


def moments(mixture, schedule, slope, level):
    """log Z and mean of p_level(x) exp(slope . x): the cumulant of a mixture of Gaussians."""
    alpha, sigma, dim = schedule.alpha[level], schedule.sigma[level], len(slope)
    dense = mixture.vectors @ torch.diag_embed(mixture.variances) @ mixture.vectors.mT
    noisy = alpha**2 * dense + sigma**2 * torch.eye(dim)
    terms = mixture.log_weights + alpha * mixture.means @ slope + 0.5 * (noisy @ slope) @ slope
    mean = terms.softmax(0) @ (alpha * mixture.means + noisy @ slope)
    return float(terms.logsumexp(0)), mean


def mixture_of(dim):
    covariances = torch.stack([0.3 * covariance(dim, seed) for seed in range(3)])
    return GaussianMixture(torch.tensor([0.5, 0.2, 0.3]), 1.5 * normal(3, dim, seed=1), covariances)


def replicas(target, level, columns, sweeps, seed=0):
    kernels, generator = Kernels.of_target(target, seed), rng(seed)
    rungs = ladder(target, kernels, level, columns, generator)
    return Replicas(target, kernels, rungs, generator).go_on(sweeps, sweeps // 4)


# --- works -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [5, 9])
def test_works_have_the_means_that_the_identity_says(t):
    schedule, s, n = CosineSchedule(20), 4, 40_000
    mixture, slope = labelled_mixture(), torch.tensor([0.4, -0.3], dtype=torch.float64)
    target = Tilted(mixture, schedule, slope)
    kernels = Kernels(target.reference, torch.full((20, 2), 0.2, dtype=torch.float64))
    truth = moments(mixture, schedule, slope, s)[0] - moments(mixture, schedule, slope, t)[0]

    def exact(level):
        x = schedule.perturb(mixture.sample(4 * n, rng(1)), level, normal(4 * n, 2, seed=2))
        return x[torch.multinomial((x @ slope).softmax(0), n, replacement=True, generator=rng(3))]

    x_t = exact(t)
    at_t = target.evaluate(x_t, t)
    x_s = kernels.down(x_t, at_t.eps, t, s, normal(n, 2, seed=4))
    down = kernels.work(x_s, x_t, target.evaluate(x_s, s), at_t, s, t)
    x_s = exact(s)
    x_t = kernels.up(x_s, s, t, normal(n, 2, seed=5))
    up = kernels.work(x_s, x_t, target.evaluate(x_s, s), target.evaluate(x_t, t), s, t)
    for works, sign in ((down, 1), (-up, -1)):
        weights = (works - sign * truth).exp()
        assert abs(float(weights.mean()) - 1) < 5 * float(weights.std()) / n**0.5 + 0.01


# --- moves -------------------------------------------------------------------------------------------------------


def test_a_move_leaves_every_level_as_it_is():
    schedule, mixture = CosineSchedule(20), labelled_mixture()
    target = MixtureTarget(mixture, schedule)
    kernels = Kernels.of_target(target)
    levels = torch.tensor([1, 7, 15]).repeat_interleave(6000)
    x = schedule.perturb(mixture.sample(18_000, rng()), levels, normal(18_000, 2))
    states, before = States.of(target, x.clone(), levels), x.view(3, 6000, 2)
    for k in range(10):
        accepted = langevin(target, kernels, states, 1.0, rng(k))
    after = states.x.view(3, 6000, 2)
    assert torch.allclose(after.mean(1), before.mean(1), atol=0.06)
    assert torch.allclose(after.square().mean(1), before.square().mean(1), atol=0.12)
    assert 0.2 < float(accepted.double().mean()) < 0.99
    assert float((after - before).square().mean()) > 0.1
    found = target.evaluate(states.x, levels)
    assert torch.equal(found.log_gamma, states.at.log_gamma) and torch.equal(found.eps, states.at.eps)


def test_step_sizes_adapt_towards_the_best_acceptance():
    step = torch.tensor([0.5, 0.5, 1e-3, 2.0], dtype=torch.float64)
    found = adapted(step, torch.tensor([0.57, 0.9, 0.0, 1.0]))
    assert torch.allclose(found, torch.tensor([0.5, 0.5 * math.exp(0.33), 1e-3, 2.0]).double())
    assert adapted(0.5, 0.1) < 0.5


# --- normalisers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dim", "level", "columns"),
    [(2, 1, 24), (16, 3, 24), pytest.param(128, 20, 32, marks=pytest.mark.slow)],
)
def test_replicas_and_particles_find_log_z(dim, level, columns):
    schedule, mixture = CosineSchedule(40), mixture_of(dim)
    slope = 0.5 * normal(dim, seed=3) / (dim / 2) ** 0.5
    target = Tilted(mixture, schedule, slope, 1.3)
    log_z, mean = moments(mixture, schedule, slope, level)
    trace = replicas(target, level, columns, 48)
    ratios = trace.log_z()
    assert abs(ratios.total - log_z - 1.3) < 4 * ratios.se
    assert ratios.se < 0.3
    assert abs(LogZ.of_replicas(trace, ["particles"]).convergence["trend"]) < 4
    check = trace.mbar()
    assert abs(check.total - log_z - 1.3) < 4 * check.se
    assert float((trace.x.mean((0, 1)) - mean).norm()) < 0.5 * dim**0.5
    assert int(trace.arrivals.sum()) >= 4 and trace.ess() > 20
    assert trace.levels[0] == level and trace.levels[-1] == 40
    particles = smc(target, Kernels.of_target(target), level, 16, 32, rng(2))
    weights = (particles.log_estimates - log_z - 1.3).exp()
    assert abs(float(weights.mean()) - 1) < 4 * float(weights.std()) / 4 + 0.02


def test_replicas_forget_where_they_started():
    schedule, mixture = CosineSchedule(30), labelled_mixture()
    target = MixtureTarget(mixture, schedule)
    kernels, generator = Kernels.of_target(target), rng()
    rungs = ladder(target, kernels, 1, 32, generator)
    # All in one component, and all far away.
    starts = torch.cat([mixture.means[1].expand(16, 2), torch.full((16, 2), 6.0, dtype=torch.float64)])
    x = torch.stack([schedule.perturb(starts, t, normal(32, 2, seed=t)) for t in rungs.levels])
    trace = Replicas(target, kernels, rungs._replace(x=x), generator).go_on(80, 20)
    for columns in (slice(0, 16), slice(16, 32)):
        ratios = trace.log_z(columns)
        assert abs(ratios.total) < 4 * ratios.se and ratios.se < 0.15
        mean = schedule.alpha[1] * mixture.log_weights.exp() @ mixture.means
        assert torch.allclose(trace.x[:, columns].mean((0, 1)), mean, atol=0.35)


def test_draws_without_mass_make_others_no_more_independent():
    trace, log_gamma = Replicas.__new__(Replicas), torch.zeros(200, 16, dtype=torch.float64)
    for k, noise in enumerate(normal(199, 16)):
        log_gamma[k + 1] = 0.95 * log_gamma[k] + noise
    log_gamma[0, :4] = -math.inf
    trace.log_gamma = log_gamma
    assert 40 < trace.ess() < 160, "3200 draws times 0.05 / 1.95 are 82"


def test_a_ladder_keeps_no_more_of_its_particles_than_the_points_where_replicas_start(monkeypatch):
    made, alive, init = [], [], States.__init__

    def noted(states, *arguments, **options):
        init(states, *arguments, **options)
        made.append(weakref.ref(states))
        alive.append(sum(one() is not None for one in made))

    monkeypatch.setattr(States, "__init__", noted)
    target, columns = MixtureTarget(mixture_of(3), CosineSchedule(60)), 6
    rungs = ladder(target, Kernels(target.reference), 1, columns, rng(3))
    assert rungs.levels == sorted(rungs.levels) and (rungs.levels[0], rungs.levels[-1]) == (1, 60)
    assert len(rungs.levels) > 8 and rungs.x.shape == (len(rungs.levels), columns, 3)
    assert max(alive) < 6


def test_a_target_without_mass_somewhere():
    schedule, mixture = CosineSchedule(30), GaussianMixture(torch.ones(1), torch.zeros(1, 2), torch.ones(1))
    target = Tilted(mixture, schedule, torch.zeros(2).double(), beyond=0.5)
    ratios = replicas(target, 1, 24, 40).log_z()
    # Standard normal at every level.
    truth = float(torch.special.log_ndtr(torch.tensor(0.5, dtype=torch.float64)))
    assert abs(ratios.total - truth) < 4 * ratios.se + 0.01 and ratios.se < 0.1


def test_a_model_is_a_target_and_so_is_one_of_its_classes():
    mixture, schedule = labelled_mixture(), CosineSchedule(10)
    backbone = MixtureClassifier(mixture, schedule, joint=True)
    model = ClassificationDiffusion(backbone, schedule, DataTransform((2,)))
    x, t = normal(6, 2), torch.tensor([1, 3, 3, 5, 9, 10])
    for y in (None, 1):
        exact, found = (one.evaluate(x, t) for one in (MixtureTarget(mixture, schedule, y), ModelTarget(model, y)))
        for mine, theirs in zip(found, exact, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-9)
    assert ModelTarget(model, batch_size=4).evaluate(x, 3).eps.shape == (6, 2)
    x_T, log_density = ModelTarget(model).start(5, rng())
    assert torch.allclose(ModelTarget(model).log_start(x_T), log_density)


def test_refusals():
    schedule = CosineSchedule(10)
    model = ClassificationDiffusion(torch.nn.Linear(2, 12).bfloat16(), schedule, DataTransform((2,)))
    with pytest.raises(UserError, match="needs float32"):
        ModelTarget(model)
    with pytest.raises(UserError, match="trained without classes"):
        ModelTarget(model.float(), y=1)
    with pytest.raises(UserError, match="give the model a DataTransform"):
        ModelTarget(ClassificationDiffusion(torch.nn.Linear(2, 12), schedule))
