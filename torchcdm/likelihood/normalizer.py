"""Estimates of log Z, the logarithm of what exp(log p_t) integrates to (section 6 of ``docs/method.md``)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LogNormalizer:
    """An estimate of log Z.

    Attributes:
        value: nats.
        low: Lower end of a 95 % confidence interval, nats.
        high: Upper end.
        estimator: How it was obtained.
        ess: Effective sample size of the estimate of Z: 1 over its relative variance, at most the number of draws.
        level: The level whose density is integrated.
        dim: Dimensions of a sample.
    """

    value: float
    low: float
    high: float
    estimator: str
    ess: float
    level: int
    dim: int

    def to_json(self) -> dict[str, Any]:
        """In bits per dimension, under the keys of the NLL contract."""
        bits = {key: getattr(self, key) / (self.dim * math.log(2)) for key in ("value", "low", "high")}
        return bits | {"estimator": self.estimator, "ess": self.ess}
