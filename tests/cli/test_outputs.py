"""Commands never replace what they read, nor what no run wrote; a run's folder has one writer at a time."""

import json
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image
from small_runs import small_flags

from torchcdm.cli import main
from torchcdm.data.folders import check_apart
from torchcdm.training.checkpoint import load
from torchcdm.training.run_folder import RunFolder


def train(folder, *words):
    return main(["train", "digits", "--out", str(folder), "--device", "cpu", "--quiet", *words, *small_flags()])


def refused(capsys, *words):
    assert main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("cdm: ")
    return error


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outputs") / "run"
    assert train(folder) == 0
    return folder


def test_inputs_are_not_replaced(capsys, tmp_path, run):
    array = tmp_path / "x.npy"
    np.save(array, np.zeros((3, 1, 8, 8), np.uint8))
    right = array.read_bytes()
    for flag in ("--csv", "--json"):
        assert "is one of the inputs" in refused(capsys, "score", run, array, flag, array)
    assert "is one of the inputs" in refused(capsys, "nll", run, "--data", f"array:{array}", "--json", array)
    assert "or among them" in refused(capsys, "score", run, tmp_path, "--csv", tmp_path / "new.csv")
    assert "holds inputs" in refused(capsys, "denoise", run, array, "--level", 3, "--out", tmp_path)
    for words in (("ratio", array, array, array, "--csv", array),):
        assert "is one of the inputs" in refused(capsys, *words)
    both = tmp_path / "both"
    assert "is to hold two outputs" in refused(capsys, "score", run, array, "--csv", both, "--json", f"{both}")
    assert array.read_bytes() == right and list(tmp_path.iterdir()) == [array]


@pytest.mark.parametrize("name", ["config.json", "config.yaml", "model.safetensors", "metrics.jsonl"])
def test_files_of_a_run_are_not_replaced(capsys, tmp_path, run, name):
    right = (run / name).read_bytes()
    for words in (["info", run], ["evaluate", run, "--limit", "2"]):
        refused(capsys, *words, "--json", run / name)
    (tmp_path / "link").symlink_to(run / name)
    refused(capsys, "info", run, "--json", tmp_path / "link")
    assert (run / name).read_bytes() == right
    assert main(["info", str(run), "--json", str(run / "mine.json")]) == 0 == main(
        ["info", str(run), "--json", str(run / "mine.json")]
    )


def test_the_data_of_a_model_are_no_output(capsys, tmp_path):
    table, model = tmp_path / "samples.csv", load("zoo:table-example")
    table.write_text("those that the model was trained on")
    model.info = replace(model.info, data=replace(model.info.data, spec=f"table:{table}"))
    model.save(tmp_path / "run")
    for words in (["sample", "--n", "2", "--out", tmp_path], ["info", "--json", table]):
        assert main([words[0], str(tmp_path / "run"), *map(str, words[1:])]) == 2
        assert "inputs" in capsys.readouterr().err
    assert table.read_text() == "those that the model was trained on"


def test_a_run_is_not_among_the_images_that_it_learns(capsys, tmp_path):
    for k in range(12):
        Image.new("L", (8, 8), 20 * k).save(tmp_path / f"{k}.png")
    words = ("train", "encoder", "--data", f"folder:{tmp_path}", "--out", tmp_path / "run", *small_flags())
    assert "lies among the images that are learned" in refused(capsys, *words)
    assert {path.suffix for path in tmp_path.iterdir()} == {".png"}
    (tmp_path / "train").mkdir()
    check_apart(tmp_path / "run", f"folder:{tmp_path}")  # the images are those in train alone


@pytest.mark.parametrize("name", ["config.yaml", "config.json", "samples", "report.json", "metrics.jsonl"])
def test_a_folder_with_files_of_another_origin_is_left_alone(capsys, tmp_path, name):
    mine = tmp_path / name
    mine.mkdir() if name == "samples" else mine.write_text("mine")
    error = refused(capsys, "train", "digits", "--out", tmp_path, "--device", "cpu", *small_flags())
    assert f"holds {name}, which no run wrote" in error
    assert list(tmp_path.iterdir()) == [mine] and (name == "samples" or mine.read_text() == "mine")


def test_a_second_training_is_refused_and_a_killed_one_does_not_block(capsys, tmp_path, run):
    with FileLock(run / ".torchcdm-lock"):
        error = refused(capsys, "train", "digits", "--out", run, "--resume", *small_flags())
        assert "another process is writing to it" in error
        missing = ["--data", f"folder:{tmp_path}"]
        error = refused(capsys, "train", "digits", "--out", run, "--resume", *missing, *small_flags())
        assert "another process is writing to it" in error, "before the data are read"
        assert main(["info", str(run)]) == 0, "readers take no lock"
    if (child := os.fork()) == 0:
        with RunFolder(tmp_path / "new").locked():
            os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    assert train(tmp_path / "new") == 0


def test_numbers_to_a_device(run):
    reading, writing = os.pipe()
    assert main(["info", str(run), "--json", f"/dev/fd/{writing}"]) == 0
    os.close(writing)
    with os.fdopen(reading) as file:
        assert json.load(file)["last step"] == 12
    assert main(["info", str(run), "--json", "/dev/null"]) == 0


def test_resume_needs_a_training(capsys, tmp_path, run):
    """A model without a training, such as a converted one, is not trained over."""
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).write_bytes((run / name).read_bytes())
    right = (tmp_path / "model.safetensors").read_bytes()
    error = refused(capsys, "train", "digits", "--out", tmp_path, "--resume", "--device", "cpu", *small_flags())
    assert "holds a model, but no training to go on with" in error
    assert (tmp_path / "model.safetensors").read_bytes() == right
