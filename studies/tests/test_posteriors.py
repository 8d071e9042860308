"""The benchmarks of posteriors and of shifts of real tables run; what they measure is for their pages."""

from functools import partial

import numpy as np
import pandas as pd
import pytest

from studies.benchmarks import anomaly_tables, posterior_tasks, posterior_uses, posteriors, real_shift
from torchcdm.estimators import CDMConditional


@pytest.fixture
def fake_sbibm(monkeypatch, tmp_path):
    """Files as those of sbibm: an observation and its reference posterior, the prior here."""
    for name, task in posterior_tasks.TASKS.items():
        theta, x = task.pairs(60, 0)
        folder = tmp_path / "tasks" / task.folder / "files" / "num_observation_1"
        folder.mkdir(parents=True, exist_ok=True)
        if name != "slcp-distractors":  # those of slcp
            pd.DataFrame(x[:1]).to_csv(folder / task.file, index=False)
            pd.DataFrame(theta).to_csv(folder / "reference_posterior_samples.csv.bz2", index=False)
    monkeypatch.setattr(posterior_tasks, "_package", lambda: tmp_path)


def test_tasks_of_simulation_based_inference_keep_to_their_supports(fake_sbibm):
    for name, task in (posterior_tasks.TASKS | posterior_tasks.DEVELOPMENT).items():
        theta, x = task.pairs(50, 1)
        assert np.isfinite(x).all() and len(x) == len(theta) == 50, name
        assert (theta >= task.support[0]).all() and (theta <= task.support[1]).all(), name
        assert all(np.array_equal(*both) for both in zip((theta, x), task.pairs(50, 1), strict=True))
        if name in posterior_tasks.TASKS:
            assert task.observation(1).shape == x[0].shape and task.reference(1).shape == (60, theta.shape[1])


def test_simulators_have_the_moments_of_their_description():
    draw = np.random.RandomState(0)
    theta = np.tile([[0.5, -1.0, 1.2, 0.8, 0.4]], (20_000, 1))
    points = posterior_tasks.TASKS["slcp"].simulate(theta, draw)[:, :2]
    cross = 1.2**2 * 0.8**2 * np.tanh(0.4)
    assert np.allclose(points.mean(0), [0.5, -1.0], atol=0.05)
    assert np.allclose(np.cov(points.T), [[1.2**4, cross], [cross, 0.8**4]], atol=0.06)
    # Without predators, and with nobody infected for long, the equations have solutions in closed form.
    hares = posterior_tasks.TASKS["lotka-volterra"].simulate(np.tile([[0.1, 1e-9, 0.2, 1e-9]], (2000, 1)), draw)
    times = 2.1 * np.arange(10)
    assert np.allclose(np.log(hares).mean(0), np.r_[np.log(30) + 0.1 * times, -0.2 * times], atol=0.02)
    filters = posterior_tasks.TASKS["bernoulli-glm"].prior(20_000, draw)
    assert filters[:, 0].var() == pytest.approx(2, rel=0.05)
    mean, cut = posterior_tasks.TASKS["sir"].prior(20_000, draw).mean(0), np.exp([0.125, 0.02])
    assert np.allclose(mean, [0.4, 0.125] * cut, rtol=0.03)


def test_coverage_of_exact_draws_is_that_of_the_level_and_of_narrow_ones_is_not():
    draw = np.random.RandomState(0)
    centre = draw.normal(size=(2000, 2))
    theta = centre + draw.normal(size=(2000, 2))
    exact = centre[:, None] + draw.normal(size=(2000, 100, 2))
    assert np.allclose(posteriors.coverage(exact, theta), [0.5, 0.9], atol=0.03)
    assert posteriors.tarp(exact, theta, 0) < 0.04
    narrow = centre[:, None] + 0.5 * draw.normal(size=(2000, 100, 2))
    assert posteriors.coverage(narrow, theta)[1] < 0.7 and posteriors.tarp(narrow, theta, 0) > 0.08


def test_posteriors_are_run_once_and_kept(report_of, fake_sbibm, tmp_path, monkeypatch):
    values = {"DRAWS": 20, "COVERED": {"cdm": 10}, "COVERED_DRAWS": 5, "SCORED": {"cdm": 5},
              "CDMConditional": partial(CDMConditional, steps=3, batch_size=16, width=16, depth=1)}  # fmt: skip
    words = ("posteriors", "--tasks", "two-moons", "--contenders", "cdm", "--pairs", "60", "--observations", "1")
    (row,) = report_of(*words, **values)
    assert 0 <= row["c2st"][0] <= 1 and 0 <= row["tarp"] <= 1 and row["scored"] > 0
    monkeypatch.setattr(posteriors, "measure", None)
    assert report_of(*words) == [row]


def test_exact_weights_of_real_shifts_are_one_over_the_chance(report_of, monkeypatch):
    draw = np.random.RandomState(0)
    x = draw.normal(size=(900, 4))
    monkeypatch.setattr(real_shift, "load", lambda name: (x, x @ [1.0, 2.0, 0.0, 0.5] + x[:, 0] ** 2))
    for name in ("torchcdm", "balanced"):
        monkeypatch.delitem(real_shift.CONTENDERS, name)
    rows = report_of("real_shift", "--tables", "modeldata/ames")
    assert [row["weights"] for row in rows[:5]] == ["exact", "none", "trees", "ulsif", "kliep"]
    for kind in real_shift.SHIFTS:
        by = {row["weights"]: row for row in rows if row["shift"] == kind}
        assert by["none"]["effective"] == pytest.approx(1) and by["exact"]["effective"] < 0.9
        assert abs(by["exact"]["mean_error"]) < 0.2


def test_ranks_of_detectors_and_their_critical_difference(tmp_path):
    # Demsar (2006), table 5: q = 2.728 for five classifiers.
    assert anomaly_tables.critical_difference(5, 10) == pytest.approx(2.728 * np.sqrt(5 * 6 / 60), rel=1e-3)
    values = {"a": (0.9, 0.7), "b": (0.8, 0.8), "c": (0.9, 0.6)}
    rows = [
        {"name": name, "table": table, "auroc": found[k], "precision": found[k]}
        for k, table in enumerate("xy")
        for name, found in values.items()
    ]
    assert anomaly_tables.mean_ranks(rows, "auroc") == ({"a": 1.75, "b": 2.0, "c": 2.25}, 2)
    anomaly_tables.plot(rows, tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").stat().st_size > 1000


def test_detectors_are_scored_on_rows_that_they_did_not_see(report_of, monkeypatch):
    seen = {}

    def distance(train, test, seed):
        seen[seed] = len(train), len(test)
        return np.linalg.norm((test - np.median(train, 0)) / train.std(0), axis=1)

    monkeypatch.setattr(anomaly_tables, "DETECTORS", {"far": distance, "near": lambda *given: -distance(*given)})
    rows = report_of("anomaly_tables", "--tables", "WDBC", "--seeds", "0", "1", "--detectors", "far", "near")
    assert seen == {0: (256, 111), 1: (256, 111)}
    assert [row["auroc"] > 0.8 for row in rows] == [True, False] * 2


@pytest.mark.slow
def test_several_observations_and_rounds_are_measured(fake_sbibm, monkeypatch):
    few = {"steps": 2, "width": 8, "overrides": {"model": {"schedule": {"T": 10}}}}
    quick = few | {"depth": 1, "components": 1, "device": "cpu", "random_state": 0}
    monkeypatch.setattr(posterior_uses, "fitted", lambda theta, x, *_: CDMConditional(**quick).fit(theta, x))
    monkeypatch.setattr(posterior_uses, "CDMDensity", partial(posterior_uses.CDMDensity, **few))
    for name, value in {"PAIRS": 100, "DRAWS": 20, "SIDE": 50, "PASSES": 1, "PROPOSED": 200}.items():
        monkeypatch.setattr(posterior_uses, name, value)
    rows = []
    posterior_uses.together("half-life", [2], 1, rows)
    assert [row["way"] for row in rows] == list(posterior_uses.WAYS) and all(0 <= row["c2st"][0] <= 1 for row in rows)
    rows = []
    posterior_uses.rounds("two-moons", 60, 0, [1], rows)
    assert [row["way"] for row in rows] == ["first round", "one round", "two rounds"] and rows[0]["fitted"] > 60


def test_posteriors_on_a_grid_are_exact():
    x = np.array([[1.0], [2.0], [1.5]])
    log_p = lambda theta, row: -0.5 * (row[0] - theta[:, 0]) ** 2  # noqa: E731
    prior = lambda theta: -0.5 * theta[:, 0] ** 2  # noqa: E731
    draws = posterior_uses.on_grid(log_p, ([-5.0], [5.0]), prior, x, np.random.RandomState(0))
    assert abs(draws.mean() - 4.5 / 4) < 0.06 and abs(draws.std() - 0.5) < 0.05
