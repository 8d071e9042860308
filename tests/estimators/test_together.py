"""Several observations of one theta, and regions of highest density: known posteriors, priors, mistakes."""

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.mixture import GaussianMixture
from test_conditional import TINY, pairs
from torch.distributions import Independent, LogNormal, Normal, Uniform, constraints

from torchcdm.errors import UserError
from torchcdm.estimators import CDMConditional, CDMDensity

NORMAL = Independent(Normal(torch.zeros(2), 1.0), 1)
MATRIX = np.array([[1.0, 0.5], [0.0, 1.0]]) / 2
LEVELS = {"model": {"backbone": {"energy_maps": 2}, "schedule": {"T": 40}}, "train": {"validate_every": 3}}
START = {**TINY, "lr": 1e-12, "overrides": LEVELS}
"""A rate of almost nothing: the network stays silent, and the posterior is that of a linear-Gaussian simulator."""


def simulated(n, seed=0):
    """theta ~ N(0, I), and x of which one says little: the prior counts."""
    draw = np.random.RandomState(seed)
    theta = draw.normal(size=(n, 2))
    return theta, theta @ MATRIX.T + draw.normal(size=(n, 2))


def observed(n):
    """Observations of one theta, and the mean and covariance of it given all."""
    x = np.array([0.5, -1.0]) @ MATRIX.T + np.random.RandomState(7).normal(size=(n, 2))
    covariance = np.linalg.inv(np.eye(2) + n * MATRIX.T @ MATRIX)
    return x, covariance @ MATRIX.T @ x.sum(0), covariance


@pytest.fixture(scope="module")
def linear():
    return CDMConditional(**START).fit(*simulated(4000))


ONE = Independent(Uniform(torch.zeros(1), 1.0), 1)
"""A prior of one column, which torch would repeat for each of two."""

THREE = Independent(Normal(torch.zeros(3), 1.0), 1)
FAR = Independent(Uniform(torch.full((2,), 50.0), 60.0), 1)


def divergence(draws, mean, covariance):
    """KL of the Gaussian of the draws' moments from the exact one, nats."""
    found = np.cov(draws.T)
    off = draws.mean(0) - mean
    ratio = np.linalg.solve(covariance, found)
    return 0.5 * (np.trace(ratio) - len(mean) - np.linalg.slogdet(ratio)[1] + off @ np.linalg.solve(covariance, off))


@pytest.mark.parametrize("n", [1, 8])
def test_draws_and_density_are_those_given_all_observations(linear, n):
    x, mean, covariance = observed(n)
    draws = linear.sample(1000, x, random_state=0, together=True, prior=NORMAL)
    assert draws.shape == (1000, 2)
    # What is left is the error of moments of 3400 pairs, which counts n times.
    assert divergence(draws, mean, covariance) < 0.08
    off = draws - mean
    exact = -0.5 * (off @ np.linalg.inv(covariance) * off).sum(1)
    assert (linear.log_prob(draws, x, together=True, prior=NORMAL) - exact).std() < 0.25
    assert np.array_equal(draws, linear.sample(1000, x, random_state=0, together=True, prior=NORMAL))


def test_one_observation_is_that_of_the_posterior_itself(linear):
    theta, x = simulated(50, seed=3)
    alone = linear.log_prob(theta, x[0])
    for prior in ({"prior": NORMAL}, {}):  # it needs none
        # To rounding, which on some processors follows the size of a batch.
        np.testing.assert_allclose(linear.log_prob(theta, x[0], together=True, **prior), alone, rtol=1e-6)
    draws = linear.sample(5, x[0], random_state=0)
    for one in (x[0], x[:1]):
        np.testing.assert_allclose(linear.sample(5, one, random_state=0, together=True), draws, rtol=1e-6)


def test_units_of_theta_are_those_of_its_prior():
    theta, x = simulated(4000)
    model = CDMConditional(**START).fit(np.exp(0.5 * theta), x)
    x, mean, covariance = observed(8)
    prior = Independent(LogNormal(torch.zeros(2), 0.5), 1)
    draws = model.sample(1000, x, together=True, prior=prior)
    assert divergence(2 * np.log(draws), mean, covariance) < 0.1
    off = 2 * np.log(draws) - mean
    exact = -0.5 * (off @ np.linalg.inv(covariance) * off).sum(1) - np.log(draws).sum(1)
    assert (model.log_prob(draws, x, together=True, prior=prior) - exact).std() < 0.25


def test_densities_fitted_to_theta_serve_as_priors(linear):
    x, mean, covariance = observed(8)
    fitted = GaussianMixture(1).fit(simulated(4000)[0])
    assert divergence(linear.sample(1000, x, together=True, prior=fitted), mean, covariance) < 0.1
    with pytest.raises(UserError, match="prior: X has 2 features"):
        linear.sample(
            10, x, together=True, prior=CDMDensity(**TINY).fit(np.random.RandomState(0).normal(size=(80, 3)))
        )


def test_bounds_of_a_prior_are_kept(linear):
    # The half of a normal prior: the posterior is cut.
    class Half:
        support = constraints.independent(constraints.real, 1)

        def log_prob(self, theta):
            return torch.where(theta[:, 0] > 0, NORMAL.log_prob(theta), -torch.inf)

    x, mean, covariance = observed(4)
    draws = linear.sample(1000, x, together=True, prior=Half())
    exact = np.random.RandomState(0).multivariate_normal(mean, covariance, 20_000)
    exact = exact[exact[:, 0] > 0]
    assert draws[:, 0].min() > -0.02 and 5000 < len(exact) < 15_000
    assert np.abs(draws.mean(0) - exact.mean(0)).max() < 0.1
    density = linear.log_prob([[0.5, 0.5], [-0.1, 0.5]], x, together=True, prior=Half())
    assert np.isfinite(density[0]) and density[1] == -np.inf
    # Bounds that torch would refuse to be asked about, which no draw given one observation reaches.
    with pytest.raises(UserError, match="prior: none of some draws"):
        linear.sample(10, x, together=True, prior=FAR)


def test_single_observations_keep_the_bounds_of_a_prior(linear):
    x = simulated(3, seed=3)[1]
    box = Independent(Uniform(torch.tensor([-1.0, -2.0]), torch.tensor([0.5, 2.0])), 1)
    free, draws = linear.sample(400, x, random_state=0), linear.sample(400, x, random_state=0, prior=box)
    inside = box.support.check(torch.tensor(free)).numpy()
    assert 0.1 < inside.mean() < 0.9 and draws.shape == (3, 400, 2)
    assert np.array_equal(draws[inside], free[inside]) and box.support.check(torch.tensor(draws)).all()
    # An edge that one draw in some twenty reaches: of 300 draws some take hundreds of tries.
    edge = Independent(Uniform(torch.tensor([1.5, -9.0]), 9.0), 1)
    assert (linear.sample(300, [0.0, 0.0], random_state=0, prior=edge)[:, 0] >= 1.5).all()
    log_p = linear.log_prob(free[0], x[0], prior=box)
    assert np.array_equal(log_p, np.where(inside[0], linear.log_prob(free[0], x[0]), -np.inf))


def test_classes_are_drawn_as_often_as_they_are_probable():
    draw = np.random.RandomState(0)
    theta = draw.randint(0, 2, 100)
    model = CDMConditional(**TINY).fit(theta, draw.normal(size=100) + theta)

    class Even:
        def score_samples(self, theta):
            return np.full(len(theta), np.log(0.5))

    x = np.array([1.0, -0.2, 0.9])
    draws = model.sample(1000, x, together=True, prior=Even())
    log_p = model.log_prob([[0], [1]], x, together=True, prior=Even())
    assert set(np.unique(draws)) == {0.0, 1.0}
    assert abs(draws.mean() - 1 / (1 + np.exp(log_p[0] - log_p[1]))) < 0.15


def test_frames_and_constant_columns():
    theta, x = pairs()
    model = CDMConditional(**TINY).fit(theta.assign(unit=4.0), x)
    draws = model.sample(7, x.iloc[:3], together=True, prior=Independent(Normal(torch.zeros(3), 5.0), 1))
    assert list(draws.columns) == ["rate", "dose", "unit"] and draws.shape == (7, 3) and (draws["unit"] == 4).all()


def test_mistakes_are_named():
    theta, x = pairs()
    model = CDMConditional(**TINY).fit(theta, x)
    texts = CDMConditional(**TINY).fit(theta.assign(kind=np.where(np.arange(80) % 3, "a", "b")), x)
    dates = CDMConditional(**TINY).fit(pd.Series(pd.date_range("2020-01-01", periods=80), name="day"), x)
    each = r"log_prob gives a number for each column; give torch.distributions.Independent\(prior, 1\), .*shape \(2,\)"
    for call, message in (
        (lambda: model.sample(5, x, together=True), "prior is None; give one of all columns, with log_prob"),
        (lambda: model.log_prob(theta, x, together=True), "prior is None; give one of all columns, with log_prob"),
        (lambda: model.sample(5, x.iloc[:2], prior=[Uniform(0.0, 1.0)] * 2), r"prior is \[Uniform.*; give one of all"),
        (lambda: model.sample(5, x, together=True, prior=Normal(0.0, 1.0)), each),
        (lambda: model.log_prob(theta, x, prior=Uniform(torch.full((2,), -9.0), 9.0)), each),
        (lambda: dates.sample(5, x.iloc[:2], prior=ONE), "prior: log_prob takes numbers, and 'day' is a date"),
        (lambda: model.sample(5, x, together=True, prior=THREE), r"its vectors are \(3,\), those of theta \(2,\)"),
        (lambda: texts.sample(5, x, together=True, prior=THREE), "prior: .* and 'kind' is a category; give"),
        (lambda: model.sample(5, x.iloc[:2], prior=FAR), "prior: no mass in any draw given x number 0; fit more"),
        (lambda: model.sample(5, x.iloc[:2], prior="box"), "prior is 'box'; give one of all columns, with log_prob"),
        (lambda: model.sample(5, x.iloc[:2], prior=ONE), r"its vectors are \(1,\), those of theta \(2,\)"),
        (lambda: model.inside(theta, x), "inside: x holds several observations"),
        (lambda: model.inside(theta, x.iloc[0], mass=1.5), "mass is 1.5; it must be"),
        (lambda: model.sample(5, x.iloc[:, :2], together=True, prior=NORMAL), "x: no column 'c'"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.parametrize("framed", [False, True])
def test_a_region_holds_its_mass_of_the_posterior(linear, framed):
    covariance = np.linalg.inv(np.eye(2) + MATRIX.T @ MATRIX)
    gain, model, x = covariance @ MATRIX.T, linear, np.array([0.5, 1.0])
    if framed:
        theta, given = simulated(1000)
        model = CDMConditional(**START).fit(pd.DataFrame(theta), given)
    draws = np.random.RandomState(0).multivariate_normal(gain @ x, covariance, 4000)
    found = model.inside(pd.DataFrame(draws) if framed else draws, x, mass=0.8)
    assert found.dtype == bool and abs(found.mean() - 0.8) < 0.05
    # It is an ellipse around the mean: the furthest inside is nearer than the nearest outside, but for the fit.
    off = draws - gain @ x
    distance = (off @ np.linalg.inv(covariance) * off).sum(1)
    assert distance[found].max() < distance[~found].min() + 1
