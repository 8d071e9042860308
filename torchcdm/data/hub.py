"""Data sets of the Hugging Face Hub, or saved by its library, through that library."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from torch import Tensor

from torchcdm.data import images, tables
from torchcdm.data.arrays import read_labels
from torchcdm.data.assembly import Samples
from torchcdm.data.options import DataOptions
from torchcdm.data.reading import DAMAGE
from torchcdm.data.source import LazySplit, Split
from torchcdm.errors import UserError, needed, reason
from torchcdm.units import DataTransform

SPLIT_NAMES = {"train": ("train",), "validation": ("validation", "valid", "val", "dev"), "test": ("test",)}
LABEL_NAMES = ("label", "labels")

ERRORS = (
    "datasets.exceptions.DatasetsError", "httpx.HTTPError", "pyarrow.ArrowException",
    "PIL.Image.DecompressionBombError",
)  # fmt: skip
"""What the libraries raise beside :data:`torchcdm.data.reading.DAMAGE`."""


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
    except (*DAMAGE, *_errors()) as error:
        raise UserError(f"hf:{argument}: cannot be loaded ({reason(error)})") from error
    parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    chosen = {
        split: next(parts[name] for name in names if name in parts)
        for split, names in SPLIT_NAMES.items()
        if any(name in parts for name in names)
    }
    if "train" not in chosen:
        raise UserError(f"hf:{argument}: no split called train (found: {', '.join(parts)})")
    chosen = {split: part for split, part in chosen.items() if len(part) or split == "train"}
    features = chosen["train"].features
    column = next((key for key, feature in features.items() if type(feature).__name__ == "Image"), None)
    if column is not None and len(chosen["train"]):
        if hasattr(datasets, "Image"):  # the library would open files of any format
            kept = datasets.Image(decode=False)
            chosen = {split: part.cast_column(column, kept) for split, part in chosen.items()}
        return _images(f"hf:{argument}", chosen, column, options)
    frames = {split: part.to_pandas() for split, part in chosen.items()}
    return tables.samples_of(frames, f"hf:{argument}", options, like=like)


def _images(name: str, rows: dict[str, Any], column: str, options: DataOptions) -> Samples:
    high = HubReader(rows["train"], column, f"{name}, train", images.pillow_high)(0)
    prepare = partial(_prepared, high=high, size=options.size, channels=options.channels)
    like = HubReader(rows["train"], column, f"{name}, train", prepare)(0)
    label, names = _label_column(rows["train"].features, options.label, name)
    sizes = [len(part) for part in rows.values()]
    # All splits together: a class must have one number, also where a split has none of it.
    labels = None if label is None else [value for part in rows.values() for value in part[label][:]]
    of_parts, class_names = read_labels(labels, sizes, name, names)
    parts: dict[str, Split] = {}
    for (split, part), of_part in zip(rows.items(), of_parts, strict=True):
        read = HubReader(part, column, f"{name}, {split}", prepare)
        lazy = LazySplit(read, range(len(part)), of_part, f"{name}, {split}: row ", like)
        parts[split] = lazy.in_memory_if_small(sum(sizes))
    notes = ["images from the column '{}', {} channel(s), {} x {} pixels.".format(column, *like.shape)]
    if label is not None:
        notes.append(f"classes from the column '{label}'.")
    return Samples(name, parts, None if high is None else (0, high), class_names, notes=tuple(notes))


def _errors() -> tuple[type[Exception], ...]:
    """Those of :data:`ERRORS` whose libraries are loaded."""
    modules = [name.rpartition(".") for name in ERRORS]
    return tuple(getattr(sys.modules[module], kind) for module, _, kind in modules if module in sys.modules)


class HubReader(NamedTuple):
    """Reads the image of one row; picklable, for worker processes."""

    rows: Any
    column: str
    name: str
    read: Callable[[Any], Any]

    def __call__(self, index: int) -> Any:
        try:
            cell = self.rows[index][self.column]
            if not isinstance(cell, dict):
                return self.read(cell)
            with images.opened(cell["path"] if cell["bytes"] is None else io.BytesIO(cell["bytes"])) as image:
                return self.read(image)
        except (*DAMAGE, *_errors()) as error:
            raise UserError(f"{self.name}: row {index} cannot be read as an image ({reason(error)})") from error


def _prepared(image: Any, high: int | None, size: tuple[int, int] | None, channels: int | None) -> Tensor:
    return images.conform(images.from_pillow(image), high, size, channels)


def _label_column(features: Any, wanted: str | None, name: str) -> tuple[str | None, tuple[str, ...] | None]:
    """The column of classes, and the names of its classes where the library knows them."""
    if wanted is not None and wanted not in features:
        raise UserError(f"{name}: no column '{wanted}' for the label (found: {', '.join(features)})")
    column = wanted or next((key for key, feature in features.items() if hasattr(feature, "names")), None)
    column = column or next((key for key in LABEL_NAMES if key in features), None)
    names = getattr(features[column], "names", None) if column else None
    return column, tuple(names) if names else None
