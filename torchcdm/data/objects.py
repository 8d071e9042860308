"""Python objects as data: tensors, arrays, data frames and torch data sets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from torchcdm.data import arrays, tables
from torchcdm.data.assembly import Samples, assemble
from torchcdm.data.images import from_pillow
from torchcdm.data.options import DataOptions, Layout
from torchcdm.data.source import DataSource, LazySplit
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
    options = replace(options or DataOptions(), **fields)
    return assemble(samples_of(data, labels, options), options)


def samples_of(
    data: Any, labels: Any, options: DataOptions, name: str | None = None, layout: Layout | None = None
) -> Samples:
    """All samples of an object that is no DataSource; ``data`` and ``labels`` as for :func:`from_object`.

    ``name`` is for messages; ``layout`` is that of the model that scores the data.
    """
    if isinstance(data, tuple) and len(data) == 2 and labels is None:
        data, labels = data
    if isinstance(data, (Tensor, np.ndarray, list)):
        first = isinstance(data, Tensor)
        name = name or ("tensor" if first else "array")
        return arrays.samples_of(arrays.as_array(data, name), labels, name, options, first=first, layout=layout)
    if tables.is_frame(data):
        table, column = tables.from_frame(data, name or "data frame"), labels if isinstance(labels, str) else None
        labels, options = None if column else labels, replace(options, label=column)
        return tables.samples_of({"train": table}, table.name, options, labels, layout)
    known = isinstance(data, Dataset) or (hasattr(data, "__getitem__") and hasattr(data, "__len__"))
    if not known or isinstance(data, (str, bytes, Mapping)) or hasattr(data, "tocsr"):
        kind = type(data).__name__
        raise UserError(f"data of type {kind} are not understood; give a tensor, an array, a data frame or a Dataset")
    return _from_dataset(data, labels, options)


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
        if hasattr(value, "getbands"):
            value = from_pillow(value)
        elif not isinstance(value, (Tensor, np.ndarray)):
            raise UserError(f"sample {index} of the Dataset is a {type(value).__name__}; give tensors or images")
        last = isinstance(value, np.ndarray) and value.ndim == 3 and not arrays.channels_first(value.shape)
        value = arrays.as_array(value, f"sample {index} of the Dataset")
        arrays.check_numbers(value, f"sample {index} of the Dataset")
        value = torch.from_numpy(np.moveaxis(value, 2, 0) if last else value)
        return value[None] if value.ndim == 2 else value, label


def _from_dataset(dataset: Any, y: Any, options: DataOptions) -> Samples:
    """One pass over the Dataset: it stays in memory where it is small; else only the labels do."""
    if len(dataset) == 0:
        raise UserError("the Dataset is empty")
    reader = DatasetReader(dataset)
    lazy = LazySplit(reader, range(len(dataset)), name="the Dataset, sample ")
    held, labels = [], []
    for index in range(len(dataset)):
        sample, label = reader.sample(index)
        if sample.shape != lazy.like.shape:
            shapes = f"{tuple(sample.shape)}; sample 0 has {tuple(lazy.like.shape)}"
            raise UserError(f"sample {index} of the Dataset has shape {shapes}; all must agree")
        labels.append(label)
        if lazy.small(len(dataset)):
            held.append(sample)
    y = labels if y is None and labels[0] is not None else y
    if held:
        return arrays.samples_of(torch.stack(held).numpy(), y, "Dataset", options, first=True)
    if lazy.like.dtype not in (torch.uint8, torch.float32):
        raise UserError(f"the Dataset gives {lazy.like.dtype}; a large one must give uint8 or float32")
    (numbers,), class_names = arrays.read_labels(y, [len(dataset)], "Dataset")
    grid = (0, 255) if lazy.like.dtype == torch.uint8 else None
    notes = (f"{len(dataset)} samples of shape {tuple(lazy.like.shape)}, read when they are asked for.",)
    pool = lazy if numbers is None else lazy.relabelled(numbers)
    return Samples("Dataset", {"train": pool}, grid, class_names, notes=notes)
