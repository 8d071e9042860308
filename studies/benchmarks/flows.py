"""How the benchmarks of tables train zuko's flows, with and without a context.

The loop of ``python -m studies compare`` takes images and tables of one data source, and its rate falls to the end of
the budget.
Here a flow stops by itself: on small tables that is long before the budget, which is an upper end.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from studies.compare.zuko_peers import RECIPE

VALIDATE_EVERY, PATIENCE = 50, 10
"""Steps between validations, validations without a new best."""

SCORED = 1000
"""Rows that are scored at once."""

Rows = Sequence[Tensor]
"""What the density is of, (N, d), and for a conditional flow the context, (N, c)."""


def train_flow(flow: nn.Module, train: Rows, validation: Rows, budget: float, seed: int) -> float:
    """The recipe of ``studies compare`` with early stopping; leaves the weights of the best validation likelihood.

    Args:
        flow: A ``zuko.lazy.Flow``, newly made.
        train: Standardised rows.
        validation: Likewise.
        budget: Processor seconds; the steps before the first validation are done in any case.
        seed: Of the batches.

    Returns:
        Mean log-likelihood of the validation rows, nats.
    """
    optimizer = RECIPE.optimizer(flow.parameters(), RECIPE.lr, weight_decay=RECIPE.weight_decay)
    draw = torch.Generator().manual_seed(seed)
    began, step, stale, best, kept = time.process_time(), 0, 0, -math.inf, flow.state_dict()
    while step < VALIDATE_EVERY or (stale < PATIENCE and time.process_time() - began < budget):
        batch = torch.randint(len(train[0]), (RECIPE.batch_size,), generator=draw)
        optimizer.zero_grad()
        (-_log_prob(flow, [part[batch] for part in train]).mean()).backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % VALIDATE_EVERY == 0:
            with torch.no_grad():
                value = float(_log_prob(flow, validation).mean())
            stale = 0 if value > best else stale + 1
            if value > best:
                best, kept = value, {key: item.clone() for key, item in flow.state_dict().items()}
    flow.load_state_dict(kept)
    return best


def score_rows(flow: nn.Module, rows: Rows) -> np.ndarray:
    """log-density of standardised rows, nats, float64 (N,)."""
    with torch.no_grad():
        parts = [_log_prob(flow, part) for part in zip(*(part.split(SCORED) for part in rows), strict=True)]
    return torch.cat(parts).double().numpy()


def _log_prob(flow: nn.Module, rows: Rows) -> Tensor:
    values, *context = rows
    return flow(*context).log_prob(values)
