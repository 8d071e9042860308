"""Data sets of the Hugging Face Hub, or saved by its library, through that library."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchcdm.data import images, tables
from torchcdm.data.arrays import read_labels, source_from_splits
from torchcdm.data.folders import read_if_small
from torchcdm.data.options import DataOptions, Layout
from torchcdm.data.source import NO_LABEL, DataSource, LazySplit, Split, complete_splits
from torchcdm.errors import UserError

SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
LABEL_NAMES = ("label", "labels")


def load(argument: str, options: DataOptions, layout: Layout | None = None) -> DataSource:
    """``hf:NAME``, ``hf:NAME:CONFIG``, or ``hf:PATH`` of a folder written by ``save_to_disk``.

    Images where there is a column of images, with the column of class labels; else a table of numbers.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"hf:{argument} needs the library datasets; pip install 'torchcdm[hub]'") from error
    name, _, config = argument.partition(":")
    try:
        if any((Path(name) / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # network, hub and file errors of several libraries
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"hf:{argument}: cannot be loaded ({reason})") from error
    parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    chosen = {
        split: next(parts[name] for name in names if name in parts)
        for split, names in SPLIT_NAMES.items()
        if any(name in parts for name in names)
    }
    if "train" not in chosen:
        raise UserError(f"hf:{argument}: no split called train (found: {', '.join(parts)})")
    features = chosen["train"].features
    column = next((key for key, feature in features.items() if type(feature).__name__ == "Image"), None)
    if column is None:
        numbers = {
            split: tables.Table(f"hf:{argument}", part.to_dict(), "row {} (counted from 0)".format)
            for split, part in chosen.items()
        }
        return tables.source_from_tables(numbers, f"hf:{argument}", options, layout=layout)
    return _image_source(f"hf:{argument}", chosen, column, options, layout)


def _image_source(
    name: str, parts: dict[str, Any], column: str, options: DataOptions, layout: Layout | None
) -> DataSource:
    train = parts["train"]
    first = train[0][column]
    high = images.pillow_high(first)
    reader = images.ImageReader(high, options.size, options.channels)
    shape = tuple(reader.prepare(images.from_pillow(first)).shape)
    label, names = _label_column(train.features, options.label, name)
    splits: dict[str, Split] = {}
    sizes = [len(part) for part in parts.values()]
    # All splits together: a class must have one number, also where a split has none of it.
    labels = None if label is None else [value for part in parts.values() for value in part[label][:]]
    y, class_names = read_labels(labels, sum(sizes), name, names)
    y = torch.full((sum(sizes),), NO_LABEL) if y is None else y
    for (split, part), of_part in zip(parts.items(), y.split(sizes), strict=True):
        lazy = LazySplit(HubReader(part, column, reader, shape, f"{name}, {split}"), range(len(part)), of_part)
        splits[split] = read_if_small(lazy, sum(sizes))
    complete, note = complete_splits(name, splits, options)
    notes = [f"images from the column '{column}', {shape[0]} channel(s), {shape[1]} x {shape[2]} pixels."]
    if label is not None:
        notes.append(f"classes from the column '{label}'.")
    grid = None if high is None else (0, high)
    return source_from_splits(name, complete, grid, options, class_names, notes=[*notes, note], layout=layout)


@dataclass(frozen=True)
class HubReader:
    """Reads the image of one row; all must have the shape of the first."""

    rows: Any
    column: str
    reader: images.ImageReader
    shape: tuple[int, ...]
    name: str

    def __call__(self, index: int) -> Tensor:
        try:
            image = images.from_pillow(self.rows[index][self.column])
        except Exception as error:  # Pillow's plug-ins raise many types for broken files
            raise UserError(f"{self.name}: row {index} cannot be read as an image ({error})") from error
        image = self.reader.prepare(image)
        if tuple(image.shape) != self.shape:
            shapes = f"{tuple(image.shape)}, the first of training has {self.shape}"
            raise UserError(f"{self.name}: row {index} has shape {shapes}; give --size HxW or --channels to convert")
        return image


def _label_column(features: Any, wanted: str | None, name: str) -> tuple[str | None, tuple[str, ...] | None]:
    """The column of classes, and the names of its classes where the library knows them."""
    if wanted is not None and wanted not in features:
        raise UserError(f"{name}: no column '{wanted}' for the label (found: {', '.join(features)})")
    column = wanted or next((key for key, feature in features.items() if hasattr(feature, "names")), None)
    column = column or next((key for key in LABEL_NAMES if key in features), None)
    names = getattr(features[column], "names", None) if column else None
    return column, tuple(names) if names else None
