"""How much of what a network adds to the ratio of the fitted Gaussians held-out samples bear out.

The ratio starts as that of two Gaussians, and no choice here may make it worse than that start. So no choice goes by
the sources alone: a classifier that tells them apart with certainty learns nothing from a log ratio of 5 or of 10.
"""

from __future__ import annotations

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import expit
from torch import Tensor

from torchcdm.apps.ratio.checks import SEPARATE, donsker_varadhan
from torchcdm.models.density import DensityModel
from torchcdm.training.evaluation import at_all_levels

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Shares of the network's correction that are tried, ..."""

DRAWS = 4
"""... on so many noisy copies of each held-out sample."""

ERRORS = 2.0
"""Standard errors by which a share of the correction has to gain."""

SCALES = tuple(k / 100 for k in range(5, 101))
"""Scales of a log ratio that :func:`tempering` tries."""


@torch.no_grad()
def best_share(model: DensityModel, x: Tensor, y: Tensor) -> float:
    """The share of the network's correction under which held-out samples best tell their source and noise level.

    Noise brings the sources together, level by level, so that this is never too easy to tell. Of a joint model the
    share is that of what differs between the sources: what the network has learned of both is in no ratio, and must
    not choose. The gain less ERRORS of its standard errors decides: more than none has to be worth it, and the same
    samples ended the training.

    Args:
        model: Trained with all sources equally frequent.
        x: Data units, (N, *shape).
        y: Sources, long (N,); zeros for a model of one.
    """
    losses = []
    for batch in at_all_levels(model, x, DRAWS):
        base, network = base_and_correction(model, batch.x_t)
        common = network.mean(1, keepdim=True) if model.joint else torch.zeros_like(network)
        true = y[batch.rows] * base.shape[2] + batch.t.cpu()
        logits = [(base + common + share * (network - common)).flatten(1).cpu() for share in SHARES]
        parts = [torch.nn.functional.cross_entropy(z, true, reduction="none") for z in logits]
        losses.append(torch.stack(parts, 1))
    values = torch.cat(losses).view(DRAWS, len(x), -1).mean(0)
    gains = values[:, :1] - values
    # Samples of the smaller source are repeated: their errors are one.
    group = x.flatten(1).unique(dim=0, return_inverse=True)[1].cpu()
    deviations = torch.zeros(int(group.max()) + 1, len(SHARES)).to(gains).index_add_(0, group, gains - gains.mean(0))
    surely = gains.mean(0) - ERRORS * deviations.square().sum(0).sqrt() / len(x)
    return SHARES[int(surely.argmax())]


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


def tempering(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, float]:
    """Scale and offset that held-out samples bear out for a log ratio: from few training samples it is too certain.

    They are those of a logistic regression of the source on the log ratio (Platt 1999), the scale at most 1; 1 and 0
    where that gains less than two parameters have to (Schwarz 1978), or where it loses divergence: the bounds of
    Donsker and Varadhan on KL(p, q) and KL(q, p) grow as a log ratio gets better, however far apart the sources are.

    Args:
        numerator: Log ratios of held-out samples of the numerator, (N,).
        denominator: Log ratios of held-out samples of the denominator, (M,).
    """
    if not (np.isfinite(numerator).all() and np.isfinite(denominator).all()):
        return 1.0, 0.0
    count = len(numerator) + len(denominator)

    def loss(scale: float, offset: float) -> float:
        up, down = scale * numerator + offset, scale * denominator + offset
        return 0.5 * float(np.logaddexp(0, -up).mean() + np.logaddexp(0, down).mean())

    def divergence(scale: float) -> float:
        up, down = scale * numerator, scale * denominator
        return donsker_varadhan(up, down) + donsker_varadhan(-down, -up)

    plain = loss(1.0, 0.0)
    candidates = [(scale, _offset(scale * numerator, scale * denominator)) for scale in SCALES]
    best = min(candidates, key=lambda pair: loss(*pair))
    gained = count * (plain - loss(*best)) > np.log(count) and divergence(best[0]) >= divergence(1.0)
    return best if gained and plain > SEPARATE else (1.0, 0.0)


def _offset(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """The b at which sigmoid(log ratio + b) is one half in the mean over both sources."""
    most = 1.0 + max(float(np.abs(numerator).max()), float(np.abs(denominator).max()))
    return float(brentq(lambda b: expit(numerator + b).mean() + expit(denominator + b).mean() - 1, -most, most))
