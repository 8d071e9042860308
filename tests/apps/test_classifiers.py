"""Classifiers of the source: what no Gaussian shows, files, what chooses a step, an end in time, trees as tensors."""

import copy
import math

import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from torchcdm import DensityRatio, mutual_information
from torchcdm.apps.ratio import classifiers
from torchcdm.apps.ratio.classifiers import BATCH, Classifiers, Networks, grown, train


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


def test_the_rows_of_a_fold_choose_nothing_for_the_member_that_they_judge():
    """Each member stays at the step that is best for the others, whatever its own fold says."""
    member = Networks([1, 1])
    offsets = torch.tensor([0.0, 0.0, 0.0, 1.0])

    def losses(rows):
        # Three folds want a bias of one, the last of minus one; batches pull all of them up.
        aim = torch.where(offsets > 0, -1.0, 1.0) if rows.shape[1] < BATCH else torch.full((4,), 2.0)
        return (member.biases[0][:, 0, 0] - aim).square()

    train(member, losses, 80, torch.Generator().manual_seed(0), 300, 0.01, 0.0, math.inf)
    reached = member.biases[0][:, 0, 0]
    assert reached[3] > 0.7, "its own fold would have kept the start"
    assert (reached[:3] > -0.1).all()


def test_a_fit_ends_in_its_time():
    draw = np.random.RandomState(0)
    x, y = draw.normal(size=(3000, 20)), draw.normal(size=(3000, 20))
    optimizers = []
    hook = register_optimizer_step_post_hook(lambda optimizer, *_: optimizers.append(optimizer))
    ratio = DensityRatio(0, device="cpu", max_seconds=0.01).fit(x, y)
    found = mutual_information(x[:, :1], y[:, :1], steps=10**6, max_seconds=0.01)
    hook.remove()
    steps = [optimizers.count(one) for one in set(optimizers) if isinstance(one, torch.optim.AdamW)]
    assert steps == [1, 1, 1], "committee and network of the ratio, towers of the information"
    assert np.isfinite(ratio.log_ratio(x)).all() and abs(found.value) < 0.05


def test_a_network_without_weight_is_not_asked(ratio, monkeypatch):
    def asked(*arguments):
        raise AssertionError("evaluated")

    monkeypatch.setattr(type(ratio._model), "class_log_prob_levels", asked)
    weightless = copy.copy(ratio)
    weightless.blend = {**ratio.blend, "network": 0.0}
    x = chequers(50, seed=6)[0]
    assert np.isfinite(weightless.log_ratio(x)).all()
    weightless.blend["network"] = 0.5
    with pytest.raises(AssertionError, match="evaluated"):
        weightless.log_ratio(x)


def test_trees_are_those_of_scikit_learn():
    from sklearn.ensemble import GradientBoostingClassifier

    p, q = chequers(300)
    x, y = torch.from_numpy(np.concatenate([p, q])).float(), torch.arange(2).repeat_interleave(300)
    made = []
    original = GradientBoostingClassifier.fit
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientBoostingClassifier, "fit", lambda *a, **k: made.append(original(*a, **k)) or made[0])
        state = grown(x, y, 0)
    fitted = Classifiers(2, state["value"].shape).requires_grad_(False)
    fitted.load_state_dict(fitted.state_dict() | state)
    start = np.log(made[0].init_.class_prior_[1] / made[0].init_.class_prior_[0])
    np.testing.assert_allclose(fitted(x)[:, 1], made[0].decision_function(x.numpy()) - start, atol=1e-9)


def test_a_rare_source_keeps_its_rows_beside_many(monkeypatch):
    draw = np.random.RandomState(0)
    x = torch.from_numpy(np.concatenate([draw.normal(2, 1, (20, 2)), draw.normal(0, 1, (60_000, 2))])).float()
    y, seen = (torch.arange(len(x)) < 20).long(), []
    monkeypatch.setattr(classifiers, "grown", lambda x, y, *rest: seen.append(y) or grown(x, y, *rest))
    assert torch.isfinite(Classifiers.fit(x, y, 4, 0)(x[:100])).all()
    assert [len(seen[0]), int(seen[0].sum())] == [classifiers.MOST_ROWS, 20]


def test_a_preset_of_ones_own_trains_the_network():
    p, q = chequers(100)
    assert "network" in DensityRatio(0, device="cpu", preset="mlp", steps=4).fit(p, q).blend
    assert "network" not in DensityRatio(0, device="cpu", max_seconds=0.01).fit(p, q).blend
