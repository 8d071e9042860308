"""Which weights are kept: validation of the averaged weights, the best of them, and patience."""

from __future__ import annotations

import math
from typing import Any, final

from torch import Tensor

from torchcdm.data import DataSource
from torchcdm.models.denoiser import Denoiser
from torchcdm.training.evaluation import labels_for, validate
from torchcdm.training.settings import Config


@final
class Selection:
    """Compares validation values of a training; the last weights are kept where there is no validation split.

    The ``best`` model has the least of the validation value called ``value``; ``stale`` counts the validations since.
    """

    def __init__(self, config: Config, source: DataSource, model: Denoiser) -> None:
        self.value = config.train.select if config.model.kind == "cdm" else "mse"
        self.unit = "" if self.value != "nll" else "nats" if source.transform.bin is None else "bits/dim"
        self.loss, self.patience = config.loss, config.train.patience
        self.data: tuple[Tensor, Tensor | None] | None = None
        if source.validation:
            x, labels = source.validation.tensors(config.train.validation_samples)
            self.data = x, labels_for(model, labels)
        self.best: dict[str, Any] | None = None
        self.stale = 0

    def compare(self, model: Denoiser, step: int, settled: bool) -> tuple[dict[str, float], bool]:
        """Validation values of a model in eval mode after ``step`` steps, and whether it is to be kept.

        Unless ``settled``, which says that all terms of the loss count in full, a model is kept for want of a better
        one, but is no best model and no reason to stop.
        """
        if self.data is None:
            return {}, True
        values = validate(model, *self.data, self.loss.ce_weight, self.loss.mse_weight)
        value, keep = values[self.value], not settled
        if settled and math.isfinite(value) and (self.best is None or value < self.best["best"]):
            self.best = {"value": self.value, "unit": self.unit, "best": value, "step": step}
            keep, self.stale = True, 0
        elif settled:
            self.stale += 1
        return {f"val_{key}": item for key, item in values.items()}, keep

    def selected(self, step: int) -> dict[str, Any]:
        """What ``config.json`` says of the kept weights, after ``step`` steps."""
        return {"value": "last", "step": step} if self.best is None else self.best

    @property
    def out_of_patience(self) -> bool:
        """Whether there were too many validations without a new best."""
        return self.patience is not None and self.stale >= self.patience
