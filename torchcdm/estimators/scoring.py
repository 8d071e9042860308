"""log-densities of rows under a trained model: by one pass, or by the probability flow of the same network."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from torchcdm.estimators.base import TableEstimator
from torchcdm.likelihood import FlowSolver, Scoring
from torchcdm.models.density import DensityModel
from torchcdm.models.inputs import LARGEST
from torchcdm.runtime.batching import labels_of
from torchcdm.runtime.validation import read_as

Likelihood = Literal["one-pass", "flow"]

FLOW_STEPS = 50
"""Steps of the probability flow, Heun: two evaluations each, of the network and of its divergence."""


@dataclass(kw_only=True, eq=False, repr=False)
class DensityEstimator(TableEstimator):
    """An estimator that gives the log-density of rows; parameters as in :class:`CDMDensity`."""

    likelihood: Likelihood = "one-pass"

    def _log_density(
        self, rows: np.ndarray, centre: float | np.ndarray = 0.0, context: np.ndarray | None = None
    ) -> np.ndarray:
        """log p of rows (N, columns) less a ``centre`` (N, kept): of discrete columns the mean over the noise."""
        read_as(Likelihood, self.likelihood, "likelihood")
        columns = self.columns_
        if differ := int(columns.deviating(rows).sum()):
            what = "rows differ in a column that was constant in training, where this density knows nothing"
            warnings.warn(f"{differ} {what}", UserWarning, stacklevel=3)
        draws = [
            log_density(self.model_, columns.noisy(rows, noise) - centre, self.likelihood, context)
            for noise in self._noise
        ]
        return np.mean(draws, axis=0) + columns.log_cell


def log_density(
    model: DensityModel, rows: np.ndarray, likelihood: str, context: np.ndarray | None = None
) -> np.ndarray:
    """log p of each row, nats in data units, float64 (N,).

    The flow's is the normalised density at level 1 taken at the row itself: that of the data blurred by r_1, a
    hundredth of a column's deviation.

    Args:
        model: In float64, with a transform.
        rows: Data units, float64 (N, d).
        likelihood: ``one-pass`` or ``flow``.
        context: Contexts of a conditional model, (N, q).
    """
    transform, alpha = model.transform, model.schedule.alpha[1]
    x, y = (None if part is None else torch.from_numpy(np.ascontiguousarray(part)) for part in (rows, context))
    scoring = Scoring(level=1, steps=FLOW_STEPS)
    solver = FlowSolver(model, scoring) if likelihood == "flow" else None

    def one(batch: slice) -> Tensor:
        z, label = x[batch].to(alpha.device), labels_of(y, batch, alpha.device)
        # Where a model refuses rows, as their squares overflow, the density is zero.
        far = ~(transform(z).abs().amax(1, keepdim=True) <= LARGEST)
        z = torch.where(far, transform.inverse(torch.zeros_like(z)), z)
        if solver is None:
            log_p = model.log_prob(z, y=label)
        else:
            log_p = solver.log_prob(alpha * transform(z), label).log_prob.double()
            log_p = log_p + transform.dim * float(alpha.log()) + transform.log_det(z)
        return log_p.masked_fill(far[:, 0], -torch.inf).cpu()

    return scoring.by_batches(model, x, one).numpy()
