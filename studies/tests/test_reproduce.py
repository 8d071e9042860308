"""Reproductions: known truth is measured as such, and what is finished is never made twice."""

import json
import math
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
from oracles import MixtureClassifier, covariance, rng

from studies.cli import main
from studies.exact import GaussianMixture
from studies.reproduce import Figure, Result, Table, Workspace, fig7, known_truth, registry, workspace
from studies.reproduce.result import write_result
from studies.reproduce.tre import TRELoss
from studies.reproduce.truth import exact_source, level_errors, spread_levels
from torchcdm.data import load_data
from torchcdm.diffusion.mixture import fit_gaussians
from torchcdm.diffusion.schedules import LogSNRSchedule
from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.training.build import build_backbone
from torchcdm.training.config_files import make_config, preset_fields
from torchcdm.units import DataTransform

TINY = make_config(
    preset_fields("mlp"),
    {"train": {"steps": 3, "batch_size": 16, "validate_every": 3, "save_every": 2},
     "model": {"backbone": {"width": 8, "depth": 1, "energy_maps": 2}}, "sampling": {"n": 1, "steps": 1}},
)  # fmt: skip


@pytest.fixture
def work(tmp_path):
    return Workspace(tmp_path, "smoke")


@pytest.fixture(scope="module")
def source():
    return exact_source(known_truth.mixture(2, 2), "two modes", 200, 50, 50)


def exact_model(mixture, T=12):
    schedule = LogSNRSchedule(T, 0.05, 10)
    transform = DataTransform(mixture.shape)
    return ClassificationDiffusion(MixtureClassifier(mixture, schedule), schedule, transform).double()


# --- what is kept --------------------------------------------------------------------------------------------------


def test_a_finished_model_is_not_trained_again(work, source, monkeypatch):
    first, facts = work.model("a", TINY, source)
    monkeypatch.setattr(workspace, "train", lambda *_, **__: pytest.fail("trained again"))
    again, same = work.model("a", TINY, source)
    assert facts == same and facts["steps"] == 3
    x = torch.zeros(4, 2)
    assert torch.equal(first.log_prob(x), again.log_prob(x))


def test_an_unfinished_model_goes_on_where_it_was(work, source, monkeypatch):
    whole, _ = work.model("whole", TINY, source)
    steps, real = [], workspace.train

    def stopped(config, out, *args, **options):
        # As a kill after the state of step 2: the third step and its model never come.
        import torchcdm.training.loop as trainer

        update = trainer.Trainer._update

        def counted(self, *inner):
            steps.append(self.step)
            if self.step == 2 and steps.count(2) == 1:
                raise KeyboardInterrupt
            return update(self, *inner)

        with monkeypatch.context() as patched:
            patched.setattr(trainer.Trainer, "_update", counted)
            return real(config, out, *args, **options)

    monkeypatch.setattr(workspace, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        work.model("broken", TINY, source)
    resumed, _ = work.model("broken", TINY, source)
    assert steps == [0, 1, 2, 2]
    x = torch.randn(4, 2, generator=rng())
    assert torch.equal(whole.log_prob(x), resumed.log_prob(x))


def test_other_settings_are_refused(work, source):
    work.model("a", TINY, source)
    other = replace(TINY, train=replace(TINY.train, steps=4))
    with pytest.raises(UserError, match=r"finished.json: was made with train.steps = 3, not 4.*choose another --out"):
        work.model("a", other, source)
    work.numbers("n", {"test": 5}, lambda: {"value": 1.0})
    with pytest.raises(UserError, match="test = 5, not 6"):
        work.numbers("n", {"test": 6}, lambda: {"value": 2.0})
    assert work.numbers("n", {"test": 5}, lambda: pytest.fail("made again")) == {"value": 1.0}


@pytest.mark.parametrize("loss", [None, TRELoss])
def test_an_unfinished_model_of_other_settings_is_refused(work, source, loss):
    work.model("a", TINY, source, loss)
    (work.root / "runs" / "a-smoke" / "finished.json").unlink()
    other = replace(TINY, train=replace(TINY.train, lr=0.5))
    with pytest.raises(UserError, match=r"was trained with train.lr = .*, not 0.5"):
        work.model("a", other, source, loss)


def test_fewer_steps_shrink_what_is_counted_in_steps(tmp_path):
    config = make_config(preset_fields("encoder"), {"train": {"steps": 1000, "warmup": 50, "validate_every": 200,
                                                              "save_every": 1}})  # fmt: skip
    assert Workspace(tmp_path, "smoke").adjusted(config) == config
    train = Workspace(tmp_path, "smoke", steps=100).adjusted(config).train
    assert (train.steps, train.warmup, train.validate_every, train.save_every) == (100, 5, 20, 1)


def test_a_seed_is_that_of_every_training(tmp_path, source):
    config = Workspace(tmp_path, "smoke", seed=3).adjusted(TINY)
    assert config.train.seed == 3
    work = Workspace(tmp_path, "smoke")
    work.model("a", TINY, source)
    with pytest.raises(UserError, match=r"was made with train.seed = 0, not 3"):
        work.model("a", config, source)


def test_sample_sets_are_kept_by_chunks(work):
    made = []

    def make(chunk):
        if chunk == 2 and made.count(2) == 0:
            made.append(2)
            raise KeyboardInterrupt
        made.append(chunk)
        return torch.full((2, 3), float(chunk))

    with pytest.raises(KeyboardInterrupt):
        work.samples("s", {"seed": 0}, 4, make)
    x = work.samples("s", {"seed": 0}, 4, make)
    assert made == [0, 1, 2, 2, 3]
    assert torch.equal(x[:, 0], torch.tensor([0.0, 0, 1, 1, 2, 2, 3, 3]))


# --- the report ----------------------------------------------------------------------------------------------------


def test_the_report_says_what_was_measured(tmp_path):
    table = Table("a title", ("row", "measured", "published"), (("CDM", 3.14159, None), ("DDM", 2, 2.65)))
    result = Result((table,), (Figure(tmp_path / "figures" / "f.png", "a curve"),), ("fewer steps",), ("a finding",))
    path = write_result(result, tmp_path, "table9", "Table 9", "small")
    text = path.read_text()
    assert path.name == "table9-small.md"
    assert "| CDM | 3.142 | – |" in text and "| DDM | 2 | 2.65 |" in text and "| --- | ---: | ---: |" in text
    assert "(figures/f.png)" in text and "- fewer steps" in text and "- a finding" in text
    assert "python -m studies reproduce table9 --scale small --out DIR" in text
    content = json.loads((tmp_path / "table9-small.json").read_text())
    assert content["tables"][0]["rows"] == [["CDM", 3.14159, None], ["DDM", 2, 2.65]]
    assert content["scaled_down"] == ["fewer steps"] and content["figures"][0]["file"] == "f.png"


def test_the_command_line(tmp_path, capsys):
    assert main(["reproduce"]) == 0
    names = capsys.readouterr().out
    assert all(name in names for name in registry.REPRODUCTIONS)
    for arguments, message in (
        (["reproduce", "fig8x", "--out", str(tmp_path)], "unknown reproduction 'fig8x'"),
        (["reproduce", "fig7", "--scale", "big", "--out", str(tmp_path)], "unknown scale 'big'"),
        (["reproduce", "fig7"], "--out DIR"),
        (["reproduce", "fig7", "--steps", "0", "--out", str(tmp_path)], "--steps is 0"),
        (["reproduce", "table1", "--samples", "-1", "--out", str(tmp_path)], "--samples is -1"),
    ):
        assert main(arguments) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("name", registry.REPRODUCTIONS)
def test_every_reproduction_has_every_scale(name):
    module = registry.importlib.import_module(registry.REPRODUCTIONS[name].module)
    assert set(module.SETTINGS) == set(workspace.SCALES)


# --- known truth ---------------------------------------------------------------------------------------------------


def test_the_exact_model_has_no_error_at_any_level():
    mixture = known_truth.mixture(2, 8)
    model, x = exact_model(mixture), mixture.sample(200, rng())
    found = level_errors(model, mixture, x, spread_levels(model.schedule.T, 6))
    assert found.levels[0] == 0 and found.levels[-1] == model.schedule.T + 1
    assert found.error.abs().max() < 1e-3  # the noisy inputs are float32
    assert found.exact[0].mean() == pytest.approx(float(mixture.log_prob(x, 0, model.schedule).mean()), abs=1e-4)
    values = known_truth.weights_by_level(mixture, x, model.schedule, found)
    assert values["largest_weight_error"] < 1e-3 and values["mass"] == pytest.approx(1, abs=1e-3)


def test_wrong_weights_and_a_wrong_mass_are_found():
    # A model that has the modes right, twice the mass, and the weights 0.7, 0.3 instead of 0.5, 0.5.
    means = torch.tensor([[-4.0, 0.0], [4.0, 0.0]], dtype=torch.float64)
    truth, wrong = (GaussianMixture(torch.tensor(w), means, torch.ones(2)) for w in ([0.5, 0.5], [0.7, 0.3]))
    model, x = exact_model(wrong), truth.sample(4000, rng())
    schedule = model.schedule
    found = level_errors(model, truth, x, [0, 4, 13])
    values = known_truth.weights_under(truth, x, 0, schedule, found.error[0] + math.log(2))
    assert values["weight_error"] == pytest.approx(0.2, abs=0.01)
    assert values["mass"] == pytest.approx(2, abs=0.05)
    # The modes are still apart at level 4; under pure noise nothing tells them.
    values = known_truth.weights_by_level(truth, x, schedule, found)
    assert values["weight_error_by_level"] == pytest.approx([0.2, 0.2, 0.0], abs=0.01)
    assert values["largest_weight_error"] == max(values["weight_error_by_level"])
    assert values["share_by_level"][0] < 0.9 and values["share_by_level"][2] == pytest.approx(1, abs=1e-6)


def test_a_mixture_is_measured_once_and_its_numbers_outlive_its_model(tmp_path, monkeypatch, capsys):
    layer = known_truth._layer(3, 16, 8, 1, 2, 12)
    setting = known_truth.Setting(((2, 2),), {2: 200}, 100, 4, layer, {}, 3)
    monkeypatch.setitem(known_truth.SETTINGS, "smoke", setting)
    monkeypatch.setattr(known_truth, "COUNTS", (1,))

    def tables(*more):
        assert main(["reproduce", "known-truth", "--device", "cpu", "--out", str(tmp_path), "--quiet", *more]) == 0
        capsys.readouterr()
        return json.loads((tmp_path / "known-truth-smoke.json").read_text())["tables"]

    found = tables()
    for table in found:
        (row,) = (dict(zip(table["columns"], row, strict=True)) for row in table["rows"])
        assert row["the same over levels"] >= row["largest error of a weight"] > 0
    shutil.rmtree(tmp_path / "runs")
    assert tables("--finished") == found


def test_the_mixture_that_a_network_corrects_is_fitted_to_all_samples(work):
    source = exact_source(known_truth.mixture(2, 2), "two modes", 11_000, 50, 50)  # more than training reads
    layer = known_truth._layer(2, 16, 8, 1, 2, 12)
    config = make_config(preset_fields("mlp"), layer, {"model": {"components": 2, "shrinkage": 0.01}})
    model, _ = work.model("mixture", config, source, partial(known_truth._on_all_samples, source, config))
    x = source.train.tensors()[0]
    (_, all_of_them, _), (_, some, _) = (fit_gaussians(x, 2, shrinkage=0.01, rows=rows) for rows in (len(x), 10_000))
    assert torch.equal(model.base.parts.mean[:, 0], all_of_them) and not torch.equal(all_of_them, some)


def test_the_error_that_training_samples_allow_shrinks_as_their_root():
    # 11 numbers of two modes in the plane: log q/p has a deviation of about the root of 11 / N.
    exact = known_truth.mixture(2, 2)
    x = exact.sample(4000, rng())
    truth = exact.log_prob(x, 0, LogSNRSchedule(4))
    few, many = (known_truth.known_modes_error(exact, count, x, truth) for count in (1000, 100_000))
    assert 0.02 < few < 0.2 and many < few / 4


def test_mixtures_have_unequal_weights_that_sum_to_one():
    for dim, modes in known_truth.MIXTURES:
        weights = known_truth.mixture(dim, modes).log_weights.exp()
        assert len(weights) == modes and float(weights.sum()) == pytest.approx(1)
        assert float(weights.max() / weights.min()) == pytest.approx(8, rel=1e-6)


def test_uniform_pixels_have_the_analytic_density():
    schedule = LogSNRSchedule(12, 0.05, 10)
    for width in fig7.WIDTHS:
        mixture = fig7.uniform_pixels((1, 3, 4), width)
        log_p = mixture.log_prob(0.9 * mixture.sample(50, rng()), 0, schedule) / 12
        assert torch.allclose(log_p, torch.full((50,), -math.log(width), dtype=torch.float64), atol=1e-4)


def test_gaussian_images_have_the_papers_covariance():
    sigma, g = covariance(5), 0.1
    x = fig7.gaussian_images((5,), sigma, g).sample(200_000, rng()).flatten(1)
    expected = math.sqrt(0.9) * sigma + math.sqrt(0.1) * torch.eye(5)
    assert torch.allclose(x.T @ x / len(x), expected, atol=0.02)


def test_the_covariance_of_images_is_that_of_dequantised_data():
    shape, sigma = fig7.image_covariance("digits")
    source = load_data("digits")
    x = source.train.tensors()[0].repeat(40, 1, 1, 1)
    z = source.transform.encode(x, rng()).double().flatten(1)
    assert shape == (1, 8, 8)
    assert torch.allclose(torch.cov(z.T, correction=0), sigma, atol=2e-3)
    # Pixels that never vary keep the variance of their cell: a density exists without added noise.
    assert torch.linalg.eigvalsh(sigma)[0] >= float(source.transform.model_bin) ** 2 / 12 - 1e-12


def test_smoke_runs_and_a_second_run_makes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fig7, "WIDTHS", (1.0,))
    monkeypatch.setattr(fig7, "SHARES", (0.1,))
    arguments = ["reproduce", "fig7", "--steps", "6", "--out", str(tmp_path), "--quiet"]
    assert main(arguments) == 0
    report = (tmp_path / "fig7-smoke.json").read_text()
    content = json.loads(report)
    assert content["command"] == "python -m studies reproduce fig7 --scale smoke --steps 6 --out DIR"
    assert content["scaled_down"][-1].startswith("6 training steps for every model")
    table = content["tables"][0]
    rows = {(row[0], row[2]): dict(zip(table["columns"], row, strict=True)) for row in table["rows"]}
    # The residual alone is right for Gaussian images, before any training.
    assert rows["Gaussian, g = 0.1", "on"]["mean \\|error\\|"] < 0.05
    assert rows["uniform, width 1", "off"]["analytic"] == pytest.approx(0, abs=1e-3)
    assert (tmp_path / "figures" / "fig7-smoke.png").stat().st_size > 5000
    monkeypatch.setattr(workspace, "train", lambda *_, **__: pytest.fail("trained again"))
    assert main(arguments) == 0
    assert (tmp_path / "fig7-smoke.json").read_text() == report
    capsys.readouterr()


@pytest.mark.parametrize("scale", workspace.SCALES)
def test_networks_of_figure_7_take_its_images(scale):
    setting = fig7.SETTINGS[scale]
    image = (1, 8, 8) if setting.covariance == "digits" else (1, 28, 28)
    for layer, shape in ((setting.uniform, setting.pixels), (setting.gaussian, image)):
        config = make_config(preset_fields("encoder"), layer)
        shape = (math.prod(shape),) if config.model.backbone.name == "mlp" else shape
        with torch.device("meta"):
            network = build_backbone(config.model, shape, config.model.schedule.T + 2, None)
        size = sum(parameter.numel() for parameter in network.parameters())
        assert (size > 10_000_000) == (scale == "paper"), "the published network has 33 million weights, ours few"
