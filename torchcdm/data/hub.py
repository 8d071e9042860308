"""Data sets of the Hugging Face Hub, or saved by its library, through that library."""

import io
import os
from functools import partial
from typing import Any

from torch import Tensor

from torchcdm.data import images, tables
from torchcdm.data.arrays import read_labels
from torchcdm.data.folders import named_splits
from torchcdm.data.options import DataOptions
from torchcdm.data.source import LazySplit, Samples, Split
from torchcdm.errors import UserError, needed, reason
from torchcdm.units import DataTransform


def load(argument: str, options: DataOptions, like: DataTransform | None = None) -> Samples:
    """``hf:NAME``, ``hf:NAME:CONFIG``, or ``hf:PATH`` of a folder written by ``save_to_disk``.

    Images where there is a column of images, with the column of class labels; else a table of numbers.
    """
    datasets = needed("datasets", "hub", f"hf:{argument}")
    name, _, config = argument.partition(":")
    try:
        if any(os.path.isfile(os.path.join(name, marker)) for marker in ("dataset_dict.json", "state.json")):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, config or None)
    except Exception as error:  # of any of the libraries below that one
        raise UserError(f"hf:{argument}: cannot be loaded ({reason(error)})") from error
    parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    rows = named_splits(parts.get)
    if "train" not in rows:
        raise UserError(f"hf:{argument}: no split called train (found: {', '.join(parts)})")
    rows = {split: part for split, part in rows.items() if len(part) or split == "train"}
    column = next((key for key, kind in rows["train"].features.items() if type(kind).__name__ == "Image"), None)
    if column is None or not len(rows["train"]):
        frames = {split: part.to_pandas() for split, part in rows.items()}
        hidden = hasattr(rows["train"].features.get(options.label), "names")  # -1 in a column of classes
        return tables.samples_of(frames, f"hf:{argument}", options, like=like, hidden=hidden)
    # Not decoded: the library would open files of any format.
    rows = {split: part.cast_column(column, datasets.Image(decode=False)) for split, part in rows.items()}
    return _images(f"hf:{argument}", rows, column, options)


def _images(name: str, rows: dict[str, Any], column: str, options: DataOptions) -> Samples:
    places = {split: (part, column, f"{name}, {split}", options) for split, part in rows.items()}
    (like, high), features = _decoded(*places["train"], 0), rows["train"].features
    if options.label is not None and options.label not in features:
        raise UserError(f"{name}: no column '{options.label}' for the label (found: {', '.join(features)})")
    # The column that is asked for, one whose classes the library knows, or one that is called so.
    known = [key for key, kind in features.items() if hasattr(kind, "names")]
    called = [key for key in ("label", "labels") if key in features]
    label = options.label or next(iter(known + called), None)
    sizes = [len(part) for part in rows.values()]
    # All splits together: a class must have one number, also where a split has none of it.
    values = None if label is None else [value for part in rows.values() for value in part[label][:]]
    names = getattr(features.get(label), "names", None)
    labels, class_names = read_labels(values, sizes, name, names, hidden=True)  # as those of many test splits are
    parts: dict[str, Split] = {}
    for (split, place), size, y in zip(places.items(), sizes, labels, strict=True):
        lazy = LazySplit(partial(_image, *place), range(size), y, f"{name}, {split}: row ", like)
        parts[split] = lazy.in_memory_if_small(sum(sizes))
    notes = ["images from the column '{}', {} channel(s), {} x {} pixels.".format(column, *like.shape)]
    notes += [] if label is None else [f"classes from the column '{label}'."]
    return Samples(name, parts, None if high is None else (0, high), class_names, notes=tuple(notes))


def _decoded(rows: Any, column: str, name: str, options: DataOptions, index: int) -> tuple[Tensor, int | None]:
    """The image of a row, and the largest value that its pixels can have, None for floats."""
    try:
        cell = rows[index][column]
        file = cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])
        pixels, high = images.from_pillow(images.opened(file))
        return images.conform(pixels, high, options.size, options.channels), high
    except Exception as error:
        raise UserError(f"{name}: row {index} cannot be read as an image ({reason(error)})") from error


def _image(*row: Any) -> Tensor:
    return _decoded(*row)[0]
