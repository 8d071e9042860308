"""The command line: every mistake is one line and exit code 2."""

import os

import numpy as np
import pytest
from cdm_calls import refuse, succeed
from small_runs import small_flags


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "invalid choice: 'trian'; did you mean 'train'? (choices: "),
        (["scroe", "RUN", "x.png"], "invalid choice: 'scroe'; did you mean 'score'? (choices: "),
        ([], "the following arguments are required: COMMAND"),
        (["train", "digits"], "required: --out"),
        (["train", "digts", "--out", "R"], "unknown preset 'digts'; did you mean 'digits'"),
        (["train", "--out", "R"], "give a preset or --config FILE"),
        (["train", "digits", "--out", "R", "--train.stesp", "5"], "unknown field 'train.stesp'; did you mean 'steps'"),
        (["train", "digits", "--out", "R", "--lr", "1"], "settings have a dot, as in --train.lr"),
        (["train", "digits", "--out", "R", "--stesp", "5"], "unknown argument '--stesp'; did you mean 'steps'"),
        (["train", "digits", "--out", "R", "--train.steps"], "--train.steps needs a value"),
        (["train", "--out", "R", "--train.lr", ".nan", "digits"], "train.lr is nan; it must be a finite number"),
        (["train", "--train.betas", "[2, 3]", "digits", "--out", "R"], "train.betas[0] is 2; it must be less than 1"),
        (["train", "digits", "--out", "R", "--train.grad_clip", "-1"], "grad_clip is -1; it must be greater than 0"),
        (["train", "digits", "--out", "R", "--train.warmup", "-5"], "warmup is -5; it must be at least 0"),
        (["train", "digits", "--out", "R", "--train.patience", "0"], "patience is 0; it must be at least 1"),
        (["train", "digits", "--out", "R", "--sampling.n", "-3"], "n is -3"),
        (["train", "digits", "--out", "R", "--sampling.sampler", "foo"], "unknown sampler 'foo'"),
        (["train", "digits", "--out", "R", "--report.methods", "[foo]"], "report.methods[0] is 'foo'; choose from"),
        (["train", "digits", "--out", "R", "--report.sweeps", "3"], "sweeps is 3; it must be at least 4"),
        (["train", "digits", "--out", "R", "--report.draws", "0"], "draws is 0; it must be at least 1"),
        (["train", "digits", "--out", "R", "--steps", "many"], "train.steps is 'many'"),
        (["train", "digits", "--out", "R", "--model", "dmm"], "model.kind is 'dmm'; did you mean"),
        (["train", "encoder", "--out", "R", "--data", "folder:My photos #1"], "My photos #1"),
        (["train", "encoder", "--out", "R", "--data", "folder:a: b"], "a: b"),
        (["train", "encoder", "--out", "R", "--data", "null"], "null"),
        (["train", "digits", "--out", "R", "--label", "1"], "'1' names a column of a table; digits has"),
        (["train", "digits", "--out", "R", "--init", "no #1"], "no #1"),
        (["train", "digits", "--out", "R", "--seed", "-1"], "train.seed is -1; it must be at least 0"),
        (["train", "digits", "--out", "R", "--model.schedule.T", "100000000000"], "it must be at most 100000"),
        (["train", "digits", "--out", "R", "--model.backbone.width", "-3"], "model.backbone.width is -3; it must be"),
        (["train", "digits", "--out", "R", "--model.backbone.dropout", ".nan"], "dropout is nan; it must be"),
        (["train", "digits", "--out", "R", "--train.steps.x", "3"], "train.steps is {'x': 3}; it must be"),
        (["train", "digits", "--out", "R", "--size", "8by8"], "write height x width"),
        (["train", "digits", "--out", "R", "--size", "7x7"], "halve"),
        (["train", "digits", "--out", "R", "--data", "digit"], "did you mean 'digits'"),
        (["train", "digits", "--out", "R", "--data", "folder:nowhere"], "nowhere"),
        (["train", "digits", "--out", "R", "--device", "gpu"], "device 'gpu' cannot be used: "),
        (["train", "encoder", "--out", "R"], "no data: "),
        (["train", "mlp", "--out", "R", "--data", "toy:two-moons", "--data.limit", "1"], "one training sample is too"),
        (["train", "--config", "nothing.yaml", "--out", "R"], "nothing.yaml: no such file"),
        (["sample", "nowhere", "--out", "S"], "nowhere: holds no trained model"),
        (["nll", "nowhere"], "nowhere: holds no trained model"),
        (["info", "nowhere"], "nowhere: holds no trained model"),
        (["info", 300 * "x"], "xxx: holds no trained model"),
        (["info", "a\0b"], "holds no trained model"),
        (["train", "digits", "--out", "R", "--init", 300 * "x"], "xxx: holds no trained model"),
        (["train", "--resume", "--out", 300 * "x"], "give a preset or --config FILE"),
        (["train", "digits", "--out", 300 * "x"], "xxx: cannot be written (File name too long)"),
        (["info", "nowhere", "--jsno", "x"], "unknown argument '--jsno'; did you mean 'json'"),
        (["info", "nowhere", "more"], "unrecognized arguments: more; see cdm info --help"),
        (["train", "digts", "--out", ""], "argument --out: '' is no name of a file or a folder"),
        (["sample", "nowhere", "--out", ""], "argument --out: '' is no name"),
        (["denoise", "R", "x.npy", "--out", ""], "argument --out: '' is no name"),
        (["restore", "R", "x.npy", "--scale", "2", "--out", ""], "argument --out: '' is no name"),
        (["convert", "none.pt", "", "--preset", "cifar10"], "argument RUN: '' is no name"),
        (["score", "R", "x.npy", "--csv", "-"], "argument --csv: '-' is no name"),
        (["score", "R", "x.npy", "--plot", ""], "argument --plot: '' is no name"),
        (["score", "R", "x.npy", "--maps", "-"], "argument --maps: '-' is no name"),
        (["ratio", "a.csv", "b.csv", "b.csv", "--csv", "-"], "argument --csv: '-' is no name"),
        (["ratio", "a.csv", "b.csv", "b.csv", "--save", ""], "argument --save: '' is no name"),
        (["convert", "none.pt", "R", "--preset", "digits"], "the published networks have model.backbone unet"),
        (["convert", "none.pt", "R", "--preset", "cifar10-conditional"], "--classes is needed"),
    ],
)
def test_mistakes_without_a_run(capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert message in refuse(capsys, *words)
    assert not (tmp_path / "R" / "model.safetensors").exists()


def test_images_of_a_model_of_vectors_are_refused_before_they_are_drawn(capsys, tmp_path):
    words = ["sample", "zoo:two-moons", "--format", "images", "--out", tmp_path / "S"]
    assert "--format images: this model makes vectors; choose grid" in refuse(capsys, *words)
    assert not (tmp_path / "S").exists()


def test_images_of_an_earlier_call_do_not_stay_among_the_new_ones(capsys, tmp_path):
    words = ["sample", "zoo:digits", "--format", "images", "--steps", 1, "--device", "cpu", "--out", tmp_path]
    for n in (3, 3, 4):
        succeed(capsys, *words, "--n", n)
    assert "holds more images, of an earlier call; choose another folder" in refuse(capsys, *words, "--n", 3)


def test_long_values_are_cut_in_messages(capsys, tmp_path):
    for words in (["train", 5000 * "x"], ["train", "digits", "--data", 5000 * "x"]):
        error = refuse(capsys, *words, "--out", tmp_path / "R")
        assert len(error) < 600 and ("choose from" in error or "did you mean" in error or "digits" in error)


@pytest.mark.parametrize(
    "error",
    [MemoryError("2 TiB"), RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 2 TiB")],
)
def test_more_than_memory_holds_is_a_line(capsys, monkeypatch, run, error):
    def evaluated(*_, **__):
        raise error

    monkeypatch.setattr("torchcdm.training.evaluation.evaluate", evaluated)
    assert "2 TiB); ask for less" in refuse(capsys, "evaluate", run, "--draws", "1000000000")


def test_a_configuration_that_is_a_pipe_is_refused_not_waited_for(capsys, tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    said = refuse(capsys, "train", "--config", tmp_path / "pipe.yaml", "--out", tmp_path)
    assert "pipe.yaml: cannot be read as a file" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sample", "RUN", "--n", "0", "--out", "S"], "argument --n: '0' is no whole number"),
        (["sample", "RUN", "--steps", "21", "--out", "S"], "takes 1 to 20 sampling steps"),
        (["sample", "RUN", "--sampler", "ddmp", "--out", "S"], "did you mean 'ddpm'"),
        (["sample", "RUN", "--label", "3", "--out", "S"], "trained without classes"),
        (["sample", "RUN", "--label", "balanced", "--out", "S"], "--label balanced: this model was trained without"),
        (["sample", "RUN", "--all-of", "3,8", "--out", "S"], "--all-of 3: this model was trained without classes"),
        (["sample", "zoo:two-moons", "--none-of", "3", "--out", "S"], "--none-of 3: this model was trained without"),
        (["sample", "RUN", "--guidance", "1", "--out", "S"], "guidance needs a class-conditional model"),
        (["sample", "RUN", "--format", "png", "--out", "S"], "invalid choice: 'png'; choose from: all, array, grid"),
        (["sample", "RUN", "--n", "four", "--out", "S"], "argument --n: 'four' is no whole number from 1"),
        (["sample", "RUN", "--n", 20 * "9", "--label", "balanced", "--out", "S"], "--n: '99999999999999999999' is no"),
        (["sample", "RUN", "--steps", 20 * "9", "--out", "S"], "--steps: '99999999999999999999' is no"),
        (["nll", "RUN", "--limit", 5000 * "9"], "--limit: '999"),
        (["nll", "RUN", "--split", "tset"], "unknown split 'tset'; did you mean 'test'"),
        (["nll", "RUN", "--methods", "single,flwo"], "did you mean 'flow'"),
        (["nll", "RUN", "--limit", "0"], "argument --limit: '0' is no"),
        (["nll", "RUN", "--level", "99"], "level 99 cannot be scored through; choose 1 ..."),
        (["nll", "RUN", "--level=-1"], "level is -1; it must be at least 0"),
        (["nll", "RUN", "--level", "0"], "level 0 cannot be scored through"),
        (["nll", "RUN", "--limit=-2"], "argument --limit: '-2' is no"),
        (["nll", "RUN", "--draws", "0"], "draws is 0; it must be at least 1"),
        (["nll", "RUN", "--draws", "1000000000"], "draws is 1000000000"),
        (["nll", "RUN", "--flow-steps", "0"], "steps is 0"),
        (["nll", "RUN", "--flow-probes", "3"], "probes is 3; it must be a multiple of 2"),
        (["nll", "RUN", "--methods", ""], "methods is []; it must have at least 1 item"),
        (["nll", "RUN", "--methods", ", ,"], "it must have at least 1 item"),
        (["nll", "RUN", "--methods", "logz", "--sweeps", "3"], "sweeps is 3; it must be at least 4"),
        (["nll", "RUN", "--seed", "1" + 30 * "0"], "seed is 1000"),
        (["nll", "RUN", "--conditional"], "have no classes"),
        (["nll", "RUN", "--data", "toy:two-moons"], "toy:two-moons: has shape (2,); the model takes (1, 8, 8)"),
        (["evaluate", "RUN", "--draws", "0"], "argument --draws: '0' is no"),
        (["denoise", "RUN", "x.npy", "--out", "S"], "to denoise data train with --data.gaussianize false"),
        (["denoise", "PIXELS", "nothing.png", "--out", "S"], "nothing.png"),
        (["denoise", "PIXELS", "x.npy", "--level", "21", "--out", "S"], "level is 21"),
        (["denoise", "PIXELS", "x.npy", "--noise-std", "-1", "--out", "S"], "noise_std is -1.0; it must be greater"),
        (["denoise", "PIXELS", "x.npy", "--noise-std", "nan", "--out", "S"], "noise_std is nan; it must be"),
        (["denoise", "PIXELS", "x.npy", "--level", "3", "--noise-std", "1", "--out", "S"], "not allowed with"),
        (["train", "digits", "--out", "RUN"], "already holds a run; go on with --resume"),
        (["convert", "x.pt", "RUN", "--preset", "cifar10"], "already holds a run"),
    ],
)
def test_mistakes_with_a_run(capsys, tmp_path, monkeypatch, run, pixels, words, message):
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.zeros((2, 8, 8), np.float32))
    folders = {"RUN": run, "PIXELS": pixels}
    assert message in refuse(capsys, *(folders.get(word, word) for word in words))


def test_mistakes_about_labels(capsys, tmp_path, conditional):
    for label in ("10", "-1", "ten", "\u00b2", 5000 * "9"):
        error = refuse(capsys, "sample", conditional, f"--label={label}", "--out", tmp_path)
        assert "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, balanced" in error


def test_what_cannot_be_written(capsys, tmp_path, run):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert "cannot be written" in refuse(capsys, "sample", run, "--n", "1", "--steps", "1", "--out", blocked / "S")
    assert "cannot be written" in refuse(capsys, "train", "digits", "--out", blocked / "R", *small_flags())
    assert "cannot be written" in refuse(capsys, "evaluate", run, "--limit", "2", "--json", blocked / "x.json")


@pytest.mark.parametrize("words, message", [
    (["--all-of", "3", "--any-of", "4"], "contradict each other"),
    (["--all-of", "3,11"], "did you mean '1'"),
    (["--any-of", ""], "--any-of : choose from: 0, 1"),
    (["--none-of", "0,1,2,3,4,5,6,7,8,9"], "leaves nothing"),
    (["--any-of", "3", "--label", "3"], "leave them out with --all-of, --any-of"),
    (["--beta", "2", "--guidance", "1"], "--label and --guidance are for the classes of a model"),
    (["--beta", "0"], "beta"),
    (["--particles", "2"], "at least as many particles"),
    (["--particles", "64", "--label", "balanced"], "give its label"),
    (["--particles", "64", "--sampler", "ddpm"], "leave sampler"),
])  # fmt: skip
def test_mistakes_about_compositions(capsys, tmp_path, conditional, words, message):
    assert message in refuse(capsys, "sample", conditional, "--n", "4", "--out", tmp_path, *words)
