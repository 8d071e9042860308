"""Fits of density ratios: interrupted, refused, cloned, loaded and fitted again."""

import numpy as np
import pytest
from oracles import normal
from sklearn.base import clone

from torchcdm import DensityRatio
from torchcdm.data import DataOptions
from torchcdm.errors import UserError


def test_an_interrupted_fit_leaves_what_was_there(monkeypatch):
    x = normal(60, 2).numpy()
    ratio = DensityRatio(device="cpu", steps=2).fit(x + 1, x)
    before = ratio.log_ratio(x)

    def stopped(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("torchcdm.apps.ratio.density_ratio.blend", stopped)
    with pytest.raises(KeyboardInterrupt):
        ratio.fit(100 * x + 1, 100 * x)
    assert np.array_equal(ratio.log_ratio(x), before)
    unfitted = DensityRatio(device="cpu", steps=2)
    with pytest.raises(KeyboardInterrupt):
        unfitted.fit(x + 1, x)
    with pytest.raises(UserError, match="this DensityRatio is not fitted"):
        unfitted.log_ratio(x)


def test_a_query_far_beyond_float32_squares_has_a_finite_ratio():
    x = normal(60, 2).numpy()
    ratio = DensityRatio(device="cpu", steps=2).fit(x + 1, x)
    query = [[1e30, 0.0], [0.0, 0.0]]
    assert np.isfinite(ratio.importance_weights(query)).all()
    assert ratio.outside_support(query).tolist() == [True, False]


def test_an_empty_query_and_too_much_validation_are_refused():
    x = normal(60, 2).numpy()
    ratio = DensityRatio(device="cpu", steps=2).fit(x + 1, x)
    with pytest.raises(UserError, match="holds no values"):
        ratio.log_ratio(x[:0])
    with pytest.raises(UserError, match="leaves nothing to train on"):
        DensityRatio(device="cpu", data={"validation_fraction": 0.99}).fit(x, x)


@pytest.mark.parametrize("seed", [None, -1, "a", np.random.RandomState(0), True])
def test_other_random_states_are_refused(seed):
    with pytest.raises(UserError, match="random_state is .*; (it must be a valid integer|it must be at least 0)"):
        DensityRatio(random_state=seed)


def test_sources_that_hardly_overlap_are_said():
    x = normal(60, 2).numpy()
    assert any("hardly overlap" in note for note in DensityRatio(device="cpu", steps=2).fit(x + 20, x).notes)


def test_a_clone_has_the_settings_and_is_not_fitted():
    x = normal(60, 2).numpy()
    ratio = DensityRatio(3, device="cpu", steps=2, model={"components": 2}).fit(x + 1, x)
    again = clone(ratio)
    with pytest.raises(UserError, match="not fitted"):
        again.log_ratio(x)
    again.overrides["model"]["components"] = 1
    assert ratio.overrides == {"steps": 2, "model": {"components": 2}}, "shared with the clone"
    assert np.array_equal(clone(ratio).fit(x + 1, x).log_ratio(x), ratio.log_ratio(x))


def test_every_setting_is_cloned():
    other = {"random_state": 1, "discrete": "error", "device": "cpu", "progress": True,
             "preset": "mlp", "steps": 5}
    ratio, cloned = vars(DensityRatio(**other)), vars(clone(DensityRatio(**other)))
    assert ratio == cloned, "neither has been fitted"
    assert all(value != vars(DensityRatio())[name] for name, value in ratio.items() if name[0] != "_")


def test_a_loaded_ratio_can_be_fitted_again_with_its_settings(tmp_path):
    x = normal(60, 2).numpy()
    data = {"validation_fraction": 0.3}
    ratio = DensityRatio(3, device="cpu", steps=2, discrete="error", data=data).fit(x + 1, x)
    ratio.save(tmp_path)
    again = DensityRatio.load(tmp_path, device="cpu")
    assert np.array_equal(again.fit(x + 1, x).log_ratio(x), ratio.log_ratio(x))
    assert again.overrides == {"steps": 2, "data": data} and again.discrete == "error"
    assert again.held_out.denominator == 18
    named = DensityRatio(3, device="cpu", steps=2, discrete="error", data=DataOptions(validation_fraction=0.3))
    assert np.array_equal(named.fit(x + 1, x).log_ratio(x), ratio.log_ratio(x))
