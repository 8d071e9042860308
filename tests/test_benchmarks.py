"""The benchmarks run; what they measure is for their pages, not for a test that a busy machine could fail."""

import json
import runpy
from pathlib import Path

import pytest

from torchcdm.errors import UserError

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def rows_of(monkeypatch, tmp_path):
    """Runs a benchmark and gives its rows by name."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name, *words):
        report = tmp_path / "report.json"
        runpy.run_path(str(FOLDER / f"{name}.py"))["main"]([*words, "--json", str(report)])
        return {row["name"]: row for row in json.loads(report.read_text())["rows"]}

    return run


@pytest.mark.slow
def test_step_cost_reports_every_step_beside_the_ddm(rows_of):
    rows = rows_of("step_cost", "--batch", "2", "--rounds", "1")
    for step in ("denoising-step", "training-step", "guided-step", "one-pass-likelihood"):
        assert rows[step] == rows[f"encoder/{step}"] | {"name": step}
        ddm = "denoising-step" if step == "one-pass-likelihood" else step
        for network in ("encoder", "paper"):
            own, baseline = rows[f"{network}/{step}"], rows[f"{network}-ddm/{ddm}"]
            assert own["ratio_to_ddm"] * baseline["seconds"] == pytest.approx(own["seconds"])


@pytest.mark.slow
def test_training_memory_has_every_training_step_beside_its_ddm(rows_of):
    rows = rows_of("training_memory", "--network", "encoder", "--batch", "16")
    assert set(rows) == {f"{name}/training-step" for name in ("encoder", "encoder-pytorch", "encoder-ddm")}
    # PyTorch keeps what the second derivatives by hand do not.
    assert rows["encoder-pytorch/training-step"]["bytes"] > 1.2 * rows["encoder/training-step"]["bytes"]
    assert rows["encoder-ddm/training-step"]["ratio_to_ddm"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("question", ["levels", "classes", "processes"])
def test_step_scaling_divides_by_the_first_value(rows_of, question):
    rows = rows_of("step_scaling", "--question", question, "--rounds", "1")
    for name, row in rows.items():
        _, value, step = name.split("/")
        first = next(other for key, other in rows.items() if key.endswith(f"/{step}"))
        assert row["seconds"] == pytest.approx(row["ratio_to_first"] * first["seconds"])
        if step.startswith("ddm-"):
            assert row["ratio_to_ddm"] == 1


@pytest.mark.slow
def test_equal_time_divides_by_the_better_ddm_and_makes_nothing_again(rows_of, tmp_path):
    words = ["--preset", "digits", "--seconds", "2", "--grid-seconds", "0.5", "--seeds", "0", "--images", "8",
             "--out", str(tmp_path / "out")]  # fmt: skip
    rows = rows_of("equal_time", *words)
    assert set(rows) == {"cdm", "ddm", "ddm-residual"}
    assert min(rows["ddm"]["ratio_to_ddm"], rows["ddm-residual"]["ratio_to_ddm"]) == 1
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("model.safetensors")}
    assert rows_of("equal_time", *words) == rows
    assert made == {path: path.stat().st_mtime_ns for path in made}
    with pytest.raises(UserError, match="was made with images = 8, not 9"):
        rows_of("equal_time", *words[:-3], "9", *words[-2:])


@pytest.mark.slow
def test_import_time_is_relative_to_torch(rows_of):
    rows = rows_of("import_time", "--rounds", "1")
    assert rows["import torch"]["ratio_to_ddm"] == 1 and len(rows) == 3


@pytest.mark.slow
def test_time_to_quality_gives_the_default_a_share_of_the_time_and_makes_nothing_again(rows_of, tmp_path):
    words = ["--preset", "digits", "--seconds", "4", "--fraction", "0.5", "--grid-seconds", "1", "--images", "8",
             "--flow-images", "4", "--flow-steps", "3", "--out", str(tmp_path / "out")]  # fmt: skip
    rows = rows_of("time_to_quality", *words)
    assert rows["default"]["seconds"] == 2 and rows["paper"]["seconds"] == 4
    assert rows["default"]["steps"] > rows["paper"]["steps"] > 0, "the paper's network takes longer for a step"
    assert rows["paper"]["seconds_to_target"] > 0, "the target is the least error of the paper's network"
    assert rows_of("time_to_quality", *words) == rows
    never = rows_of("time_to_quality", *words, "--target-mse", "0")
    assert all(row["seconds_to_target"] is None for row in never.values())
