r"""Constants of the levels, set on held-out data after a training.

A level classifier is calibrated as a whole where the mean of p(t | x) over noisy copies of all levels is the share of
the level,

.. math:: \frac{1}{T+2} \sum_s E_{x \sim p_s}[p(t \mid x)] = \frac{1}{T+2} \quad \text{for every } t,

as it is for the true densities. Constants added to the logits that minimise the cross-entropy make it so, and no
gradient in x, and so no sample, changes. The errors of all levels add up in log p_0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from torchcdm.annealing.ratios import best_constants
from torchcdm.errors import UserError
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.training.evaluation import at_all_levels

FEWEST_COPIES = 20
"""Noisy copies at each level, of all samples together."""


class Calibration(NamedTuple):
    """Cross-entropy of the level on held-out halves, before and with the constants of the other half, nats.

    ``change`` is what log p_0 has gained at every input, nats; 0 where the constants did not help.
    """

    before: float
    after: float
    change: float


@torch.no_grad()
def calibrate_levels(
    model: ClassificationDiffusion, x: Tensor, y: Tensor | None = None, copies: int = 20_000, seed: int = 0
) -> Calibration:
    """Sets ``model.level_constants`` to those that minimise the cross-entropy of the level on noisy copies of ``x``.

    Each half of the samples, (N, *shape) in data units, which the model was not trained on, is scored with the
    constants of the other half first: where that does not lower the cross-entropy, the samples are too few to tell,
    and the model stays as it is. The ``copies`` are spread over samples and levels; at least one of each sample, and
    :data:`FEWEST_COPIES` of each level.

    Raises:
        UserError: Log probabilities that are not finite.
    """
    draws = -(-max(copies, FEWEST_COPIES * (model.schedule.T + 2)) // len(x))
    parts = [
        (batch.by_parts(lambda one: model.conditional_and_marginal(one.x_t, one.y)[1]), batch.t.cpu(), batch.rows % 2)
        for batch in at_all_levels(model, x, draws, seed, y)
    ]
    log_p, t, half = (torch.cat(column) for column in zip(*parts, strict=True))
    if not bool(log_p.isfinite().all()):
        raise UserError("calibration: the model's log probabilities of the levels are not finite")
    before, after = float(cross_entropy(log_p, t)), 0.0
    for k in (0, 1):
        scored = half == k
        others = best_constants(log_p[~scored], t[~scored])
        after += float(scored.sum() * cross_entropy(log_p[scored] + others, t[scored])) / len(t)
    if not after < before:
        return Calibration(before, after, 0.0)
    constants = best_constants(log_p, t)
    model.level_constants += constants.to(model.level_constants)
    return Calibration(before, after, float(constants[0]))
