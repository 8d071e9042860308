r"""Columns made more nearly normal, one by one: heavy tails and skew are what Gaussians and networks bear worst.

A density ratio is the same after any invertible map of both data sets, so a map of the columns costs it nothing.

.. math:: z = \sinh(\delta\,\operatorname{arsinh}((x - \xi) / \eta) - \epsilon)

is standard normal under the sinh-arcsinh distribution (Jones and Pewsey, Biometrika 2009): :math:`\epsilon` for skew,
:math:`\delta` below 1 for heavy tails. Before it, x becomes its logarithm where that is more nearly normal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

ROWS = 2000
"""Rows that the curves are fitted to."""

ITERATIONS = 100

BELOW = 1e-3
"""Share of the least training value: a new value below that is taken for it, so that zero has a logarithm too."""

TINY = 1e-9
"""Least deviation of a source, in deviations of the column."""

LEAST_GAIN = 0.02
"""Nats a row that bending a column must add to the likelihood of a normal for each source; else it keeps its shape."""


@dataclass(frozen=True)
class ColumnWarp:
    """The map of all columns, each (d,), float64.

    Attributes:
        least: Values below it count as it, in a column that becomes its logarithm; zero in others.
        location: See above; of other columns, what is subtracted.
        scale: See above; of other columns, what they are divided by.
        skew: epsilon.
        tail: delta.
        bent: Whether the column takes part in that; it is shifted and scaled alone otherwise.
    """

    least: np.ndarray
    location: np.ndarray
    scale: np.ndarray
    skew: np.ndarray
    tail: np.ndarray
    bent: np.ndarray

    @classmethod
    def fit(cls, x: np.ndarray, sources: np.ndarray) -> ColumnWarp:
        """By maximum likelihood, for each column by itself.

        The curve is that of all rows together, but it is used only where each source is more nearly normal for it: two
        normals side by side look skewed together, and bending them would be the end of their simple ratio.

        Args:
            x: (N, d), float64.
            sources: The source of each row, (N,).
        """
        rows = np.linspace(0, len(x) - 1, min(ROWS, len(x))).round().astype(int)
        least, scaled = x.min(0), x[rows] / _deviation(x)
        positive = np.where(least > 0, scaled, 1.0)
        gain = _log_spread(scaled, sources[rows]) - _log_spread(np.log(positive), sources[rows])
        least = np.where((least > 0) & (gain - np.log(positive).mean(0) > LEAST_GAIN), BELOW * least, 0.0)
        x = _logarithm(x, least)
        mean, deviation = x.mean(0), _deviation(x)
        y = (x[rows] - mean) / deviation
        location, scale, skew, tail = _maximum_likelihood(y)
        u = (y - location) / scale
        z = _bend(u, skew, tail)
        log_slope = np.log(tail / scale) + 0.5 * (np.log1p(np.square(z)) - np.log1p(np.square(u)))
        gain = _log_spread(y, sources[rows]) - _log_spread(z, sources[rows]) + log_slope.mean(0)
        bent = gain > LEAST_GAIN
        kept = (np.where(bent, value, other) for value, other in ((location, 0), (scale, 1), (skew, 0), (tail, 1)))
        location, scale, skew, tail = kept
        return cls(least, mean + deviation * location, deviation * scale, skew, tail, bent)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """(N, d) to (N, d), float64."""
        y = (_logarithm(x, self.least) - self.location) / self.scale
        # sinh(arcsinh(y)) is y, but not to the last bit, and far out not even nearly.
        return np.where(self.bent, _bend(y, self.skew, self.tail), y)

    def to_config(self) -> dict[str, Any]:
        """Plain Python values, exact."""
        return {name: value.tolist() for name, value in vars(self).items()}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ColumnWarp:
        """The inverse of :meth:`to_config`."""
        return cls(**{name: np.asarray(value) for name, value in config.items()})


def _bend(u: np.ndarray, skew: np.ndarray, tail: np.ndarray) -> np.ndarray:
    return np.sinh(tail * np.arcsinh(u) - skew)


def _deviation(x: np.ndarray) -> np.ndarray:
    """(d,); 1 for constant columns."""
    deviation = x.std(0)
    return np.where(deviation > 0, deviation, 1.0)


def _logarithm(x: np.ndarray, least: np.ndarray) -> np.ndarray:
    return np.where(least > 0, np.log(np.maximum(x, np.where(least > 0, least, 1.0))), x)


def _log_spread(x: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Mean over the rows of the log deviation of their source, (d,): by so much normals are less likely."""
    parts = [x[sources == source] for source in np.unique(sources)]
    # A source that is constant in a column is neither more nor less normal for its curve.
    return sum(len(part) / len(x) * np.log(np.maximum(part.std(0), TINY)) for part in parts)


def _maximum_likelihood(y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Location, scale, skew and tail of each column of ``y`` (N, d), each (d,)."""
    values = torch.from_numpy(y)
    low, middle, high = (values.quantile(q, dim=0) for q in (0.25, 0.5, 0.75))
    location, log_scale = middle.clone(), ((high - low) / 1.35).clamp_min(1e-3).log()
    skew, log_tail = torch.zeros_like(location), torch.zeros_like(location)
    parameters = [p.requires_grad_() for p in (location, log_scale, skew, log_tail)]
    optimizer = torch.optim.Adam(parameters, 0.1)
    with torch.enable_grad():
        for _ in range(ITERATIONS):
            optimizer.zero_grad()
            (-_log_density(values, *parameters).mean(0).sum()).backward()
            optimizer.step()
            # Light tails, those of a uniform or of two modes, are not stretched: only heavy ones do harm.
            with torch.no_grad():
                log_tail.clamp_max_(0.0)
    location, log_scale, skew, log_tail = (p.detach() for p in parameters)
    return location.numpy(), log_scale.exp().numpy(), skew.numpy(), log_tail.exp().numpy()


def _log_density(
    y: torch.Tensor, location: torch.Tensor, log_scale: torch.Tensor, skew: torch.Tensor, log_tail: torch.Tensor
) -> torch.Tensor:
    """log density of the sinh-arcsinh distribution up to the constant of the normal, (N, d)."""
    u = (y - location) / log_scale.exp()
    bent = log_tail.exp() * u.asinh() - skew
    # log cosh without overflow.
    log_cosh = bent.abs() + torch.log1p((-2 * bent.abs()).exp())
    log_slope = log_tail + log_cosh - np.log(2.0) - 0.5 * torch.log1p(u.square()) - log_scale
    return -0.5 * bent.sinh().square() + log_slope
