"""Figures: their formats, and logs that do not hold what they show."""

import pytest
import torch
from matplotlib.axes import Axes

from torchcdm.apps import plots
from torchcdm.errors import UserError


@pytest.mark.parametrize("lines", [[], [{"step": 3}], [{"step": 3, "mse": None}]])
def test_a_log_without_values_leaves_no_figure(tmp_path, lines):
    plots.training_curves(lines, tmp_path / "training.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("suffix", "starts"), [(".png", b"\x89PNG"), (".pdf", b"%PDF"), (".svg", b"<?xml")])
def test_the_suffix_names_the_format(tmp_path, suffix, starts):
    scores = torch.rand(30, generator=torch.Generator().manual_seed(0))
    path = tmp_path / f"new/histogram{suffix}"
    plots.score_histogram(scores, 2 * scores, 0.9, "log_prob", path)
    assert path.read_bytes().startswith(starts)


def test_all_scores_lie_within_the_bars(tmp_path, monkeypatch):
    """Those of the commands: double precision of normal data, single precision of inputs, and an outlier."""
    normal = torch.linspace(1.1, 3.3, 40, dtype=torch.float64)
    bars, hist = [], Axes.hist
    monkeypatch.setattr(Axes, "hist", lambda *given, **more: bars.append(hist(*given, **more)))
    plots.score_histogram(normal, torch.tensor([1.1, 3.3, 1e30]), 1.9, "levels", tmp_path / "scores.png")
    assert [float(heights.sum()) for heights, *_ in bars] == pytest.approx([1, 1], abs=1e-6)


@pytest.mark.parametrize("name", ["histogram", "histogram.xyz", "histogram.PNG.exe"])
def test_other_formats_are_refused_before_the_work(tmp_path, name):
    with pytest.raises(UserError, match=r"figures are written as \.png, .*; choose one of these suffixes"):
        plots.check_figure(tmp_path / name)
