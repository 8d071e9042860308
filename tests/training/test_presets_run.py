"""Every preset on tiny files in the true on-disk formats: shrunk in size, unchanged in everything else."""

import json

import numpy as np
import pytest
import torch
from published_checkpoint import CLASSES, published_output, write_checkpoint
from published_data import write_celeba, write_cifar, write_fashion

from torchcdm.cli import main
from torchcdm.training.checkpoint import load, read_info
from torchcdm.training.config_files import preset_names

SHRUNK = {
    "--steps": "2",
    "--train.batch_size": "4",
    "--train.validation_samples": "4",
    "--train.sample_every": "1",
    "--sampling.n": "2",
    "--sampling.steps": "2",
    "--report.limit": "4",
    "--report.flow_steps": "1",
    "--report.sweeps": "4",
    "--report.draws": "1",
    "--report.baselines": "false",
    "--model.schedule.T": "25",
    "--data.workers": "0",
}
NETWORK = {
    "unet": {"--model.backbone.channels": "8", "--model.backbone.blocks": "1", "--model.backbone.groups": "4"},
    "encoder": {"--model.backbone.width": "8", "--model.backbone.blocks": "1"},
    "mlp": {"--model.backbone.width": "16", "--model.backbone.depth": "1"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All data sets as they are distributed, tiny."""
    root = tmp_path_factory.mktemp("data")
    write_fashion(root / "fashion-mnist")
    write_cifar(root / "cifar-10-batches-bin")
    write_celeba(root / "celeba")
    rows = np.random.default_rng(0).normal(size=(60, 3))
    np.savetxt(root / "table.csv", rows, delimiter=",", header="a,b,c", comments="")
    np.savez(root / "images.npz", x=np.random.default_rng(1).integers(0, 256, (40, 12, 8, 3), dtype=np.uint8))
    return root


DATA = {"table": "table:{}/table.csv", "mlp": "table:{}/table.csv", "encoder": "array:{}/images.npz"}


CONDITIONAL = [name for name in preset_names() if name.endswith("-conditional")]
"""Those of which each has a sibling without classes."""


@pytest.mark.parametrize(
    "preset", [pytest.param(name, marks=[pytest.mark.slow] * (name in CONDITIONAL)) for name in preset_names()]
)
def test_preset_trains_samples_and_reports(folder, tmp_path, monkeypatch, preset):
    monkeypatch.setenv("TORCHCDM_DATA", str(folder))
    paper = preset.startswith("cifar10") or preset == "celeba64"
    network = "unet" if paper else "mlp" if preset in ("table", "mlp", "two-moons") else "encoder"
    flags = SHRUNK | NETWORK[network]
    if preset in DATA:
        flags["--data"] = DATA[preset].format(folder)
    if preset.startswith("fashion"):
        flags["--train.calibration"] = "200"
    words = [word for pair in flags.items() for word in pair]
    assert main(["train", preset, "--out", str(tmp_path / "run"), "--device", "cpu", "--quiet", *words]) == 0
    info, model = read_info(tmp_path / "run"), load(tmp_path / "run")
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["preset"] == preset and report["steps"] == 2
    rows = {row["name"]: row["value"] for row in report["nll"]["rows"]}
    assert np.isfinite(rows["one-pass"])
    if paper:
        side = 64 if preset == "celeba64" else 32
        assert info.transform.shape == (3, side, side) and not info.transform.dequantize
        assert float(info.transform.scale) == 127.5 and float(info.transform.shift) == 127.5
        assert "flow" not in rows and report["gap_to_flow_by_level"] is None
    assert model.classes == (10 if "conditional" in preset else None)
    assert model.joint == (preset in ("fashion-mnist-conditional", "digits-conditional"))
    suffix = "csv" if network == "mlp" else "png"
    assert sorted(path.name for path in (tmp_path / "run" / "samples").iterdir()) == [
        f"final.{suffix}", "manifest.csv", f"step-0000001.{suffix}",
    ]  # fmt: skip


def test_a_dry_run_of_the_papers_preset(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCHCDM_DATA", str(folder))
    words = [word for pair in (NETWORK["unet"] | {"--train.batch_size": "4"}).items() for word in pair]
    assert main(["train", "cifar10", "--out", str(tmp_path / "run"), "--device", "cpu", "--dry-run", *words]) == 0
    assert "s a step of 4 samples; the training takes" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("classes", [None, CLASSES], ids=["unconditional", "conditional"])
def test_converted_checkpoints_become_runs(tmp_path, capsys, classes):
    weights = write_checkpoint(tmp_path / "model.pt", classes)
    (tmp_path / "model.yaml").write_text(
        "extends: cifar10\ndata: {channels: 1, size: [8, 8]}\nmodel:\n"
        f"  labels: {'none' if classes is None else 'input'}\n  schedule: {{name: uniform-sigma, T: 10}}\n"
        "  backbone: {channels: 32, multipliers: [1, 2], blocks: 1, attention: [4]}\n"
    )
    words = ["convert", str(tmp_path / "model.pt"), str(tmp_path / "run"), "--config", str(tmp_path / "model.yaml")]
    assert main(words + ([] if classes is None else ["--classes", str(classes)])) == 0
    model = load(tmp_path / "run")
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    y = None if classes is None else torch.tensor([0, 2, 1, 1])
    # Identity 1: log p_t(x) = F_t - F_{T+1} + log N(x; 0, I).
    F = published_output(weights, x, y).double()
    normal = torch.distributions.Normal(0.0, 1.0).log_prob(x.double()).flatten(1).sum(1)
    torch.testing.assert_close(model.log_prob_levels(x, y), F - F[:, -1:] + normal[:, None], rtol=1e-4, atol=1e-3)
    assert main(["sample", str(tmp_path / "run"), "--n", "2", "--steps", "2", "--out", str(tmp_path / "s"), "--quiet",
                 *([] if classes is None else ["--label", "1"])]) == 0  # fmt: skip
    assert main(["info", str(tmp_path / "run")]) == 0 and "converted" in capsys.readouterr().out
