r"""Columns made more nearly normal, one by one: heavy tails and skew are what Gaussians and networks bear worst.

.. math:: z = \sinh(\delta\,\operatorname{arsinh}((x - \xi) / \eta) - \epsilon)

is standard normal under the sinh-arcsinh distribution (Jones and Pewsey, Biometrika 2009): :math:`\epsilon` for skew,
:math:`\delta` below 1 for heavy tails. Before it, x becomes its logarithm where that is more nearly normal.
"""

import math
from collections.abc import Collection

import numpy as np
import torch
from torch import Tensor

from torchcdm.random import evenly_spaced

ROWS = 2000  # rows that the curves are fitted to
ITERATIONS = 100  # of Adam, which fits them
BELOW = 1e-3  # share of the least training value: below it the logarithm goes on as a line, so that zero has one too
TINY = 1e-9  # least deviation of a source, in deviations of the column
# Nats a row that bending a column must add to the likelihood of a normal for each source; else it keeps its shape.
LEAST_GAIN = 0.02


def fit_warp(x: Tensor, sources: Tensor | None = None, straight: Collection[int] = ()) -> dict[str, Tensor]:
    """The curves of columns by maximum likelihood, each by itself: ``warp`` of :class:`ColumnTransform`.

    The curve is that of all rows (N, d), float64, but it is used only where each of the ``sources`` (N,) is more
    nearly normal for it: two normals side by side look skewed together, and bending them would be the end of their
    simple ratio. Columns that are ``straight`` are only shifted and scaled.
    """
    allowed = torch.ones(x.shape[1], dtype=torch.bool)
    allowed[list(straight)] = False
    sources = torch.zeros(len(x)) if sources is None else sources
    rows = evenly_spaced(len(x), ROWS)
    least, scaled, of_rows = x.amin(0), x[rows] / _deviation(x), sources[rows]
    positive = torch.where(least > 0, scaled, 1.0)
    gain = log_spread(scaled, of_rows) - log_spread(positive.log(), of_rows) - positive.log().mean(0)
    least = torch.where((least > 0) & (gain > LEAST_GAIN) & allowed, BELOW * least, 0.0)
    x = logarithm(x, least)
    mean, deviation = x.mean(0), _deviation(x)
    y = (x[rows] - mean) / deviation
    location, scale, skew, tail = _maximum_likelihood(y)
    bent = bend((y - location) / scale, skew, tail)
    slopes = bend_log_slope((y - location) / scale, skew, tail) - scale.log()
    gain = log_spread(y, of_rows) - log_spread(bent, of_rows) + slopes.mean(0)
    used = (gain > LEAST_GAIN) & allowed
    pairs = ((location, 0), (scale, 1), (skew, 0), (tail, 1))
    location, scale, skew, tail = (torch.where(used, value, straight) for value, straight in pairs)
    found = {"least": least, "location": mean + deviation * location, "scale": deviation * scale}
    return found | {"skew": skew, "tail": tail, "bent": used}


def bend(u: Tensor, skew: Tensor, tail: Tensor) -> Tensor:
    """z of u, (N, d)."""
    return (tail * u.asinh() - skew).sinh()


def bend_log_slope(u: Tensor, skew: Tensor, tail: Tensor) -> Tensor:
    """log of the derivative of :func:`bend`."""
    bent = (tail * u.asinh() - skew).abs()
    log_cosh = bent + torch.log1p((-2 * bent).exp()) - math.log(2)  # without overflow
    return tail.log() + log_cosh - 0.5 * torch.log1p(u.square())


def floor_of(least: Tensor) -> Tensor:
    """Where the logarithm ends; 1, as good as any, in columns without one."""
    return torch.where(least > 0, least, 1.0)


def logarithm(x: Tensor, least: Tensor) -> Tensor:
    """log x where ``least`` is positive, below it the tangent; x elsewhere."""
    floor = floor_of(least)
    return torch.where(least > 0, torch.maximum(x, floor).log() + (x - floor).clamp_max(0) / floor, x)


def _deviation(x: Tensor) -> Tensor:
    """(d,); 1 for constant columns."""
    deviation = x.std(0, correction=0)
    return torch.where(deviation > 0, deviation, 1.0)


def log_spread(x: Tensor, sources: Tensor) -> Tensor:
    """Mean over the rows of the log deviation of their source, (d,): by so much normals are less likely."""
    parts = [x[sources == source] for source in sources.unique()]
    # A source that is constant in a column is neither more nor less normal for its curve.
    spreads = [0.5 * len(part) / len(x) * part.var(0, correction=0).clamp_min(TINY**2).log() for part in parts]
    return torch.stack(spreads).sum(0)


def _maximum_likelihood(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Location, scale, skew and tail of each column of ``y`` (N, d), each (d,)."""
    # By numpy: torch 2.8 refuses more than 16 million numbers.
    low, middle, high = torch.from_numpy(np.quantile(y.numpy(), (0.25, 0.5, 0.75), axis=0))
    location, log_scale = middle.clone(), ((high - low) / 1.35).clamp_min(1e-3).log()
    skew, log_tail = torch.zeros_like(location), torch.zeros_like(location)
    parameters = [p.requires_grad_() for p in (location, log_scale, skew, log_tail)]
    optimizer = torch.optim.Adam(parameters, 0.1)
    with torch.enable_grad():
        for _ in range(ITERATIONS):
            optimizer.zero_grad()
            scale, tail = log_scale.exp(), log_tail.exp()
            u = (y - location) / scale
            log_density = -0.5 * bend(u, skew, tail).square() + bend_log_slope(u, skew, tail) - log_scale
            (-log_density.mean(0).sum()).backward()
            optimizer.step()
            # Light tails, those of a uniform or of two modes, are not stretched: only heavy ones do harm.
            with torch.no_grad():
                log_tail.clamp_max_(0.0)
    location, log_scale, skew, log_tail = (p.detach() for p in parameters)
    return location, log_scale.exp(), skew, log_tail.exp()
