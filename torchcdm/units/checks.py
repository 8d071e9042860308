"""Checks of what transforms are made of: arguments from Python and values from a saved run."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from torchcdm.errors import UserError

MOST_NUMBERS = 2**28
"""Numbers of a sample, or of the histograms of all its dimensions: 2 GiB of float64."""

T = TypeVar("T")


def construct(kind: Callable[..., T], config: Any, what: str) -> T:
    """Makes a ``kind`` from its keyword arguments, as they were saved.

    Raises:
        UserError: The config is no mapping, an argument is missing, unknown or wrong.
    """
    if not isinstance(config, Mapping):
        raise UserError(f"{what} is {config!r:.60}; named values are needed")
    try:
        inspect.signature(kind).bind(**config)
    except TypeError as error:
        raise UserError(f"{what}: {error}") from None
    return kind(**config)


def event_shape(shape: Iterable[Any]) -> tuple[int, ...]:
    """The sizes of a sample's dimensions."""
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        sizes = ()
    if not sizes or min(sizes) < 1 or math.prod(sizes) > MOST_NUMBERS:
        raise UserError(f"data transform: shape is {shape!r:.60}; whole numbers of at least 1 are needed")
    return sizes


def real(value: Any, what: str) -> float:
    """A finite number."""
    if isinstance(value, bool | str | Tensor) or (found := numbers(value, what)).ndim:
        raise UserError(f"data transform: {what} is {value!r:.60}; a number is needed")
    return found.item()


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


def flag(value: Any, what: str) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise UserError(f"data transform: {what} is {value!r:.60}; true or false is needed")
    return value


def rising(values: Tensor, what: str) -> Tensor:
    """Two or more finite numbers (n,), each above the one before."""
    if values.ndim != 1 or len(values) < 2 or not bool(values.isfinite().all() and (values.diff() > 0).all()):
        raise UserError(f"data transform: {what} must be two or more rising numbers")
    return values
