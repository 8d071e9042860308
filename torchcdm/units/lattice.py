"""Values on a lattice, each with a cell of its own: dequantisation spreads them over it, rounding takes them back."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchcdm.errors import UserError

Discrete = Literal["dequantize", "error"]  # what to do with a column of few distinct values

NONE: Mapping[Any, Any] = MappingProxyType({})

FEW_VALUES = 20  # a column of at most so many values is discrete, where each comes twice on average
# A column of more values is, where each comes REPEATS times on average and they are at least SMALLEST_STEP deviations
# apart: a finer lattice is blurred by the first noise level anyway.
REPEATS = 5
SMALLEST_STEP = 0.01
NEAREST = 1e-6  # deviations between two values of a discrete column, at least
# Share of the rows in which one value of a continuous column comes back, above which it has a probability.
LARGE_SHARE = 0.1


class Cells(NamedTuple):
    """What has a probability in a column."""

    values: tuple[float, ...]  # rising
    width: float  # of the cell of each
    mixed: bool = False  # whether there are other numbers too, which have a density


def discrete_values(x: np.ndarray, name: str) -> tuple[float, ...] | None:
    """The distinct values, at least two, rising, of a discrete column ``x`` (N,), float64; None of any other.

    UserError, with the ``name`` of the column, where two of them nearly coincide.
    """
    values = np.unique(x)
    if len(values) == 1:
        return None
    step, deviation = float(np.diff(values).min()), float(x.std())
    if len(values) <= FEW_VALUES:
        if 2 * len(values) > len(x):
            return None
    elif REPEATS * len(values) > len(x) or step < SMALLEST_STEP * deviation:
        return None
    if step < NEAREST * deviation:
        what = f"has {len(values)} distinct values in {len(x)} rows, two of them only {step:g} apart"
        raise UserError(f"column '{name}' {what}; round the column")
    return tuple(values.tolist())


def frequent_values(x: np.ndarray) -> dict[float, float]:
    """The values of a continuous column (N,) that come back again and again, rising, with their shares of the rows."""
    values, counts = np.unique(x, return_counts=True)
    often = (counts >= LARGE_SHARE * len(x)) & (counts >= REPEATS)
    return dict(zip(values[often].tolist(), (counts[often] / len(x)).tolist(), strict=True))


def cell_width(values: Sequence[float] | Tensor) -> float:
    """Width of the cells of the rising ``values``: the smallest distance between two of them, so that none overlap."""
    return float(torch.as_tensor(values, dtype=torch.float64).diff().min())


def spread(x: Tensor, position: Tensor, cells: Mapping[int, Cells]) -> Tensor:
    """The numbers of ``x`` (..., d) that have a cell at the ``position`` in it, on [0, 1]; the shapes broadcast."""
    x, position = torch.broadcast_tensors(x, position)
    noisy = x.clone()
    for k, (values, width, mixed) in cells.items():
        noisy[..., k] += width * (position[..., k] - 0.5)
        if mixed:
            apart = (x[..., k, None] - torch.as_tensor(values).to(x)).abs().amin(-1)
            noisy[..., k] = torch.where(apart < 1e-3 * width, noisy[..., k], x[..., k])
    return noisy


def by_chance(x: Tensor, cells: Mapping[int, Cells]) -> Tensor:
    """Rows (N, ...) of nothing but values with a cell, (N,): they come back by chance, and are no copies if spread."""
    return (spread(x, torch.zeros(()), cells) != x).flatten(1).all(1)
