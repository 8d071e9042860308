"""log-densities of rows under a trained model: by one pass, or by the probability flow of the same network."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchcdm.errors import UserError, nearest
from torchcdm.likelihood import FlowSolver, Scoring
from torchcdm.models.density import DensityModel

LIKELIHOODS = ("one-pass", "flow")
BATCH = 1000

FLOW_STEPS = 50
"""Steps of the probability flow, Heun: two evaluations each, of the network and of its divergence."""


def check_likelihood(likelihood: str) -> None:
    """Refuses a name that is none of :data:`LIKELIHOODS`."""
    if likelihood not in LIKELIHOODS:
        raise UserError(f"likelihood is '{likelihood}'; {nearest(str(likelihood), LIKELIHOODS)}")


def log_density(
    model: DensityModel, rows: np.ndarray, likelihood: str, y: np.ndarray | None = None
) -> np.ndarray:
    """log p of each row, nats in data units, float64 (N,).

    The flow's is the normalised density at level 1 taken at the row itself: that of the data blurred by r_1, a
    hundredth of a column's deviation.

    Args:
        model: In float64, with a transform.
        rows: Data units, float64 (N, d).
        likelihood: ``one-pass`` or ``flow``.
        y: Contexts of a conditional model, (N, q).

    Raises:
        UserError: Another likelihood.
    """
    check_likelihood(likelihood)
    device = model.schedule.alpha.device
    x, context = (None if part is None else torch.from_numpy(np.ascontiguousarray(part)) for part in (rows, y))
    parts = []
    for start in range(0, len(rows), BATCH):
        batch, label = (None if part is None else part[start : start + BATCH].to(device) for part in (x, context))
        parts.append((_one_pass if likelihood == "one-pass" else _flow)(model, batch, label).cpu())
    return torch.cat(parts).numpy()


@torch.no_grad()
def _one_pass(model: DensityModel, x: Tensor, y: Tensor | None) -> Tensor:
    return model.log_prob(x, y=y)


def _flow(model: DensityModel, x: Tensor, y: Tensor | None) -> Tensor:
    transform, alpha = model.transform, model.schedule.alpha[1]
    solver = FlowSolver(model, Scoring(level=1, steps=FLOW_STEPS))
    log_p = solver.log_prob(alpha * transform(x), y).log_prob.double()
    return log_p + transform.dim * float(alpha.log()) + transform.log_det(x)
