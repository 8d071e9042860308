"""Tables 2 and 3 and Figure 6 at their smallest scale; the published setting on tiny files in their true formats."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from oracles import rng
from published_data import write_celeba, write_cifar

from studies.cli import main
from studies.compare import comparison
from studies.quality import frechet
from studies.quality.features import Extractor
from studies.reproduce import Workspace, fig6, models, table1, table2, table3, workspace
from torchcdm.annealing.kernels import Kernels
from torchcdm.cli import main as cdm
from torchcdm.likelihood import Scoring
from torchcdm.training.config_files import make_config, merge, preset_fields


def pixels(source, device="cpu"):
    """Features that are easy to see."""
    return Extractor("means of rows", lambda x: x.double().flatten(1, 2).mean(2), "rows")


def columns(table):
    """Rows by their first cell, each a dict of lists by column, as names repeat."""
    found = {}
    for row in table["rows"]:
        cells = {}
        for name, cell in zip(table["columns"], row, strict=True):
            cells.setdefault(name, []).append(cell)
        found.setdefault(row[0], []).append(cells)
    return found


@pytest.fixture
def short(monkeypatch):
    """Models of three steps, few samples, and plain features."""
    monkeypatch.setattr(frechet, "extractor_for", pixels)
    setting = models.SETTINGS["smoke"]
    layers = merge(setting.layers, {"train": {"steps": 3}, "model": {"schedule": {"T": 24}}})
    steps = {"ddim": 2, "ddpm": 3, "dpm2": 2}
    monkeypatch.setitem(models.SETTINGS, "smoke", replace(setting, layers=layers, samples=20, steps=steps, test=20))


def run(name, folder, scale="smoke"):
    assert main(["reproduce", name, "--scale", scale, "--out", str(folder), "--quiet", "--device", "cpu"]) == 0
    return json.loads((folder / f"{name}-{scale}.json").read_text())


def test_other_commands_read_a_model_of_a_reproduction(short, monkeypatch, tmp_path, capsys):
    setting = models.SETTINGS["smoke"]
    small = replace(setting, layers=merge(setting.layers, {"data": {"size": [4, 4]}}))
    monkeypatch.setitem(models.SETTINGS, "smoke", small)
    found = models.Models(Workspace(tmp_path, "smoke", device="cpu", progress=False))
    assert found.denoiser("both")[0].shape == (1, 4, 4)
    folder = tmp_path / "runs" / f"{found.name('both')}-smoke"
    assert cdm(["nll", str(folder), "--methods", "single", "--limit", "5", "--quiet"]) == 0
    assert "bits/dim" in capsys.readouterr().out


# --- Table 2 and Figure 6 ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_table_2_and_figure_6_share_models_and_samples(tmp_path, short, monkeypatch, capsys):
    content = run("table2", tmp_path)
    main_table, grid, other, quality = content["tables"]
    rows = columns(main_table)
    assert list(rows) == ["DDM", "CDM", "DDM, conditional", "CDM, conditional"]
    assert rows["CDM"][0]["published"] == [7.56, 4.74, 7.29] and rows["CDM"][0]["guidance weight"] == [None]
    assert rows["CDM, conditional"][0]["published"] == [5.08, 3.66, 4.87]
    assert "means of rows" in main_table["title"] and "20 samples" in main_table["title"]
    assert main_table["columns"][2:] == [
        "DDIM, 2 steps", "published", "DDPM, 3 steps", "published", "2nd-order DPM-Solver, 2 steps", "published",
    ]  # fmt: skip
    assert [row[3] for row in other["rows"]] == [10.28, 7.07] and other["rows"][1][1] == "Euler, 3 steps"
    # Of twenty samples no Fréchet distance is printed, and yet a weight was chosen.
    assert all(cell is None for row in grid["rows"] for cell in row[1:])
    assert {rows[name][0]["guidance weight"][0] for name in ("DDM, conditional", "CDM, conditional")} <= {0.5, 1.0}
    assert len(content["figures"]) == len(quality["rows"]) == 6
    assert quality["columns"] == ["samples", "KID", "precision", "recall"]

    monkeypatch.setattr(workspace, "train", lambda *_, **__: pytest.fail("trained again"))
    made = []
    monkeypatch.setattr(models, "sample", lambda *args, **_: made.append(args) or torch.zeros(20, 1, 8, 8))
    figure = run("fig6", tmp_path)
    assert not made or {args[5] for args in made} == {0.0}, "guided samples are those of the table"
    assert [row[0] for row in figure["tables"][0]["rows"]] == ["0", "0.5", "1", "test images"]
    grid, nearest = figure["figures"]
    assert "trouser" not in grid["caption"] and "Rows: 0, 1, 2" in grid["caption"]
    assert nearest["caption"] == "Samples, guidance weight 1; below each its nearest of 1300 training images."
    assert (tmp_path / "figures" / nearest["file"]).exists()
    capsys.readouterr()


@pytest.mark.slow
def test_a_seed_is_that_of_trainings_and_samples(tmp_path, short, capsys):
    drawn = {}
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        options = ["--quiet", "--device", "cpu", "--seed", str(seed)]
        assert main(["reproduce", "fig5", "--out", str(folder), *options]) == 0
        content = json.loads((folder / "fig5-smoke.json").read_text())
        assert content["command"].endswith(f" --seed {seed} --out DIR") == bool(seed)
        family = models.Models(Workspace(folder, "smoke", device="cpu", seed=seed, finished_only=True))
        family.denoiser("both")
        family.work.finished_only = False
        drawn[seed] = family.samples("both", count=4)
    assert not torch.equal(drawn[0], drawn[1])
    assert main(["reproduce", "fig5", "--out", str(tmp_path / "0"), "--quiet", "--device", "cpu", "--seed", "1"]) == 2
    assert "was made with train.seed = 0, not 1" in capsys.readouterr().err
    assert main(["reproduce", "fig5", "--out", str(tmp_path), "--quiet", "--seed", "-1"]) == 2
    assert "--seed is -1; it must not be negative" in capsys.readouterr().err


@pytest.mark.slow
def test_what_is_finished_is_reported_without_making_the_rest(tmp_path, short, monkeypatch, capsys):
    command = ["reproduce", "table2", "--scale", "smoke", "--out", str(tmp_path), "--quiet", "--device", "cpu"]
    assert main([*command, "--finished"]) == 2
    assert "nothing of table2 is finished at scale smoke" in capsys.readouterr().err
    run("table2", tmp_path)
    # As after a stop: the CDM's last sample set, all of a guided model, and one of the other schedules are missing.
    shutil.rmtree(tmp_path / "samples" / "digits-both-ddpm-3-smoke")
    for name in ("ddm-conditional", "ot"):
        shutil.rmtree(tmp_path / "runs" / f"digits-{name}-smoke")
    monkeypatch.setattr(workspace, "train", lambda *_, **__: pytest.fail("trained"))
    monkeypatch.setattr(models, "sample", lambda *_, **__: pytest.fail("sampled"))
    monkeypatch.setattr(frechet.Reference, "printable", lambda self, x: 1.0)
    assert main([*command, "--finished"]) == 0
    content = json.loads((tmp_path / "table2-smoke.json").read_text())
    rows = columns(content["tables"][0])
    assert list(rows) == ["DDM", "CDM", "CDM, conditional"]
    assert [rows["CDM"][0][name] for name in content["tables"][0]["columns"][2::2]] == [[1.0], [None], [1.0]]
    assert [row[0] for row in content["tables"][2]["rows"]] == ["CDM, uniform sigma"]
    (left_out,) = (note for note in content["notes"] if note.startswith("Left out"))
    assert "CDM, DDPM" in left_out and "DDM, conditional" in left_out and "optimal transport" in left_out
    assert content["command"].endswith("--finished --out DIR")


@pytest.mark.slow
def test_the_chosen_weight_has_the_least_distance(tmp_path, short, monkeypatch, capsys):
    # Samples of weight w lie w away from the data.
    real = models.Models.samples

    def shifted(self, variant, *args, guidance=0.0, **options):
        x = self.source.train.tensors(2000)[0].float()
        return x + guidance if "conditional" in variant else real(self, variant, *args, guidance=guidance, **options)

    monkeypatch.setattr(models.Models, "samples", shifted)
    monkeypatch.setattr(frechet, "SMALLEST_COUNT", 1000)
    rows = columns(run("table2", tmp_path)["tables"][0])
    assert rows["CDM, conditional"][0]["guidance weight"] == [0.5]
    distance = rows["CDM, conditional"][0]["DDIM, 2 steps"][0]
    assert distance == pytest.approx(8 * 0.5**2, rel=1e-6), "eight features, each half a grey level away"
    capsys.readouterr()


def test_a_larger_sample_set_begins_with_the_smaller(tmp_path, short):
    setting = replace(models.SETTINGS["smoke"], samples=600)
    family = models.Models(Workspace(tmp_path, "smoke"), setting)
    few, all_ = (family.samples("conditional", "ddim", 1, 0.5, count) for count in (30, None))
    assert len(few) == 250 and len(all_) == 750 and torch.equal(all_[:250], few)
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == ["digits-conditional-ddim-1-w0.5-smoke"]


def test_class_means_tell_classes_and_their_spread():
    y = torch.arange(400) % 4
    centres = 10 * torch.eye(4)[:, None, :, None].expand(4, 1, 4, 4)
    noise = torch.randn(400, 1, 4, 4, generator=rng())
    means = fig6.ClassMeans(pixels(None), centres[y] + noise, y, 4)
    kept, spread = means.measure(centres[y] + 0.5 * noise, y)
    assert kept == 100 and spread == pytest.approx(0.5, rel=1e-6)
    wrong, _ = means.measure(centres[(y + 1) % 4] + noise, y)
    assert wrong == 0


# --- Table 3 -------------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(monkeypatch):
    """Likelihoods and speeds measured with next to no evaluations, and no Gaussian in 3072 dimensions."""
    pytest.importorskip("normflows")
    monkeypatch.setattr(Kernels, "of_target", classmethod(lambda cls, target, *_: cls(target.reference)))
    monkeypatch.setattr("studies.compare.denoising.SCORING", Scoring(steps=2))
    monkeypatch.setattr("studies.compare.denoising.ELBO_EVALUATIONS", 3)
    monkeypatch.setattr("studies.compare.comparison.DRAWN", 2)
    for scale, systems in (("smoke", ("cdm", "realnvp")), ("paper", ("realnvp",))):
        setting = table3.Setting(4, 0.3, "processor", 32, systems)
        monkeypatch.setitem(table3.SETTINGS, scale, setting)


@pytest.mark.filterwarnings("ignore")
def test_table_3_has_all_systems_and_makes_nothing_twice(tmp_path, short, scored, monkeypatch, capsys):
    content = run("table3", tmp_path)
    own, compared = content["tables"]
    rows = columns(own)
    assert list(rows) == [*table3.OWN_ROWS.values(), *(title for title, _ in table3.PUBLISHED_ONLY)]
    found = {(title, row["likelihood"][0]): row for title in rows for row in rows[title]}
    assert found["CDM, uniform sigma", "one pass, level 0"]["published"] == [2.98]
    assert found["DDM, trained on L", "ELBO"]["published"] == [3.70]
    assert found["DDM, trained on L_simple", "probability flow"]["published NFE"] == [200]
    assert found["CDM", "one pass, level 0"]["NFE"] == [1]
    assert found["MintNet", None]["published"] == [3.32] and found["MintNet", None]["NLL"] == [None]
    assert ("DDM, trained on L", "one pass, level 0") not in found

    likelihoods = {(row[0], row[1]) for row in compared["rows"]}
    assert {("CDM", "probability flow"), ("CDM", "ELBO"), ("RealNVP", "density, mean of 16 draws")} <= likelihoods
    # Few particles on an untrained network: a normalised row, or why there is none.
    assert ("CDM", "one pass, normalised") in likelihoods or any("CDM: No normalised" in n for n in content["notes"])
    rows = columns(compared)
    assert rows["RealNVP"][0]["published"] == [3.49]
    normalised = [row[2] for row in compared["rows"]]
    assert normalised == sorted(normalised, reverse=True), "those that need not be normalised come last"
    assert "Gaussianised" in compared["title"], "digits are compared in the units of their preset"

    for module, name in ((workspace, "train"), (comparison, "_measured"), (table3, "FittedDenoiser")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("made again"))
    assert run("table3", tmp_path) == content
    capsys.readouterr()


@pytest.mark.filterwarnings("ignore")
def test_libraries_that_are_not_installed_are_named(tmp_path, short, scored, monkeypatch, capsys):
    monkeypatch.setattr(table3, "find_spec", lambda name: None)
    monkeypatch.setattr(table3, "OWN_ROWS", {"ddm": "DDM"})
    setting = table3.SETTINGS["smoke"]
    monkeypatch.setitem(table3.SETTINGS, "smoke", replace(setting, systems=("realnvp",)))
    content = run("table3", tmp_path)
    assert any("Not installed: realnvp; pip install 'torchcdm[studies]'" in note for note in content["notes"])
    capsys.readouterr()


# --- the published setting, on tiny files --------------------------------------------------------------------------

TINY = {
    "train": {"steps": 2, "batch_size": 4, "warmup": 1, "validate_every": 2, "save_every": 2, "decay": "constant"},
    "data": {"workers": 0},
    "sampling": {"n": 1, "steps": 1, "guidance": 0.0},
}  # fmt: skip


@pytest.fixture
def published(tmp_path, monkeypatch):
    """CIFAR-10 and CelebA as they are distributed, a few images each, and the published setting with thin networks."""
    write_cifar(tmp_path / "data" / "cifar-10-batches-bin", count=6)
    write_celeba(tmp_path / "data" / "celeba", count=12)
    monkeypatch.setenv("TORCHCDM_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(frechet, "extractor_for", pixels)
    shrunk = {"samples": 10, "test": 4, "steps": {"ddim": 1, "ddpm": 2, "dpm2": 1}, "weights": (1.0,)}

    def tiny(setting):
        # The same form and number of levels; 4 channels instead of 128.
        layers = merge(TINY, {"model": {"backbone": {"channels": 4, "blocks": 1}}})
        return replace(setting, layers=layers, **shrunk)

    monkeypatch.setitem(models.SETTINGS, "paper", tiny(models.SETTINGS["paper"]))
    monkeypatch.setitem(table2.MORE, "paper", tuple(map(tiny, table2.MORE["paper"])))
    return tmp_path / "out"


@pytest.mark.slow
def test_the_published_setting_of_table_2_runs_on_both_data_sets(published, capsys):
    content = run("table2", published, "paper")
    titles = [table["title"] for table in content["tables"]]
    assert titles[0].startswith("cifar10") and titles[-2].startswith("celeba") and "CelebA 64x64" in titles[-2]
    celeba = columns(content["tables"][-2])
    assert list(celeba) == ["DDM", "CDM"] and celeba["CDM"][0]["published"] == [4.78, 2.51, 4.45]
    assert not any("celeba" in title for title in titles[:-2]), "CelebA has no classes, and no other schedules"
    assert sorted(path.name for path in (published / "runs").iterdir()) == [
        "celeba-both-paper", "celeba-ddm-paper", "cifar10-both-paper", "cifar10-conditional-paper",
        "cifar10-ddm-conditional-paper", "cifar10-ddm-paper", "cifar10-ot-paper", "cifar10-uniform-paper",
    ]  # fmt: skip
    capsys.readouterr()


@pytest.mark.parametrize("name", ["table1", "fig6"])
def test_the_published_setting_runs(name, published, capsys):
    content = run(name, published, "paper")
    assert content["tables"][0]["title"].startswith("cifar10")
    if name == "fig6":
        assert "Rows: airplane, automobile" in content["figures"][0]["caption"]
    else:
        assert [row[0] for row in content["tables"][0]["rows"]] == list(table1.ROWS.values())
    capsys.readouterr()


@pytest.mark.filterwarnings("ignore")
def test_the_published_setting_of_table_3_runs(published, scored, monkeypatch, capsys):
    monkeypatch.setattr(table3, "OWN_ROWS", {"ddm-bound": "DDM, trained on L", "ot": "CDM, optimal transport"})
    content = run("table3", published, "paper")
    own, compared = content["tables"]
    assert own["title"].startswith("cifar10, the paper's form")
    assert compared["title"].startswith("cifar10, one protocol")
    assert {row[0] for row in compared["rows"]} == {"RealNVP"}
    capsys.readouterr()


def test_the_published_configurations_are_the_presets():
    for variant, preset in {"both": "cifar10", "uniform": "cifar10-uniform", "ot": "cifar10-ot",
                            "conditional": "cifar10-conditional"}.items():  # fmt: skip
        assert models.config_of(models.SETTINGS["paper"], variant) == make_config(preset_fields(preset)), variant
    assert models.config_of(models.CELEBA, "both") == make_config(preset_fields("celeba64"))
    ddm = models.config_of(models.CELEBA, "ddm")
    assert ddm.train.lr == 1e-4 and ddm.model.kind == "ddm"
