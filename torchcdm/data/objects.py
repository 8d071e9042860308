"""Python objects as data: tensors, arrays, data frames and torch data sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from torchcdm.data import arrays, tables
from torchcdm.data.images import from_pillow
from torchcdm.data.options import DataOptions, with_fields
from torchcdm.data.source import MEMORY_LIMIT, DataSource, LazySplit
from torchcdm.errors import UserError


def from_object(data: Any, labels: Any = None, options: DataOptions | None = None, **fields: Any) -> DataSource:
    """A data source from a Python object, split at random.

    Integers are grey levels; floats are continuous.

    Args:
        data: Tensor (N, d) or (N, C, H, W); numpy array, where channels may come last; a pandas DataFrame or Series; a
            torch Dataset of samples or (sample, label) pairs, samples being tensors, arrays or Pillow images; a pair
            (samples, labels); or a DataSource, which is given back.
        labels: Classes 0 ... K - 1, (N,), or texts; for a data frame also the name of a column. None for a DataSource.
        options: How the data are split (``validation_fraction``, ``test_fraction``, ``seed``), and ``dequantize``.
        **fields: Fields of :class:`torchcdm.data.DataOptions`; they replace those of ``options``.

    Raises:
        UserError: Data that are not understood, with the reason.

    Example:
        >>> from_object(torch.randn(100, 3)).shape
        (3,)
    """
    if isinstance(data, DataSource):
        if labels is not None:
            raise UserError("labels have no effect on a DataSource, which has its own; make it with them")
        return data
    if isinstance(data, tuple) and len(data) == 2 and labels is None:
        data, labels = data
    column = labels if isinstance(labels, str) else None
    options = with_fields(options or DataOptions(), label=column, **fields)
    y = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels
    if isinstance(data, Tensor):
        data = data.float() if data.dtype == torch.bfloat16 else data  # a type that numpy has not
        return _from_array(data.detach().cpu().numpy(), y, "tensor", options, first=True)
    if isinstance(data, (np.ndarray, list)):
        return _from_array(arrays.as_array(data, "array"), y, "array", options)
    if tables.is_frame(data):
        table = tables.from_frame(data)
        return tables.source_from_tables({"train": table}, table.name, options, None if column else y)
    known = isinstance(data, Dataset) or (hasattr(data, "__getitem__") and hasattr(data, "__len__"))
    if not known or isinstance(data, (str, bytes, Mapping)) or hasattr(data, "tocsr"):
        kind = type(data).__name__
        raise UserError(f"data of type {kind} are not understood; give a tensor, an array, a data frame or a Dataset")
    return _from_dataset(data, y, options)


def _from_array(
    x: np.ndarray, y: np.ndarray | None, name: str, options: DataOptions, first: bool = False
) -> DataSource:
    pool, grid, class_names, notes = arrays.pool_from(x, y, name, options, first)
    return arrays.source_from_pool(name, pool, grid, options, class_names, notes=notes)


@dataclass(frozen=True)
class DatasetReader:
    """One sample of a torch Dataset as a tensor of event shape, without its label."""

    dataset: Any

    def __call__(self, index: int) -> Tensor:
        return self.sample(index)[0]

    def sample(self, index: int) -> tuple[Tensor, Any]:
        """The sample as uint8 or float32, (C, H, W) or (d,), and its label or None."""
        item = self.dataset[index]
        value, label = (item[0], item[1]) if isinstance(item, (tuple, list)) and len(item) >= 2 else (item, None)
        if isinstance(value, (tuple, list)) and len(value) == 1:
            value = value[0]
        if not isinstance(value, (Tensor, np.ndarray)):
            if not hasattr(value, "getbands"):
                raise UserError(f"sample {index} of the Dataset is a {type(value).__name__}; give tensors or images")
            value = from_pillow(value)
        if isinstance(value, np.ndarray):
            last = value.ndim == 3 and not arrays.channels_first(value.shape)
            value = torch.from_numpy(np.moveaxis(value, 2, 0) if last else value)
        return value[None] if value.ndim == 2 else value, label


def _from_dataset(dataset: Any, y: Any, options: DataOptions) -> DataSource:
    """One pass over the Dataset: it stays in memory where it is small; else only the labels do."""
    if len(dataset) == 0:
        raise UserError("the Dataset is empty")
    reader = DatasetReader(dataset)
    first, _ = reader.sample(0)
    small = len(dataset) * first.nelement() * first.element_size() <= MEMORY_LIMIT
    samples, labels = [], []
    for index in range(len(dataset)):
        sample, label = reader.sample(index)
        if sample.shape != first.shape:
            shapes = f"{tuple(sample.shape)}; sample 0 has {tuple(first.shape)}"
            raise UserError(f"sample {index} of the Dataset has shape {shapes}; all must agree")
        labels.append(label)
        if small:
            samples.append(sample)
    y = np.asarray(labels) if y is None and labels[0] is not None else y
    if small:
        return _from_array(torch.stack(samples).numpy(), y, "Dataset", options, first=True)
    if first.dtype not in (torch.uint8, torch.float32):
        raise UserError(f"the Dataset gives {first.dtype}; a large one must give uint8 or float32")
    numbers, class_names = arrays.read_labels(y, len(dataset), "Dataset")
    numbers = torch.full((len(dataset),), -1) if numbers is None else numbers
    grid = (0, 255) if first.dtype == torch.uint8 else None
    pool = LazySplit(reader, range(len(dataset)), numbers)
    notes = [f"{len(dataset)} samples of shape {tuple(first.shape)}, read when they are asked for."]
    return arrays.source_from_pool("Dataset", pool, grid, options, class_names, notes=notes)
