"""Tables of the quality of samples."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import mean
from typing import Any

import numpy as np
import torch
from scipy.stats import ttest_ind

from studies.tables.reading import markdown, read
from torchcdm.units import standard_error


def ruler() -> str:
    """What the fixed networks see of test images: the floor of every measure."""
    rows = []
    for name in ("ruler_fashion28", "ruler_fashion16", "ruler_digits"):
        content = read(name)
        (row,) = content["rows"]
        title = f"{content['data']} {content['shape'][1]}x{content['shape'][2]}"
        rows.append([title, content["features"], str(row["count"]), f"{row['frechet']:.3g} ± {row['frechet_se']:.2g}",
                     f"{row['precision']:.3f}", f"{row['recall']:.3f}", f"{row['c2st']:.3f} ± {row['c2st_se']:.3f}",
                     f"{row['grain']:.3f} ± {row['grain_se']:.3f}"])  # fmt: skip
    head = ["test images", "features", "images", "Fréchet", "precision", "recall", "C2ST", "grain"]
    return markdown(head, rows)


def by_cell(rows: Sequence[Any]) -> dict[tuple[Any, ...], dict[str, list[Any]]]:
    """Rows of all trainings of a CDM and of a DDM, by evaluations, sampler and placement of the steps."""
    cells: dict[tuple[Any, ...], dict[str, list[Any]]] = {}
    for row in rows:
        key = (row["evaluations"], row["sampler"], row["spacing"])
        cells.setdefault(key, {"cdm": [], "ddm": []})[row["model"].split("-")[0]].append(row)
    return dict(sorted(cells.items()))


def quality_curves(name: str) -> str:
    """Fréchet distance and grain of both models, by evaluations, sampler and placement of the steps.

    Of several trainings: means, with standard errors over the trainings, and the ratio of the means with the upper end
    of its 95 % interval (Welch's, of the logarithms). Where all trainings drew from the same noise, the error of the
    samples is added to both, as that over the trainings has it not.
    """
    rows, cells = [], by_cell(read(name)["rows"])
    several = any(len(found) > 1 for models in cells.values() for found in models.values())
    for (evaluations, sampler, spacing), models in cells.items():
        shown = ["–" if not found else f"{mean(r['frechet'] for r in found):.2f} ± {error_of(found):.2f}"
                 for found in models.values()]  # fmt: skip
        shown += ["–" if not found else f"{mean(r['grain'] for r in found):.2f}" for found in models.values()]
        rows.append([str(evaluations), sampler, spacing, *shown, *([ratio_of(*models.values())] * several)])
    head = ["evaluations", "sampler", "steps", "Fréchet, CDM", "Fréchet, DDM", "grain, CDM", "grain, DDM"]
    return markdown(head + ["CDM / DDM, upper end"] * several, rows)


def own_images(name: str) -> str:
    """Fréchet distance, precision, recall and grain of single models, by their size and groups, sampler and steps."""
    rows = []
    for row in sorted(read(name)["rows"], key=lambda row: (row["model"], row["sampler"], row["evaluations"])):
        grouped, side = re.findall(r"^enc(g?)(\d+)", row["model"])[0]
        rows.append([f"{side}x{side}", "20" if grouped else "none", row["sampler"], str(row["evaluations"]),
                     f"{row['frechet']:.2f} ± {row['frechet_se']:.2f}", f"{row['precision']:.2f}",
                     f"{row['recall']:.2f}", f"{row['grain']:.2f}"])  # fmt: skip
    head = ["images", "groups", "sampler", "evaluations", "Fréchet", "precision", "recall", "grain"]
    return markdown(head, rows)


def error_of(rows: Sequence[Any]) -> float:
    """Standard error over several trainings, and of their samples where the noise is one; of one training, these."""
    values = torch.tensor([row["frechet"] for row in rows])
    own = standard_error(values) if len(values) > 1 else 0.0
    return math.hypot(own, float(values.mean()) * error_of_samples(rows))


def error_of_samples(rows: Sequence[Any]) -> float:
    """Relative error of the distance by its samples, the mean over trainings; zero where each drew its own noise, so
    that trainings differ by it."""
    drawn = len({row.get("seed") for row in rows}) == len(rows) > 1
    return 0.0 if drawn else mean(row["frechet_se"] / row["frechet"] for row in rows)


def ratio_of(cdm: Sequence[Any], ddm: Sequence[Any]) -> str:
    """Ratio of the means and the upper end of its 95 % interval; a dash where either has one training."""
    if min(len(cdm), len(ddm)) < 2:
        return "–"
    values = [[row["frechet"] for row in rows] for rows in (cdm, ddm)]
    middle = np.subtract(*(np.log(side).mean() for side in values))
    high = ttest_ind(*map(np.log, values), equal_var=False).confidence_interval(0.95).high
    samples = 1.96 * math.hypot(error_of_samples(cdm), error_of_samples(ddm))
    return f"{mean(values[0]) / mean(values[1]):.2f}, {math.exp(middle + math.hypot(high - middle, samples)):.2f}"


def quality_of_zoo() -> str:
    """Fréchet distance and grain of two models of the zoo and of a DDM, by evaluations, sampler and steps."""
    cells: dict[tuple[Any, ...], dict[str, str]] = {}
    names = ("digits", "fashion28", "fashion28_ddm")
    for name in names:
        for row in read(f"quality_{name}")["rows"]:
            key = row["evaluations"], row["sampler"], row["spacing"], row["steps"]
            cells.setdefault(key, {})[name] = f"{row['frechet']:.2f} ± {row['frechet_se']:.2f}, {row['grain']:.2f}"
    rows = [
        [str(evaluations), sampler, f"{steps}, {spacing}", *(found.get(name, "–") for name in names)]
        for (evaluations, sampler, spacing, steps), found in sorted(cells.items())
    ]
    titles = ["zoo:digits", "zoo:fashion-mnist-conditional", "its DDM"]
    return markdown(["evaluations", "sampler", "steps", *titles], rows)


def corrected_sampling() -> str:
    """Fréchet distances by steps and moves."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for r in read("corrected_sampling")["rows"]:
        budget = (r["steps"] - 1) * (1 + r["moves"]) + 1
        found.setdefault(r["sampler"], {})[r["steps"], r["moves"]] = r | {"evaluations": budget}
    head = ["sampler", "steps x moves", "evaluations", "Fréchet", "recall", "accepted"]
    lines = []
    for sampler, by in found.items():
        for (steps, moves), r in sorted(by.items(), key=lambda item: (item[1]["evaluations"] // 6, item[0][1])):
            accepted = "" if r["acceptance"] is None else f"{r['acceptance']:.0%}"
            lines.append([sampler, f"{steps} x {moves}", str(r["evaluations"]),
                          f"{r['frechet']:.2f} ± {r['frechet_se']:.2f}", f"{r['recall']:.3f}", accepted])  # fmt: skip
    return markdown(head, lines)
