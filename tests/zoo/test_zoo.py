"""The models that ship: their files, their names on the command line, and their numbers."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchcdm
from torchcdm.cli import main
from torchcdm.data import load_data
from torchcdm.errors import UserError
from torchcdm.likelihood.log_z import read_log_z
from torchcdm.zoo import HOME, about, located, names


def test_all_are_small_and_have_a_card_with_a_licence_and_numbers():
    assert {"digits", "two-moons", "table-example"} <= set(names())
    files = [path for path in HOME.rglob("*") if path.is_file() and path.suffix in (".safetensors", ".json", ".md")]
    assert sum(path.stat().st_size for path in files) < 8 * 2**20
    for name in names():
        head, card = about(name), (HOME / name / "card.md").read_text(encoding="utf-8")
        assert {"license", "description", "reaches"} <= set(head)
        for part in ("## Data", "licence", f"python -m studies zoo {name}", "## Numbers", "## Limits"):
            assert part in card, (name, part)


@pytest.mark.parametrize("name", names())
def test_each_loads_and_reaches_what_its_card_says(name):
    model = torchcdm.load(f"zoo:{name}")
    info = json.loads((HOME / name / "config.json").read_text(encoding="utf-8"))
    x, _ = load_data(info["data"]["spec"]).test.tensors(200)
    rows = torchcdm.likelihood.report(model, x, methods=["single"]).rows
    nll = next(row.value for row in rows if row.name == "one-pass")
    card = (HOME / name / "card.md").read_text(encoding="utf-8").splitlines()
    row = next(line for line in card if line.startswith("| one pass, level 0"))
    assert nll == pytest.approx(float(row.split("|")[2]), abs=0.15)


@pytest.mark.parametrize("name", [name for name in names() if (HOME / name / "log_z.json").exists()])
def test_log_z_that_ships_normalises(name):
    found = read_log_z(HOME / name)
    assert found is not None and not found.lacking and found.width > 1.96
    classes = (found.convergence or {}).get("classes")
    if classes:  # bounds take the upper ends of their intervals
        values = [value * found.dim * math.log(2) for value, _ in classes]
        assert all(end > value for end, value in zip(found.restricted.log_z.tolist(), values, strict=True))


@pytest.mark.parametrize("name", ["digits", "fashion-mnist-conditional"])
def test_trajectories_that_ship_are_those_of_the_model(name):
    model = torchcdm.load(f"zoo:{name}")
    ((key, kept),) = model.curvatures.items()
    model.curvatures = {}
    model.sample(1)
    assert list(model.curvatures) == [key] and model.curvatures[key].first == kept.first
    assert torch.allclose(model.curvatures[key].errors, kept.errors, rtol=0.01)


def test_commands_take_the_names(tmp_path, capsys):
    assert main(["sample", "zoo:two-moons", "--n", "4", "--steps", "5", "--out", str(tmp_path), "--quiet"]) == 0
    assert len((tmp_path / "samples.csv").read_text().splitlines()) == 5
    assert main(["info", "zoo:table-example"]) == 0
    assert "wine" in capsys.readouterr().out
    assert main(["zoo"]) == 0
    assert "zoo:two-moons" in capsys.readouterr().out


def test_an_unknown_name_is_one_line_with_the_nearest(capsys):
    assert main(["sample", "zoo:two-moon", "--out", "x"]) == 2
    assert "did you mean 'two-moons'?" in capsys.readouterr().err
    with pytest.raises(UserError, match="choose from: .*two-moons"):
        torchcdm.load("zoo:")


def test_changed_weights_are_refused(tmp_path, monkeypatch):
    home = tmp_path / "zoo"
    shutil.copytree(HOME / "two-moons", home / "two-moons")
    weights = home / "two-moons" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    monkeypatch.setattr("torchcdm.zoo.HOME", home)
    with pytest.raises(UserError, match="checksum"):
        torchcdm.load("zoo:two-moons")


def test_other_names_are_folders_as_they_are():
    assert located("runs/zoo") == Path("runs/zoo")
    assert located(Path("a:b")) == Path("a:b")


def test_no_network_is_needed(tmp_path):
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise OSError('no network here')\n"
        "socket.socket.connect = socket.create_connection = refuse\n"
        "from torchcdm.cli import main\n"
        f"sys.exit(main(['sample', 'zoo:two-moons', '--n', '2', '--steps', '2', '--out', {str(tmp_path)!r}]))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
