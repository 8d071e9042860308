"""Tables as estimators are given them: data frames, arrays, and the noise over the cells of their values."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.utils import check_array
from torch import Tensor

from torchcdm.data.arrays import as_array
from torchcdm.errors import UserError
from torchcdm.random import stream
from torchcdm.units import TableEncoding
from torchcdm.units.lattice import spread
from torchcdm.units.table import as_frame

if TYPE_CHECKING:
    from pandas import DataFrame

COPIES, COPIED_ROWS = 20, 200_000
"""A table with cells is trained on so many noisy copies, or so many rows in all, whichever is less."""

DRAWS = 8
"""Draws of the dequantisation noise that a score is averaged over."""


def noisy_copies(table: TableEncoding, codes: Tensor, seed: int) -> Tensor:
    """What to train on: several dequantised copies of codes (N, kept), one after the other, where some have a cell."""
    copies = max(1, min(COPIES, COPIED_ROWS // len(codes))) if table.cells else 1
    repeated, generator = codes.repeat(copies, 1), stream(seed, "dequantise")
    return spread(repeated, torch.rand(repeated.shape, generator=generator, dtype=torch.float64), table.cells)


def noise_draws(table: TableEncoding, seed: int) -> Tensor:
    """Noise of scores, (DRAWS, kept), evenly spread: the same for every row, so that a row's score is its own."""
    if not table.cells:
        return torch.full((1, 1), 0.5, dtype=torch.float64)
    from scipy.stats import qmc

    return torch.from_numpy(qmc.Sobol(len(table.kept), seed=seed).random(DRAWS))


def data_frame(
    table: Any,
    name: str,
    smallest: int = 1,
    like: TableEncoding | None = None,
    check: Callable[..., np.ndarray] = check_array,
) -> DataFrame:
    """A data frame as it comes, and anything else that scikit-learn takes as a table of finite numbers.

    Args:
        table: Data frame, array, list or tensor.
        name: Of the table, for messages.
        smallest: Rows, at least.
        like: Columns of the fit. They go by name; by their place where the fit or the table has no names.
        check: ``check_array``, or ``validate_data`` of an estimator.

    Raises:
        UserError: Fewer rows, or another number of columns without names.
        ValueError: Cells of an array that are no finite numbers, another shape.
        TypeError: A sparse matrix.
    """
    import pandas as pd

    named = hasattr(table, "iloc")
    if not named:
        if isinstance(table, Tensor) or np.ma.is_masked(table):
            table = as_array(table, "the table")  # the check would drop the mask of an array
        try:
            table = pd.DataFrame(check(table, dtype=np.float64, ensure_min_samples=smallest))
        except OverflowError:
            raise UserError("the table has numbers beyond float64 (1.8e308)") from None
    frame = as_frame(table)
    if len(frame) < smallest:
        raise UserError(f"{name}: {len(frame)} sample(s); a minimum of {smallest} is required")
    names = None if like is None else [column.name for column in like.columns]
    if names is None or (named and names != [str(k) for k in range(len(names))]):
        return frame
    if len(frame.columns) != len(names):
        raise UserError(f"{name} has {len(frame.columns)} columns; the fit had {len(names)}")
    return frame.set_axis(names, axis=1)
