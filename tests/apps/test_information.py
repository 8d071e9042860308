"""What a ratio tells of two data sets as a whole, beside truths in closed form; and mistakes."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from torchcdm import DensityRatio, mutual_information, two_sample_test
from torchcdm.apps.ratio.information import divergence
from torchcdm.errors import UserError

CPU = {"device": "cpu", "steps": 25}


def normals(n, shift, seed=0):
    draw = np.random.RandomState(seed)
    return draw.normal(size=(n, 2)) + [shift, 0], draw.normal(size=(n, 2))


@pytest.fixture(scope="module")
def ratio():
    return DensityRatio(0, device="cpu").fit(*normals(3000, 1.0))


# --- divergences -------------------------------------------------------------------------------------------------

# Of N(1, 1) from N(0, 1): KL 1/2 either way, chi2 e - 1, Jensen-Shannon by quadrature.
X = np.linspace(-12, 13, 200_001)
P, Q = (np.exp(-0.5 * (X - shift) ** 2) / math.sqrt(2 * math.pi) for shift in (1, 0))
M = (P + Q) / 2
JS = float((P * np.log(P / M) + Q * np.log(Q / M)).sum() / 2 * (X[1] - X[0]))
TRUTH = {"kl": 0.5, "reverse_kl": 0.5, "js": JS, "chi2": math.e - 1}
TAILS = ("reverse_kl", "chi2")
"""Those that the tails of the log ratio decide."""


@pytest.mark.parametrize("kind", TRUTH)
def test_divergences_of_normals(ratio, kind):
    fresh = normals(20_000, 1.0, seed=5)
    found = ratio.divergence(kind, *fresh)
    # Trees in the blend are too careful in the tails, which is said where the bound tells.
    error = (0.2 if kind in TAILS else 0.05) * TRUTH[kind]
    assert abs(found.value - TRUTH[kind]) < error + 3 * found.se and float(found) == found.value
    assert 0 < found.se < 0.1 and found.effective_sample_size > 1000 and found.coverage > 0.99
    if kind in ("kl", "reverse_kl"):
        assert abs(found.bound - 0.5) < 0.1
    assert kind in TAILS or not found.notes
    on_held_out = ratio.divergence(kind)
    assert abs(on_held_out.value - TRUTH[kind]) < max(error, 0.1 * TRUTH[kind]) + 4 * on_held_out.se


def test_a_divergence_of_exact_log_ratios_has_the_standard_error_of_its_mean():
    draw = np.random.RandomState(0)
    means, errors = [], []
    for _ in range(200):
        up, down = 0.5 + draw.normal(size=100), -0.5 + draw.normal(size=100)
        found = divergence("js", up, down)
        means.append(found.value)
        errors.append(found.se)
    assert np.std(means) == pytest.approx(np.mean(errors), rel=0.15)


def test_what_cannot_be_trusted_is_said():
    draw = np.random.RandomState(0)
    far = divergence("kl", 20 + draw.normal(size=500), -20 + draw.normal(size=500))
    assert [note.split(":")[0] for note in far.notes] == ["coverage", "bound"]
    assert far.text("kl").startswith(f"kl: {far.value:.4g} +-") and "coverage: 100 %" in far.text("kl")
    # A mean that is infinite, whose error is none.
    assert any("may be infinite" in note for note in divergence("chi2", *np.full((2, 50), 800.0)).notes)


def test_rows_that_come_back_are_judged_by_models_that_have_not_seen_them():
    p, q = normals(250, 0.0)
    found = DensityRatio(0, **CPU).fit(np.tile(p, (4, 1)), np.tile(q, (4, 1))).divergence("kl")
    # Of four copies each the error is that of the rows, twice what it is said to be.
    assert abs(found.value) < 4 * 2 * found.se


# --- mutual information --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_mutual_information_of_correlated_normals_whatever_the_scale_of_a_column():
    draw = np.random.RandomState(0)
    x = draw.normal(size=1000)
    y = 0.8 * x + 0.6 * draw.normal(size=1000)
    truth = -0.5 * math.log(1 - 0.64)
    for other in (y, np.exp(y)):
        found = mutual_information(x, other, **CPU)
        assert abs(found.value - truth) < 3 * found.se + 0.03
    nothing = mutual_information(x, draw.normal(size=(1000, 2)), **CPU)
    assert abs(nothing.value) < 3 * nothing.se + 0.02


@pytest.mark.parametrize("keep", [0.0, 0.6, 1.0])
def test_categories_tell_of_categories_by_their_frequencies(keep):
    """They have no order, by which networks and trees lost a fifth of what they tell."""
    draw, names = np.random.RandomState(0), np.array(["fir", "oak", "ash", "elm", "yew", "box"])
    x, other = draw.randint(0, 6, (2, 1000))
    y = np.where(draw.uniform(size=1000) < keep, (5 * x + 2) % 6, other)
    joint = np.full((6, 6), (1 - keep) / 36) + np.eye(6) * keep / 6
    exact = float((joint * np.log(36 * joint.clip(1e-300))).sum())
    sides = (pd.DataFrame({"tree": names[side]}) for side in (x, y))
    found = mutual_information(*sides, steps=1)
    assert abs(found.value - exact) < 3 * found.se + 0.04 + 0.06 * exact
    assert [note.split(":")[0] for note in found.notes] == ([] if keep else ["unproven"])


@pytest.mark.parametrize("names", [np.arange(3), np.array(["oak", "ash", "elm"])])
def test_categories_tell_of_numbers_whatever_their_order(names):
    """A tenth was missing, however many the rows."""
    draw = np.random.RandomState(0)
    kinds = draw.randint(0, 3, 4000)
    y = 2 * kinds + draw.normal(size=4000)
    densities = np.exp(-0.5 * (y[:, None] - 2 * np.arange(3)) ** 2)
    exact = np.log(densities[np.arange(4000), kinds] / densities.mean(1)).mean()  # of the same rows, of less noise
    sides = pd.DataFrame({"tree": names[kinds]}), y
    found, other = (mutual_information(*pair, **CPU) for pair in (sides, sides[::-1]))
    assert abs(found.value - exact) < 0.018 and abs(other.value - exact) < 0.018 and not found.notes
    none = mutual_information(sides[0], draw.normal(size=4000), **CPU)
    assert abs(none.value) < 0.002


def test_missing_cells_lose_what_is_missing_and_little_more():
    """Half of the cells, at random: below the least number they bent the ranks, for a quarter of what is left."""
    errors = []
    for seed in range(2):
        draw = np.random.RandomState(seed)
        x, noise = draw.normal(size=(2, 1000)) * 0.5**0.5
        y, missing = x + noise, draw.uniform(size=1000) < 0.5
        # Of the same rows: log p(y | x) / p(y) where x is known, of variances 1/2 and 1.
        exact = np.where(missing, 0, 0.5 * math.log(2) + y**2 / 2 - noise**2).mean()
        side = pd.DataFrame({"x": np.where(missing, np.nan, x)})
        errors.append(mutual_information(side, y, **CPU).value - exact)
        assert abs(mutual_information(side, draw.normal(size=1000), **CPU).value) < 0.005
    assert abs(np.mean(errors)) < 0.03


def test_a_single_step_is_enough_to_be_asked_for():
    x = np.random.RandomState(0).normal(size=(200, 2))
    assert np.isfinite(mutual_information(x, x + 1e-1 * x[::-1], steps=1).value)


@pytest.mark.parametrize(("rows", "columns"), [(40, 5), (150, 20)])
def test_few_rows_of_many_columns_show_a_part_of_their_information_and_say_so(rows, columns):
    """They gave 0 +- 0 without a word."""
    draw = np.random.RandomState(0)
    x, noise = draw.normal(size=(2, rows, columns))
    truth = -0.5 * columns * math.log(1 - 0.36)
    found = mutual_information(x, 0.6 * x + 0.8 * noise, **CPU)
    assert 0.25 * truth < found.value < truth + 2 * found.se
    assert f"rows: {rows} are few for {2 * columns} columns: a part of the dependence" in found.text("information")
    none = mutual_information(x, noise, **CPU)
    assert abs(none.value) < 0.01 and none.se >= 4 / rows
    assert any(note.startswith("unproven: no dependence shows") for note in none.notes)


@pytest.mark.parametrize("seed", range(4))
def test_an_interval_holds_dependence_that_is_too_small_to_be_proven(seed):
    x, noise = np.random.RandomState(seed).normal(size=(2, 100))
    found = mutual_information(x, 0.3 * x + math.sqrt(1 - 0.09) * noise, **CPU)
    assert abs(found.value + 0.5 * math.log(1 - 0.09)) < 2 * found.se


def test_rows_that_come_back_tell_nothing_more():
    """Copies in several folds would be seen by the models that judge them."""
    x, y = np.random.RandomState(0).normal(size=(2, 250, 2))
    once, often = mutual_information(x, y, **CPU), mutual_information(np.tile(x, (4, 1)), np.tile(y, (4, 1)), **CPU)
    assert once.value < 0.05 and often.value < 0.05
    few = np.arange(22) % 19
    with pytest.raises(UserError, match="too few samples without copies, 19"):
        mutual_information(x[few], y[few], **CPU)


def test_the_parts_of_mutual_information_have_to_go_together():
    x = np.random.RandomState(0).normal(size=(40, 2))
    for parts, message in (
        ((x, x[:30]), "x has 40 rows and y 30"),
        ((x[:10], x[:10]), "too few samples without copies, 10; at least 20"),
        ((np.ones((40, 1)), x), "x: every column is constant"),
        ((x, torch.zeros(40, 1, 8, 8)), "y: holds images"),
    ):
        with pytest.raises(UserError, match=message):
            mutual_information(*parts, **CPU)


# --- test of two samples -------------------------------------------------------------------------------------------


def test_a_difference_in_one_column_is_found_and_named():
    draw = np.random.RandomState(0)
    p, q = draw.normal(size=(200, 3)), draw.normal(size=(150, 3))
    p[:, 1] += 0.7
    found = two_sample_test(p, q)
    assert found.p_value == 1 / 1000 and found.statistic > 5
    assert [len(part) for part in found.log_ratios] == [200, 150]
    (name, value), (_, other), _ = found.columns
    assert name == "c1" and value > 5 * abs(other)
    assert p[int(found.numerator_rows[0][0]), 1] > 1.5 and q[int(found.denominator_rows[0][0]), 1] < -0.5
    assert "p = 0.001" in found.text() and "columns that differ most: c1" in found.text()
    ratio = DensityRatio(0, **CPU).fit(p, q)
    again = ratio.two_sample_test()
    assert again.p_value == found.p_value and again.columns == found.columns


@pytest.mark.parametrize(("rows", "tests"), [(60, 60), pytest.param(400, 30, marks=pytest.mark.slow)])
def test_p_values_of_one_source_are_uniform(rows, tests):
    draw = np.random.RandomState(1)
    sides = ((draw.normal(size=(rows // 3, 3)).round(1), draw.normal(size=(rows, 3)).round(1)) for _ in range(tests))
    values = [two_sample_test(p, q, permutations=99, random_state=k).p_value for k, (p, q) in enumerate(sides)]
    assert 0.38 < np.mean(values) < 0.62 and np.mean(np.array(values) <= 0.1) < 0.24


def test_what_means_do_not_show_is_seen():
    """Other correlations with the same columns; two modes as far apart as one is wide; images with a moved square."""
    draw = np.random.RandomState(2)
    q = draw.normal(size=(300, 4))
    p = draw.normal(size=(300, 4))
    p[:, 1] = 0.5 * p[:, 0] + 0.75**0.5 * p[:, 1]
    found = two_sample_test(p, q, permutations=199)
    assert (
        found.p_value <= 0.01 and found.seen_in == "pairs" and {name for name, _ in found.columns[:2]} == {"c0", "c1"}
    )
    p = draw.normal(size=(300, 4))
    p[:, 2] = 0.4 * p[:, 2] + 0.9 * np.sign(draw.normal(size=300))
    assert two_sample_test(p, q, permutations=199).columns[0][0] == "c2"
    images = draw.randint(0, 50, size=(120, 1, 6, 6)).astype(np.uint8)
    images[:60, :, 2:4, 2:4] += 40
    images[60:, :, 2:4, 3:5] += 40
    found = two_sample_test(images[:60], images[60:], permutations=199)
    assert found.p_value <= 0.01 and found.columns == ()
    assert two_sample_test(images[:30], images[30:60], permutations=199).p_value > 0.01


def test_columns_without_any_difference_tell_nothing():
    """All rows alike but for one column, whose values come back; more rows than are tested."""
    p, q = np.ones((30, 2)), np.ones((25, 2))
    p[:, 0], q[:, 0] = np.arange(30) % 3, np.arange(25) % 3
    assert two_sample_test(p, q, permutations=99).p_value > 0.3
    with pytest.raises(UserError, match="every column is constant"):
        two_sample_test(np.ones((30, 2)), np.ones((25, 2)))
    many = np.random.RandomState(3).normal(size=(10_400, 1))
    found = two_sample_test(many, many[:30] + 3, permutations=19)
    assert len(found.log_ratios[0]) == 10_000 and found.p_value == 0.05


@pytest.mark.parametrize("alike", [np.arange(40)[:, None] % 2, np.zeros((40, 1, 4, 4), np.uint8)])
def test_rounding_is_no_difference(alike):
    """Products of a balanced column have no variance but by rounding, which follows the order of the rows."""
    assert two_sample_test(alike, alike, permutations=199).p_value > 0.3


def test_a_test_is_drawn_and_a_loaded_ratio_has_no_data(ratio, tmp_path):
    fresh = normals(50, 1.0, seed=6)
    path = two_sample_test(*fresh, permutations=19).plot(tmp_path / "test.png")
    assert path.read_bytes().startswith(b"\x89PNG")
    ratio.save(tmp_path / "ratio")
    loaded = DensityRatio.load(tmp_path / "ratio", device="cpu")
    assert loaded.divergence("kl") == ratio.divergence("kl")
    with pytest.raises(UserError, match="has no data to test; call torchcdm.two_sample_test"):
        loaded.two_sample_test()
    with pytest.raises(UserError, match="unknown divergence 'lk'; choose from: chi2, js, kl"):
        loaded.divergence("lk")
    with pytest.raises(UserError, match="permutations is 5"):
        two_sample_test(*fresh, permutations=5)
    for parts, message in (
        ((fresh[0], fresh[1][:, :1]), "numerator: 2 column.s.; 1 are needed"),
        ((fresh[0][:10], fresh[1]), "too few samples, 10; at least 20"),
        ((fresh[0], torch.zeros(40, 1, 8, 8)), "holds images"),
    ):
        with pytest.raises(UserError, match=message):
            two_sample_test(*parts)
