"""Values on a lattice, each with a cell of its own: dequantisation spreads them over it, rounding takes them back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

Numbers = TypeVar("Numbers", Tensor, np.ndarray)


def cell_width(values: Sequence[float] | Tensor) -> float:
    """Width of the cells of the rising ``values``: the smallest distance between two of them, so that none overlap."""
    return float(torch.as_tensor(values, dtype=torch.float64).diff().min())


def spread(x: Numbers, width: float | Numbers, position: Numbers) -> Numbers:
    """Each value at the ``position`` on [0, 1] of the cell of that ``width`` around it; all shapes broadcast."""
    return x + width * (position - 0.5)


def nearest_value(x: Tensor, values: Tensor) -> Tensor:
    """Each number of ``x`` rounded to the nearest of the rising ``values`` (n,), in their precision."""
    borders = (values[1:] + values[:-1]) / 2
    return values[torch.searchsorted(borders, x.to(values.dtype).contiguous())]
