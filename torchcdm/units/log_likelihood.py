"""What a log-likelihood is measured in, and that of a normal distribution."""

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LogLikelihood:
    """Log-likelihoods that carry their unit.

    Attributes:
        nats: log-likelihood of each sample, in data units (densities) or absolute (code lengths), shape (B,).
        dim: Dimensions d of one sample.
        level: Noise level at which the density was taken.
        log_bin: log of the grey-level spacing in data units; None for continuous data.
        nfe: Network evaluations for each sample.
    """

    nats: Tensor
    dim: int
    level: int
    log_bin: float | None
    nfe: int

    @property
    def unit(self) -> str:
        """``bits/dim`` for data on a grid, ``nats`` for continuous data, whose bits would depend on their unit."""
        return "nats" if self.log_bin is None else "bits/dim"

    def values(self) -> Tensor:
        """In :attr:`unit`, each sample's, float64 (B,): -log p, or -(log p + d log bin) / (d log 2), a code length."""
        if self.log_bin is None:
            return -self.nats.double()
        return -(self.nats.double() + self.dim * self.log_bin) / (self.dim * math.log(2))

    def mean_and_error(self) -> tuple[float, float]:
        """Mean of :meth:`values` and its standard error over samples (nan for one sample)."""
        values = self.values()
        return float(values.mean()), standard_error(values)


def standard_error(values: Tensor) -> float:
    """Standard error of the mean of ``values`` (N,); nan for one value."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def log_normal(z: Tensor, variance: Tensor | None = None) -> Tensor:
    """log N(z; 0, variance) of each number, nats; both broadcast, and the variance is 1 when None."""
    if variance is None:
        return -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
    return -0.5 * (z.square() / variance + (2 * math.pi * variance).log())
