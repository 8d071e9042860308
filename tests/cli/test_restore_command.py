"""``cdm restore``: images from a part of them, and mistakes in what is known of them."""

import argparse
import csv

import numpy as np
import pytest
import torch
from cdm_calls import refuse, succeed
from PIL import Image

import torchcdm
from torchcdm import compose
from torchcdm.cli import main
from torchcdm.cli.sampling import _measurement
from torchcdm.data import load_data, save_images

pytestmark = pytest.mark.filterwarnings("ignore:the weights have collapsed")
FEW = ("--n", 3, "--particles", 4, "--device", "cpu", "--quiet")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("restore")
    x = load_data("digits").test.tensors(2)[0].numpy()
    np.save(folder / "x.npy", x)
    np.save(folder / "small.npy", x.reshape(-1, 1, 4, 2, 4, 2).mean((3, 5)).astype("float32"))
    np.save(folder / "upper.npy", np.arange(8)[:, None] < np.full((1, 8), 4))
    np.save(folder / "nothing.npy", np.zeros((8, 8)))
    np.save(folder / "wide.npy", np.ones((8, 9)))
    np.save(folder / "texts.npy", np.full((8, 8), "a"))
    np.save(folder / "unknown.npy", np.full((8, 8), np.nan))
    Image.fromarray(np.triu(np.full((8, 8), 255, np.uint8))).save(folder / "lossy.jpg")
    Image.fromarray(np.arange(144, dtype=np.uint8).reshape(12, 12)).save(folder / "other.jpg")
    return folder


@pytest.mark.parametrize("name, words", [
    ("x.npy", ["--mask", "upper.npy"]), ("small.npy", ["--scale", 2, "--noise-std", 2]), ("x.npy", ["--blur", 0.7]),
])  # fmt: skip
def test_means_widths_and_draws_are_written(capsys, tmp_path, pixels, files, name, words):
    words = [files / word if str(word).endswith("npy") else word for word in words]
    said = succeed(capsys, "restore", pixels, files / name, *words, *FEW, "--out", tmp_path)
    assert "2 images" in said
    draws = np.load(tmp_path / "draws.npz")
    assert draws["x"].shape == (6, 1, 8, 8) and draws["y"].tolist() == [0, 0, 0, 1, 1, 1]
    assert np.load(tmp_path / "mean.npy").shape == np.load(tmp_path / "width.npy").shape == (2, 1, 8, 8)
    with (tmp_path / "restored.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["file"] for row in rows] == ["000000", "000001"] and all(float(row["ess"]) >= 1 for row in rows)
    for part in ("mean", "width", "draws"):
        assert (tmp_path / f"000001-{part}.png").exists()


def test_images_of_an_earlier_call_do_not_stay_among_the_new_ones(capsys, tmp_path, pixels, files):
    np.save(tmp_path / "one.npy", np.load(files / "x.npy")[:1])
    calls = ["restore", "--blur", 1, *FEW, "--out"], ["denoise", "--level", 5, "--out"], ["score", "--maps"]
    for command, *words in calls:
        words.append(tmp_path / command)
        for _ in range(2):
            succeed(capsys, command, pixels, files / "x.npy", *words)
        message = "holds more images, of an earlier call"
        assert message in refuse(capsys, command, pixels, tmp_path / "one.npy", *words)


def test_black_of_a_mask_is_black_with_an_opaque_alpha_channel(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 3], pixels[:4, :, 0], pixels[:2, :, 3] = 255, 200, 0
    for mode, known in (("RGBA", 16), ("LA", 16), ("RGB", 32)):
        image = Image.fromarray(pixels)
        (image.convert(mode) if mode != "RGB" else Image.fromarray(pixels[..., :3].copy())).save(tmp_path / "mask.png")
        options = argparse.Namespace(mask=tmp_path / "mask.png", blur=None, scale=None)
        measure, _ = _measurement(options, (1, 8, 8))
        assert measure(torch.ones(1, 1, 8, 8)).shape == (1, known)


def test_what_is_known_is_kept_and_the_rest_is_spread():
    model = torchcdm.load("zoo:digits")
    known = compose.mask(torch.arange(8)[:, None] < torch.full((8,), 6))
    x = load_data("digits").test.tensors(1)[0].double()
    found = torchcdm.sample(compose.posterior(model, known, known(x)[0], 1.0), 8, particles=32, details=True)
    low, high = found.interval()
    error, width = (found.mean() - x[0]).abs(), high - low
    assert error[:, :6].mean() < 1.5 and width[:, 6:].mean() > width[:, :6].mean()


@pytest.mark.parametrize("words, message", [
    (["x.npy", "--mask", "nothing.npy"], "is 0 everywhere"),
    (["x.npy", "--mask", "wide.npy"], "has shape (8, 9)"),
    (["x.npy", "--mask", "texts.npy"], "is no array of finite numbers"),
    (["x.npy", "--mask", "unknown.npy"], "is no array of finite numbers"),
    (["x.npy", "--mask", "no.npy"], "no.npy"),
    (["x.npy", "--mask", "lossy.jpg"], "lossy.jpg: has grey levels; save black and white alone, as a PNG"),
    (["x.npy", "--mask", "other.jpg"], "other.jpg: has shape (12, 12); the model takes (1, 8, 8)"),
    (["x.npy"], "one of the arguments --mask --blur --scale is required"),
    (["x.npy", "--blur", "1", "--scale", "2"], "not allowed with"),
    (["x.npy", "--blur", "0"], "blur: std is 0"),
    (["x.npy", "--scale", "3"], "must divide the model's 8 x 8"),
    (["x.npy", "--scale", "2"], "x.npy"),
    (["x.npy", "--blur", "1", "--noise-std", "nan"], "--noise-std is nan"),
    (["x.npy", "--blur", "1", "--noise-std", "inf"], "--noise-std is inf; it must be a finite number"),
    (["x.npy", "--blur", "1", "--noise-std", "1e-9"], "give at least as much"),
    (["x.npy", "--blur", "1", "--n", "9"], "at least as many particles"),
])  # fmt: skip
def test_mistakes_are_one_line(capsys, tmp_path, pixels, files, words, message):
    words = [files / word if word.endswith(("npy", "jpg")) else word for word in words]
    assert message in refuse(capsys, "restore", pixels, *words, *([] if "--n" in words else FEW[:2]), *FEW[2:],
                             "--out", tmp_path / "out")  # fmt: skip


def test_tables_are_refused(capsys, tmp_path, files):
    words = ["restore", "zoo:two-moons", files / "x.npy", "--blur", "1", "--out", tmp_path / "out"]
    assert "is for images" in refuse(capsys, *words)


def test_what_is_skipped_is_said(capsys, tmp_path, pixels, files):
    folder = tmp_path / "given"
    save_images(load_data("digits").test.tensors(1)[0].float(), folder, torchcdm.load(pixels).transform)
    (folder / "bad.png").write_bytes(b"no picture")
    words = ["restore", pixels, folder, "--blur", "1", *FEW, "--out", tmp_path / "out"]
    assert "bad.png" in refuse(capsys, *words)
    assert main([*map(str, words), "--skip-bad"]) == 0
    said = capsys.readouterr()
    assert "1 file(s) that cannot be used are left out" in said.err and "1 images in" in said.out
