"""Conditional densities: posteriors that are known, columns that are no ordinary ones, files and mistakes."""

import numpy as np
import pandas as pd
import pytest
import torch
from damage import resealed
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

import torchcdm
from torchcdm.errors import UserError
from torchcdm.estimators import CDMConditional, CDMDensity, conditional, smooth
from torchcdm.estimators.smooth import fit_smooth

TINY = {
    "steps": 3, "width": 8, "depth": 1, "batch_size": 16, "device": "cpu", "random_state": 0,
    "overrides": {"model": {"backbone": {"energy_maps": 2}, "schedule": {"T": 8}}, "train": {"validate_every": 3}},
}  # fmt: skip

MATRIX = np.array([[1.0, 0.3], [-0.5, 2.0], [0.8, 0.8]])
NOISE = np.array([0.5, 1.0, 0.3])


def linear_gaussian(n, seed=0):
    """theta ~ N(0, I), x = A theta + noise; theta, x."""
    draw = np.random.RandomState(seed)
    theta = draw.normal(size=(n, 2))
    return theta, theta @ MATRIX.T + NOISE * draw.normal(size=(n, 3))


def posterior():
    """Covariance of theta given x, and the matrix that takes x to its mean."""
    covariance = np.linalg.inv(np.eye(2) + (MATRIX.T / NOISE**2) @ MATRIX)
    return covariance, covariance @ MATRIX.T / NOISE**2


def exact_log_prob(theta, x):
    covariance, gain = posterior()
    residual = theta - x @ gain.T
    mahalanobis = (residual @ np.linalg.inv(covariance) * residual).sum(1)
    return -0.5 * (mahalanobis + np.linalg.slogdet(2 * np.pi * covariance)[1])


def pairs(n=80):
    theta, x = linear_gaussian(n)
    return pd.DataFrame(theta, columns=["rate", "dose"]), pd.DataFrame(x, columns=["a", "b", "c"])


def test_before_training_it_is_the_posterior_of_a_linear_gaussian_simulator_in_the_units_of_theta():
    theta, x = linear_gaussian(20_000)
    new, x_new = linear_gaussian(300, seed=1)
    # A rate of almost nothing: the network stays silent. The base is the Gaussian of the moments, not a shrunk one.
    overrides = TINY["overrides"] | {"model": TINY["overrides"]["model"] | {"components": 1, "shrinkage": 0.0}}
    model = CDMConditional(**{**TINY, "lr": 1e-12, "overrides": overrides}).fit(theta * [1, 1000], x)
    expected = exact_log_prob(new, x_new) - np.log(1000)
    # What is left are the errors of moments of 17 000 pairs, which grow in the tails.
    error = np.abs(model.log_prob(new * [1, 1000], x_new) - expected)
    assert error.mean() < 0.03 and error.max() < 0.2
    one = model.log_prob(new * [1, 1000], x_new[0])
    assert np.allclose(one, exact_log_prob(new, x_new[:1]) - np.log(1000), rtol=0.02, atol=0.1)
    flow = model.set_params(likelihood="flow").log_prob(new[:20] * [1, 1000], x_new[:20])
    assert np.abs(flow - expected[:20]).max() < 0.2


def test_draws_have_the_mean_and_covariance_of_the_posterior():
    theta, x = linear_gaussian(20_000)
    model = CDMConditional(**{**TINY, "lr": 1e-12, "overrides": {"train": {"validate_every": 3}}}).fit(theta, x)
    covariance, gain = posterior()
    draws = model.sample(2000, x[:2])
    assert draws.shape == (2, 2000, 2) and draws.flags.writeable
    for k in range(2):
        assert np.allclose(draws[k].mean(0), gain @ x[k], atol=0.04)
        assert np.allclose(np.cov(draws[k].T), covariance, atol=0.1 * np.abs(covariance).max())
    one = model.sample(5, x[0], random_state=3)
    assert one.shape == (5, 2) and np.array_equal(one, model.sample(5, x[0], random_state=3))
    assert not np.array_equal(one, model.sample(5, x[0], random_state=4))


def test_before_training_positive_columns_are_linear_in_their_logarithms():
    theta, x = (np.exp(0.8 * part) for part in linear_gaussian(20_000))
    new, x_new = linear_gaussian(300, seed=1)
    model = CDMConditional(**{**TINY, "lr": 1e-12}).fit(theta, x)
    expected = exact_log_prob(new, x_new) - (0.8 * new + np.log(0.8)).sum(1)
    assert np.abs(model.log_prob(np.exp(0.8 * new), np.exp(0.8 * x_new)) - expected).mean() < 0.05


def test_draws_keep_to_the_bounds_of_a_prior_and_the_density_ends_there():
    draw = np.random.RandomState(0)
    theta = draw.uniform(-1, 3, (2000, 1))
    model = CDMConditional(**{**TINY, "steps": 50}).fit(theta, theta + 1.5 * draw.normal(size=(2000, 1)))
    draws = model.sample(2000, [[-1.0], [3.0]])
    assert ((draws < -1) | (draws > 3)).mean() < 0.005
    grid = np.linspace(-2, 4, 6001)[:, None]
    density = np.exp(model.log_prob(grid, [3.0])) * 0.001
    assert density[grid[:, 0] > 3].sum() < 0.005 * density.sum()
    assert density[(grid[:, 0] > 2.8) & (grid[:, 0] < 3)].sum() > 0.05 * density.sum()


def test_a_prior_that_is_infinite_at_its_bound_leaves_the_density_there():
    draw = np.random.RandomState(0)
    theta = draw.uniform(size=(80, 1))
    x = theta + draw.normal(size=(80, 1))
    model = CDMConditional(**TINY).fit(theta, x)
    half = torch.full((1,), 0.5, dtype=torch.float64)
    prior = torch.distributions.Independent(torch.distributions.Beta(half, half), 1)
    at = [[0.0], [0.5]]
    assert prior.log_prob(torch.tensor(at).double())[0] == torch.inf
    assert np.array_equal(model.log_prob(at, x[:2], prior=prior), model.log_prob(at, x[:2]))


def test_columns_of_x_with_heavy_tails_or_few_values_stay_moderate():
    draw = np.random.RandomState(0)
    theta, x = linear_gaussian(500)
    x = np.c_[x, draw.standard_t(1, 500), draw.poisson(0.5, 500)]
    model = CDMConditional(**TINY).fit(theta, x)
    assert np.abs(model._context(model._numbers(model._observations(x)))).max() < 30
    assert np.isfinite(model.log_prob(theta, x)).all()
    assert np.isfinite(model.sample(3, [0.0, 0.0, 0.0, 1e6, 40.0])).all()


def test_before_training_a_curve_is_known_that_rows_left_out_confirm():
    def simulate(n, seed):
        draw = np.random.RandomState(seed)
        x = draw.uniform(-2, 2, (n, 2))
        return np.c_[np.sin(2 * x[:, 0]) + 0.1 * draw.normal(size=n), x[:, 1] + 0.1 * draw.normal(size=n)], x

    model = CDMConditional(**{**TINY, "lr": 1e-12}).fit(*simulate(1000, 0))
    theta, x = simulate(2000, 1)
    residual = theta - np.c_[np.sin(2 * x[:, 0]), x[:, 1]]
    exact = (-0.5 * (residual / 0.1) ** 2 - np.log(0.1 * np.sqrt(2 * np.pi))).sum(1)
    # A straight line alone is two nats away; the other column is one.
    assert 0 < (exact - model.log_prob(theta, x)).mean() < 0.2
    assert np.array_equal((model._centre.coefficients != 0).any(0), [True, False])


@pytest.mark.parametrize("curved", [False, True])
def test_errors_at_rows_left_out_are_those_at_new_rows(curved):
    draw = np.random.RandomState(0)
    x = draw.normal(size=(2400, 3 if curved else 200))
    y = 2 * (np.sin(2 * x[:, :1]) if curved else x[:, :1]) + draw.normal(size=(2400, 1))
    found, errors = fit_smooth(x[:400], y[:400])
    later = y[400:] - found(x[400:])
    assert abs(errors.std() / later.std() - 1) < 0.1 and later.std() > 1.1 * (y[:400] - found(x[:400])).std()
    assert bool(found.coefficients.any()) == curved


def test_kernels_of_a_large_table_are_those_of_some_rows_at_a_time(monkeypatch):
    x = np.random.RandomState(0).normal(size=(900, 2))
    found, _ = fit_smooth(x, np.sin(2 * x[:, :1]))
    at_once, rows, kernels = found(x), [], smooth.rbf_kernel
    monkeypatch.setattr(smooth, "ROWS", 400)
    monkeypatch.setattr(smooth, "rbf_kernel", lambda z, *rest: rows.append(len(z)) or kernels(z, *rest))
    np.testing.assert_allclose(found(x), at_once, rtol=1e-12)
    assert rows == [400, 400, 100] and found(x[:0]).shape == (0, 1)


def test_the_network_is_told_where_theta_is_and_how_wide_it_is_given_x():
    draw = np.random.RandomState(0)
    x = draw.uniform(-1, 1, (2000, 2))
    theta = np.c_[np.sin(2 * x[:, 0]) + 0.1 * np.exp(2 * x[:, 1]) * draw.normal(size=2000), draw.normal(size=2000)]
    model = CDMConditional(**TINY).fit(theta, x)
    context = model._context(model._numbers(model._observations(x)))
    told = np.corrcoef(np.c_[context[:, [2, 4]], np.sin(2 * x[:, 0]), x[:, 1]].T)
    assert told[0, 2] > 0.98 and told[1, 3] > 0.8
    assert np.abs(model._context(1e3 * model._numbers(model._observations(x)))[:, 2:]).max() == conditional.FAR


def test_in_training_the_network_is_told_what_rows_left_out_would_be(monkeypatch):
    # Few rows of many columns: a regression knows the rows that it was fitted to better than any other.
    draw = np.random.RandomState(0)
    x, seen = draw.normal(size=(200, 60)), []
    theta = x[:, :1] + draw.normal(size=(200, 1))
    train = CDMConditional._train
    monkeypatch.setattr(CDMConditional, "_train", lambda self, *rest: seen.append(rest[1]) or train(self, *rest))
    model = CDMConditional(**TINY).fit(theta, x)
    rows = np.setdiff1d(np.arange(200), model.validation_indices_)
    noise = (theta - x[:, :1])[rows, 0]

    def leaked(context):
        return np.corrcoef(context[:, 60], noise)[0, 1]

    known = model._context(model._numbers(model._observations(x[rows])))
    assert leaked(seen[0][0][: len(rows)]) < 0.1 < 0.2 < leaked(known)


@pytest.mark.slow
def test_training_learns_what_no_regression_knows():
    # theta | x ~ N(x_1², (0.2 + |x_2|)²): its width is not the same at all x.
    def simulate(n, seed):
        draw = np.random.RandomState(seed)
        x = draw.uniform(-1, 1, (n, 2))
        return x[:, 0] ** 2 + (0.2 + np.abs(x[:, 1])) * draw.normal(size=n), x

    def exact(theta, x):
        width = 0.2 + np.abs(x[:, 1])
        return -0.5 * ((theta - x[:, 0] ** 2) / width) ** 2 - np.log(width * np.sqrt(2 * np.pi))

    def divergence(model):
        theta, x = simulate(2000, 1)
        return (exact(theta, x) - model.log_prob(theta, x)).mean()

    theta, x = simulate(3000, 0)
    options = {"random_state": 0, "device": "cpu", "width": 64, "dropout": 0.0, "overrides": {"train": {"warmup": 20}}}
    started = divergence(CDMConditional(**options, steps=1, lr=1e-12).fit(theta, x))
    trained = divergence(CDMConditional(**options, steps=400, lr=1e-2).fit(theta, x))
    assert started > 0.1
    assert abs(trained) < 0.05


@pytest.mark.slow
def test_a_discrete_theta_gets_the_probability_of_each_value():
    # A class given x, by Bayes' rule: two normals a distance of two apart.
    draw = np.random.RandomState(0)
    theta = draw.randint(0, 2, 2000)
    x = draw.normal(size=2000) + 2 * theta
    model = CDMConditional(**{**TINY, "steps": 400, "width": 32, "lr": 4e-3, "batch_size": 128,
                              "overrides": {"train": {"validate_every": 50}}}).fit(theta, x)  # fmt: skip
    draws = model.sample(500, np.array([-1.0, 1.0, 3.0]))[:, :, 0]
    assert set(np.unique(draws)) == {0.0, 1.0}
    truth = 1 / (1 + np.exp([4.0, 0.0, -4.0]))
    assert np.abs(draws.mean(1) - truth).max() < 0.15


def test_one_pass_integrates_to_one_at_each_x_whatever_the_network_says():
    # The half-life of a decay from a uniform prior: bent to a normal, and of another width at every x.
    draw = np.random.RandomState(0)
    theta = draw.uniform(0.5, 3.0, (640, 1))
    x = 2.0 ** (-np.array([0.3, 0.8, 2.0, 4.0]) / theta) + 0.07 * draw.normal(size=(640, 4))
    model = CDMConditional(**{**TINY, "width": 32}).fit(theta[:600], x[:600])
    assert model._normalizer.size
    generator, backbone = torch.Generator().manual_seed(1), model.model_.backbone
    with torch.no_grad():
        for weight in backbone.head.parameters():
            weight.copy_(0.01 * torch.randn(weight.shape, generator=generator))
        for weight in backbone.blocks.parameters():
            weight.add_(0.6 * torch.randn(weight.shape, generator=generator))
    grid = np.linspace(0.0, 4.0, 2001)[:, None]

    def log_integrals():
        return np.log([np.exp(model.log_prob(grid, row)).sum() * 0.002 for row in x[600:]])

    model._normalizer = np.empty(0)
    before = log_integrals()
    model._normalizer = model._learned_normalizer(model._context(model._numbers(model._observations(x[:600]))), 0)
    after = log_integrals()
    assert before.std() > 0.1 and after.std() < 0.02 and abs(after.mean()) < 0.02


def test_what_is_constant_in_x_is_left_out():
    theta, x = pairs()
    model = CDMConditional(**TINY).fit(theta, x.assign(site=4.0))
    alone = CDMConditional(**TINY).fit(theta, x)
    assert model.notes_ == ["x: columns left out because they are constant in training: site."]
    assert np.array_equal(model.log_prob(theta, x.assign(site=4.0)), alone.log_prob(theta, x))
    with pytest.raises(UserError, match="x: every column is constant in training; there is nothing to learn"):
        CDMConditional(**TINY).fit(theta, np.ones((80, 2)))


def test_the_random_state_decides_all_and_files_give_the_same_scores(tmp_path):
    theta, x = pairs()
    theta = theta.assign(kind=np.arange(80) % 3)
    fitted, again = CDMConditional(**TINY).fit(theta, x), clone(CDMConditional(**TINY)).fit(theta, x)
    assert np.array_equal(fitted.log_prob(theta, x), again.log_prob(theta, x))
    fitted.save(tmp_path / "saved")
    loaded = CDMConditional.load(tmp_path / "saved")
    assert np.array_equal(loaded.log_prob(theta, x), fitted.log_prob(theta, x))
    assert np.array_equal(loaded.sample(4, x.iloc[:2]), fitted.sample(4, x.iloc[:2]))
    assert loaded.get_params() == fitted.get_params() and loaded.notes_ == fitted.notes_
    with pytest.raises(UserError, match="holds a CDMConditional, no CDMDensity; load it by CDMConditional.load"):
        CDMDensity.load(tmp_path / "saved")


def test_mistakes_are_named():
    theta, x = pairs()
    model = CDMConditional(**TINY).fit(theta, x)
    for call, message in (
        (lambda: model.log_prob(theta.iloc[:, :1], x), "theta: no column 'dose'"),
        (lambda: model.log_prob(theta, x.iloc[:, :2]), "x: no column 'c'"),
        (lambda: model.log_prob(theta, x.to_numpy()[:, :2]), "x: 2 column.s.; 3 are needed"),
        (lambda: model.log_prob(theta, x.iloc[:5]), "x holds 5 rows and theta 80; give one x, or one for each theta"),
        (lambda: model.sample(0, x), "n is 0; it must be at least 1"),
        (lambda: model.set_params(likelihood="flw").log_prob(theta, x), "likelihood is 'flw'; did you mean 'flow'"),
    ):
        with pytest.raises(UserError, match=message):
            call()
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        CDMConditional(**TINY).fit(theta, x[:50])
    with pytest.raises(ValueError, match="Input theta contains NaN"):
        CDMConditional(**TINY).fit(theta.assign(dose=np.nan).to_numpy(), x)
    with pytest.raises(ValueError, match="a minimum of 10 is required"):
        CDMConditional(**TINY).fit(theta[:9], x[:9])
    with pytest.raises(UserError, match="column 'kind' holds values that come back.*discrete='dequantize'"):
        CDMConditional(**TINY, discrete="error").fit(theta.assign(kind=np.arange(80) % 3), x)
    with pytest.raises(ValueError, match="Input x contains"):
        model.log_prob(theta, x.assign(a=np.inf).to_numpy())


def test_conditional_is_exported():
    assert torchcdm.estimators.CDMConditional is CDMConditional


def test_columns_go_by_name():
    theta, x = pairs()
    model = CDMConditional(**TINY).fit(theta, x)
    truth = model.log_prob(theta, x)
    assert np.array_equal(model.log_prob(theta.iloc[:, ::-1], x.iloc[:, ::-1]), truth)
    assert np.array_equal(model.sample(2, x.iloc[:3, ::-1]), model.sample(2, x.iloc[:3]))
    assert np.array_equal(model.log_prob(theta.to_numpy(), x.to_numpy()), truth)
    with pytest.raises(UserError, match="theta: no column 'rate', 'dose'"):
        model.log_prob(x.iloc[:, :2], x)


def test_frames_are_taken_as_they_come_and_draws_are_frames():
    # The unit of x is a text: the mean of theta is 0, 5 or 20 by it, and no straight line over its levels.
    draw = np.random.RandomState(0)
    unit = draw.choice(["a", "b", "c"], 600)
    theta = pd.DataFrame({"dose": pd.Series(unit).map({"a": 5.0, "b": 20.0, "c": 0.0}) + draw.normal(size=600)})
    theta["kind"] = np.where(draw.rand(600) < 0.3, "x", "y")
    x = pd.DataFrame({"unit": unit, "day": pd.Timestamp("2024-01-01") + pd.to_timedelta(np.arange(600), "D")})
    model = CDMConditional(**{**TINY, "lr": 1e-12}).fit(theta, x)
    drawn = model.sample(200, x.iloc[0])
    assert drawn.shape == (200, 2) and set(drawn["kind"]) == {"x", "y"}
    several = model.sample(200, x.assign(unit=["a", "b", "c"] * 200)[:3])
    assert np.abs(several["dose"].groupby(level=0).mean() - [5, 20, 0]).max() < 0.5
    by_kind = model.log_prob(theta.assign(kind="x"), x), model.log_prob(theta.assign(kind="y"), x)
    assert np.exp(by_kind[0] - np.logaddexp(*by_kind)).mean() == pytest.approx((theta["kind"] == "x").mean(), abs=0.1)
    with pytest.raises(UserError, match="x: column 'unit', row 0 holds 'd', none of the 3 levels"):
        model.log_prob(theta, x.assign(unit="d"))


@pytest.mark.slow
def test_it_has_a_score_for_grid_searches():
    theta, x = pairs()
    search = GridSearchCV(CDMConditional(**TINY), {"width": [8, 16]}, cv=2).fit(theta, x)
    assert search.best_params_["width"] in (8, 16) and search.best_estimator_.n_features_in_ == 2
    assert search.best_estimator_.score(theta, x) == search.best_estimator_.log_prob(theta, x).mean()


def test_a_row_that_differs_in_a_constant_column_is_said():
    theta, x = pairs()
    model = CDMConditional(**TINY).fit(theta.assign(unit=1.0), x)
    with pytest.warns(UserWarning, match="80 rows differ in a column that was constant in training"):
        model.log_prob(theta.assign(unit=2.0), x)
    model = CDMConditional(**TINY).fit(theta, x.assign(unit=1.0))
    for call in (lambda x: model.log_prob(theta, x), lambda x: model.score(theta, x), lambda x: model.sample(1, x)):
        with pytest.warns(UserWarning, match="x differs in a column that was constant in training") as found:
            call(x.assign(unit=2.0))
        assert found[0].filename == __file__


def test_a_series_is_what_its_column_was_in_training():
    theta, x = pairs()
    day = pd.Series(pd.Timestamp("2024-01-01") + pd.to_timedelta(10 * x["a"].to_numpy(), "D"), name="day")
    for column in (day, pd.Series(np.where(x["a"] > 0, "high", "low"), name="text")):
        model = CDMConditional(**TINY).fit(theta, column.to_frame())
        assert np.array_equal(model.log_prob(theta, column), model.log_prob(theta, column.to_frame()))
        assert model.sample(2, column[:3].rename(None)).equals(model.sample(2, column[:3].to_frame()))


def test_an_observation_may_be_a_series_without_names():
    class Series:  # as that of polars
        def __array__(self, *_, **__):
            return np.array([0.5, -1.0])

        def to_frame(self):
            return object()

    theta, x = pairs()
    model = CDMConditional(**TINY).fit(theta, x[["a", "b"]])
    assert model.sample(3, Series()).equals(model.sample(3, np.array([0.5, -1.0])))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content.pop("params"),
        lambda content: content["fitted"].pop("_centre"),
        lambda content: content["fitted"].pop("_scales"),
        lambda content: content["params"].update(colour=1),
        lambda content: content.update(fitted=None),
        lambda content: content["fitted"].update(_noise=[]),
        lambda content: content["fitted"].update(_noise=[[]]),
        lambda content: content["fitted"].update(_noise=[9 * [0.5]]),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage):
    theta, x = pairs()
    CDMConditional(**TINY).fit(theta, x).save(tmp_path)
    resealed(tmp_path / "config.json", lambda content: damage(content["estimator"]))
    with pytest.raises(UserError, match="config.json: damaged"):
        CDMConditional.load(tmp_path)
