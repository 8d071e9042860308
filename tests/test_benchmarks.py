"""The benchmarks run; what they measure is for their pages, not for a test that a busy machine could fail."""

import json
import runpy
from pathlib import Path

import pytest

STEP_COST = Path(__file__).parent.parent / "benchmarks" / "step_cost.py"


@pytest.mark.slow
def test_step_cost_reports_every_step_beside_the_ddm(tmp_path):
    report = tmp_path / "report.json"
    main = runpy.run_path(str(STEP_COST))["main"]
    main(["--batch", "2", "--rounds", "1", "--json", str(report)])
    rows = {row["name"]: row for row in json.loads(report.read_text())["rows"]}
    for step in ("denoising-step", "training-step", "guided-step", "one-pass-likelihood"):
        assert rows[step] == rows[f"encoder/{step}"] | {"name": step}
        ddm = "denoising-step" if step == "one-pass-likelihood" else step
        for network in ("encoder", "paper"):
            own, baseline = rows[f"{network}/{step}"], rows[f"{network}-ddm/{ddm}"]
            assert own["ratio_to_ddm"] * baseline["seconds"] == pytest.approx(own["seconds"])
