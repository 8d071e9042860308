"""Figure 4: denoising error by level, the plain diffusion model against the CDM, and their ratio."""

from __future__ import annotations

import torch
from torch import Tensor

from studies.reproduce.models import SETTINGS, Models
from studies.reproduce.result import Figure, Result, Table
from studies.reproduce.workspace import Workspace
from torchcdm.apps.plots import panels
from torchcdm.runtime.validation import encode
from torchcdm.training.evaluation import level_sums

__all__ = ["SETTINGS", "run"]

GROUPS = 10
"""Neighbouring levels are averaged: one level sees few samples."""

DRAWS = 8

VARIANTS = {"ddm": "DDM", "both": "CDM"}


def run(work: Workspace) -> Result:
    """Both models on the same noisy test images."""
    models = Models(work)
    source, setting = models.source, models.setting
    errors, sizes, seconds = {}, {}, {}
    for variant in VARIANTS:
        model, training = models.denoiser(variant)
        sizes[variant] = sum(parameter.numel() for parameter in model.parameters())
        seconds[variant] = round(training["seconds"], 1)

        def make(model=model) -> dict[str, list[float]]:  # noqa: ANN001
            x, _ = source.split("test").tensors(setting.test)
            sums = level_sums(model, x, draws=DRAWS)
            return {"mse": sums["mse"].tolist(), "count": sums["count"].tolist()}

        settings = {"config": encode(models.config(variant)), "test": setting.test, "draws": DRAWS}
        errors[variant] = grouped(work.numbers(f"fig4-{models.name(variant)}", settings, make))
    edges, ddm, cdm = errors["ddm"][0], errors["ddm"][1], errors["both"][1]
    rows = []
    for (low, high), a, b in zip(edges, ddm.tolist(), cdm.tolist(), strict=True):
        rows.append((f"{low} ... {high}", a, b, b / a))
    overall = [float(values[2]) for values in errors.values()]
    rows.append(("all", *overall, overall[1] / overall[0]))
    title = f"{setting.data}, squared error of eps, mean over d, {DRAWS} noisy copies of {setting.test} test images"
    table = Table(title, ("levels", "DDM", "CDM", "CDM / DDM"), tuple(rows))

    path = work.figure("fig4")
    with panels(path, 2) as axes:
        middle = [(low + high) / 2 for low, high in edges]
        for name, values in (("DDM", ddm), ("CDM", cdm)):
            axes[0].plot(middle, values.numpy(), marker=".", label=name)
        axes[0].set_yscale("log")
        axes[0].set_ylabel("squared error of eps")
        axes[0].legend()
        axes[1].plot(middle, (cdm / ddm).numpy(), marker=".")
        axes[1].axhline(1, color="k", linestyle="--", linewidth=0.8)
        axes[1].set_ylabel("CDM / DDM")
        for ax in axes:
            ax.set_xlabel("level t")

    figure = Figure(path, "Denoising error by level, and the ratio of the two models.")
    notes = (
        f"DDM: {sizes['ddm']} parameters, {seconds['ddm']} s of training; CDM: {sizes['both']} parameters, "
        f"{seconds['both']} s; the same data, steps and batches.",
        "In the paper the CDM's error is lower at high noise; it is published as a figure without numbers.",
    )
    return Result((table,), (figure,), setting.scaled_down, notes)


def grouped(sums: dict[str, list[float]]) -> tuple[list[tuple[int, int]], Tensor, Tensor]:
    """Levels (first, last) of each group without 0 and T+1, the mean error in each (groups,), and that over all."""
    mse, count = (torch.tensor(sums[key], dtype=torch.float64) for key in ("mse", "count"))
    parts = [part for part in torch.arange(1, len(mse) - 1).chunk(GROUPS) if count[part].sum() > 0]
    edges = [(int(part[0]), int(part[-1])) for part in parts]
    return edges, torch.stack([mse[p].sum() / count[p].sum() for p in parts]), mse[1:-1].sum() / count[1:-1].sum()
