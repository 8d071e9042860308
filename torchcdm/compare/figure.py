"""The figure of a comparison: likelihood against what it costs to score a sample."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torchcdm.compare.results import Comparison
from torchcdm.plots import save_panels

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def scoring_cost(comparison: Comparison, path: Path) -> Path:
    """NLL over seconds for a sample; filled where the density is normalised, hollow where it need not be.

    Args:
        comparison: What was measured.
        path: The PNG file.
    """

    def paint(axes: Sequence[Axes]) -> None:
        (ax,) = axes
        for normalised in (True, False):
            for result, row in comparison.ranked(normalised):
                cost = 1 / row.per_second
                label = result.title if row.name == "density" else f"{result.title}, {row.name}"
                face = "tab:blue" if normalised else "none"
                ax.errorbar(cost, row.value, row.se, fmt="o", color="tab:blue", markerfacecolor=face, markersize=5)
                ax.annotate(label, (cost, row.value), fontsize=7, xytext=(5, 3), textcoords="offset points")
        ax.set_xscale("log")
        ax.set_xlabel("seconds to score a sample")
        ax.set_ylabel(f"NLL, {comparison.protocol.unit}")
        ax.set_title("filled: normalised by construction; hollow: not", fontsize=9)

    return save_panels(path, 1, paint)
