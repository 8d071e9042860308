"""Folders of pictures of any size: crops to train on, tiles to score and to denoise, and nothing resized unsaid."""

import numpy as np
import pytest
import torch
from PIL import Image

import torchcdm
from torchcdm.apps.denoising import denoise, denoise_all
from torchcdm.cli import main
from torchcdm.data import CropSplit, DataOptions, load_data, read_inputs
from torchcdm.data.source import places_of
from torchcdm.errors import UserError
from torchcdm.training.batches import Batches
from torchcdm.units import DataTransform

SIZES = [(40, 30), (16, 16), (33, 17), (20, 50), (60, 24), (30, 30)]


def picture(size, seed):
    """A smooth texture of one kind everywhere, uint8."""
    field = torch.randn(1, 1, size[0] + 4, size[1] + 4, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(field, 5, 1)[0, 0]
    return (128 + 150 * smooth).clamp(0, 255).round().byte()


@pytest.fixture
def folder(tmp_path):
    for k, size in enumerate(SIZES):
        Image.fromarray(picture(size, k).numpy()).save(tmp_path / f"{k}.png")
    return tmp_path


def test_training_sees_random_crops_and_other_splits_fixed_ones(folder):
    source = load_data(f"folder:{folder}", crop=(16, 16), validation_fraction=0.2, test_fraction=0.2)
    assert source.shape == (1, 16, 16) and all(isinstance(split, CropSplit) for split in source.splits.values())
    assert not any("resizing" in note for note in source.notes)
    files = [{path for path, *_ in split.items} for split in source.splits.values()]
    assert sum(map(len, files)) == 6 and not files[0] & files[1] and not files[0] & files[2]
    x, _ = source.train.batch(torch.arange(len(source.train)))
    assert torch.equal(x, source.train.tensors()[0]) and x.dtype == torch.uint8
    found = [source.train.batch(torch.zeros(50, dtype=torch.long), torch.rand(50, 2))[0] for _ in range(2)]
    path = source.train.items[0][0]
    whole = torch.from_numpy(np.asarray(Image.open(path)))[None]
    windows = whole.unfold(1, 16, 1).unfold(2, 16, 1).reshape(-1, 16, 16)
    assert all(bool((windows == crop[0]).all((1, 2)).any()) for crop in found[0])
    assert not torch.equal(*found) or len(windows) == 1
    batches = Batches(source, 8, 0, labels=False)
    first, again = ([batch.x_0 for batch in batches(3, 6, Levels(), torch.device("cpu"))] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "a resumed run sees the same"
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize(("dtype", "size"), [(np.uint8, 1), (np.uint16, 4), (np.float32, 4)])
def test_memory_of_crops_is_counted_in_bytes(tmp_path, monkeypatch, dtype, size):
    for k in range(10):
        np.save(tmp_path / f"{k}.npy", np.random.default_rng(k).integers(0, 200, (6, 20, 20)).astype(dtype))
    total = 10 * 6 * 20 * 20 * size
    for limit, held in ((total - 1, False), (total, True)):
        monkeypatch.setattr("torchcdm.data.folders.MEMORY_LIMIT", limit)
        train = load_data(f"folder:{tmp_path}", crop=(8, 8)).train
        assert (train.read(train.items[0][0]) is train.read(train.items[0][0])) == held


def test_memory_of_crops_counts_all_splits(tmp_path, monkeypatch):
    for split in ("train", "validation", "test"):
        (tmp_path / split).mkdir()
        np.save(tmp_path / split / "0.npy", np.zeros((20, 20), np.uint8))
    for limit, held in ((1199, False), (1200, True)):
        monkeypatch.setattr("torchcdm.data.folders.MEMORY_LIMIT", limit)
        train = load_data(f"folder:{tmp_path}", crop=(8, 8)).train
        assert (train.read(train.items[0][0]) is train.read(train.items[0][0])) == held


def test_a_split_without_images_is_drawn_with_crops_as_without(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for k in range(8):
            np.save(tmp_path / "train" / name / f"{k}.npy", np.full((20, 20), 9 * k, np.uint8))
    (tmp_path / "test").mkdir()
    whole, cropped = (load_data(f"folder:{tmp_path}", **options) for options in ({}, {"crop": (8, 8)}))
    for split in ("train", "validation", "test"):
        assert len(cropped.split(split)) and len(whole.split(split))
        assert cropped.split(split).labels.dtype == torch.long


class Levels:
    model = torch.nn.Linear(1, 1)

    def draw_levels(self, n, generator):
        return torch.ones(n, dtype=torch.long)


def test_places_cover_an_image():
    assert places_of((16, 16), (16, 16)) == [(0, 0)] and places_of((33, 20), (16, 16)) == [(0, 2), (17, 2)]
    seen = torch.zeros(45, 31)
    for top, left in places_of((45, 31), (16, 8), 0.5):
        seen[top : top + 16, left : left + 8] += 1
    assert seen.min() >= 1 and seen[8:-8, 4:-4].min() >= 2


def test_pictures_are_tiled_or_refused_and_never_resized_unsaid(folder):
    transform = DataTransform.images((1, 16, 16))
    found = read_inputs(folder / "0.png", transform)
    assert found.x.shape == (6, 1, 16, 16) and found.names[1].endswith("0.png at 0,14")
    whole = torch.from_numpy(np.asarray(Image.open(folder / "0.png"))).float()
    assert torch.equal(found.x[1, 0], whole[:16, 14:30]) and "are tiled" in found.notes[0]
    with pytest.raises(UserError, match="images of 16 x 16 pixels, 1 channel.*the model takes images of 20 x 20"):
        read_inputs(folder / "1.png", DataTransform.images((1, 20, 20)))
    resized = read_inputs(folder / "0.png", transform, DataOptions(size=(16, 16)))
    assert resized.x.shape == (1, 1, 16, 16) and "resized to 16 x 16, as in training" in resized.notes[0]


def test_what_is_wrong_with_a_crop_is_said(folder):
    with pytest.raises(UserError, match="give --crop or --size, not both"):
        load_data(f"folder:{folder}", crop=(16, 16), size=(16, 16))
    with pytest.raises(UserError, match=r"crop is for folders of images .*; digits is none"):
        load_data("digits", crop=(4, 4), size=(8, 8))


@pytest.fixture(scope="module")
def model():
    x = torch.stack([picture((16, 16), seed) for seed in range(400)])[:, None]
    return torchcdm.fit(
        x, preset="encoder", steps=2, progress=False, device="cpu",
        model={"gaussian": True, "backbone": {"width": 8}}, data={"gaussianize": False},
    )  # fmt: skip


def test_tiles_of_a_denoised_picture_leave_no_seams(model):
    """The error's steps across the edges of the tiles are those everywhere else; a cut without overlap shows its."""
    clean = picture((160, 128), 1000).float()[None]
    noisy = clean + 25 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    (found,), noise = denoise_all(model, [noisy], noise_std=25.0)
    assert found.shape == clean.shape and noise.shape == (1,)
    error = (found - clean)[0]
    assert error.square().mean() < 0.3 * 25**2

    def seams(error, edges):
        """Mean squared step across the edges, over that across all other places."""
        steps, edge = error.diff(dim=0).square().mean(1), torch.zeros(len(error) - 1, dtype=torch.bool)
        edge[[top - 1 for top in edges]] = True
        return float(steps[edge].mean() / steps[~edge].mean())

    tops = sorted({top for top, _ in places_of((160, 128), (16, 16), 0.5)} - {0})
    assert abs(seams(error, tops) - 1) < 0.15
    tiles = noisy[0].unfold(0, 16, 16).unfold(1, 16, 16).reshape(-1, 1, 16, 16)
    cut = denoise(model, tiles, noise_std=25.0)[0].reshape(10, 8, 16, 16).transpose(1, 2).reshape(160, 128)
    assert seams(cut - clean[0], range(16, 160, 16)) > 1.5
    estimated = denoise_all(model, [noisy])[1]
    assert 18 < float(estimated) * float(model.transform.scale) < 32
    with pytest.raises(UserError, match="the model takes .* or larger"):
        denoise_all(model, [noisy[:, :10]])


def test_commands_take_pictures_of_any_size(folder, tmp_path_factory, capsys):
    out = tmp_path_factory.mktemp("run")
    arguments = ["--model.backbone.width", "8", "--steps", "2", "--quiet", "--no-report", "--device", "cpu"]
    spec = ["--data", f"folder:{folder}", "--crop", "16x16", "--data.gaussianize", "false"]
    assert main(["train", "encoder", *spec, *arguments, "--out", str(out / "run")]) == 0
    assert main(["denoise", str(out / "run"), str(folder), "--noise-std", "10", "--out", str(out / "clean")]) == 0
    clean = [np.asarray(Image.open(out / "clean" / f"{k:06d}.png")).shape for k in range(6)]
    assert clean == SIZES
    scored = ["score", str(out / "run"), str(folder / "0.png"), "--fpr", "0.5", "--reference", str(folder)]
    assert main(scored) == 0 and "0.png at 24,14" in capsys.readouterr().out
    assert main(["train", "encoder", "--data", f"folder:{folder}", *arguments, "--out", str(out / "x")]) == 2
    assert "images differ" in capsys.readouterr().err
    assert main(["train", "encoder", *spec[:2], "--crop", "50x50", *arguments, "--out", str(out / "x")]) == 2
    assert "smaller than the crop" in capsys.readouterr().err
