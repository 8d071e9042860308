"""Means of the loss terms, which a training tells while it runs."""

from __future__ import annotations

import math
from typing import final

import torch
from torch import Tensor

from torchcdm.runtime.files import without_nan
from torchcdm.runtime.processes import Processes


@final
class Window:
    """Means of the loss terms over the steps since the last line of the log, of a schedule with ``T`` noise levels.

    ``mse`` is a mean over the levels 1 ... T, as in validation: that of level 0 is a constant and that of T+1 is zero.
    """

    def __init__(self, T: int, device: torch.device) -> None:
        self.T, self.device = T, device
        self.sums: dict[str, Tensor] = {}

    def add(self, terms: dict[str, Tensor]) -> None:
        """Terms (B,) of one step, with their levels ``t``."""
        values = {key: term.double() for key, term in terms.items() if key != "t"}
        noisy = ((terms["t"] >= 1) & (terms["t"] <= self.T)).double()
        values |= {"samples": torch.ones_like(noisy), "noisy": noisy, "mse": values["mse"] * noisy}
        for key, term in values.items():
            self.sums[key] = self.sums.get(key, 0.0) + term.sum()

    def means(self, processes: Processes) -> dict[str, float]:
        """Means over all processes; starts a new window. Empty where every step was skipped."""
        sums, self.sums = self._totals(processes), {}
        if not sums:
            return {}
        samples, noisy = sums.pop("samples"), sums.pop("noisy")
        means = {key: value / samples for key, value in sums.items()} | {"mse": sums["mse"] / max(noisy, 1)}
        if "correct" in means:
            means["accuracy"] = means.pop("correct")
        return means

    def to_json(self, processes: Processes) -> dict[str, float | None]:
        """The sums over all processes; None for those that are not finite."""
        return without_nan(self._totals(processes))

    def restore(self, sums: dict[str, float | None]) -> None:
        """Goes on from what :meth:`to_json` gave."""
        for key, value in sums.items():
            value = math.nan if value is None else value
            self.sums[key] = torch.tensor(value, dtype=torch.float64, device=self.device)

    def _totals(self, processes: Processes) -> dict[str, float]:
        if not self.sums:
            return {}
        names = sorted(self.sums)
        totals = processes.total(torch.stack([self.sums[name] for name in names]))
        return dict(zip(names, totals.tolist(), strict=True))
