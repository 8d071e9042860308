"""``python -m studies quality``: what each measure sees, and the command."""

import json

import pytest
import torch
from oracles import rng

from studies.cli import main
from studies.quality.frechet import Reference
from studies.quality.measure import LEGEND, measure, nyquist, two_sample_accuracy
from torchcdm.data import load_data, save_array
from torchcdm.errors import UserError


def test_energy_lies_where_a_wave_has_it():
    rows, columns = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    chequered, stripes = (-1.0) ** (rows + columns), (-1.0) ** rows
    smooth = torch.cos(2 * torch.pi * rows / 8)
    waves = torch.stack([chequered, stripes, smooth, chequered + smooth, 5 + 0 * rows])[:, None]
    high, total = nyquist(waves).T
    assert torch.allclose(total, 64 * waves.double().sub(waves.double().mean((2, 3), True)).square().sum((1, 2, 3)))
    share = high / total.clamp_min(1e-9)
    assert torch.allclose(share, torch.tensor([1, 1, 0, 1 / 1.5, 0]).double(), atol=1e-6)


def test_a_classifier_tells_only_what_differs():
    a, b, c = (torch.randn(1500, 5, generator=rng(seed)) for seed in range(3))
    same, error = two_sample_accuracy(a, b)
    assert abs(same - 0.5) < 4 * error
    assert two_sample_accuracy(a, 2 * c)[0] > 0.75, "equal means, other deviations"


def test_every_measure_sees_its_fault():
    reference = Reference(load_data("digits"))
    train, test = (split.tensors()[0].float() for split in (reference.source.train, reference.source.test))
    grain = 1.5 * (-1.0) ** torch.arange(8).add(torch.arange(8)[:, None])
    rows = measure({"grainy": test + grain, "copied": train[:297], "few": test[:9].repeat(33, 1, 1, 1)}, reference)
    floor = rows["test images"]
    assert list(rows) == ["test images", "grainy", "copied", "few"] and floor.count == 297
    assert abs(floor.c2st - 0.5) < 0.08 and abs(floor.grain - 1) < 4 * floor.grain_se and floor.copies <= 0.02
    assert rows["grainy"].grain > 1.3 and rows["grainy"].frechet > 2 * floor.frechet
    assert rows["copied"].copies == 1 and rows["copied"].nearest == pytest.approx(0, abs=1e-3)
    assert rows["few"].recall < 0.5 < floor.recall and rows["few"].c2st > 0.75
    # Again the same.
    assert measure({}, reference) == {"test images": floor}


def test_the_command_measures_files_and_folders(tmp_path, capsys):
    source = load_data("digits")
    save_array(source.test.tensors()[0][:100], tmp_path / "x.npz", source.transform)
    words = ["quality", str(tmp_path / "x.npz"), "--data", "digits", "--n", "80", "--json", str(tmp_path / "q.json")]
    assert main([*words, "--cache", str(tmp_path), "--quiet"]) == 0
    text, content = capsys.readouterr().out, json.loads((tmp_path / "q.json").read_text())
    assert text.startswith("digits 1x8x8: distances to 1300 training images in 96 features of the fixed digits")
    assert all(line in text for line in LEGEND)
    assert [(row["set"], row["count"]) for row in content["rows"]] == [
        ("test images", 80), (str(tmp_path / "x.npz"), 80),
    ]  # fmt: skip
    assert main(["quality", str(tmp_path / "x.npz")]) == 2
    assert "name the training images with --data" in capsys.readouterr().err


def test_vectors_have_no_pictures():
    with pytest.raises(UserError, match="need images"):
        measure({}, Reference(load_data("toy:two-moons")))
