"""``cdm sample``: the files, their seeds, and whose classes they are."""

import csv
import json
import re
import shutil
from dataclasses import replace

import numpy as np
from cdm_calls import refuse, succeed
from PIL import Image

from torchcdm.training.checkpoint import load
from torchcdm.training.run_folder import RunFolder


def test_sampling_again_gives_the_same_files(capsys, tmp_path, run):
    for name in ("a", "b"):
        succeed(capsys, "sample", run, "--n", "3", "--steps", "4", "--seed", "7", "--format", "all", "--device", "cpu",
                "--out", tmp_path / name, "--quiet")  # fmt: skip
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["000000.png", "000001.png", "000002.png", "manifest.csv", "samples.npz", "samples.png"]
    for name in names:
        if not name.endswith(".npz"):
            assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    with (tmp_path / "a" / "manifest.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == names[:3] and {row["seed"] for row in rows} == {"7"}
    x = np.load(tmp_path / "a" / "samples.npz")["x"]
    assert x.shape == (3, 1, 8, 8) and x.dtype == np.uint8 and x.max() <= 16
    assert np.asarray(Image.open(tmp_path / "a" / names[0])).tolist() == np.round(x[0, 0] * 255.0 / 16).tolist()


def test_steps_are_placed_once_for_a_run(capsys, tmp_path, run):
    """A run of its own keeps where they lie; one that others write to, or that nobody may, samples all the same."""
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("curvatures*"))
    words = ["sample", copy, "--n", "3", "--steps", "4", "--quiet", "--out"]
    with RunFolder(copy).locked():
        succeed(capsys, *words, tmp_path / "a")
    assert not load(copy).curvatures
    succeed(capsys, *words, tmp_path / "b")
    kept = load(copy).curvatures
    sheets = [(tmp_path / name / "samples.png").read_bytes() for name in ("a", "b")]
    assert len(kept) == 1 and sheets[0] == sheets[1]
    succeed(capsys, *words, tmp_path / "c", "--sampler", "ddpm", "--spacing", "adaptive")
    assert load(copy).curvatures.keys() == kept.keys()


def test_samples_of_a_class(capsys, tmp_path, conditional):
    succeed(capsys, "sample", conditional, "--n", "12", "--steps", "2", "--label", "balanced", "--guidance", "1",
            "--out", tmp_path / "all", "--quiet")  # fmt: skip
    succeed(capsys, "sample", conditional, "--n", "2", "--steps", "2", "--label", "7", "--out", tmp_path / "one",
            "--format", "array", "--quiet")  # fmt: skip
    for name, labels in (("all", [str(i % 10) for i in range(12)]), ("one", ["7", "7"])):
        with (tmp_path / name / "manifest.csv").open() as file:
            assert [row["label"] for row in csv.DictReader(file)] == labels
    assert np.load(tmp_path / "one" / "samples.npz")["y"].tolist() == [7, 7]


def test_the_class_that_a_joint_model_drew_is_a_column_of_the_table_again(capsys, tmp_path):
    """With it samples are a labelled table, which another model can learn from."""
    draw = np.random.default_rng(0)
    kind = draw.integers(0, 2, 400)
    x = np.round(draw.normal(size=400) + 6 * kind, 3)
    lines = [f"{value},{('low', 'high')[k]}" for value, k in zip(x, kind, strict=True)]
    (tmp_path / "t.csv").write_text("path,self\n" + "\n".join(lines) + "\n")
    succeed(capsys, "train", "table", "--data", f"table:{tmp_path / 't.csv'}", "--label", "self", "--model.labels",
            "joint", "--model.class_gaussians", "true", "--steps", "1", "--no-report", "--quiet",
            "--out", tmp_path / "run")  # fmt: skip
    succeed(capsys, "sample", tmp_path / "run", "--n", "60", "--out", tmp_path / "out", "--quiet")
    for folder in (tmp_path / "out", tmp_path / "run" / "samples"):
        with next(path for path in folder.glob("*.csv") if path.stem != "manifest").open() as file:
            rows = list(csv.DictReader(file))
        assert [row["path"] for row in rows] and {row["self"] for row in rows} == {"low", "high"}
    by_class = {name: [float(row["path"]) for row in rows if row["self"] == name] for name in ("low", "high")}
    assert np.mean(by_class["low"]) < 1.5 and np.mean(by_class["high"]) > 4.5, "each class has a Gaussian of its own"
    with (tmp_path / "out" / "manifest.csv").open() as file:
        assert {row["label"] for row in csv.DictReader(file)} == {"low", "high"}
    (tmp_path / "new.csv").write_text("path,self\n0.5,low\n5.5,\n0.1,low\n")
    words = ["nll", tmp_path / "run", "--data", f"table:{tmp_path / 'new.csv'}", "--methods", "single", "--quiet"]
    assert "single" in succeed(capsys, *words), "a label that is not used may be missing"
    assert "has no label" in refuse(capsys, *words, "--conditional")
    (tmp_path / "new.csv").write_text("path,self\n0.5,low\nfive,low\n0.1,low\n")
    assert "leave out their rows or columns (--skip-bad" in refuse(capsys, *words)
    assert json.loads(succeed(capsys, *words, "--skip-bad", "--json", "-"))["data"]["count"] == 2


def test_names_of_classes_may_be_other_numbers(capsys, tmp_path, conditional):
    model = load(conditional)
    model.info = replace(model.info, class_names=tuple("1234567890"))
    model.save(tmp_path / "run")
    words = ["sample", tmp_path / "run", "--n", "2", "--steps", "2", "--format", "array", "--quiet", "--out", tmp_path]
    succeed(capsys, *words, "--label", "1")
    assert np.load(tmp_path / "samples.npz")["y"].tolist() == [0, 0]
    assert "did you mean" in refuse(capsys, *words, "--label", "10")


def test_samples_of_composed_classes(capsys, tmp_path, conditional):
    words = ["sample", conditional, "--n", "6", "--quiet", "--out", tmp_path]
    plain = succeed(capsys, *words, "--any-of", "3,8", "--steps", "2", "--corrector", "2")
    assert re.search(r"; 4 evaluations of the denoiser each; \d+% of moves accepted", plain)
    weighed = succeed(capsys, *words, "--none-of", "1", "--beta", "2", "--particles", "16")
    assert "of 16 particles; log Z" in weighed
    one = succeed(capsys, *words, "--label", "3", "--particles", "16")
    assert "of 16 particles; log Z" in one
    with open(tmp_path / "manifest.csv", encoding="utf-8") as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["3"] * 6
