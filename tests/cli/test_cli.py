"""The command line: every command on a small run."""

import argparse
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cdm_calls import refuse, succeed
from PIL import Image
from small_runs import small_flags

import torchcdm
from torchcdm.apps import denoising
from torchcdm.apps.baselines import Baseline
from torchcdm.cli import main, measuring
from torchcdm.data import DataOptions, DataSource, MemorySplit, load_data, save_images
from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.errors import UserError, warn
from torchcdm.networks.mlp import MLP
from torchcdm.training import evaluation
from torchcdm.training.checkpoint import read_info
from torchcdm.training.loop import Interrupted
from torchcdm.units import DataTransform


def test_a_process_exits_with_two(tmp_path):
    code = "import sys; from torchcdm.cli import main; sys.exit(main())"
    result = subprocess.run(
        [sys.executable, "-c", code, "train", "digts", "--out", str(tmp_path)], capture_output=True, text=True
    )
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_an_output_that_is_full_and_one_that_knows_ascii_alone():
    def run(*words, **options):
        command = [sys.executable, "-m", "torchcdm", *words]
        return subprocess.run(command, stderr=subprocess.PIPE, text=True, **options)

    with open("/dev/full", "w") as full:
        result = run("presets", stdout=full)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1) and "No space left" in result.stderr
    result = run("nll", "--help", stdout=subprocess.PIPE, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 0 and "--sweeps" in result.stdout


def test_a_rank_that_is_not_the_first_says_nothing(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["info", "nowhere"]) == 2 and capsys.readouterr().err == ""


def test_a_warning_is_a_line(capsys, monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", lambda *found: sys.stderr.write(warnings.formatwarning(*found[:4])))
    monkeypatch.setattr("torchcdm.cli.about.presets", lambda _: warn("two\n  lines"))
    assert main(["presets"]) == 0 and capsys.readouterr().err == "cdm: warning: two lines\n"
    warn("afterwards")
    assert capsys.readouterr().err.startswith(f"{__file__}:")


def test_the_signal_that_stopped_a_training_is_in_the_exit_code(capsys, tmp_path, monkeypatch):
    def stopped(*_, **__):
        raise Interrupted(signal.SIGTERM, "stopped by a signal while steps were timed; nothing is kept")

    monkeypatch.setattr("torchcdm.cli.training.with_budget", stopped)
    assert main(["train", "digits", "--out", str(tmp_path / "run")]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "cdm: stopped by a signal while steps were timed; nothing is kept\n"


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out.startswith("torchcdm 0.")


def test_presets_tell_what_they_reach(capsys):
    lines = {line.split()[0]: line for line in succeed(capsys, "presets").splitlines()}
    assert {"digits", "fashion-mnist", "fashion-mnist-conditional", "cifar10", "cifar10-uniform", "cifar10-ot",
            "cifar10-conditional", "celeba64", "two-moons", "table"} <= set(lines)  # fmt: skip
    assert "(published)" in lines["cifar10"] and "T=1000" in lines["cifar10"] and "500000 steps" in lines["cifar10"]
    assert "(measured)" in lines["digits"]


def test_a_run_ends_in_a_report(run):
    report = json.loads((run / "report.json").read_text())
    assert {"preset", "data", "steps", "seconds", "versions", "nll", "baselines"} <= set(report)
    assert report["preset"] == "digits" and report["steps"] == 12 and report["seconds"] > 0
    rows = {row["name"]: row["value"] for row in report["nll"]["rows"]}
    assert 2 < rows["one-pass"] < 4 and 2 < rows["flow"] < 4
    gaps = report["gap_to_flow_by_level"]  # where the model is inconsistent
    assert gaps["levels"][0] == report["nll"]["gap_to_flow"]["level"] and len(gaps["mean"]) == len(gaps["levels"])
    for name in ("training", "levels", "gaps"):
        assert Image.open(run / "plots" / f"{name}.png").size[0] > 20
    assert Image.open(run / "samples" / "final.png").size == (130, 130)  # 2 x 2 digits, 64 wide, and the gap


def test_log_z_is_kept_beside_the_model_and_used_again(capsys, tmp_path, conditional):
    folder = tmp_path / "run"
    shutil.copytree(conditional, folder)
    words = ["nll", folder, "--limit", "10", "--device", "cpu", "--quiet", "--json", "-", "--level", "15"]
    measured = json.loads(succeed(capsys, *words, "--methods", "single,logz", "--sweeps", "4"))
    again = json.loads(succeed(capsys, *words, "--methods", "single"))
    assert (folder / "log_z.json").exists() == measured["believe"]
    assert again["log2_z_per_dim"] == (measured["log2_z_per_dim"] if measured["believe"] else None)
    rows = [{row["name"]: row["value"] for row in found["rows"]} for found in (measured, again)]
    assert rows[0].get("one-pass-restricted") == rows[1].get("one-pass-restricted")


def test_nll_writes_the_contract(capsys, tmp_path, run):
    words = ["nll", run, "--limit", "5", "--methods", "single,flow", "--flow-steps", "2", "--device", "cpu", "--quiet"]
    out = succeed(capsys, *words, "--json", tmp_path / "nll.json")
    content = json.loads((tmp_path / "nll.json").read_text())
    log_z = {"log2_z_per_dim", "log2_z_per_dim_check"}
    assert set(content) == {"data", "unit", "rows", "gap_to_flow", "believe", "why"} | log_z
    assert content["data"] == {"name": "digits", "split": "test", "count": 5, "dim": 64}
    assert set(content["gap_to_flow"]) == {"mean", "sd", "level"}
    assert {"published-convention", "one-pass", "one-pass-level", "flow"} <= {row["name"] for row in content["rows"]}
    assert "one-pass-level" in out
    assert json.loads(succeed(capsys, *words, "--json", "-")) == content


def nll_of(capsys, run, *words):
    words = ["nll", run, "--methods", "single", "--device", "cpu", "--quiet", "--json", "-", *words]
    return {row["name"]: row["value"] for row in json.loads(succeed(capsys, *words))["rows"]}


@pytest.mark.parametrize(("command", "more"), [("nll", ["--methods", "single"]), ("evaluate", [])])
def test_other_data_without_splits_are_measured_whole(capsys, tmp_path, run, command, more):
    np.save(tmp_path / "some.npy", load_data("digits").test.tensors()[0][:7].byte().numpy())
    words = [command, run, "--data", f"array:{tmp_path / 'some.npy'}", "--device", "cpu", "--quiet", *more]
    content = json.loads(succeed(capsys, *words, "--json", "-"))
    assert (content | content["data"])["count"] == 7 and content["data"]["split"] == "all"
    assert "too few samples, 7" in refuse(capsys, *words, "--split", "test")


@pytest.mark.parametrize(("counts", "name"), [((5, 3, 2), "test"), ((5, 3, 0), "validation"), ((5, 0, 0), "all")])
def test_other_data_with_splits_are_measured_by_what_is_held_out(counts, name):
    parts = [MemorySplit(torch.zeros(count, 2)) for count in counts]
    info = SimpleNamespace(data=DataOptions(spec="array:a.npy"), is_training_data=lambda *arguments: False)
    info.read_source = lambda *arguments, **how: DataSource("b", *parts, DataTransform((2,)))
    options = argparse.Namespace(split=None, data="array:b.npy", skip_bad=False)
    _, found, split = measuring._to_measure(SimpleNamespace(info=info), options, False)
    assert found == name and len(split) == counts[("all", "validation", "test").index(name)]


def test_what_is_usual_for_a_run_is_its_own_training_data(capsys, tmp_path, table, monkeypatch):
    run, path = table
    np.savetxt(tmp_path / "o.csv", np.ones((20, 2)), delimiter=",", header="volt,gram", comments="")

    def stop(model, x, *others, training, **how):
        raise UserError(f"{len(x)} samples, {len(training)} are usual")

    monkeypatch.setattr(measuring, "report", stop)
    words = ["nll", run, "--data", f"table:{tmp_path / 'o.csv'}", "--methods", "logz", "--device", "cpu"]
    assert "20 samples, 320 are usual" in refuse(capsys, *words)
    path.rename(tmp_path / "moved.csv")  # what is scored says nothing of what is usual
    try:
        assert "2 samples, 16 are usual" in refuse(capsys, *words)
    finally:
        (tmp_path / "moved.csv").rename(path)


def test_other_tables_are_read_by_the_columns_of_the_run(capsys, tmp_path, table):
    run, path = table
    volt, gram = np.loadtxt(path, delimiter=",", skiprows=1).T.tolist()
    # In another order and among others; one that holds a single value must stay in.
    lines = [f"{g!r},n{i},{v!r}" for i, (v, g) in enumerate(zip(volt, gram, strict=True))]
    (tmp_path / "other.csv").write_text("\n".join(["gram,name,volt", *lines]))
    (tmp_path / "flat.csv").write_text("\n".join(["gram,volt", *(f"{g!r},0.1" for g in gram)]))
    (tmp_path / "lacking.csv").write_text("\n".join(["gram,ampere", *(f"{g!r},0.1" for g in gram)]))
    own = nll_of(capsys, run)
    assert nll_of(capsys, run, "--data", f"table:{tmp_path / 'other.csv'}") == own  # its test split
    assert np.isfinite(nll_of(capsys, run, "--data", f"table:{tmp_path / 'flat.csv'}")["one-pass"])
    for command in ("nll", "evaluate"):
        error = refuse(capsys, command, run, "--data", f"table:{tmp_path / 'lacking.csv'}")
        assert "no column 'volt' (found: gram, ampere)" in error


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_an_array_on_the_grid_of_the_model_need_not_reach_its_ends(capsys, tmp_path, run, dtype):
    x = load_data("digits").test.tensors()[0].clamp(1, 9).numpy()
    path = tmp_path / "some.npy"
    np.save(path, x.astype(dtype))
    source = load_data(f"array:{path}", torchcdm.load(run).transform)
    values = torch.cat([split.tensors()[0].float() for split in (source.train, source.validation, source.test)])
    assert values.sum((1, 2, 3)).sort()[0].tolist() == sorted(x.sum((1, 2, 3)).tolist())
    assert np.isfinite(nll_of(capsys, run, "--data", f"array:{path}", "--limit", "5")["one-pass"])


@pytest.mark.parametrize("command", ["nll", "evaluate"])
def test_other_grey_levels_are_refused(capsys, tmp_path, run, table, command):
    draw = np.random.RandomState(0)
    np.save(tmp_path / "bytes.npy", draw.randint(0, 256, (40, 8, 8), dtype=np.uint8))
    np.save(tmp_path / "signed.npy", draw.randint(-1, 10, (40, 8, 8)))
    np.save(tmp_path / "floats.npy", draw.rand(40, 8, 8))
    np.save(tmp_path / "counts.npy", draw.randint(0, 10, (40, 2)))
    for other, name, message in (
        (run, "bytes", "grey levels 0 ... 255; the model takes grey levels 0 ... 16; rescale them"),
        (run, "signed", "grey levels -1 ... 9; the model takes grey levels 0 ... 16; rescale them"),
        (run, "floats", "continuous values; the model takes grey levels 0 ... 16; give whole numbers"),
        (table[0], "counts", "grey levels 0 ... 9; the model takes continuous values; give floats"),
    ):
        assert message in refuse(capsys, command, other, "--data", f"array:{tmp_path / name}.npy")


def test_classes_of_other_data_go_by_name(capsys, tmp_path, conditional):
    x, y = load_data("digits").test.tensors()
    chosen = (y == 3) | (y == 7)
    x, y = x[chosen].numpy(), y[chosen].numpy()
    for name, labels in (("numbers", y), ("texts", y.astype(str)), ("words", np.where(y == 3, "three", "7"))):
        np.savez(tmp_path / f"{name}.npz", x=x, y=labels)
    words = ["--conditional", "--data"]
    by_number = nll_of(capsys, conditional, *words, f"array:{tmp_path / 'numbers.npz'}")
    # Classes 0 and 1 there; 3 and 7 for the model.
    assert nll_of(capsys, conditional, *words, f"array:{tmp_path / 'texts.npz'}") == by_number
    data = ["--data", f"array:{tmp_path / 'words.npz'}"]
    for command in (["nll", conditional, "--conditional"], ["evaluate", conditional]):
        assert "class 'three' is none of the model's (0, 1, 2, 3, " in refuse(capsys, *command, *data)
    nll_of(capsys, conditional, *data)  # without classes they do not matter


def test_evaluate_by_level(capsys, tmp_path, run):
    out = succeed(capsys, "evaluate", run, "--json", tmp_path / "e.json", "--device", "cpu")
    content = json.loads((tmp_path / "e.json").read_text())
    assert content["count"] == 297 and content["levels"] == 22
    per_level = content["per_level"]
    assert all(len(values) == 22 for values in per_level.values())
    # The mean error leaves out the ends: level 0 is a constant, level T+1 is exact.
    assert abs(per_level["mse"][0] - 1) < 0.1 and per_level["mse"][21] == 0
    inner = sum(per_level["mse"][1:21]) / 20
    assert abs(content["mean"]["mse"] - inner) < 0.02 and f"{content['mean']['mse']:.4f}" in out


def test_denoising_removes_noise(capsys, tmp_path, pixels):
    clean = load_data("digits").test.tensors(20)[0].float()
    noisy = clean + 4 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    np.save(tmp_path / "noisy.npy", noisy.numpy())
    for flags in (["--noise-std", "4"], ["--level", "9"], []):
        out = tmp_path / "-".join(["out", *flags])
        succeed(capsys, "denoise", pixels, tmp_path / "noisy.npy", *flags, "--out", out, "--device", "cpu")
        result = torch.from_numpy(np.load(out / "denoised.npy")).float()
        # Little training: what the Gaussian alone removes.
        assert (result - clean).square().mean() < 0.6 * (noisy - clean).square().mean()
        with (out / "noise.csv").open() as file:
            found = [float(row["noise_std"]) for row in csv.DictReader(file)]
        assert 3 < np.median(found) < 5.5 and len(list(out.glob("*.png"))) == 20


def test_an_image_larger_than_the_model_keeps_its_size_and_the_command_says_so(capsys, tmp_path, pixels):
    save_images(torch.full((1, 1, 12, 20), 100.0), tmp_path, None, ["large"])
    words = ("denoise", pixels, tmp_path / "large.png", "--level", "5", "--device", "cpu", "--out", tmp_path / "out")
    assert main([str(word) for word in (*words, "--quiet")]) == 0
    assert capsys.readouterr().err == "images keep their size, by tiles of the model's 8 x 8 pixels\n"
    assert Image.open(tmp_path / "out" / "000000.png").size == (20, 12)


def test_long_work_shows_a_bar_unless_it_is_to_be_quiet(capsys, monkeypatch, tmp_path, pixels):
    seen = []
    for module in (denoising, evaluation):
        monkeypatch.setattr(module, "progress_bar", lambda parts, what, shown, **_: seen.append(shown) or parts)
    np.save(tmp_path / "x.npy", np.zeros((2, 1, 8, 8)))
    for flags in ([], ["--quiet"]):
        words = [f"array:{tmp_path / 'x.npy'}", "--level", "5", "--out", tmp_path / f"out{len(flags)}"]
        succeed(capsys, "denoise", pixels, "--device", "cpu", *words, *flags)
        succeed(capsys, "evaluate", pixels, "--device", "cpu", "--limit", "9", *flags)
    assert seen == [True, True, False, False]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A run on two columns that belong together, one in units and one in thousands; and its file."""
    folder = tmp_path_factory.mktemp("cli")
    hidden = np.random.RandomState(0).normal(size=(400, 1))
    rows = (hidden + 0.1 * np.random.RandomState(1).normal(size=(400, 2))) * [1, 1000]
    np.savetxt(folder / "t.csv", rows, delimiter=",", header="volt,gram", comments="")
    words = ["--data", f"table:{folder / 't.csv'}", "--data.gaussianize", "false", "--train.steps", "4"]
    words += ["--sampling.n", "0", "--report.methods", "[single]", "--report.baselines", "false", "--quiet"]
    assert main(["train", "table", "--out", str(folder / "run"), "--device", "cpu", *words]) == 0
    return folder / "run", folder / "t.csv"


def noisy_rows(path, ratio):
    """A table's columns, the noise that was put on them, and their deviations."""
    clean = np.loadtxt(path, delimiter=",", skiprows=1)
    return clean, clean + ratio * clean.std(0) * np.random.RandomState(2).normal(size=clean.shape), clean.std(0)


def test_noise_of_a_table_is_told_in_deviations_of_its_columns(capsys, tmp_path, table):
    run, path = table
    clean, noisy, deviation = noisy_rows(path, 0.4)
    np.savetxt(tmp_path / "n.csv", noisy, delimiter=",", header="volt,gram", comments="")
    words = ["denoise", run, tmp_path / "n.csv", "--device", "cpu", "--out", tmp_path / "out"]
    assert "of each column's" in succeed(capsys, *words)
    with (tmp_path / "out" / "noise.csv").open() as file:
        found = [float(row["noise_ratio"]) for row in csv.DictReader(file)]
    # Two numbers a row tell little of its noise; many rows tell it.
    assert 0.2 < np.median(found) < 0.7
    denoised = np.loadtxt(tmp_path / "out" / "denoised.csv", delimiter=",", skiprows=1)
    assert ((denoised - clean) / deviation).std() < 0.9 * 0.4
    assert "the columns differ in scale; give a level instead" in refuse(capsys, *words, "--noise-std", "1")


def test_a_text_that_training_never_had_is_not_denoised_as_another_one(capsys, tmp_path):
    rows = [f"{k % 7},{k % 5 + 0.5},{'xyz'[k % 3]}" for k in range(60)]
    for name, lines in (("t.csv", rows), ("new.csv", ["1,1.5,x", "1,1.5,new"])):
        (tmp_path / name).write_text("\n".join(["volt,gram,kind", *lines]))
    words = ["train", "table", "--data", f"table:{tmp_path / 't.csv'}", "--steps", "2", "--no-report"]
    words += ["--data.gaussianize", "false", "--data.dequantize", "false", "--sampling.n", "0", "--device", "cpu"]
    succeed(capsys, *words, "--out", tmp_path / "run")
    words = "denoise", tmp_path / "run", tmp_path / "new.csv", "--device", "cpu", "--out", tmp_path / "out"
    assert "new.csv: line 3: holds what training never had, in kind; leave it out" in refuse(capsys, *words)


def test_a_report_leaves_out_the_normalised_number_that_cannot_be_given(capsys, tmp_path, monkeypatch):
    beside = [Baseline("something classical", 3.0, 0.1, "bits/dim")]
    monkeypatch.setattr("torchcdm.apps.report.baselines", lambda *_: beside)
    flags = small_flags(report__baselines="true", report__methods="[single]", train__steps="2")
    out = succeed(capsys, "train", "digits", "--out", tmp_path / "run", "--device", "cpu", *flags)
    table = out[out.index("density model, same test samples") :]
    assert "something classical, Gaussianised" in table
    assert "this model, one-pass, level 0" in table and "normalized" not in table


def test_a_report_estimates_log_z_by_the_sweeps_asked_for(capsys, tmp_path):
    few = {"sampling__n": "0", "model__schedule": "{name: uniform-sigma, T: 6}"}
    flags = small_flags(report__methods="[single, logz]", report__sweeps="5", train__steps="2", **few)
    succeed(capsys, "train", "digits", "--out", tmp_path / "run", "--device", "cpu", *flags)
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["nll"]["log2_z_per_dim"]["estimator"].endswith("36 columns, 5 sweeps")


def test_info(capsys, run):
    out = succeed(capsys, "info", run)
    assert "uniform-sigma, T = 20" in out and "encoder" in out and "step-12" in out and "0 ... 16" in out


def test_info_of_a_grid_without_ends(capsys, tmp_path):
    model = torchcdm.ClassificationDiffusion(MLP(2, levels=12), UniformSigmaSchedule(10), DataTransform((2,), bin=1.0))
    model.save(tmp_path / "model")
    assert "grey levels" not in succeed(capsys, "info", tmp_path / "model")


def test_columns_may_have_any_name(tmp_path):
    rows = [f"{k % 7 + k / 60},{k * k % 11 + k / 50},{k % 5}" for k in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["\U0001f321,gram,no", *rows]), encoding="utf-8")
    words = ["train", "table", "--data", f"table:{tmp_path / 't.csv'}", "--out", str(tmp_path / "run"), "--quiet"]
    words += ["--columns", "\U0001f321,gram,no", "--drop", "no", "--steps", "1", "--no-report", "--device", "cpu"]
    assert main([*words, "--sampling.n", "0"]) == 0
    assert read_info(tmp_path / "run").columns == ("\U0001f321", "gram")


def test_training_without_a_report_says_what_it_kept(capsys, tmp_path):
    flags = small_flags(train__steps="3", sampling__n="0")
    out = succeed(capsys, "train", "digits", "--out", tmp_path / "run", "--device", "cpu", "--no-report", *flags)
    assert "validation, bits/dim, lower is better: model" in out and "row" not in out
    assert "the 10 classes of the data are not used; --model.labels joint learns them" in out
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] == 3 and set(report["outcome"]["values"]) >= {"model", "start", "gaussian", "uniform"}


def test_a_dry_run_tells_the_cost_of_all_steps_and_leaves_nothing(capsys, tmp_path):
    words = ["train", "digits", "--out", tmp_path / "run", "--device", "cpu", "--dry-run", "--train.batch_size", "8"]
    told = succeed(capsys, *words, "--steps", "100000000")
    found = re.search(r"([\d.e-]+) s a step of 8 samples; the training takes (\d+) days?, (\d+):.*apart", told)
    seconds = 86400 * int(found[2]) + 3600 * int(found[3])
    assert seconds == pytest.approx(1e8 * float(found[1]), rel=0.02)
    assert "takes 0:01:30, " in succeed(capsys, *words, "--steps", "100000000", "--budget", "90s")
    told = succeed(capsys, *words, "--steps", "1")  # fewer than are timed
    found = re.search(r"([\d.e-]+) s a step of 8 samples; the training takes 0:00:0(\d),", told)
    assert found and int(found[2]) == round(float(found[1])) and float(found[1]) > 0
    assert not (tmp_path / "run").exists()


def test_the_report_keeps_what_the_training_found(capsys, tmp_path):
    flags = small_flags(train__steps="3", sampling__n="0", report__limit="4", report__methods="[single]")
    told = succeed(capsys, "train", "digits", "--out", tmp_path / "run", "--device", "cpu", *flags)
    assert "3 steps in " in told and "samples in" not in told and not (tmp_path / "run" / "samples").exists()
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["outcome"]["kept"] in ("model", "start") and report["levels"]["mse"] > 0


def test_nll_without_log_z_says_what_was_measured(capsys, tmp_path, run):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("log_z.*"))
    out = succeed(capsys, "nll", tmp_path / "run", "--limit", "4", "--methods", "single,flow", "--quiet")
    assert "Measured: one pass" in out and "--methods single,elbo,flow,logz" in out and "believed" not in out


def test_resume_of_a_run_needs_no_preset(capsys, tmp_path, run):
    words = ["train", "--out", tmp_path / "r", "--device", "cpu"]
    succeed(capsys, *words, "--config", run / "config.yaml", "--steps", "2")
    out = succeed(capsys, *words, "--resume", "--steps", "3")
    assert "3 steps in" in out and "one-pass" in out


def test_resume_by_the_name_of_a_preset_takes_the_data_of_the_run(tmp_path):
    np.savetxt(tmp_path / "t.csv", np.random.default_rng(0).normal(size=(60, 2)), delimiter=",", header="a,b")
    words = ["train", "mlp", "--out", str(tmp_path / "r"), "--device", "cpu", "--quiet", "--no-report", "--sampling.n"]
    assert main([*words, "0", "--data", f"table:{tmp_path / 't.csv'}", "--steps", "2"]) == 0
    assert main([*words, "0", "--resume", "--steps", "3"]) == 0
    assert json.loads((tmp_path / "r" / "report.json").read_text())["steps"] == 3


def test_a_field_and_its_value_may_stand_anywhere(tmp_path, run):
    """The value of a field is no preset, with or without one before it."""
    fields = ["--train.steps", "2", "--sampling.n", "0", "--report.limit", "4", "--report.methods", "[single]"]
    words = ["train", "--config", str(run / "config.yaml"), "--out", str(tmp_path / "r"), *fields, "--quiet"]
    assert main(words) == 0
    assert "steps: 2" in (tmp_path / "r" / "config.yaml").read_text()
    assert main(["train", "--out", str(tmp_path / "r"), "--resume", "--train.steps", "3", "--quiet"]) == 0


def test_the_ddm_beside_an_encoder_is_the_unet_of_its_width(capsys, tmp_path):
    small = ["--model.backbone.width", "8", "--model.backbone.multipliers", "[1]", "--train.steps", "1",
             "--model.schedule.T", "6", "--report.draws", "1"]  # fmt: skip
    words = ["--sampling.n", "0", "--report.limit", "4", "--train.validation_samples", "4", "--quiet"]
    words += ["--report.flow_steps", "2", "--report.baselines", "false"]
    assert main(["train", "digits", "--out", str(tmp_path / "r"), "--model", "ddm", *small, *words]) == 0
    model = torchcdm.load(tmp_path / "r")
    assert isinstance(model, torchcdm.DenoisingDiffusion) and model.backbone.conv_out.out_channels == 1
    # The preset asks for one pass and log Z too, which take a classifier.
    rows = json.loads((tmp_path / "r" / "report.json").read_text())["nll"]["rows"]
    assert [row["name"] for row in rows] == ["elbo", "flow"] and all(1 < row["value"] < 9 for row in rows)
    words = ["nll", str(tmp_path / "r"), "--limit", "2", "--flow-steps", "4", "--quiet", "--json"]
    assert main([*words, str(tmp_path / "nll.json")]) == 0
    numbers = json.loads((tmp_path / "nll.json").read_text())
    assert [row["name"] for row in numbers["rows"]] == ["elbo", "flow"] and numbers["gap_to_flow"] is None
    assert "single: a ddm has no density in one pass" in refuse(capsys, *words, "-", "--methods", "single,flow")


def test_numbers_that_are_none_are_null_in_json(tmp_path, run):
    path = tmp_path / "nll.json"
    assert main(["nll", str(run), "--methods", "single", "--limit", "1", "--json", str(path), "--quiet"]) == 0
    assert "NaN" not in path.read_text() and json.loads(path.read_text())["rows"][0]["se"] is None
