"""Density ratios of two data sets: against exact ones, their sign, weights, checks, files, and mistakes."""

import copy
import math
import os
import shutil
from contextlib import suppress

import numpy as np
import pytest
import torch
from damage import resealed
from gaussian_pair import exact, samples

from torchcdm import DensityRatio
from torchcdm.apps.ratio import Calibration, effective_sample_size, importance_weights
from torchcdm.apps.ratio.checks import balanced
from torchcdm.errors import UserError
from torchcdm.zoo import located

CPU = {"device": "cpu", "steps": 25}


@pytest.fixture(scope="module")
def ratio():
    return DensityRatio(0, **CPU).fit(*samples(2500))


# --- known truth -------------------------------------------------------------------------------------------------


def test_log_ratio_of_two_gaussians(ratio):
    """In nats, numerator over denominator."""
    x = np.concatenate(samples(2000, seed=7))
    estimate = ratio.log_ratio(x)
    assert estimate.dtype == np.float64 and estimate.shape == (4000,)
    assert math.sqrt(np.mean((estimate - exact(x)) ** 2)) < 0.2
    assert np.array_equal(ratio.ratio(x), np.exp(estimate))
    assert ratio.counts == (2500, 2500)


def test_swapped_sources_have_the_opposite_sign(ratio):
    p, q = samples(2500)
    swapped = DensityRatio(0, **CPU).fit(q, p)
    x = np.concatenate(samples(500, seed=7))
    assert ratio.log_ratio(x[:500]).mean() > 0.5 > -0.5 > ratio.log_ratio(x[500:]).mean()
    assert np.abs(ratio.log_ratio(x) + swapped.log_ratio(x)).mean() < 0.15


def test_sources_of_different_size_keep_the_ratio_of_densities():
    """Eight times as many of one source shift no log ratio by log 8."""
    ratio = DensityRatio(0, **CPU).fit(samples(3200)[0], samples(400)[1])
    x = np.concatenate(samples(2000, seed=7))
    assert abs(np.mean(ratio.log_ratio(x) - exact(x))) < 0.25
    # Those of the smaller source are repeated for the network, and judge the ratio once.
    assert ratio.held_out.denominator == round(0.15 * 400)


def test_the_ratio_is_that_of_the_columns_as_they_were_given():
    """The exponential of both sides has the same ratio, and neither heavy tails nor units change it."""
    ratio = DensityRatio(0, **CPU).fit(*(1000 * np.exp(x) for x in samples(3000)))
    x = np.concatenate(samples(1000, seed=7))
    assert math.sqrt(np.mean((ratio.log_ratio(1000 * np.exp(x)) - exact(x)) ** 2)) < 0.5


def test_the_same_seed_gives_the_same_ratio():
    p, q = samples(200)
    values = [DensityRatio(seed, device="cpu", steps=3).fit(p, q).log_ratio(p) for seed in (1, 1, 2)]
    assert np.array_equal(values[0], values[1]) and not np.array_equal(values[0], values[2])


def test_images():
    draw = np.random.RandomState(0)
    dark, bright = draw.randint(0, 9, (40, 8, 8)), draw.randint(8, 17, (40, 8, 8))
    options = {"steps": 2, "batch_size": 8, "model": {"backbone": {"width": 8, "blocks": 1}}}
    ratio = DensityRatio(0, device="cpu", **options).fit(bright.astype(np.uint8), dark.astype(np.uint8))
    both = np.concatenate([bright[:10], dark[:10]]).astype(np.uint8)
    assert (np.sign(ratio.log_ratio(both)) == np.repeat([1, -1], 10)).all()


def test_log_ratios_are_in_full_precision(ratio, monkeypatch):
    """A small difference of log densities in the thousands is none of products in TF32, which a user may have set."""
    seen, log_prob_levels = [], ratio._model.base.log_prob_levels

    def watched(x):
        seen.append(torch.get_float32_matmul_precision())
        return log_prob_levels(x)

    monkeypatch.setattr(ratio._model.base, "log_prob_levels", watched)
    torch.set_float32_matmul_precision("high")
    try:
        ratio.log_ratio(samples(20)[0])
        assert set(seen) == {"highest"} and torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# --- the Gaussians that it starts from ---------------------------------------------------------------------------


def test_a_ratio_that_starts_from_a_mixture_is_saved_and_loaded(tmp_path):
    draw = np.random.RandomState(0)

    def two_modes(n, weight):
        return 0.1 * draw.normal(size=(n, 2)) + np.where(draw.uniform(size=n) < weight, 2.0, -2.0)[:, None]

    model = {"components": 2, "backbone": {"width": 8, "depth": 1, "energy_maps": 2}}
    ratio = DensityRatio(0, device="cpu", steps=2, model=model).fit(two_modes(500, 0.9), two_modes(500, 0.5))
    query = np.array([[2.0, 2.0], [-2.0, -2.0]])
    found = ratio.log_ratio(query)
    # 75 held-out samples of a side scale it: they know the shares to a third of a nat.
    np.testing.assert_allclose(found, np.log([0.9 / 0.5, 0.1 / 0.5]), atol=0.6)
    ratio.save(tmp_path / "ratio")
    np.testing.assert_allclose(DensityRatio.load(tmp_path / "ratio").log_ratio(query), found)


# --- weights -----------------------------------------------------------------------------------------------------


def test_importance_weights_reweight_the_denominator_to_the_numerator(ratio):
    _, q = samples(4000, seed=11)
    weights = ratio.importance_weights(q)
    assert weights.mean() == pytest.approx(1) and (weights >= 0).all()
    assert np.abs(np.average(q, axis=0, weights=weights) - [1.0, 0.5]).max() < 0.12
    truth = np.exp(exact(q))
    share = [ratio.effective_sample_size(w) / 4000 for w in (weights, truth)]
    assert abs(share[0] - share[1]) < 0.1


def test_balanced_weights_have_the_means_of_the_numerator(ratio):
    p, q = samples(2000, seed=7)
    weights = ratio.importance_weights(q, balance=p)
    assert weights.mean() == pytest.approx(1) and (weights >= 0).all()
    # Of the columns as the fit bends them, which is hardly at all here.
    off = np.abs(np.average(q, axis=0, weights=weights) - p.mean(axis=0)) / p.std(axis=0)
    plain = np.abs(np.average(q, axis=0, weights=ratio.importance_weights(q)) - p.mean(axis=0)) / p.std(axis=0)
    assert off.max() < 0.02 < plain.max()
    with pytest.raises(UserError, match="3 column.s.; 2 are needed"):
        ratio.importance_weights(q, balance=np.ones((5, 3)))


def test_balancing_equal_weights_gives_the_ratio_of_two_normals_of_one_deviation():
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(20_000, 2)), rng.normal(size=(20_000, 2)) + [1, 0]
    log = np.log(balanced(np.ones(len(x)), x, target))
    assert np.abs(log - (x[:, 0] - 0.5)).mean() < 0.05


def test_weights_stay_finite_where_no_weights_have_the_means():
    x = np.random.default_rng(0).normal(size=(200, 2))
    weights = balanced(np.append(0.0, np.ones(199)), np.c_[x, np.ones(200)], np.full((50, 3), 9.0))
    assert np.isfinite(weights).all() and weights[0] == 0 and weights.sum() == pytest.approx(200)


def test_weights_by_hand():
    np.testing.assert_allclose(importance_weights(np.log([1.0, 3.0])), [0.5, 1.5])
    # Of 101 weights 1, 2, ..., 101 the quantile 0.9 is 91: ten are cut down to it.
    log_ratio = np.log(np.arange(1.0, 102.0))
    clipped = np.minimum(np.arange(1.0, 102.0), 91)
    np.testing.assert_allclose(importance_weights(log_ratio, clip=0.9), clipped / clipped.mean(), rtol=1e-12)
    np.testing.assert_allclose(importance_weights(log_ratio + 5000, clip=1), importance_weights(log_ratio), rtol=1e-9)
    # However far above the quantile a sample lies.
    far = importance_weights(np.append(np.zeros(999), 1000.0), clip=0.99)
    np.testing.assert_allclose(far, np.ones(1000))
    for clip in (0, -0.1, 1.01):
        with pytest.raises(UserError, match=f"clip is {clip}; it must be"):
            importance_weights(log_ratio, clip)


def test_effective_sample_size_by_hand():
    assert effective_sample_size(np.full(7, 0.1)) == pytest.approx(7)
    assert effective_sample_size([0, 0, 4.0]) == 1
    assert effective_sample_size([1.0, 3.0]) == pytest.approx(1.6)
    assert effective_sample_size(np.array([1.0, 3.0]) * 1e300) == pytest.approx(1.6)
    for bad in ([], [0.0, 0.0], [1.0, -1.0], [1.0, math.inf], [[1.0]], [math.nan]):
        with pytest.raises(UserError, match="finite numbers|not be negative and not all zero"):
            effective_sample_size(bad)


# --- checks that need no truth -----------------------------------------------------------------------------------


def shifted(n=20_000):
    """Exact log ratios of N(1, 1) over N(0, 1), x - 1/2, at samples of both."""
    draw = np.random.RandomState(0)
    return draw.normal(1, 1, n) - 0.5, draw.normal(0, 1, n) - 0.5


def test_calibration_of_an_exact_ratio():
    check = Calibration.of(*shifted())
    assert abs(check.mean_ratio - 1) < 4 * check.mean_ratio_error < 0.1
    assert abs(check.mean_inverse - 1) < 4 * check.mean_inverse_error < 0.1
    # E_q[(p/q)²] is e for a shift by one deviation.
    assert check.effective_sample_size / check.denominator == pytest.approx(1 / math.e, abs=0.03)
    x = np.linspace(-9, 10, 20_000)
    half = np.exp(-0.5 * (x - 1) ** 2) / math.sqrt(2 * math.pi) * np.logaddexp(0, 0.5 - x)
    assert check.log_loss == pytest.approx(half.sum() * (x[1] - x[0]), abs=0.01)
    assert check.calibration_error < 0.01
    assert sum(line.mass for line in check.bins) == pytest.approx(1)
    assert sum(line.count for line in check.bins) == 40_000
    assert all(line.low <= line.predicted <= line.high for line in check.bins)


def test_calibration_notices_a_ratio_that_is_wrong():
    """Too sure of itself, and with one source more frequent than it should be."""
    right, (p, q) = Calibration.of(*shifted()), shifted()
    sure, offset = Calibration.of(3 * p, 3 * q), Calibration.of(p + 1, q + 1)
    for wrong in (sure, offset):
        assert wrong.log_loss > right.log_loss + 0.02 and wrong.calibration_error > 0.05
    assert offset.mean_ratio == pytest.approx(math.e * right.mean_ratio)
    assert offset.mean_inverse == pytest.approx(right.mean_inverse / math.e)


def test_a_source_with_values_of_its_own_is_named():
    """The exact ratio of U(0, 1) over U(0, 2): the mean of q/p over the numerator is the half that they share."""
    (note,) = Calibration.of(np.full(500, math.log(2)), np.repeat([math.log(2), -60.0], 250)).warnings()
    assert "mean_inverse" in note and "the denominator has values that the numerator has not" in note


def test_few_held_out_samples_of_even_weight_are_not_told_to_be_clipped():
    even, uneven = (np.array([top, *[0.0] * 11]) for top in (0.0, 5.0))
    assert Calibration.of(even, even).warnings() == []
    assert any("effective_sample_size: 1 of 12" in note for note in Calibration.of(uneven, uneven).warnings())


def test_no_advice_on_a_network_that_nobody_asked_for(capsys):
    """One step stands in for it, of which a report says that it was worse than its start."""
    ratio = DensityRatio(progress=True, max_seconds=1).fit(*samples(100))
    assert "network" not in ratio.blend and capsys.readouterr().out == ""


def test_sources_of_different_size_weigh_the_same_in_the_calibration():
    p, q = shifted()
    some, all_ = Calibration.of(p[:2000], q), Calibration.of(p, q)
    assert some.calibration_error < 0.02 and abs(some.log_loss - all_.log_loss) < 0.02


def test_calibration_of_a_fitted_ratio(ratio):
    check = ratio.calibration(*samples(3000, seed=5))
    assert check.denominator == 3000 and check.calibration_error < 0.05
    assert abs(check.mean_ratio - 1) < 0.25
    assert ratio.held_out.denominator == round(0.15 * 2500)
    assert f"calibration error                 {check.calibration_error:.3f}" in check.table()
    with pytest.raises(UserError, match="at least two held-out samples"):
        ratio.calibration(samples(3)[0][:1], samples(3)[1])


def test_what_lies_outside_both_sources_is_flagged(ratio):
    inside = np.concatenate(samples(1000, seed=5))
    assert ratio.outside_support(inside).mean() < 0.005
    assert ratio.outside_support([[40.0, -40.0], [0.0, 30.0], [1e6, 1e6]]).all()
    scores = ratio.scores(np.concatenate([inside[:3], [[40.0, -40.0]]]))
    assert scores.outside.tolist() == [False, False, False, True] and len(scores.names) == 4
    # Outside one source alone the ratio is large, and no extrapolation.
    apart = DensityRatio(0, **CPU).fit(inside[:1000] + 30, inside[1000:])
    both = [inside[:1000] + 30, inside[1000:]]
    assert not apart.outside_support(np.concatenate(both)[::20]).any()
    assert apart.log_ratio(both[0]).min() > 20 and apart.log_ratio(both[1]).max() < -20


@pytest.mark.parametrize("shape", [(64,), (1, 8, 8)])
def test_new_samples_lie_inside_where_those_of_the_fit_were_few(shape):
    """Training samples are more probable than new ones under densities that were fitted to them: of images every third
    new one was flagged."""
    draw = np.random.RandomState(1)

    def drawn(mean, count, deviation=40):
        return draw.normal(mean, deviation, (count, *shape)).round().clip(0, 255).astype(np.uint8)

    few = DensityRatio(0, **CPU).fit(drawn(150, 40), drawn(100, 40))
    assert max(few.outside_support(drawn(mean, 300)).mean() for mean in (150, 100)) <= 0.03
    assert few.outside_support(np.concatenate([drawn(255, 40, 1), drawn(100, 40, 400)])).mean() > 0.95


def test_few_samples_of_many_columns_give_weights_that_are_not_extreme():
    draw = np.random.RandomState(0)
    numerator, denominator = (draw.standard_t(3, size=(n, 12)) for n in (60, 200))
    ratio = DensityRatio(0, **CPU).fit(numerator, denominator)
    fresh = draw.standard_t(3, size=(2000, 12))
    assert ratio.effective_sample_size(ratio.importance_weights(fresh)) > 200


# --- how far ratios go -------------------------------------------------------------------------------------------


def test_weights_under_a_long_tail_are_not_those_of_a_few_rows(tmp_path):
    """The denominator is a part of the numerator's distribution, a twentieth of it far out, where a t has more rows
    than two Gaussians know of; their ratio goes on rising with the distance."""
    draw = np.random.RandomState(5)
    p, q = draw.standard_t(4, size=(2, 1500, 3))
    q = q[draw.uniform(size=1500) < np.maximum(np.exp(-np.square(q).sum(1) / 6), 0.05)]
    ratio = DensityRatio(0, **CPU).fit(p, q)
    assert np.exp(ratio.blend["most"]) < 20 and ratio.log_ratio(q).max() == ratio.blend["most"]
    assert any(note.startswith("most: log ratios end at") for note in ratio.notes)
    assert 300 < ratio.effective_sample_size(ratio.importance_weights(q)) < 500
    assert max(map(max, ratio._held_out)) <= ratio.blend["most"]
    ratio.save(tmp_path / "ratio")
    assert np.array_equal(DensityRatio.load(tmp_path / "ratio").log_ratio(q), ratio.log_ratio(q))
    del ratio.blend["most"]
    with pytest.warns(UserWarning, match=f"of {len(q)} samples carry the weights p/q"):
        ratio.importance_weights(q)


# --- files -------------------------------------------------------------------------------------------------------


def test_a_saved_ratio_comes_back(ratio, tmp_path):
    ratio.save(tmp_path / "ratio")
    again = DensityRatio.load(tmp_path / "ratio", device="cpu")
    x = np.concatenate([*samples(50, seed=3), [[50.0, 50.0]]])
    assert np.array_equal(again.log_ratio(x), ratio.log_ratio(x))
    assert np.array_equal(again.outside_support(x), ratio.outside_support(x))
    assert (again.counts, again.notes) == (ratio.counts, ratio.notes)
    assert (again.held_out, again.blend) == (ratio.held_out, ratio.blend)
    assert again.divergence("kl") == ratio.divergence("kl")
    assert not list((tmp_path / "ratio").rglob("*.pkl")) and not list((tmp_path / "ratio").rglob("*.pt"))


def test_a_check_that_is_infinite_is_saved(ratio, tmp_path):
    """float64 does not hold the ratio at a sample: its mean is infinite, and JSON has no such number."""
    ratio = copy.copy(ratio)
    ratio.held_out = Calibration.of(np.array([1.0, -800.0]), np.array([0.0, 800.0]))
    assert ratio.held_out.mean_ratio == math.inf
    ratio.save(tmp_path / "ratio")
    found = DensityRatio.load(tmp_path / "ratio").held_out
    assert found.mean_ratio == math.inf and found.bins == ratio.held_out.bins


def test_a_kill_while_one_is_saved_over_another_leaves_one_of_the_two(ratio, tmp_path, monkeypatch):
    other = copy.copy(ratio)
    other.blend, other._model = ratio.blend | {"offset": 1.0}, copy.deepcopy(ratio._model)
    other._model.base.mean += 0.5
    x, replace = samples(20, seed=3)[0], os.replace
    either = [one.log_ratio(x).tolist() for one in (ratio, other)]
    for renames in range(5):
        folder, left = tmp_path / str(renames), [replace] * renames
        ratio.save(folder)
        with monkeypatch.context() as patch, suppress(IndexError):
            patch.setattr(os, "replace", lambda *paths, left=left: left.pop()(*paths))
            other.save(folder)
        assert DensityRatio.load(folder).log_ratio(x).tolist() in either


def test_damaged_files_are_refused(ratio, tmp_path):
    ratio.save(tmp_path / "ratio")

    def with_content(change):
        folder = shutil.copytree(tmp_path / "ratio", tmp_path / "damaged", dirs_exist_ok=True)
        resealed(folder / "config.json", change)
        return folder

    with pytest.raises(UserError, match="holds no trained model"):
        DensityRatio.load(tmp_path)
    with pytest.raises(UserError, match="holds a run, no DensityRatio; load it by torchcdm.load"):
        DensityRatio.load(located("zoo:two-moons"))
    with pytest.raises(UserError, match="format version 99"):
        DensityRatio.load(with_content(lambda content: content.update({"format": 99})))
    for change in ({"_warp": {"scale": [1.0]}}, {"counts": 3}, {"held_out": None}, {"_limits": ["a"]}, {"blend": 1}):
        with pytest.raises(UserError):
            DensityRatio.load(with_content(lambda content, new=change: content["estimator"]["fitted"].update(new)))
    with pytest.raises(UserError, match="damaged, missing or wrong: '_limits'"):
        DensityRatio.load(with_content(lambda content: content["estimator"]["fitted"].pop("_limits")))


# --- mistakes ----------------------------------------------------------------------------------------------------


def test_mistakes(ratio):
    p, q = samples(60)
    with pytest.raises(UserError, match="unknown override 'stesp'; did you mean 'steps'"):
        DensityRatio(stesp=3).fit(p, q)
    with pytest.raises(UserError, match="unknown preset 'encodr'"):
        DensityRatio(preset="encodr").fit("nothing.csv", q)  # before the data are read
    with pytest.raises(UserError, match="steps is 0"):
        DensityRatio(steps=0).fit("nothing.csv", q)
    with pytest.raises(UserError, match="data.spec has no effect on a ratio"):
        DensityRatio(data={"spec": "digits"}).fit(p, q)
    with pytest.raises(UserError, match="data.dequantize is of images"):
        DensityRatio(data={"dequantize": False}).fit(p, q)
    with pytest.raises(UserError, match="not fitted; call fit"):
        DensityRatio().log_ratio(p)
    with pytest.raises(UserError, match="3 column.s.; 2 are needed"):
        ratio.log_ratio(np.zeros((4, 3)))
    with pytest.raises(UserError, match="sample 0 holds a value that is not a finite number"):
        ratio.log_ratio([[1.0, math.nan]])
    with pytest.raises(UserError, match="few distinct values in the columns c1"):
        DensityRatio(discrete="error").fit(*(np.stack([x[:, 0], x[:, 1].round()], 1) for x in (p, q)))


def test_fewer_rows_than_columns_and_a_column_that_one_source_holds_constant():
    """Their Gaussians are singular; the ratio is still a number."""
    draw = np.random.RandomState(0)
    wide = DensityRatio(0, device="cpu", steps=2).fit(draw.normal(size=(20, 40)), draw.normal(size=(20, 40)))
    assert np.isfinite(wide.log_ratio(draw.normal(size=(10, 40)))).all()
    p, q = samples(100)
    q[:, 1] = 0.25
    ratio = DensityRatio(0, device="cpu", steps=2).fit(p, q)
    assert np.isfinite(ratio.log_ratio(p)).all() and ratio.log_ratio(p).mean() > 0 > ratio.log_ratio(q).mean()
