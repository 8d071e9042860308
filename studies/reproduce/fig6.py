"""Figure 6: guided samples of each class: rows are classes, columns guidance weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from studies.quality.features import Extractor
from studies.quality.frechet import Reference
from studies.reproduce.models import SETTINGS, Models
from studies.reproduce.result import Figure, Result, Table
from studies.reproduce.workspace import Workspace
from torchcdm.data import save_grid

__all__ = ["SETTINGS", "run"]

MEASURED = 500
"""Samples of each weight, at most."""

REAL = 10_000
"""At most so many training images give the means of the classes."""


def run(work: Workspace) -> Result:
    """One model, the same noise under every weight."""
    models = Models(work)
    setting, source = models.setting, models.source
    classes = source.classes or 0
    weights = (0.0, *setting.weights)
    sets = [models.samples("conditional", guidance=weight, count=MEASURED) for weight in weights]
    extractor = Reference(source, work.device, work.features).extractor
    means = ClassMeans(extractor, *source.train.tensors(REAL), classes)
    rows = [(f"{w:g}", *means.measure(x, torch.arange(len(x)) % classes)) for w, x in zip(weights, sets, strict=True)]
    rows.append(("test images", *means.measure(*source.split("test").tensors(MEASURED))))
    title = (
        f"{source.name}, at most {MEASURED} samples of a CDM that is given the class (DDIM, {setting.steps['ddim']} "
        f"steps), in {means.extractor.name}"
    )
    columns = ("guidance weight", "nearest to the mean of their own class, %", "spread within a class, of real images")
    # The first sample of each class, one column a weight.
    shown = torch.stack([x[:classes] for x in sets], 1).flatten(0, 1)
    path = save_grid(shown, work.figure("fig6"), source.transform, len(weights))
    names = ", ".join(source.class_names or ())
    caption = f"Rows: {names}. Columns: guidance weights {', '.join(f'{w:g}' for w in weights)}; a row has one noise."
    notes = ("Guidance is meant to trade spread for samples that keep to their class; weight 0 is the plain model.",)
    # What was learned by heart would show most under the strongest guidance.
    nearest = models.figure("fig6-neighbours", sets[-1], f"guidance weight {weights[-1]:g}")
    return Result((Table(title, columns, tuple(rows)),), (Figure(path, caption), nearest), setting.scaled_down, notes)


class ClassMeans:
    """How well samples keep to their classes, and how much of a class they show.

    Args:
        extractor: The features.
        x: Training images, data units, (N, C, H, W).
        y: Their classes, (N,).
        classes: How many.
    """

    def __init__(self, extractor: Extractor, x: Tensor, y: Tensor, classes: int) -> None:
        self.extractor = extractor
        features = extractor.features(x)
        self.means = torch.stack([features[y == k].mean(0) for k in range(classes)])
        self.spread = _spread(features, y, classes)

    def measure(self, x: Tensor, y: Tensor) -> tuple[float, float]:
        """Percentage that lies nearest to the mean of its own class, and the spread over that of training images."""
        features = self.extractor.features(x)
        found = torch.cdist(features, self.means).argmin(1)
        return 100 * float((found == y).double().mean()), _spread(features, y, len(self.means)) / self.spread


def _spread(features: Tensor, y: Tensor, classes: int) -> float:
    """Root mean square distance to the mean of the own class, without the bias of means from few samples."""
    present = [features[y == k] for k in range(classes) if bool((y == k).any())]
    squares = sum(float((part - part.mean(0)).square().sum()) for part in present)
    return math.sqrt(squares / max(1, len(features) - len(present)))
