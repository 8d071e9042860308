"""Estimators of tables: scikit-learn's own checks, columns that are no ordinary ones, files, and known densities."""

import pickle
import subprocess
import sys
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import geom, norm
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import torchcdm
from torchcdm.errors import UserError
from torchcdm.estimators import CDMConditional, CDMDensity, CDMOutlierDetector, base as estimators_base
from torchcdm.runtime.artefact import write_artefact

TINY = {
    "steps": 3, "width": 8, "depth": 1, "batch_size": 16, "device": "cpu", "random_state": 0,
    "overrides": {"model": {"backbone": {"energy_maps": 2}, "schedule": {"T": 8}}, "train": {"validate_every": 3}},
}  # fmt: skip


@parametrize_with_checks([CDMOutlierDetector(**TINY)])
def test_scikit_learn_checks(estimator, check):
    check(estimator)


@pytest.mark.slow
@parametrize_with_checks([CDMDensity(**TINY), CDMOutlierDetector(**TINY, contamination=0.1)])
def test_scikit_learn_checks_of_other_estimators(estimator, check):
    check(estimator)


def table(n=80, seed=0):
    draw = np.random.RandomState(seed)
    x = draw.normal(size=(n, 3)) @ np.array([[1.0, 0.5, 0], [0, 0.2, 0.3], [0, 0, 5.0]])
    return pd.DataFrame(x + [1e9, 0, -7], columns=["time", "level", "flow"])


def test_copies_of_a_row_are_all_held_out_or_all_trained_on():
    frame = pd.concat([table(40)] * 3, ignore_index=True)
    for kind, given in ((CDMDensity, (frame,)), (CDMOutlierDetector, (frame,)), (CDMConditional, (frame, frame))):
        held_out = kind(**TINY).fit(*given).validation_indices_
        rows = np.setdiff1d(np.arange(120), held_out)
        assert not set(held_out % 40) & set(rows % 40), kind.__name__


def test_max_seconds_counts_the_choice_of_the_mixture(monkeypatch):
    # A clock that every look moves by a second, and every choice by twenty.
    seconds, choose = 0.0, estimators_base.best_start

    def look():
        nonlocal seconds
        seconds += 1
        return seconds

    def best_start(*given, **options):
        nonlocal seconds
        seconds += 20
        return choose(*given, **options)

    monkeypatch.setattr(estimators_base, "best_start", best_start)
    density = CDMDensity(**TINY | {"steps": 10**6, "max_seconds": 50})
    density.clock = look
    density.fit(table())
    assert 50 <= seconds <= 54


# --- scores ----------------------------------------------------------------------------------------------------------


def gaussian_before_training(**options):
    # A rate of almost nothing: the model stays the Gaussian that it starts as.
    overrides = TINY["overrides"] | {"model": TINY["overrides"]["model"] | {"components": 1, "shrinkage": 0.0}}
    return CDMDensity(**{**TINY, "lr": 1e-12, "overrides": overrides, **options})


def test_nats_are_in_the_units_of_the_table_and_a_large_offset_costs_nothing():
    frame = table(400)
    density = gaussian_before_training().fit(frame)
    train = np.delete(frame.to_numpy(), density.validation_indices_, 0)
    mean, covariance = train.mean(0), np.cov(train.T, bias=True)
    truth = torch.distributions.MultivariateNormal(torch.tensor(mean), torch.tensor(covariance))
    expected = truth.log_prob(torch.tensor(frame.to_numpy())).numpy()
    assert np.allclose(density.score_samples(frame), expected, atol=1e-3)
    assert density.score(frame) == pytest.approx(expected.mean(), abs=1e-3)
    # In other units the density is another by the volume.
    scaled = gaussian_before_training().fit(frame * 1000)
    assert np.allclose(scaled.score_samples(frame * 1000), expected - 3 * np.log(1000), atol=1e-3)


def test_the_flow_of_a_gaussian_is_that_gaussian_blurred_by_the_first_level():
    frame = table(200)
    density = gaussian_before_training().fit(frame)
    one_pass = density.score_samples(frame)
    flow = density.set_params(likelihood="flow").score_samples(frame)
    assert np.abs(flow - one_pass).max() < 0.1 and np.abs(flow - one_pass).max() > 0
    with pytest.raises(UserError, match="likelihood is 'flo'; did you mean 'flow'"):
        density.set_params(likelihood="flo").score_samples(frame)


def test_the_flow_of_a_row_is_its_own_wherever_it_stands():
    z = np.random.RandomState(0).normal(size=(200, 20))
    z[:, 1::2] = z[:, ::2] ** 2 + 0.2 * z[:, 1::2]
    density = CDMDensity(steps=20, width=16, components=1, random_state=0, likelihood="flow", device="cpu").fit(z)
    few = density.score_samples(z[:6])
    assert np.allclose(density.score_samples(z[:6][::-1])[::-1], few, atol=1e-6)
    assert np.allclose(density.score_samples(z[:3]), few[:3], atol=1e-6) and len(set(few)) == 6


@pytest.mark.slow
def test_skewed_and_discrete_columns_are_brought_near_a_normal_first():
    # Three values, and a log-normal column whose mean depends on them: standardised alone, 0.3 nats are lost.
    def rows(seed):
        draw = np.random.RandomState(seed)
        kind = draw.choice(3, 2000, p=[0.6, 0.3, 0.1])
        return np.c_[kind, np.exp(kind + draw.normal(size=2000))]

    new = rows(1)
    log_mass = np.log([0.6, 0.3, 0.1])[new[:, 0].astype(int)]
    normal = -0.5 * (np.log(new[:, 1]) - new[:, 0]) ** 2 - 0.5 * np.log(2 * np.pi)
    true = (log_mass + normal - np.log(new[:, 1])).mean()
    density = CDMDensity(random_state=0, steps=200, width=32, device="cpu").fit(rows(0))
    assert abs(density.score(new) - true) < 0.1
    sampled = density.sample(500, random_state=1)
    assert (sampled[:, 1] > 0).all() and abs(np.log(sampled[:, 1]).mean() - 0.5) < 0.2


def test_a_discrete_column_is_scored_as_a_probability():
    # Two equally likely values, whatever number stands for them: each has log-probability -log 2, and no density does
    # better than that in the mean.
    draw = np.random.RandomState(0)
    coin = draw.randint(0, 2, 600)
    for low, high in ((0.0, 1.0), (-3.0, 997.0)):
        x = np.c_[np.where(coin, high, low), draw.normal(size=600)]
        density = CDMDensity(random_state=0, device="cpu", steps=150, batch_size=128, width=32, lr=4e-3).fit(x)
        (cell,) = (found.width for found in density.columns_.cells.values())
        assert cell == high - low
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(torch.tensor(x[:, 1])).numpy()
        per_row = density.score_samples(x) - normal
        assert -0.15 < per_row.mean() + np.log(2) < 0.1
        sampled = density.sample(200, random_state=1)
        assert set(sampled[:, 0]) == {low, high} and 0.3 < (sampled[:, 0] == low).mean() < 0.7
    with pytest.raises(UserError, match="column '0' holds values that come back.*discrete='dequantize'"):
        CDMDensity(discrete="error").fit(x)


def test_neighbours_tell_of_values_with_few_rows():
    # Six rows a value: by counts alone 0.25 nats are lost, and as many values more at whole numbers that no row has.
    def rows(seed):
        draw = np.random.RandomState(seed)
        return np.round(np.c_[draw.normal(1000, 50, 1500), draw.geometric(0.03, 1500)])

    new = rows(1)
    true = (norm.logpdf(new[:, 0], 1000, 50) + geom.logpmf(new[:, 1], 0.03)).mean()
    density = CDMDensity(random_state=0, steps=1, device="cpu").fit(rows(0))
    assert set(density.columns_.cells) == {0, 1}
    assert abs(density.score(new) - true) < 0.1


def test_thin_structure_is_known():
    # Columns that nearly add up, and tight groups far apart: along them one Gaussian of some was too wide.
    draw = np.random.RandomState(0)
    x, error = draw.normal(size=(2, 2000))
    thin = np.c_[x, x + 1e-3 * error]
    groups = 500 * np.array([[0, 0], [1.0, 2], [2, 0.6]])[draw.randint(0, 3, 2000)] + draw.normal(size=(2000, 2))
    of_thin, of_groups = -norm.entropy() - norm(scale=1e-3).entropy(), -np.log(3) - 2 * norm.entropy()
    for rows, true in ((thin, of_thin), (groups, of_groups)):
        density = CDMDensity(random_state=0, steps=1, device="cpu").fit(rows[:1000])
        assert abs(density.score(rows[1000:]) - true) < 0.1


def test_a_constant_column_is_left_out_with_a_warning_and_marks_outliers():
    frame = table(100).assign(site=4.0)
    with pytest.warns(UserWarning, match="left out because they are constant in training: site"):
        density = CDMDensity(**TINY).fit(frame)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alone = CDMDensity(**TINY).fit(frame.drop(columns="site"))
        assert np.array_equal(density.score_samples(frame), alone.score_samples(frame.drop(columns="site")))
    assert (density.sample(5, random_state=0)["site"] == 4).all()
    moved = frame.assign(site=[5.0] * 2 + [4.0] * 98)
    with pytest.warns(UserWarning, match="2 rows differ in a column that was constant"):
        density.score_samples(moved)
    with pytest.warns(UserWarning, match="constant"):
        detector = CDMOutlierDetector(**TINY).fit(frame)
    assert (detector.predict(moved)[:2] == -1).all()
    assert np.isfinite(detector.score_samples(moved)).all()
    assert detector.score_samples(moved)[:2].max() < detector.score_samples(frame).min()
    with pytest.raises(UserError, match="every column is constant"):
        CDMDensity(**TINY).fit(np.ones((20, 2)))


@pytest.mark.parametrize("values", [np.arange(80) % 3, np.r_[np.zeros(30), np.linspace(1, 2, 50)]])
def test_columns_whose_density_has_no_upper_bound_can_be_refused(values):
    with pytest.raises(UserError, match="column 'b' holds values that come back.*no upper bound"):
        CDMDensity(**TINY, discrete="error").fit(table(80).assign(b=values))


def test_columns_whose_values_nearly_coincide_are_refused():
    x = np.c_[np.random.RandomState(0).choice([0, 1, 1 + 1e-12], 100), np.arange(100.0)]
    with pytest.raises(UserError, match="column '0' has 3 distinct values.*apart; round the column"):
        CDMDensity(**TINY).fit(x)


def as_it_comes(n=80):
    """Numbers, texts, dates, booleans, zeros that come back, missing cells, a constant."""
    draw = np.random.RandomState(1)
    return table(n).assign(
        kind=draw.choice(["a", "b", None], n),
        day=pd.Timestamp("2020-01-01") + pd.to_timedelta(draw.randint(300, size=n), "D"),
        ok=draw.rand(n) < 0.5, rain=np.where(draw.rand(n) < 0.4, 0, draw.exponential(size=n)),
        gap=np.where(draw.rand(n) < 0.2, np.nan, draw.normal(size=n)), site="here",
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:the table. columns left out")
@pytest.mark.parametrize("kind", [CDMDensity, CDMOutlierDetector])
def test_data_frames_are_taken_as_they_come(kind, tmp_path):
    frame = as_it_comes()
    fitted = kind(**TINY).fit(frame)
    truth = fitted.score_samples(frame)
    assert np.isfinite(truth).all() and fitted.n_features_in_ == 9
    assert np.array_equal(fitted.score_samples(frame.iloc[:, ::-1].assign(more=1)), truth)
    fitted.save(tmp_path)
    loaded, model = kind.load(tmp_path), torchcdm.load(tmp_path)
    assert np.array_equal(loaded.score_samples(frame.astype({"day": str})), truth)
    assert model.log_prob(frame).shape == (80,)
    for drawn in (torchcdm.sample(model, 30, seed=0), *([loaded.sample(30)] if kind is CDMDensity else [])):
        assert [t.kind for t in drawn.dtypes] == [t.kind for t in frame.dtypes]
        assert set(drawn["site"]) == {"here"} and set(drawn["kind"].dropna()) <= {"a", "b"}
        assert 0 < (drawn["rain"] == 0).sum() < 30 and drawn["gap"].isna().any()
    new = frame.assign(kind="c")
    with pytest.raises(UserError, match="no column 'level', 'kind'"):
        fitted.score_samples(frame.drop(columns=["kind", "level"]))
    if kind is CDMDensity:
        with pytest.raises(UserError, match="column 'kind', row 0 holds 'c', none of the 3 levels of training"):
            fitted.score_samples(new)
    else:
        assert (fitted.predict(new) == -1).all()


def test_samples_have_the_labels_of_the_table_numbers_too(tmp_path):
    frame = table(80).set_axis([0, 1, 4], axis=1)
    fitted = CDMDensity(**TINY).fit(frame)
    fitted.save(tmp_path)
    for sampled in (fitted.sample(3), CDMDensity.load(tmp_path).sample(3)):
        assert list(sampled.columns) == [0, 1, 4] and np.isfinite(fitted.score_samples(sampled)).all()


@pytest.mark.parametrize("kind", [CDMDensity, CDMOutlierDetector])
def test_what_the_model_scores_lies_in_the_cells_of_the_row(kind, tmp_path):
    state = np.random.RandomState(0).choice([0.0, 2.0, 5.0], 80)
    frame = table(80).assign(state=state)
    fitted = kind(**TINY).fit(frame)
    fitted.save(tmp_path)
    for estimator in (fitted, kind.load(tmp_path)):
        seen = []
        estimator.model_.transform.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        estimator.score_samples(frame)
        moved = torch.stack(seen) - estimator.columns_.encode(frame).x
        assert not moved[:, :, :3].any()
        assert 0.8 < float(moved[:, :, 3].abs().max()) <= 1


# --- as people use them ----------------------------------------------------------------------------------------------


def test_pipeline_and_grid_search_over_a_data_frame():
    frame = table(60)
    search = GridSearchCV(CDMDensity(**TINY), {"width": [4, 8], "lr": [1e-3]}, cv=2).fit(frame)
    assert search.best_params_["width"] in (4, 8) and np.isfinite(search.cv_results_["mean_test_score"]).all()
    assert search.best_estimator_.feature_names_in_.tolist() == ["time", "level", "flow"]
    pipeline = make_pipeline(StandardScaler(), CDMDensity(**TINY)).fit(frame)
    assert np.isfinite(pipeline.score(frame)) and pipeline.score_samples(frame).shape == (60,)
    with pytest.raises(UserError, match="no column 'time'"):
        search.best_estimator_.score_samples(frame.rename(columns={"time": "when"}))
    with pytest.raises(ValueError, match="NaN"):
        CDMDensity(**TINY).fit(frame.assign(flow=np.nan).to_numpy())


def test_the_random_state_decides_all():
    frame = table(60)
    one, again = CDMDensity(**TINY).fit(frame), clone(CDMDensity(**TINY)).fit(frame)
    other = CDMDensity(**{**TINY, "random_state": 1}).fit(frame)
    assert np.array_equal(one.score_samples(frame), again.score_samples(frame))
    assert not np.array_equal(one.score_samples(frame), other.score_samples(frame))
    assert np.array_equal(one.sample(4, random_state=3), again.sample(4, random_state=3))
    assert not np.array_equal(one.sample(4, random_state=3), one.sample(4, random_state=4))
    generator = np.random.RandomState(5)
    density = CDMDensity(**{**TINY, "random_state": generator}).fit(frame)
    assert not np.array_equal(density.sample(4), density.sample(4))  # a generator moves on


@pytest.mark.parametrize("kind", [CDMDensity, CDMOutlierDetector])
def test_files_and_pickles_give_the_same_scores(kind, tmp_path):
    frame = table(60).assign(state=np.arange(60) % 3)
    options = {"anomaly_score": "levels"} if kind is CDMOutlierDetector else {}
    fitted = kind(**TINY, **options).fit(frame)
    fitted.save(tmp_path / "saved")
    loaded = kind.load(tmp_path / "saved")
    for other in (loaded, pickle.loads(pickle.dumps(fitted))):
        assert np.array_equal(other.score_samples(frame), fitted.score_samples(frame))
        assert other.get_params() == fitted.get_params() and other.notes_ == fitted.notes_
        assert other.feature_names_in_.tolist() == fitted.feature_names_in_.tolist()
        assert other.validation_indices_.tolist() == fitted.validation_indices_.tolist()
    if kind is CDMOutlierDetector:
        assert np.array_equal(loaded.predict(frame), fitted.predict(frame))
    assert not list((tmp_path / "saved").glob("*.p*k*l*"))
    assert isinstance(torchcdm.load(tmp_path / "saved"), torchcdm.ClassificationDiffusion)
    wrong = CDMDensity if kind is CDMOutlierDetector else CDMOutlierDetector
    with pytest.raises(UserError, match=f"holds a {kind.__name__}, no .*; load it by {kind.__name__}.load"):
        wrong.load(tmp_path / "saved")
    write_artefact(tmp_path / "run" / "config.json", "run", {}, {"model.safetensors": {}})
    with pytest.raises(UserError, match="holds a run, which this would replace"):
        fitted.save(tmp_path / "run")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("mine")
        with pytest.raises(UserError, match=f"holds {name}, which no run wrote"):
            fitted.save(tmp_path / name)
        assert (tmp_path / name / name).read_text() == "mine"
    fitted.save(tmp_path / "saved")  # in place of itself
    (tmp_path / "saved" / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged, not JSON"):
        kind.load(tmp_path / "saved")


def test_a_warning_of_a_fit_points_at_the_call(monkeypatch):
    def stop(*_):
        raise UserError("columns are described")

    monkeypatch.setattr(estimators_base.TableEstimator, "_split_rows", stop)
    frame = table(20).assign(site=1.0)
    for kind, given in ((CDMDensity, (frame,)), (CDMOutlierDetector, (frame,)), (CDMConditional, (frame, frame[:]))):
        with pytest.warns(UserWarning, match="left out") as found, pytest.raises(UserError, match="are described"):
            kind().fit(*given)
        assert {warning.filename for warning in found} == {__file__}
    with pytest.warns(UserWarning, match="left out") as found, pytest.raises(UserError, match="are described"):
        CDMOutlierDetector().fit_predict(frame)  # scikit-learn calls fit
    assert {warning.filename for warning in found} == {__file__}


def test_a_warning_of_a_score_points_at_the_call():
    model = CDMDensity(**TINY).fit(frame := table(20).assign(site=1.0))
    with pytest.warns(UserWarning, match="20 rows differ") as found:
        model.score(frame.assign(site=2.0))
    assert {warning.filename for warning in found} == {__file__}


@pytest.mark.parametrize("kind", [CDMDensity, CDMOutlierDetector])
def test_columns_of_pyarrow_go_by_name(kind):
    arrow, frame = pytest.importorskip("pyarrow").Table, table(40)
    model, turned = kind(**TINY).fit(arrow.from_pandas(frame)), frame[frame.columns[::-1]]
    for same in (turned, arrow.from_pandas(turned), arrow.from_pandas(turned).to_batches()[0]):
        assert np.array_equal(model.score_samples(same), model.score_samples(frame))


def test_overrides_are_read_before_the_data():
    wrong = {"overrides": {"dropuot": 3}}
    for fit in (
        lambda: CDMDensity(**wrong).fit(None),
        lambda: CDMOutlierDetector(**wrong, contamination=0.1).fit(None),
        lambda: CDMConditional(**wrong).fit(None, None),
        lambda: torchcdm.DensityRatio(dropuot=3).fit(None, None),
    ):
        with pytest.raises(UserError, match="unknown override 'dropuot'"):
            fit()
    with pytest.raises(UserError, match="unknown field 'loss.ce_wight'"):
        CDMConditional(overrides={"loss": {"ce_wight": 1}}).fit(None, None)


def test_bad_settings_are_named():
    frame = table(60)
    for options, message in (
        ({"preset": "tabel"}, "unknown preset 'tabel'; did you mean 'table'"),
        ({"discrete": "drop"}, "discrete is 'drop'; choose from: dequantize, error"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"overrides": {"loss": {"ce_wight": 1}}}, "unknown field 'loss.ce_wight'; did you mean 'ce_weight'"),
        ({"overrides": {"model": {"kind": "ddm"}}}, "an estimator needs a density"),
    ):
        with pytest.raises(UserError, match=message):
            CDMDensity(**{**TINY, **options}).fit(frame)
    with pytest.raises(UserError, match="contamination is 0.7"):
        CDMOutlierDetector(**TINY, contamination=0.7).fit(frame)
    with pytest.raises(UserError, match="anomaly_score is 'level'; did you mean 'levels'"):
        CDMOutlierDetector(**TINY, anomaly_score="level").fit(frame)
    with pytest.raises(UserError, match="n_samples is 0"):
        CDMDensity(**TINY).fit(frame).sample(0)


@pytest.mark.parametrize("kind", [CDMDensity, CDMOutlierDetector])
def test_tables_that_cannot_be_fitted_or_scored_are_refused(kind):
    frame = table(60)
    with pytest.raises(UserError, match="column 'level', row 0 holds '-inf', not a finite number"):
        kind(**TINY).fit(frame.assign(level=[-np.inf] * 2 + [1.0, 2.0] * 29))
    with pytest.raises(ValueError, match=r"9 sample\(s\).*a minimum of 10 is required"):
        kind(**TINY).fit(frame[:9])
    fitted = kind(**TINY).fit(frame)
    with pytest.raises(ValueError, match="contains NaN"), warnings.catch_warnings(action="ignore"):
        fitted.score_samples(frame.assign(level=np.nan).to_numpy())
    with pytest.raises(UserError, match="no column 'level'"):
        fitted.score_samples(frame.rename(columns={"level": "depth"}))
    with pytest.raises(ValueError, match="2 features, but .* is expecting 3 features"):
        fitted.score_samples(frame.to_numpy()[:, :2])


def test_verbose_shows_the_notes(capsys):
    frame = table(60).assign(state=np.arange(60) % 3)
    CDMDensity(**{**TINY, "verbose": 1}).fit(frame)
    said = capsys.readouterr()
    assert "column 'state' has 3 distinct values: dequantised with cells of 1" in said.out
    assert "training" in said.err


# --- outliers --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("score", ["log_prob", "levels"])
def test_outliers_are_found_and_held_out_rows_set_the_threshold(score):
    draw = np.random.RandomState(0)
    angle = draw.uniform(0, 2 * np.pi, 1500)
    ring = 3 * np.c_[np.cos(angle), np.sin(angle)] + 0.1 * draw.normal(size=(1500, 2))
    train, test = train_test_split(ring, random_state=0)
    # The middle of the ring is where a Gaussian has its mode.
    middle = 0.3 * draw.normal(size=(100, 2))
    detector = CDMOutlierDetector(
        anomaly_score=score, random_state=0, device="cpu", steps=150, width=32, lr=4e-3, dropout=0.0
    ).fit(train)
    alarms = (detector.predict(test) == -1).mean()
    assert alarms < 0.15
    assert (detector.predict(middle) == -1).mean() > 0.95
    assert np.array_equal(detector.decision_function(test), detector.score_samples(test) - detector.offset_)


def test_few_rows_say_how_rough_their_threshold_is():
    rough = CDMOutlierDetector(**TINY).fit(table(30))
    assert "4 held-out rows set the threshold: of new normal rows about 20% lie below, not 5%" in rough.notes_[-1]
    assert not any("threshold" in note for note in CDMOutlierDetector(**TINY).fit(table(150)).notes_)


def test_contamination_is_the_share_of_the_training_table_that_is_flagged():
    frame = table(200)
    assert (CDMOutlierDetector(**TINY, contamination=0.1).fit_predict(frame) == -1).sum() == 20
    # Too few held-out rows for one in twenty: none of them is flagged.
    small = CDMOutlierDetector(**TINY).fit(frame[:40])
    assert (small.predict(frame.iloc[small.validation_indices_]) == 1).all()
    with pytest.raises(UserError, match="3 samples are too few for the score 'levels'; give more, or take another"):
        CDMOutlierDetector(**TINY, anomaly_score="levels").fit(frame[:40])


def test_outliers_in_the_training_table_are_not_learned_where_contamination_says_that_it_holds_some(tmp_path):
    draw = np.random.RandomState(0)
    usual = draw.normal(size=(540, 3)).round(1)  # values that come back
    group = [4.0, -4.0, 0.0] + 0.1 * draw.normal(size=(60, 3))
    x, odd = np.r_[usual, group], np.arange(600) >= 540
    robust = CDMOutlierDetector(**TINY, contamination=0.1).fit(x)
    assert np.array_equal(robust.predict(x) == -1, odd)
    assert robust.detector_.name == "coarse"
    usual_fit = CDMOutlierDetector(**TINY).fit(x)
    assert (usual_fit.predict(x)[odd] == -1).mean() < 0.5 and usual_fit.detector_.name == "log_prob"
    robust.save(tmp_path)
    assert np.array_equal(CDMOutlierDetector.load(tmp_path).decision_function(x), robust.decision_function(x))
    given = CDMOutlierDetector(**TINY, contamination=0.1, anomaly_score="levels").fit(x)
    assert given.detector_.name == "levels" and (given.predict(x) == -1).sum() == 60


def test_the_package_stays_light_until_an_estimator_is_asked_for():
    code = "import sys, torchcdm; before = 'sklearn' in sys.modules; torchcdm.estimators.CDMDensity; print(before)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "False", result.stderr


def test_outlier_scores_of_rows_without_any_density_are_finite(monkeypatch):
    detector = CDMOutlierDetector(**TINY).fit(np.random.RandomState(0).normal(size=(80, 2)))
    monkeypatch.setattr(detector, "_scores", lambda codes: np.full(len(codes), -np.inf))
    assert np.isfinite(detector.score_samples(np.zeros((3, 2)))).all()
