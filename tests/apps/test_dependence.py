"""Estimates of the log ratio of pairs over strangers: canonical variates, Gaussians of them, unseen rows."""

import math

import numpy as np
import pytest
from scipy.stats import multivariate_normal

from torchcdm.apps.ratio.dependence import VARIATES, Canonical, canonical, estimates, strangers, with_length


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


def test_products_with_the_length_undo_a_rotation_by_it():
    x, y = correlated(6000, 3)
    angle = np.square(x).sum(1) / 3
    turned = np.stack([
        np.cos(angle) * x[:, 0] - np.sin(angle) * x[:, 1], np.sin(angle) * x[:, 0] + np.cos(angle) * x[:, 1], x[:, 2]
    ], 1)  # fmt: skip
    plain, bent = (
        canonical(*sides, np.arange(4500), VARIATES)
        for sides in ((turned, y), (with_length(turned)[1], with_length(y)[1]))
    )
    assert plain.correlations[1] < 0.6 < 0.72 < bent.correlations[1] < 0.82


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
