"""Figures of ``studies.benchmarks.quality_curves``: its curves, and pictures of both models from the same noise.

    python -m studies.benchmarks.quality_figure curves quality_curves.json docs/images/curves.png
    python -m studies.benchmarks.quality_figure pictures runs/curves/cells docs/images/beside.png \\
        --cells cdm-0-ddim-adaptive-10 ddm-0-ddim-adaptive-10

``curves``: Fréchet distance against evaluations, a panel for each sampler with placed steps, errors as in the tables.
``pictures``: the samples of some cells one below the other.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from studies.tables.pictures import by_cell, error_of

NAMES = {"ddim": "DDIM", "ddpm": "DDPM", "dpm2": "DPM-Solver, 2nd order", "sa2": "sa2, the default"}


def curves(results: Path, figure: Path) -> None:
    """The curves of a result file."""
    content = json.loads(results.read_text(encoding="utf-8"))
    cells = {key: models for key, models in by_cell(content["rows"]).items() if key[2] == "adaptive"}
    floor = content["floors"][0]["frechet"]
    drawing = Figure(figsize=(11, 3), layout="constrained")
    axes = drawing.subplots(1, len(NAMES), sharey=True)
    for ax, (sampler, title) in zip(axes, NAMES.items(), strict=True):
        for kind, color in (("ddm", "0.5"), ("cdm", "C3")):
            found = {key[0]: models[kind] for key, models in cells.items() if key[1] == sampler and models[kind]}
            middle = [mean(row["frechet"] for row in rows) for rows in found.values()]
            errors = [error_of(rows) for rows in found.values()]
            ax.errorbar(list(found), middle, errors, color=color, marker="o", capsize=3, label=kind.upper())
        ax.axhline(floor, color="0.7", linestyle="--", label="test images")
        ax.set(title=title, xscale="log", yscale="log", xlabel="evaluations")
        ax.set_xticks(list(found), map(str, found))
        ax.minorticks_off()
    axes[0].set(ylabel="Fréchet distance", yticks=[0.5, 1, 2, 4])
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].legend()
    drawing.savefig(figure, dpi=100)


def pictures(folder: Path, cells: Sequence[str], figure: Path) -> None:
    """The pictures of some cells in a folder, with what they are."""
    found = [np.asarray(Image.open(folder / f"{cell}.png").convert("RGB")) for cell in cells]
    drawing = Figure(figsize=(6, sum(6 * len(one) / one.shape[1] + 0.25 for one in found)), layout="constrained")
    for ax, cell, one in zip(drawing.subplots(len(found), squeeze=False)[:, 0], cells, found, strict=True):
        model, _, sampler, _, evaluations = cell.split("-")
        ax.imshow(one)
        ax.set_title(f"{model.upper()}, {evaluations} evaluations of {sampler}", fontsize=9, loc="left")
        ax.set_axis_off()
    drawing.savefig(figure, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in (("curves", "JSON of the curves"), ("pictures", "folder of the cells")):
        command = commands.add_parser(name)
        command.add_argument("source", type=Path, help=what)
        command.add_argument("figure", type=Path, help="file to write, .png")
    commands.choices["pictures"].add_argument("--cells", nargs="+", required=True, metavar="NAME", help="to show")
    options = parser.parse_args(arguments)
    if options.command == "curves":
        curves(options.source, options.figure)
    else:
        pictures(options.source, options.cells, options.figure)


if __name__ == "__main__":
    main()
