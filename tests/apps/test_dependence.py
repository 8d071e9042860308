"""Estimates of the log ratio of pairs over strangers: canonical variates, Gaussians of them, unseen rows."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm

from torchcdm.apps.ratio.classifiers import MEMBERS
from torchcdm.apps.ratio.dependence import (
    VARIATES,
    Canonical,
    Towers,
    canonical,
    estimates,
    normal_scores,
    of_kinds,
    products,
    shrunk,
    significant,
    strangers,
    towers,
    turned,
)


def correlated(n, columns, rho=0.8, seed=0):
    """Of which the first two columns of either side correlate, and the others tell nothing."""
    x, noise = np.random.RandomState(seed).normal(size=(2, n, columns))
    return x, np.hstack([rho * x[:, :2] + (1 - rho**2) ** 0.5 * noise[:, :2], noise[:, 2:]])


def test_correlations_are_those_of_rows_that_were_not_seen():
    x, y = correlated(4000, 20, 0.5)
    seen, own = np.arange(2000), np.arange(2000, 4000)
    found = canonical(x, y, seen)
    for k in range(2):
        out = np.corrcoef(found.left[own, k], found.right[own, k])[0, 1]
        assert found.correlations[k] == pytest.approx(out, abs=0.04)
    assert (found.correlations[2:] < 0.12).all(), "noise alone has up to 2 sqrt(20 / 2000) = 0.2"
    nothing = canonical(x, np.random.RandomState(1).normal(size=x.shape), seen)
    assert np.square(nothing.correlations).sum() < 0.02
    assert canonical(x[:40], y[:40], np.arange(30)).correlations.size == 0, "fewer rows than they need"
    wide = np.empty((40_000, 1100), np.float32)
    assert canonical(wide, wide, np.arange(40_000)).correlations.size == 0, "at no time"


def test_shrunk_correlations_are_for_few_rows():
    """Of 20 columns and 60 rows: what the pairs of columns have in common, and none by chance."""
    own, values = np.arange(60, 4000), []
    for seed in range(6):
        draw = np.random.RandomState(seed)
        x, noise = draw.normal(size=(2, 4000, 20))
        found = [shrunk(x, y, np.arange(60)).gaussians(np.arange(60)) for y in (noise, 0.6 * x + 0.8 * noise)]
        values.append([log_ratio(own, own).mean() for log_ratio in found])
    nothing, half = np.abs(values).mean(0)
    assert nothing < 0.02 and 0.8 < half < 20 * -0.5 * math.log(1 - 0.36)


def test_gaussians_of_kinds_are_the_true_ratio_whatever_the_view():
    """Of normals with other means and deviations; Cauchy's tails are for the view of ranks, a rare kind for none."""
    draw = np.random.RandomState(0)
    kinds, means, deviations = draw.randint(0, 3, 6000), np.array([1.0, -1.0, 0.0]), np.array([1.0, 0.5, 2.0])
    z = (means[kinds] + deviations[kinds] * draw.normal(size=6000))[:, None]
    densities = norm.pdf(z, means, deviations)
    truth = np.log(densities[np.arange(6000), kinds] / densities.mean(1))
    seen, own = np.arange(3000), np.arange(3000, 6000)
    found = of_kinds(kinds, (z, normal_scores(z)), seen)(own, own)
    assert abs((found - truth[own]).mean()) < 0.01 and (found - truth[own]).std() < 0.1
    cauchy, kinds = draw.standard_cauchy((6000, 1)) + 2.0 * (kinds[:, None] == 1), np.append(3, kinds[1:])
    found = of_kinds(kinds, (cauchy, normal_scores(cauchy)), seen)(own, own)
    assert found.mean() > 0.05 and np.isfinite(of_kinds(kinds, (z, z), seen)(own, np.full(3000, 0))).all()


def spiral(x, first, second):
    """Rows whose two columns are turned by the mean square of the row."""
    angle, found = np.square(x).mean(1), x.copy()
    found[:, first] = np.cos(angle) * x[:, first] - np.sin(angle) * x[:, second]
    found[:, second] = np.sin(angle) * x[:, first] + np.cos(angle) * x[:, second]
    return found


def test_products_with_the_length_undo_a_rotation_by_it():
    x, y = correlated(6000, 3)
    sides = spiral(x, 0, 1), y
    both = sides, [products(side) for side in sides]
    plain, bent = (canonical(*part, np.arange(4500), VARIATES) for part in both)
    assert plain.correlations[1] < 0.6 < 0.72 < bent.correlations[1] < 0.82


def test_products_are_finite_whatever_the_columns():
    draw = np.random.RandomState(0)
    around = draw.normal(size=(50, 3))
    on_sphere, far = around / np.linalg.norm(around, axis=1, keepdims=True), draw.standard_cauchy((50, 2)) * 1e300
    for side in (on_sphere, np.sign(around), far, 1e-200 * around):
        assert np.isfinite(products(side)).all()


def test_columns_that_matter_are_told_from_noise():
    draw = np.random.RandomState(0)
    x = draw.normal(size=(2000, 10))
    variates = np.stack([x[:, 0] + draw.normal(size=2000), draw.normal(size=2000) - 0.2 * x[:, 3]], 1)
    np.testing.assert_array_equal(significant(x, variates, 4.0), np.isin(np.arange(10), [0, 3]))
    assert not significant(x, variates[:, :0], 4.0).any()


def test_spirals_of_uniform_columns_lose_little_of_their_information():
    """Against the true log ratio of the same rows, so that their noise does not count."""
    z, w = correlated(8000, 15, 0.7)
    sides = spiral(norm.cdf(z), 0, 1), spiral(norm.cdf(w), 1, 2)
    seen, own = np.arange(6000), np.arange(6000, 8000)
    truth = Canonical(z[:, :2], w[:, :2], np.array([0.7, 0.7])).gaussians(seen)(own, own)
    errors = [
        (found.gaussians(seen)(own, own) - truth).mean()
        for found in (turned(*map(products, sides), seen), canonical(*map(normal_scores, sides), seen))
    ]
    assert -0.045 < errors[0] < 0.01 and errors[0] > errors[1] + 0.012, errors


def test_turned_variates_of_independent_sides_tell_nothing():
    draw = np.random.RandomState(0)
    for columns in (5, 25):
        sides = [products(spiral(draw.uniform(size=(3000, columns)), 0, 1)) for _ in range(2)]
        seen, own = np.arange(2000), np.arange(2000, 3000)
        found = turned(*sides, seen).gaussians(seen)(own, own)
        assert -0.02 < found.mean() <= 2 * found.std() / 1000**0.5


def test_gaussians_of_variates_are_gaussians_and_repeated_pairs_are_left_out():
    x, y = correlated(3000, 1)
    rows, partners = np.arange(3000), np.roll(np.arange(3000), 7)
    one = Canonical(x, y, np.array([0.8]))
    joint = multivariate_normal([0, 0], [[1, 0.8], [0.8, 1]]).logpdf(np.hstack([x, y[partners]]))
    alone = -0.5 * (x[:, 0] ** 2 + y[partners, 0] ** 2) - math.log(2 * math.pi)
    np.testing.assert_allclose(one.gaussians(rows)(rows, partners), joint - alone, atol=1e-9)
    twice = Canonical(np.repeat(x, 2, 1), np.repeat(y, 2, 1), np.array([0.8, 0.79]))
    np.testing.assert_allclose(twice.gaussians(rows)(rows, partners), joint - alone, atol=1e-9)
    none = Canonical(x[:, :0], y[:, :0], np.zeros(0))
    assert not none.gaussians(rows)(rows, partners).any()


def test_strangers_are_other_rows():
    for count in (5, 6, 7, 40):
        rows = np.arange(count)
        assert all((other != rows).all() for other in strangers(rows))


def test_every_row_is_judged_by_models_that_have_not_seen_it():
    """Independent sides have no information, however much the models learn by heart."""
    x, y = np.random.RandomState(0).normal(size=(2, 400, 3))
    pairs, others = estimates(x, y, 300, 0)
    assert pairs.shape == (400, 4) and others.shape == (800, 4)
    for k in range(4):
        difference = pairs[:, k].mean() - others[:, k].mean()
        error = (pairs[:, k].var() / 400 + others[:, k].var() / 800) ** 0.5
        assert abs(difference) <= 4 * error


def test_towers_read_some_rows_at_a_time(monkeypatch):
    """All rows of a large table at once would take gigabytes."""
    read, forward = [], Towers.forward
    x, y = (torch.from_numpy(side).float().expand(MEMBERS, -1, -1) for side in correlated(10_000, 3))

    def counting(networks, x, y):
        read.append(x.shape[1])
        return forward(networks, x, y)

    monkeypatch.setattr(Towers, "forward", counting)
    found = towers(x, y, 2, 0, math.inf)
    monkeypatch.undo()
    assert max(read) < 5000 and sum(read[-3:]) == 10_000
    log_ratio = found[1](np.array([0, 9_999]), np.array([4_999, 0]))
    assert log_ratio.shape == (2,) and np.isfinite(log_ratio).all() and log_ratio[0] != log_ratio[1]
