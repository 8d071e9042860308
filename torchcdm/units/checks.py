"""Checks of what transforms are made of: arguments from Python and values from a saved run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchcdm.errors import UserError

MOST_NUMBERS = 2**28
"""Numbers of a sample, or of the histograms of all its dimensions: 2 GiB of float64."""

T = TypeVar("T")


def construct(kind: Callable[..., T], config: Any, what: str) -> T:
    """Makes a ``kind`` from its keyword arguments, as they were saved; UserError where one is missing or unknown."""
    try:
        return kind(**config)
    except TypeError as error:
        raise UserError(f"{what}: {error}") from None


def numbers(value: Any, what: str, count: int | None = None) -> Tensor:
    """Finite numbers as float64, of any shape or of the shape (count,)."""
    try:
        found = torch.as_tensor(value, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise UserError(f"data transform: {what} is {value!r:.60}; numbers are needed") from None
    if not bool(found.isfinite().all()):
        raise UserError(f"data transform: {what} is not finite")
    if count is not None and found.shape != (count,):
        raise UserError(f"data transform: {what} has the shape {tuple(found.shape)}; one number a column, {count}")
    return found


def rising(value: Any, what: str) -> Tensor:
    """Two or more finite numbers (n,), each above the one before, as float64."""
    values = numbers(value, what)
    if values.ndim != 1 or len(values) < 2 or not bool((values.diff() > 0).all()):
        raise UserError(f"data transform: {what} must be two or more rising numbers")
    return values
