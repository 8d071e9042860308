"""The benchmarks run; what they measure is for their pages, not for a test that a busy machine could fail."""

import importlib
import itertools
import json
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import small_config

from studies import benchmarks
from studies.benchmarks import (
    composed_classes,
    composing,
    conditional_density,
    log_z_images,
    mi_tasks,
    quality_curves,
    quality_figure,
    rare_events,
    ratio_pairs,
    restorations,
    table_density,
    two_samples,
)
from studies.benchmarks.equal_time import on_plain_grey_levels
from studies.benchmarks.posterior_coverage import Nothing, exact_mixture, measure, summary
from studies.budget import CLOCKS
from studies.exact import GaussianMixture
from studies.tables import likelihoods
from torchcdm import DensityRatio, mutual_information
from torchcdm.apps.anomaly import SCORES
from torchcdm.compose import sample
from torchcdm.data import load_data
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.errors import UserError
from torchcdm.estimators import CDMConditional, CDMDensity
from torchcdm.likelihood import Scoring, log_normalizer
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.random import evenly_spaced
from torchcdm.training.loop import train
from torchcdm.units import DataTransform


@pytest.fixture
def rows_of(report_of):
    """Likewise, the rows by name."""
    return lambda *words, **values: {row["name"]: row for row in report_of(*words, **values)}


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    """The folder of a CDM of plain grey levels that was hardly trained."""
    folder = tmp_path_factory.mktemp("digits")
    train(small_config(train__steps="4", data__gaussianize="false"), folder, device="cpu", progress=False)
    return str(folder)


def test_every_benchmark_says_how_it_is_run():
    helpers = {"exact_targets", "files", "flows", "joint_step", "posterior_tasks", "ratio_pairs"}
    helpers |= {"anomaly_sets"}
    for path in Path(benchmarks.__file__).parent.glob("[a-z]*.py"):
        if path.stem not in helpers:
            module = importlib.import_module(f"studies.benchmarks.{path.stem}")
            assert f"python -m {module.__name__}" in module.__doc__ and module.main


@pytest.mark.slow
def test_step_cost_reports_every_step_beside_the_ddm(rows_of):
    rows = rows_of("step_cost", "--batch", "2", "--rounds", "1")
    for step in ("denoising-step", "training-step", "guided-step", "one-pass-likelihood"):
        assert rows[step] == rows[f"encoder/{step}"] | {"name": step}
        ddm = "denoising-step" if step == "one-pass-likelihood" else step
        for network in ("encoder", "paper"):
            own, baseline = rows[f"{network}/{step}"], rows[f"{network}-ddm/{ddm}"]
            assert own["ratio_to_ddm"] * baseline["seconds"] == pytest.approx(own["seconds"])


@pytest.mark.slow
def test_training_memory_has_every_training_step_beside_its_ddm(rows_of):
    rows = rows_of("training_memory", "--network", "encoder", "--batch", "16")
    names = ("encoder", "encoder-twice", "encoder-pytorch", "encoder-ddm")
    assert set(rows) == {f"{name}/training-step" for name in names}
    # PyTorch keeps what the second derivatives by hand do not.
    assert rows["encoder-pytorch/training-step"]["bytes"] > 1.2 * rows["encoder-twice/training-step"]["bytes"]
    assert rows["encoder-ddm/training-step"]["ratio_to_ddm"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("question", ["levels", "classes", "processes"])
def test_step_scaling_divides_by_the_first_value(rows_of, question):
    rows = rows_of("step_scaling", "--question", question, "--rounds", "1")
    for name, row in rows.items():
        _, value, step = name.split("/")
        first = next(other for key, other in rows.items() if key.endswith(f"/{step}"))
        assert row["seconds"] == pytest.approx(row["ratio_to_first"] * first["seconds"])
        if step.startswith("ddm-"):
            assert row["ratio_to_ddm"] == 1


@pytest.mark.slow
def test_equal_time_divides_by_the_better_ddm_and_makes_nothing_again(rows_of, tmp_path):
    words = ["--preset", "digits", "--seconds", "2", "--grid-seconds", "0.5", "--seeds", "0", "--images", "8",
             "--out", str(tmp_path / "out")]  # fmt: skip
    rows = rows_of("equal_time", *words)
    assert set(rows) == {"cdm", "cdm-residual", "ddm", "ddm-residual"}
    assert min(rows["ddm"]["ratio_to_ddm"], rows["ddm-residual"]["ratio_to_ddm"]) == 1
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("model.safetensors")}
    assert rows_of("equal_time", *words) == rows
    assert made == {path: path.stat().st_mtime_ns for path in made}
    with pytest.raises(UserError, match="was made with images = 8, not 9"):
        rows_of("equal_time", *words[:-3], "9", *words[-2:])


def test_contenders_with_classes_have_a_joint_head_and_an_embedding():
    config = on_plain_grey_levels("digits")
    models = quality_curves.contenders(config, replace(config.data, clusters=3), classes=True)
    assert all(own.data.clusters == 3 for own in models.values())
    assert {name: own.model.labels for name, own in models.items()} == {"cdm": "joint", "ddm": "input"}


@pytest.mark.slow
def test_quality_curves_draw_the_clusters_of_the_training_data(report_of, tmp_path, monkeypatch):
    words = ["--preset", "digits", "--seconds", "2", "--images", "8", "--samples", "40", "--evaluations", "4",
             "--samplers", "ddpm", "--spacings", "even", "--clusters", "5", "--batch", "16",
             "--guidance", "0.5"]  # fmt: skip
    asked = []

    def observed(model, n, rule, steps, y, *rest, **how):
        asked.append(y)
        return sample(model, n, rule, steps, y, *rest, **how)

    monkeypatch.setattr(quality_curves, "sample", observed)
    rows = report_of("quality_curves", *words, "--out", str(tmp_path / "out"))
    found = [(row["model"], row["steps"], row["evaluations"]) for row in rows]
    assert found == [("cdm-0", 4, 4), ("ddm-0", 2, 4)], "a guided step of a DDM is two evaluations"
    labels = load_data("digits", clusters=5).train.labels
    assert all(torch.equal(y, labels[evenly_spaced(1300, 40)]) for y in asked) and len(asked) == 2


@pytest.mark.slow
def test_quality_curves_make_nothing_again_and_end_with_their_budget(report_of, tmp_path, monkeypatch):
    words = ["--preset", "digits", "--seconds", "2", "--images", "8", "--samples", "40", "--evaluations", "4", "5",
             "--samplers", "ddpm", "heun", "dpm++", "ddpm~1", "sa2@4,0.1", "--out", str(tmp_path / "out")]  # fmt: skip
    rows = report_of("quality_curves", *words)
    cells = [(r["model"], r["sampler"], r["spacing"], r["evaluations"]) for r in rows]
    assert ("ddm-0", "ddpm~1", "adaptive", 5) in cells and ("cdm-0", "sa2@4,0.1", "even", 5) in cells
    assert ("cdm-0", "heun", "even", 3) in cells and ("ddm-0", "heun", "even", 5) in cells
    assert len(cells) == len(set(cells)) == 40
    assert ("cdm-0", "dpm++", "adaptive", 4) in cells, "its plus signs are no moves"
    names = [f"{kind}-0-ddpm-adaptive-5" for kind in ("cdm", "ddm")]
    quality_figure.pictures(tmp_path / "out" / "cells", names, tmp_path / "pictures.png")
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows, "floors": [{"frechet": 1.0}]}), encoding="utf-8")
    quality_figure.curves(tmp_path / "rows.json", tmp_path / "curves.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("pictures.png", "curves.png"))
    monkeypatch.setattr(quality_curves, "sample", lambda *_, **__: pytest.fail("made again"))
    assert report_of("quality_curves", *words) == rows
    with pytest.raises(UserError, match="was made with samples = 40, not 50"):
        report_of("quality_curves", *("50" if word == "40" else word for word in words))


@pytest.mark.slow
def test_import_time_is_relative_to_torch(rows_of):
    rows = rows_of("import_time", "--rounds", "1")
    assert rows["import torch"]["ratio_to_ddm"] == 1 and len(rows) == 3


@pytest.mark.slow
def test_time_to_quality_gives_the_default_a_share_of_the_time_and_makes_nothing_again(rows_of, tmp_path):
    words = ["--preset", "digits", "--seconds", "4", "--fraction", "0.5", "--grid-seconds", "1", "--images", "8",
             "--flow-images", "4", "--flow-steps", "3", "--out", str(tmp_path / "out")]  # fmt: skip
    rows = rows_of("time_to_quality", *words)
    assert rows["default"]["seconds"] == 2 and rows["paper"]["seconds"] == 4
    assert rows["default"]["steps"] > rows["paper"]["steps"] > 0, "the paper's network takes longer for a step"
    assert rows["paper"]["seconds_to_target"] > 0, "the target is the least error of the paper's network"
    assert rows_of("time_to_quality", *words) == rows
    never = rows_of("time_to_quality", *words, "--target-mse", "0")
    assert all(row["seconds_to_target"] is None for row in never.values())


TINY = {"steps": 3, "batch_size": 16, "width": 16, "depth": 1}
TINY_RATIO = {"steps": 3, "batch_size": 16, "model": {"backbone": {"width": 16, "depth": 1}}}


def finite(rows, *keys):
    """Whether the values under the keys are numbers in every row."""
    return all(np.isfinite(row[key]) for row in rows for key in keys)


def test_likelihood_throughput_divides_by_the_flow(rows_of, digits_run):
    rows = rows_of("likelihood_throughput", digits_run, "--images", "4", "--rounds", "1", "--passes", "1")
    assert set(rows) == {"one-pass", "one-pass-level", "network-pass", "flow"}
    for row in rows.values():
        assert row["images_per_second"] == pytest.approx(4 / row["seconds"])
        assert row["ratio_to_flow"] * row["seconds"] == pytest.approx(rows["flow"]["seconds"])


def test_restorations_ranks_by_every_score(digits_run, capsys):
    restorations.main([digits_run])
    lines = capsys.readouterr().out.splitlines()
    (first,) = (number for number, line in enumerate(lines) if line.startswith("score"))
    table = {line.split()[0]: [float(value) for value in line.split()[1:]] for line in lines[first + 1 :]}
    assert set(table) == {*SCORES} - {"ratio"}
    assert all(abs(correlation) <= 1 and 0 <= best <= 1 for correlation, best, _ in table.values())


def test_estimator_times_has_a_row_for_each_table(report_of):
    rows = report_of("estimator_times", "--shapes", "60x2", "50x3", CDMDensity=partial(CDMDensity, **TINY))
    assert [(row["rows"], row["columns"]) for row in rows] == [(60, 2), (50, 3)]
    assert finite(rows, "fit", "score", "sample", "nats")


def test_table_density_scores_all_contenders_on_the_same_rows(rows_of):
    peers = ["gmm", "kde", *(["nsf"] if find_spec("zuko") else [])]
    words = ["--tables", "wine", "--folds", "1", "--budget", "0.1", "--contenders", "cdm", *peers]
    rows = rows_of("table_density", *words, CDMDensity=partial(CDMDensity, **TINY), FLOW_ROWS=5)
    assert {name: row["rows"] for name, row in rows.items()} == {"cdm": 36, "cdm-flow": 5} | dict.fromkeys(peers, 36)
    assert finite(rows.values(), "nats", "se")
    assert finite((rows[name] for name in peers), "validation")


@pytest.mark.slow
def test_table_density_gives_the_cdm_the_budget_of_the_others(rows_of, monkeypatch):
    looks = itertools.count()  # each takes a hundredth of a second
    monkeypatch.setitem(CLOCKS, "processor", lambda: next(looks) / 100)
    words = ["--tables", "wine", "--folds", "1", "--budget", "0.4", "--contenders", "cdm"]
    rows = rows_of("table_density", *words, CDMDensity=partial(CDMDensity, **TINY | {"steps": 10**6}), FLOW_ROWS=5)
    assert rows["cdm"]["seconds"] == pytest.approx(0.4, abs=0.05)


def test_the_density_of_the_houses_integrates_to_one():
    houses = table_density.Houses()
    side, steps = 10 / 2000, (np.arange(2000) + 0.5) / 2000
    latitudes = 32 + 10 * steps
    assert np.exp(houses.log_prob(latitudes[:, None])).sum() * side == pytest.approx(1, abs=1e-4)
    # One conditional, of the longitude: east of the coast, by a logarithmic grid.
    x = houses.rows(1, 0)[:, :2].repeat(4000, 0)
    start = houses._conditional(x, 1)[0][0]
    inland = np.exp(np.linspace(-12, 8, 4000))
    x[:, 1] = start + inland
    conditional = np.exp(houses.log_prob(x) - houses.log_prob(x[:, :1]))
    assert (conditional * inland).sum() * 20 / 4000 == pytest.approx(1, abs=1e-3)


def test_conditional_density_measures_against_the_exact_posterior(report_of):
    pytest.importorskip("zuko")
    words = ["--simulators", "linear-gaussian", "decay", "--pairs", "300", "--budget", "0.1"]
    rows = report_of("conditional_density", *words, CDMConditional=partial(CDMConditional, **TINY),
                     OBSERVATIONS=1, DRAWS=20, PAIRS_TESTED=50, FLOW_PAIRS=5, c2st=lambda *_: 0.5)  # fmt: skip
    names = ["cdm", "cdm-flow", "nsf", "linear"]
    assert [(row["simulator"], row["name"]) for row in rows] == [(s, n) for s in words[1:3] for n in names]
    assert finite(rows, "kl", "se")
    # Linear regression is the exact model of the first, up to what 300 pairs tell.
    assert rows[3]["kl"] < 0.3 < rows[7]["kl"]
    assert [row["log_z"] is not None for row in rows] == [False] * 4 + [True] + [False] * 3


def test_the_posterior_of_the_two_moons_integrates_to_one_and_draws_what_it_says():
    simulator = conditional_density.TwoMoons()
    x = simulator.pairs(100, 0)[1][:1]
    points, area = conditional_density.grid(*simulator.box(x[0]), 1000)
    density = np.exp(simulator.log_posterior(points, x.repeat(len(points), 0)))
    assert density.sum() * area == pytest.approx(1, abs=0.01)
    draws = simulator.draws(4000, x[0], 0)
    mean, spread = area * density @ points, draws.std(0)
    assert np.abs(draws.mean(0) - mean).max() < 0.08 * spread.max()


@pytest.mark.filterwarnings("ignore")
def test_the_classifier_of_conditional_density_tells_samples_apart():
    x, y = np.random.RandomState(0).normal(size=(2, 40, 2))
    assert conditional_density.c2st(x + 9, y) == 1
    assert conditional_density.c2st(x, y) < 0.75


@pytest.mark.slow
def test_mutual_information_climbs_the_rungs(report_of):
    words = ["--rungs", "20", "--residual", "on", "off", "--kinds", "rotated", "bent", "--rows", "200", "--test", "50",
             "--steps", "3", "--pairs", "60"]  # fmt: skip
    rows = report_of("mutual_information", *words, mutual_information=partial(mutual_information, steps=3))
    assert [(row["residual"], row["kind"]) for row in rows] == [(r, k) for r in ("on", "off") for k in words[6:8]]
    assert finite(rows, "exact", "estimate", "rmse", "information") and all(0 <= row["weight"] <= 1 for row in rows)


def test_estimates_of_information_are_kept_and_earn_marks(tmp_path, monkeypatch):
    x, noise = np.random.RandomState(0).normal(size=(2, 2000, 1))
    np.savez(tmp_path / "tasks.npz", **{"pair|0.5108|0|x": x, "pair|0.5108|0|y": 0.8 * x + 0.6 * noise})
    asked = []

    def critic(verbose, seed):
        asked.append(seed)
        return SimpleNamespace(estimate=lambda x, y: 0.3)

    monkeypatch.setitem(sys.modules, "bmi", SimpleNamespace(estimators=SimpleNamespace(MINEEstimator=critic)))
    names = ["canonical correlations", "Kraskov", "MINE"]
    for _ in range(2):
        rows = mi_tasks.estimate(tmp_path / "tasks.npz", names, [0], [""], tmp_path / "found.json")
    assert asked == [0] and [row.estimator for row in rows] == names
    assert [row["mark"] for row in json.loads((tmp_path / "found.json").read_text())["marks"]] == [True, True, False]


def test_every_test_of_two_samples_sees_a_large_shift():
    p, q = two_samples.tables(two_samples.shift, 80, 5, 3.0, np.random.RandomState(0))
    assert all(test(p, q, 0) <= 0.01 < test(q[:40], q[40:], 0) for test in two_samples.TESTS.values())
    assert [task.name for task in two_samples.tasks(40, 400)].count("null") == 2


def test_ratio_peers_scores_every_estimator(report_of):
    pytest.importorskip("densratio")
    rows = report_of("ratio_peers", "--dims", "2", "--rows", "100", DensityRatio=partial(DensityRatio, **TINY_RATIO))
    names = ["constant", "joint", "gaussians", "logistic", "boosting", "kliep", "rulsif"]
    assert [row["estimator"] for row in rows] == names
    assert finite(rows, "rmse", "correlation")


def test_covariate_shift_measures_against_exact_weights(report_of):
    rows = report_of("covariate_shift", "--columns", "2", "--rows", "200", TEST_ROWS=200,
                     DensityRatio=partial(DensityRatio, **TINY_RATIO))  # fmt: skip
    names = ["exact", "none", "torchcdm", "torchcdm, 0.999", "gaussians", "logistic"]
    assert [row["weights"] for row in rows] == names
    assert rows[0]["relative"] == 0 and rows[1]["effective"] == pytest.approx(1)
    assert all(row["error"] == pytest.approx((1 + row["relative"]) * rows[0]["error"]) for row in rows)


@pytest.mark.slow
def test_mixture_weights_has_a_row_for_every_contender(report_of):
    names = ["ratio", "ratio-mixture", "start", "density", "mixture", "exact", "counts"]
    rows = report_of("mixture_weights", "--dims", "2", "--rows", "400", "--steps", "3", POINTS=5)
    assert [row["contender"] for row in rows] == names
    assert finite(rows, "largest", "mean", "log_error")
    errors = {row["contender"]: row["mean"] for row in rows}
    assert errors["exact"] < min(errors["ratio"], errors["density"])


@pytest.mark.parametrize("dim", [2, 5])
def test_the_map_of_the_ratio_benchmarks_is_invertible(dim):
    """Its Jacobian's determinant is that of the last step: the couplings keep volumes."""
    x, width = np.random.RandomState(0).normal(size=(20, dim)), 1e-6
    move = ratio_pairs.InvertibleMap(dim)
    columns = [(move(x + width * unit) - move(x - width * unit)) / (2 * width) for unit in np.eye(dim)]
    volumes = np.linalg.det(np.stack(columns, -1))
    # y + 0.2 sin(2 y), by Newton's steps from its values.
    y = z = move(x)
    for _ in range(50):
        y = y - (y + 0.2 * np.sin(2 * y) - z) / (1 + 0.4 * np.cos(2 * y))
    assert volumes == pytest.approx((1 + 0.4 * np.cos(2 * y)).prod(1), rel=1e-5)


def test_rare_ink_stands_beside_particles_that_no_threshold_has_moved(report_of, tmp_path, monkeypatch):
    """On a density that is known: the threshold is the exact quantile, and estimates there are near the truth."""
    model = exact_mixture()
    monkeypatch.setattr(rare_events.torchcdm, "load", lambda _: model)
    words = ["--model", "mixture", "--probabilities", "0.05", "--draws", "1024", "--repeats", "3", "--particles",
             "100", "--moves", "2", "--parts", str(tmp_path / "parts")]  # fmt: skip
    (row,) = report_of("rare_events", *words, ISLAND=128)
    drawn = model.base.draw((100_000, 4), torch.Generator().manual_seed(0)).sum(1)
    truth = float((drawn > row["threshold"]).double().mean())
    assert row["p"] == pytest.approx(0.05, abs=0.002) and 0 < row["p_se"] < 0.02
    assert truth == pytest.approx(0.05, abs=0.03)
    assert row["mean_over_truth"] * row["p"] == pytest.approx(truth, rel=0.5)
    assert row["draws"] == 1024 and row["repeats"] == 3 and row["evaluations"] > 100 * 2 * model.schedule.T
    monkeypatch.setattr(rare_events, "probability", None)
    assert report_of("rare_events", *words, "--seconds", "0", ISLAND=128) == [row]


class _Constants(Nothing):
    """A joint backbone of two classes, that adds a constant to log p of each at every level but the last."""

    classes, joint, constants = 2, True, (0.8, -0.2)

    def forward(self, x, y=None):
        h = super().forward(x)
        return torch.stack([torch.nn.functional.pad(h[:, 1:] + c, (0, 1)) for c in self.constants], 1)


def test_bounds_on_images_by_a_log_z_that_was_measured(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = (8 + 3 * torch.randn(900, 1, 4, 4, generator=generator).cumsum(3)).round().clamp(0, 16)
    schedule, transform = UniformSigmaSchedule(12), DataTransform.images((1, 4, 4), 17)
    base = GaussianMarginals.fit(transform(x.double()), schedule, 1e-3)
    model = ClassificationDiffusion(_Constants(14), schedule, transform, base).eval()

    class Source:
        name, class_names = "gaussian", ("more", "less")

        def split(self, _):
            return self

        def tensors(self, _):
            return x, torch.arange(len(x)) % 2

    found = [log_normalizer(model, x[:200], None, Scoring(6, seed=s), 8, 8, restricted=True) for s in (0, 1)]
    row = log_z_images.measured(model, Source(), found, 40, 16, 8)
    assert row["levels"][-1] == row["level"] == 6 and row["count"] == 40 and row["images"] == 16
    values = {name: value for name, (value, *_) in row["rows"].items()}
    for name, (off, se, _) in row["minus"].items():
        one, other = name.split(" - ")
        assert off == pytest.approx(values[one] - values[other]) and se > 0
    monkeypatch.setattr(likelihoods, "read", lambda name: {"gaussian": row})
    table = likelihoods.log_z_images("gaussian").splitlines()
    assert "seed 1" in table[0] and table[2].startswith("| more") and "**mean**" in table[4]
    assert "`few-pass-restricted`" in likelihoods.log_z_images_rows("gaussian")


@pytest.mark.slow
def test_intervals_of_an_exact_mixture_hold_what_they_say_and_rows_are_kept(tmp_path):
    asked = "mixture", "upper"
    rows = measure(*asked, 40, 64, 0.5, ["particles"], parts=tmp_path)
    found = summary(rows, 1.0)
    assert abs(found["coverage"] - 0.9) < 0.09 and found["se"] < 0.03 and found["evaluations"] == 24 * 2 * 64
    kept = (tmp_path / "rows.jsonl").read_text()
    assert measure(*asked, 40, 64, 0.5, ["particles"], parts=tmp_path) == rows
    assert (tmp_path / "rows.jsonl").read_text() == kept


def test_images_of_one_class_are_not_both():
    source, pair = load_data("digits"), [3, 8]
    x, y = source.test.tensors()
    own = composed_classes.shares("digits", x[torch.isin(y, torch.tensor(pair))], source.transform, pair)
    assert own["either"] > 0.9 and own["both"] < 0.1
    others = composed_classes.shares("digits", x[~torch.isin(y, torch.tensor(pair))], source.transform, pair)
    assert others["not"] > 0.9


def test_a_mixture_over_a_broad_gaussian_is_a_mixture():
    one, wide = composing.exact_mixture(3), composing.broad(3)
    a, (mean, variances) = composing.at_level_1(one), wide.base.moments(1)
    inverse = torch.zeros(1).double(), mean[None], -variances[:1]
    weights, means, spread = composing.multiplied(composing.multiplied(a, a), inverse)
    x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = GaussianMixture(weights.softmax(0), means, spread).log_prob(x, 0, one.schedule)
    wanted = 2 * one.log_prob(x, t=1) - wide.log_prob(x, t=1)
    assert float((found - wanted).std()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--learned", "--steps", "20"]], ids=["exact", "learned"])
def test_draws_of_compositions_are_compared(tmp_path, more):
    composing.main(["--n", "100", "--dims", "2", "--json", str(tmp_path / "found.json"), *more])
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert len(rows) == (36 if more else 30)
    assert all(abs(row["c2st"] - 0.5) < 0.15 for row in rows if row["method"] == "exact")
