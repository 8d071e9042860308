"""The benchmarks run; what they measure is for their pages, not for a test that a busy machine could fail."""

import json
import runpy
from pathlib import Path

import pytest

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
@pytest.mark.parametrize("question", ["levels", "classes"])
def test_step_scaling_divides_by_the_first_value(rows_of, question):
    rows = rows_of("step_scaling", "--question", question, "--rounds", "1")
    for name, row in rows.items():
        _, value, step = name.split("/")
        first = next(other for key, other in rows.items() if key.endswith(f"/{step}"))
        assert row["seconds"] == pytest.approx(row["ratio_to_first"] * first["seconds"])
        if step == "ddm-denoising-step":
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


@pytest.mark.slow
def test_import_time_is_relative_to_torch(rows_of):
    rows = rows_of("import_time", "--rounds", "1")
    assert rows["import torch"]["ratio_to_ddm"] == 1 and len(rows) == 3
