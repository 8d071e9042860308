"""Samples of a model and what is recorded of them: files, and a manifest with seed, label and log p."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchcdm.compose.sampling import default_moves, sample
from torchcdm.data import save_grid, save_table
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser
from torchcdm.runtime.files import write_rows
from torchcdm.runtime.processes import labels_of, map_rows
from torchcdm.training.settings import SamplingConfig


class Drawn(NamedTuple):
    """Samples in data units, not rounded, with classes, log p in nats (None of a ddm), the seed of all, evaluations of
    the denoiser for each (0 for particles), and what is known of how well moves or particles have corrected them."""

    x: Tensor
    y: Tensor | None
    log_p: Tensor | None
    seed: int
    evaluations: int
    summary: str


def draw(model: Denoiser, n: int, y: Tensor | None, seed: int, **options: Any) -> Drawn:
    """Samples and their one-pass log-densities; arguments and ``options`` as in :func:`torchcdm.sample`."""
    given, log_p, density = y, None, model.density
    if y is not None and options.get("particles"):
        if bool((y != y[0]).any()):
            raise UserError("particles are of one class: give its label, not balanced")
        given = y[:1]
    found = sample(model, n, y=given, seed=seed, units="codes", details=True, **options)
    x, device = found.x, model.schedule.alpha.device
    if density is not None:
        with torch.no_grad():
            log_p = map_rows(
                lambda rows: density.log_prob(x[rows].to(device), y=labels_of(y, rows, device)).cpu(), n,
                dim=x.shape[1:].numel(), device=device,
            )  # fmt: skip
    return Drawn(x, y, log_p, seed, found.evaluations, found.summary())


def sampling_options(model: Denoiser, sampling: SamplingConfig) -> dict[str, Any]:
    """What the settings of a run say to :func:`draw`; without a density the evaluations of moves go into steps."""
    moves, steps = default_moves(sampling.sampler, sampling.corrector), sampling.steps
    if model.density is None:
        steps, moves = steps and steps * (1 + moves), 0
    return {"sampler": sampling.sampler, "steps": steps and min(steps, model.schedule.T), "corrector": moves}


def balanced_labels(n: int, classes: int) -> Tensor:
    """Each class equally often, in turn: long (n,)."""
    return torch.arange(n) % classes


def save_sheet(drawn: Drawn, model: Denoiser, stem: Path) -> Path:
    """All samples of ``model`` in one file: ``stem`` as a PNG grid, or as a CSV table; gives its path."""
    if drawn.x.ndim == 4:
        return save_grid(drawn.x, stem.with_suffix(".png"), model.transform)
    return save_table(drawn.x, stem.with_suffix(".csv"), model.transform)


def save_manifest(
    drawn: Drawn, path: Path, files: Sequence[Path] = (), class_names: Sequence[str] | None = None
) -> None:
    """``manifest.csv``: index, seed, label and log p (nats, data units) of each sample, and its file if it has one.

    Labels are ``class_names`` where they are given, and numbers elsewhere.
    """
    count = len(drawn.x)
    labels = [""] * count if drawn.y is None else drawn.y.tolist()
    if class_names and drawn.y is not None:
        labels = [class_names[label] for label in labels]
    log_p = [""] * count if drawn.log_p is None else [f"{value:.4f}" for value in drawn.log_p.tolist()]
    columns = {"index": range(count), "seed": [drawn.seed] * count, "label": labels, "log_p": log_p}
    columns |= {"file": [file.name for file in files]} if files else {}
    write_rows(path, list(columns), zip(*columns.values(), strict=True))
