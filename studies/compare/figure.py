"""The figure of a comparison: likelihood against what it costs to score a sample."""

from __future__ import annotations

from pathlib import Path

from studies.compare.results import Comparison
from torchcdm.apps.plots import panels


def scoring_cost(comparison: Comparison, path: Path) -> Path:
    """NLL over seconds for a sample; filled where the density is normalised, hollow where it need not be.

    Args:
        comparison: What was measured.
        path: The PNG file.
    """

    with panels(path, 2) as axes:
        ax, legend = axes
        rows = [(normalised, *pair) for normalised in (True, False) for pair in comparison.ranked(normalised)]
        for place, (normalised, result, row) in enumerate(rows):
            colour, marker = f"C{place % 10}", "osD^v"[place // 10 % 5]
            label = result.title if row.name == "density" else f"{result.title}, {row.name}"
            ax.errorbar(
                1 / row.per_second, row.value, row.se, fmt=marker, color=colour, markersize=6,
                markerfacecolor=colour if normalised else "none", label=f"{row.value:.3f}  {label}",
            )  # fmt: skip
        ax.set_xscale("log")
        ax.set_xlabel("seconds to score a sample")
        ax.set_ylabel(f"NLL, {comparison.protocol.unit}")
        ax.set_title("filled: normalised by construction; hollow: not", fontsize=9)
        legend.axis("off")
        handles, labels = ax.get_legend_handles_labels()
        legend.legend(handles, labels, loc="center left", fontsize=7, frameon=False, ncols=1 + (len(rows) > 18))

    return path
