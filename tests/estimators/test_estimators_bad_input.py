"""Whatever the estimators are given ends in ValueError or TypeError, and leaves what was fitted as it was."""

import numpy as np
import pandas as pd
import pytest
import torch
from bad_tables import ALWAYS, GOOD, NUMBERS, OTHERS
from hypothesis import assume, given, settings, strategies as st
from sklearn.exceptions import NotFittedError

from torchcdm.data import from_object
from torchcdm.errors import UserError
from torchcdm.estimators import CDMConditional, CDMDensity, CDMOutlierDetector
from torchcdm.estimators.base import data_frame

TINY = {
    "steps": 2, "width": 4, "depth": 1, "batch_size": 16, "device": "cpu", "random_state": 0,
    "overrides": {"model": {"backbone": {"energy_maps": 2}, "schedule": {"T": 6}}, "train": {"validate_every": 2}},
}  # fmt: skip
X = np.c_[GOOD, GOOD[:, :2] ** 2]
FRAMES = {"frame of dates", "frame with NA", "frame of texts"}
"""What a fit takes, and no score after a fit of numbers."""
TABLES = st.sampled_from(sorted(ALWAYS.keys() - FRAMES))
few = settings(max_examples=80, deadline=None)


@pytest.fixture(scope="module")
def fitted():
    return {
        "density": CDMDensity(**TINY).fit(GOOD),
        "outliers": CDMOutlierDetector(**TINY).fit(GOOD),
        "conditional": CDMConditional(**TINY).fit(GOOD, X),
    }


CALLS = {
    "score_samples": lambda f, bad: f["density"].score_samples(bad),
    "score": lambda f, bad: f["density"].score(bad),
    "predict": lambda f, bad: f["outliers"].predict(bad),
    "decision_function": lambda f, bad: f["outliers"].decision_function(bad),
    "log_prob of theta": lambda f, bad: f["conditional"].log_prob(bad, X),
    "log_prob given x": lambda f, bad: f["conditional"].log_prob(GOOD, bad),
    "conditional score": lambda f, bad: f["conditional"].score(bad, bad),
    "sample given x": lambda f, bad: f["conditional"].sample(2, bad),
}


@given(st.sampled_from(sorted(CALLS)), st.sampled_from(sorted(ALWAYS | OTHERS)))
@settings(max_examples=200, deadline=None)
def test_bad_tables_are_not_scored(fitted, call, name):
    assume(name != "frame with NA" or call not in ("predict", "decision_function"))  # such rows are outliers
    bad = (ALWAYS | OTHERS)[name]
    with pytest.raises((ValueError, TypeError)):
        CALLS[call](fitted, bad)


@given(st.sampled_from(["density", "outliers", "theta", "x"]), TABLES)
@few
def test_a_fit_that_fails_leaves_what_was_fitted(fitted, which, name):
    estimator = fitted[which if which in fitted else "conditional"]
    before = dict(vars(estimator))
    pair = {"theta": (ALWAYS[name], GOOD), "x": (GOOD, ALWAYS[name])}.get(which, (ALWAYS[name],))
    with pytest.raises((ValueError, TypeError)):
        estimator.fit(*pair)
    assert vars(estimator) == before


def test_a_refused_setting_leaves_what_was_fitted(fitted):
    density = CDMDensity(**TINY).fit(GOOD)
    expected = density.score_samples(GOOD)
    with pytest.raises(ValueError, match="lr"):
        density.set_params(lr="fast").fit(GOOD[:20])
    assert np.array_equal(density.score_samples(GOOD), expected) and len(density.validation_indices_) == 6


@pytest.mark.parametrize("overrides", [{"data": {"gaussianize": True}}, {"seed": 9}, {"report": {"limit": 3}}])
def test_overrides_without_effect_are_refused(overrides):
    with pytest.raises(UserError, match="has no effect on an estimator"):
        CDMDensity(overrides=overrides).fit(GOOD)


def test_a_series_is_a_table_of_one_column(tmp_path):
    values = pd.Series(np.random.RandomState(0).normal(size=60), name="temp")
    density = CDMDensity(**TINY).fit(values)
    density.save(tmp_path / "density")
    assert density.n_features_in_ == 1
    again = CDMDensity.load(tmp_path / "density").score_samples(values)
    np.testing.assert_allclose(again, density.score_samples(values))


def test_texts_are_no_numbers():
    for kind, wrong in ((CDMDensity, {"validation_fraction": "0.2"}), (CDMOutlierDetector, {"contamination": "0.1"})):
        (name,) = wrong
        with pytest.raises(UserError, match=f"^{name} is '"):
            kind(**TINY, **wrong).fit(GOOD)
    with pytest.raises(UserError, match="^contamination is 'aut'; it must be a valid number, or 'auto'$"):
        CDMOutlierDetector(**TINY, contamination="aut").fit(GOOD)


TEXTS = [["a", 1.0]] * 40


@pytest.mark.parametrize("texts", [np.array(TEXTS), np.array(TEXTS, object), TEXTS])
def test_an_array_of_texts_is_to_be_a_data_frame(texts):
    for fit in (CDMDensity(**TINY).fit, lambda x: CDMConditional(**TINY).fit(GOOD[:40], x)):
        with pytest.raises(UserError, match="holds texts; give a data frame"):
            fit(texts)


def test_a_table_that_is_not_collected_is_refused():
    class LazyFrame:
        columns, collect = ["a", "b"], None

    lazy = LazyFrame()
    for fit in (CDMDensity(**TINY).fit, lambda x: CDMConditional(**TINY).fit(GOOD, x), from_object):
        with pytest.raises(UserError, match=r"a LazyFrame holds no rows yet; call its .collect\(\)"):
            fit(lazy)


@pytest.mark.parametrize("name", NUMBERS)
def test_bad_numbers_of_draws_and_seeds_are_refused(fitted, name):
    bad = NUMBERS[name]
    for call in (
        lambda: fitted["density"].sample(bad),
        lambda: fitted["conditional"].sample(bad, X[:2]),
        lambda: fitted["density"].sample(2, bad),
    ):
        with pytest.raises((ValueError, TypeError)):
            call()


def test_nothing_answers_before_a_fit():
    for call in (
        lambda: CDMDensity().score_samples(GOOD),
        lambda: CDMDensity().sample(1),
        lambda: CDMOutlierDetector().predict(GOOD),
        lambda: CDMConditional().log_prob(GOOD, GOOD),
        lambda: CDMConditional().sample(1, GOOD[0]),
    ):
        with pytest.raises(NotFittedError):
            call()


def test_a_row_whose_square_overflows_has_no_density_and_not_nan(fitted):
    far = np.r_[GOOD[:1], GOOD[1:2] * 1e200]
    values = fitted["density"].score_samples(far)
    assert np.isfinite(values[0]) and values[1] == -np.inf


def test_tensors_are_read(fitted):
    expected = fitted["density"].score_samples(GOOD)
    assert np.array_equal(fitted["density"].score_samples(torch.from_numpy(GOOD).requires_grad_()), expected)
    conditional, x = fitted["conditional"], torch.from_numpy(X[0]).requires_grad_()
    assert np.array_equal(conditional.sample(3, x), conditional.sample(3, X[0]))
    assert np.array_equal(conditional.log_prob(GOOD, x), conditional.log_prob(GOOD, X[0]))
    vector = torch.from_numpy(GOOD[:, 0]).requires_grad_()
    assert data_frame(vector, "theta").equals(data_frame(GOOD[:, 0], "theta"))


@pytest.mark.parametrize(
    "options",
    [
        *({name: 10**9} for name in ("width", "depth", "components", "batch_size")),
        {"overrides": {"model": {"backbone": {"energy_maps": 10**9}}}},
    ],
)
def test_absurd_sizes_are_refused_before_they_take_memory(options):
    with pytest.raises(ValueError, match="1000000000"):
        CDMDensity(**TINY | options).fit(GOOD)


@pytest.mark.parametrize("scale", [1e300, 1e160, 1e-160])
@pytest.mark.parametrize("fit", [CDMDensity(**TINY).fit, CDMOutlierDetector(**TINY).fit,
                                 lambda x: CDMConditional(**TINY).fit(x, GOOD),
                                 lambda x: CDMConditional(**TINY).fit(GOOD, x)])  # fmt: skip
def test_columns_whose_squares_leave_float64_are_refused(fit, scale):
    with pytest.raises(ValueError, match="column '0' has values too large or too small for float64"):
        fit(scale * (GOOD - GOOD.mean(0)))
