"""How much of what a network adds to its fitted start held-out samples bear out."""

from __future__ import annotations

import torch
from torch import Tensor

from torchcdm.models.density import DensityModel
from torchcdm.training.evaluation import at_all_levels

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the network's correction that are tried, ..."""

DRAWS = 4
"""... on so many noisy copies of each held-out sample."""

ERRORS = 2.0
"""Standard errors by which a share of the correction has to gain."""


@torch.no_grad()
def best_share(model: DensityModel, x: Tensor) -> float:
    """The share under which held-out samples (N, *shape) best tell their noise level, by the gain less its error."""
    losses = []
    for batch in at_all_levels(model, x, DRAWS):
        base = model.base.log_prob_levels(batch.x_t)
        network, true = model.log_prob_levels(batch.x_t) - base, batch.t.cpu()
        logits = [(base + share * network).cpu() for share in SHARES]
        losses.append(torch.stack([torch.nn.functional.cross_entropy(z, true, reduction="none") for z in logits], 1))
    values = torch.cat(losses).view(DRAWS, len(x), -1).mean(0)
    gains = values[:, :1] - values
    return SHARES[int((gains.mean(0) - ERRORS * gains.std(0) / len(x) ** 0.5).argmax())]
