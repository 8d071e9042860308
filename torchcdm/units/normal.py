"""The log density of a normal distribution, for every place that needs it."""

from __future__ import annotations

import math

from torch import Tensor


def log_normal(z: Tensor, variance: Tensor | None = None) -> Tensor:
    """log N(z; 0, variance) of each number, nats; both broadcast, and the variance is 1 when None."""
    if variance is None:
        return -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
    return -0.5 * (z.square() / variance + (2 * math.pi * variance).log())
