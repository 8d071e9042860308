"""Python objects as data: tensors, arrays, data frames and torch data sets."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from torchcdm.data import arrays
from torchcdm.data.source import DataSource, Options
from torchcdm.errors import UserError


def from_object(
    data: Any,
    labels: Any = None,
    validation_fraction: float | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    dequantize: bool = True,
) -> DataSource:
    """A data source from a Python object, split at random.

    Args:
        data: Tensor (N, d) or (N, C, H, W); numpy array, where channels may come last; a pandas DataFrame; a torch
            Dataset of samples or (sample, label) pairs; a pair (samples, labels); or a DataSource, given back.
        labels: Classes 0 ... K - 1, (N,), or texts; for a data frame also the name of the column.
        validation_fraction: Share of validation; 0.1 when None.
        test_fraction: Share of test; 0.1 when None.
        seed: Seed of the split.
        dequantize: Whether training and scoring add uniform noise to integer data.

    Raises:
        UserError: Data that are not understood, with the reason.

    Example:
        >>> from_object(torch.randn(100, 3)).shape
        (3,)
    """
    if isinstance(data, DataSource):
        return data
    if isinstance(data, tuple) and len(data) == 2 and labels is None:
        data, labels = data
    options = Options(
        validation_fraction=validation_fraction, test_fraction=test_fraction, seed=seed, dequantize=dequantize
    )
    y = labels.cpu().numpy() if isinstance(labels, Tensor) else labels
    if isinstance(data, Tensor):
        return _from_array(data.detach().cpu().numpy(), y, "tensor", options, channels_first=True)
    if isinstance(data, (np.ndarray, list)):
        return _from_array(np.asarray(data), y, "array", options)
    kind = type(data).__name__
    raise UserError(f"data of type {kind} are not understood; give a tensor, an array, a data frame or a Dataset")


def _from_array(
    x: np.ndarray, y: np.ndarray | None, name: str, options: Options, channels_first: bool = False
) -> DataSource:
    pool, grid, class_names, notes = arrays.pool_from(x, y, name, options, channels_first)
    return arrays.source_from_pool(name, pool, grid, options, class_names, notes=notes)
