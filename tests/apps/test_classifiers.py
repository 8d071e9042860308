"""Classifiers of the source: what no Gaussian shows, files, unseen rows as control variate, trees as tensors."""

import math

import numpy as np
import pytest
import torch

from torchcdm import DensityRatio
from torchcdm.apps.ratio.classifiers import Classifiers, grown
from torchcdm.apps.ratio.information import Variate, divergence


def chequers(n, seed=0):
    """Rows of the squares of one colour, and rows of all squares: the log ratio is log 2, or minus infinity."""
    draw = np.random.RandomState(seed)
    p, q = draw.uniform(-1, 1, (2, n, 2))
    p[:, 1] = np.abs(p[:, 1]) * np.sign(p[:, 0])
    return p, q


@pytest.fixture(scope="module")
def ratio():
    return DensityRatio(0, device="cpu", steps=80).fit(*chequers(1500))


def test_what_no_gaussian_shows_is_learned(ratio):
    p, q = chequers(2000, seed=5)
    assert ratio.blend["gaussians"] < 0.5 < ratio.blend["committee"] + ratio.blend["trees"]
    assert ratio.held_out.log_loss < 0.55, "log 2 - 0.216 = 0.477 at best; two Gaussians have 0.66"
    assert np.median(ratio.log_ratio(p)) == pytest.approx(math.log(2), abs=0.2)
    away = q[q[:, 0] * q[:, 1] < -0.05]
    assert np.median(ratio.log_ratio(away)) < -1.5


def test_classifiers_are_saved_with_the_ratio(ratio, tmp_path):
    ratio.save(tmp_path)
    again, x = DensityRatio.load(tmp_path, device="cpu"), chequers(50, seed=6)[1]
    assert np.array_equal(again.log_ratio(x), ratio.log_ratio(x)) and again.blend == ratio.blend
    far = again.log_ratio([[1e30, -1e30], [1.0, -1.0]])
    assert np.isfinite(far).all()


def test_divergences_of_held_out_rows_use_the_training_rows_too(ratio):
    found = ratio.divergence("kl")
    numerator, denominator = (np.array(side) for side in ratio._held_out)
    assert found.se < divergence("kl", numerator, denominator).se
    assert abs(found.value - math.log(2)) < 0.15


def test_a_control_variate_moves_the_mean_as_far_as_it_correlates():
    draw = np.random.RandomState(0)
    values = []
    for _ in range(200):
        x = draw.normal(size=1000)
        held_out, training = x[:100], x[100:]
        noise = 0.3 * draw.normal(size=100)
        variates = [Variate((3 * held_out).tolist(), float(3 * training.mean()), 9 / 900)] * 2
        values.append(divergence("kl", held_out + noise, -held_out, variates))
    spread = np.std([found.value for found in values])
    assert spread == pytest.approx(np.mean([found.se for found in values]), rel=0.2) and spread < 0.06


def test_trees_are_those_of_scikit_learn():
    from sklearn.ensemble import GradientBoostingClassifier

    p, q = chequers(300)
    x, y = torch.from_numpy(np.concatenate([p, q])).float(), torch.arange(2).repeat_interleave(300)
    made = []
    original = GradientBoostingClassifier.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientBoostingClassifier, "fit", lambda *a: made.append(original(*a)) or made[0])
        state = grown(x, y, 0)
    fitted = Classifiers(2, state["value"].shape)
    fitted.load_state_dict(state | {f"committee.{k}": v for k, v in fitted.committee.state_dict().items()})
    start = np.log(made[0].init_.class_prior_[1] / made[0].init_.class_prior_[0])
    np.testing.assert_allclose(fitted(x)[:, 1], made[0].decision_function(x.numpy()) - start, atol=1e-9)


def test_a_rare_source_keeps_its_rows_beside_many():
    draw = np.random.RandomState(0)
    x = torch.from_numpy(np.concatenate([draw.normal(2, 1, (20, 2)), draw.normal(0, 1, (60_000, 2))])).float()
    y = (torch.arange(len(x)) < 20).long()
    found = Classifiers.fit(x, y, 4, 0)
    assert found.unseen[0][1] > 0 and all(math.isfinite(value) for side in found.unseen for value in side)


def test_a_preset_of_ones_own_trains_the_network():
    p, q = chequers(100)
    assert "network" in DensityRatio(0, device="cpu", preset="mlp", steps=4).fit(p, q).blend
