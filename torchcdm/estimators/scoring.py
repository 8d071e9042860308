"""log-densities of rows under a trained model: by one pass, or by the probability flow of the same network."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchcdm.errors import UserError, nearest
from torchcdm.likelihood import FlowSolver, Scoring
from torchcdm.models.density import DensityModel

LIKELIHOODS = ("one-pass", "flow")

FLOW_STEPS = 50
"""Steps of the probability flow, Heun: two evaluations each, of the network and of its divergence."""

FARTHEST = 1e100
"""Model units beyond which a row has a density of zero: its square overflows."""


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
    transform, alpha = model.transform, model.schedule.alpha[1]
    x, context = (None if part is None else torch.from_numpy(np.ascontiguousarray(part)) for part in (rows, y))
    scoring = Scoring(level=1, steps=FLOW_STEPS)
    solver = FlowSolver(model, scoring) if likelihood == "flow" else None

    def one(batch: slice) -> Tensor:
        z, label = x[batch].to(alpha.device), None if context is None else context[batch].to(alpha.device)
        if solver is None:
            log_p = model.log_prob(z, y=label)
        else:
            log_p = solver.log_prob(alpha * transform(z), label).log_prob.double()
            log_p = log_p + transform.dim * float(alpha.log()) + transform.log_det(z)
        far = transform(z).abs().amax(1) > FARTHEST
        return log_p.masked_fill(far & log_p.isnan(), -torch.inf).cpu()

    return scoring.by_batches(model, x, one).numpy()
