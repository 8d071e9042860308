"""How much of what a network adds to its fitted Gaussians held-out samples bear out."""

from __future__ import annotations

import torch
from torch import Tensor

from torchcdm.models.density import DensityModel
from torchcdm.training.evaluation import at_all_levels

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the network's correction that are tried, ..."""

DRAWS = 4
"""... on so many noisy copies of each held-out sample."""


@torch.no_grad()
def best_share(model: DensityModel, x: Tensor, y: Tensor) -> float:
    """The share of the network's correction under which held-out samples best tell their source and noise level.

    Unlike the source alone, which is certain where the ratio is large, that is never too easy to tell.

    Args:
        model: Trained with all sources equally frequent.
        x: Data units, (N, *shape).
        y: Sources, long (N,); zeros for a model of one.
    """
    losses = torch.zeros(len(SHARES), dtype=torch.float64)
    for batch in at_all_levels(model, x, DRAWS):
        base, network = base_and_correction(model, batch.x_t)
        true = y[batch.rows] * base.shape[2] + batch.t.cpu()
        for k, share in enumerate(SHARES):
            logits = (base + share * network).flatten(1).cpu()
            losses[k] += torch.nn.functional.cross_entropy(logits, true, reduction="sum")
    return SHARES[int(losses.argmin())]


def base_and_correction(model: DensityModel, z: Tensor) -> tuple[Tensor, Tensor]:
    """log p_t of the fitted Gaussians, and what the network adds to it.

    Args:
        model: Joint over sources, or of one.
        z: Model units, (B, *shape).

    Returns:
        Two of float64 (B, sources, T+2), nats.
    """
    base = model.base.log_prob_levels(z)[:, None]
    if not model.joint:
        return base, model.log_prob_levels(z)[:, None] - base
    effects, learned = model.base.class_effects(z), model.class_log_prob_levels(z)
    base = base.expand_as(learned) if effects is None else base + effects
    return base, learned - base
