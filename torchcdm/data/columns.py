"""The columns of vectors: those of few values, whose density has no upper bound without noise, and all others."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from torchcdm.errors import UserError, nearest
from torchcdm.units import ColumnTransform, DataTransform, cell_width

DISCRETE = ("dequantize", "error")
"""What to do with a column of few distinct values."""

FEW_VALUES = 20
"""A column of at most so many values is discrete, where each comes twice on average."""

REPEATS = 5
SMALLEST_STEP = 0.01
"""A column of more values is, where each comes REPEATS times on average and they are at least SMALLEST_STEP deviations
apart: a finer lattice is blurred by the first noise level anyway."""

NEAREST = 1e-6
"""Deviations between two values of a discrete column, at least."""

LARGE_SHARE = 0.1
"""Share of the rows in which one value of a continuous column comes back, above which its density is said to have no
upper bound."""

FLOAT32_STEPS = 1000
"""Least number of float32 steps in a standard deviation before a note asks to subtract an offset."""

ROUNDING = 0.01
"""Deviation of what rounding to float32 takes from a column, beside the column's own, above which it is refused."""


def measure_columns(
    x: Tensor, names: Sequence[str], dequantize: bool, data: str
) -> tuple[DataTransform, list[str]]:
    """The transform of the training rows of vectors, and what is to be said of their columns.

    Args:
        x: Rows (N, d), data units.
        names: Of the columns.
        dequantize: Whether discrete columns get noise over their cells; they are taken as continuous otherwise.
        data: Name of the data, for messages.

    Raises:
        UserError: A constant column, or a discrete one whose values nearly coincide.
    """
    rows, notes, discrete = x.double().numpy(), [], {}
    for k, name in enumerate(names):
        column = rows[:, k]
        if (column == column[0]).all():
            raise UserError(f"{data}: column '{name}' is constant; leave it out")
        notes += resolution_notes(column, name)
        values = discrete_values(column, name)
        if values is None:
            notes += frequency_notes(column, name)
        elif dequantize:
            discrete[k] = values
            what = f"has {len(values)} distinct values: dequantised with cells of {cell_width(values):g}"
            notes.append(f"column '{name}' {what}; its density times the cell is a probability.")
        else:
            notes.append(f"column '{name}' has {len(values)} distinct values: its density has no upper bound.")
    if not discrete:
        return DataTransform.standardize(x), notes
    return ColumnTransform.fit(x, discrete, bend=False), notes


def check_discrete(discrete: str) -> None:
    """Refuses what is none of :data:`DISCRETE`."""
    if discrete not in DISCRETE:
        raise UserError(f"discrete is '{discrete}'; {nearest(str(discrete), DISCRETE)}")


def discrete_values(x: np.ndarray, name: str) -> tuple[float, ...] | None:
    """The distinct values of a column, rising, where they are those of a discrete one.

    Args:
        x: The column, float64 (N,).
        name: Its name, for the message.

    Returns:
        At least two values; None for continuous and for constant columns.

    Raises:
        UserError: Two of them nearly coincide.
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


def check_resolution(x: np.ndarray, names: Sequence[str], data: str) -> None:
    """Refuses training rows (N, d), float64, with a column whose values, or whose differences, float32 does not hold.

    Raises:
        UserError: Names the first such column.
    """
    for column, name in zip(x.T, names, strict=True):
        lost = single(column, f"{data}: column '{name}'").numpy() - column
        if lost.std() > ROUNDING * column.std():
            raise UserError(f"{data}: column '{name}' varies less than float32 resolves; subtract an offset")


def single(x: np.ndarray, name: str) -> Tensor:
    """Finite numbers as float32.

    Raises:
        UserError: A value beyond float32.
    """
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(x, np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{name}: holds values beyond float32 (3e38); divide them by a constant")
    return torch.from_numpy(values)


def frequent_value(x: np.ndarray) -> tuple[float, float] | None:
    """The most frequent value of a column (N,) and its share of the rows, where that is large."""
    values, counts = np.unique(x, return_counts=True)
    share = counts.max() / len(x)
    return (float(values[counts.argmax()]), share) if share >= LARGE_SHARE and counts.max() >= REPEATS else None


def constants_note(names: Iterable[str]) -> str:
    """That the columns of these names are left out."""
    return f"columns left out because they are constant in training: {', '.join(names)}."


def frequency_notes(x: np.ndarray, name: str) -> list[str]:
    """A warning where one value of a continuous column (N,) comes back again and again."""
    frequent = frequent_value(x)
    if frequent is None:
        return []
    what = f"holds {frequent[0]:g} in {100 * frequent[1]:.0f} % of the rows"
    return [f"column '{name}' {what}: its density has no upper bound there; better leave it out."]


def resolution_notes(x: np.ndarray, name: str) -> list[str]:
    """A warning where float32 hardly resolves the variation of a column (N,)."""
    if x.std() >= FLOAT32_STEPS * np.finfo(np.float32).eps * np.abs(x).max():
        return []
    return [f"column '{name}' varies little beside its size, beyond float32: subtract an offset."]
