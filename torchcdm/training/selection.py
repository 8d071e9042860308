"""Which weights are kept: validation of the averaged weights, the best of them, and patience."""

from __future__ import annotations

import math
from typing import Any, final

from torch import Tensor

from torchcdm.models.denoiser import Denoiser
from torchcdm.training.evaluation import validate
from torchcdm.training.settings import LossConfig


@final
class Selection:
    """Compares validation values of a training.

    Args:
        value: Name of the validation value that the best model has the least of.
        unit: Unit of that value.
        data: Validation samples in data units and their labels; None without a validation split.
        loss: Weights of the terms in the validation value ``loss``.
        patience: Validations without a new best that end the training; None for any number.

    Attributes:
        best: ``{"value", "unit", "best", "step"}`` of the best model so far; None before there is one.
        stale: Validations since then.
    """

    def __init__(
        self, value: str, unit: str, data: tuple[Tensor, Tensor | None] | None, loss: LossConfig, patience: int | None
    ) -> None:
        self.value, self.unit, self.data, self.loss, self.patience = value, unit, data, loss, patience
        self.best: dict[str, Any] | None = None
        self.stale = 0

    def compare(self, model: Denoiser, step: int, settled: bool) -> tuple[dict[str, float], bool]:
        """Validates a model.

        Args:
            model: In eval mode.
            step: Steps that it has been trained.
            settled: Whether all terms of the loss count in full. Before, the model is kept for want of a better one,
                but it is no best model and no reason to stop.

        Returns:
            The validation values, and whether the model is to be kept.
        """
        if self.data is None:
            return {}, True
        values = validate(model, *self.data, self.loss.ce_weight, self.loss.mse_weight)
        value, keep = values[self.value], not settled
        if settled and math.isfinite(value) and (self.best is None or value < self.best["best"]):
            self.best, keep = {"value": self.value, "unit": self.unit, "best": value, "step": step}, True
            self.stale = 0
        elif settled:
            self.stale += 1
        return {f"val_{key}": item for key, item in values.items()}, keep

    def selected(self, step: int) -> dict[str, Any]:
        """What ``config.json`` says of the kept weights, after ``step`` steps."""
        return {"value": "last", "step": step} if self.best is None else self.best

    @property
    def out_of_patience(self) -> bool:
        """Whether the training is to end."""
        return self.patience is not None and self.stale >= self.patience
