"""Arrays: which axis is what, which values lie on a grid, and the source that comes of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchcdm.data import pixels
from torchcdm.data.columns import check_resolution, measure_columns
from torchcdm.data.options import DataOptions, Layout
from torchcdm.data.source import DataSource, MemorySplit, Split, complete_splits
from torchcdm.errors import UserError
from torchcdm.units import DataTransform

Grid = tuple[int, int]
"""Smallest and largest grey level of integer data; None stands for continuous data."""

DATA_KEYS = ("x", "images", "data")
LABEL_KEYS = ("y", "labels")


def load(path: str, options: DataOptions, layout: Layout | None = None) -> DataSource:
    """``array:FILE.npz`` or ``array:FILE.npy``, split at random."""
    x, y, notes = read(Path(path))
    pool, grid, class_names, more = pool_from(x, y, path, options, layout=layout)
    return source_from_pool(f"array:{path}", pool, grid, options, class_names, notes=[*notes, *more], layout=layout)


def pool_from(
    x: np.ndarray,
    y: np.ndarray | None,
    name: str,
    options: DataOptions,
    first: bool = False,
    layout: Layout | None = None,
) -> tuple[MemorySplit, Grid | None, tuple[str, ...] | None, list[str]]:
    """All samples of an array, resized and converted, with their grid, class names and notes."""
    values, grid, notes = interpret(x, name, first, _grid_of(None if layout is None else layout.transform))
    if values.ndim == 4:
        values = convert_images(values, grid, options)
    labels, class_names = read_labels(y, len(values), name)
    return MemorySplit(values, labels), grid, class_names, notes


def read(path: Path) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Data, labels and notes of an .npy or .npz file. Pickled objects are refused.

    Raises:
        UserError: Missing, unreadable, or without a key that is understood.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded, None, []
        with loaded:
            arrays = {key: loaded[key] for key in loaded.files}
    except Exception as error:  # numpy raises many types, zipfile's and pickle's among them
        raise UserError(f"{path}: cannot be read as a numpy array without pickled objects ({error})") from error
    y = next((arrays.pop(key) for key in LABEL_KEYS if key in arrays), None)
    key = next((key for key in DATA_KEYS if key in arrays), None)
    notes = []
    if key is None and len(arrays) == 1:
        key = next(iter(arrays))
        notes.append(f"the only array of the file, '{key}', is taken as the data.")
    if key is None:
        found = ", ".join(sorted(arrays)) or "none"
        raise UserError(f"{path}: no array called {' or '.join(DATA_KEYS)} (found: {found}); rename the data to x")
    return arrays[key], y, notes


def as_array(data: Any, name: str) -> np.ndarray:
    """A list or an array as an array; one of objects that are numbers as float64.

    Raises:
        UserError: Rows of unequal length, objects that are no numbers.
    """
    try:
        x = np.asarray(data)
        return x.astype(np.float64) if x.dtype.kind == "O" else x
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: the list is not an array of numbers ({error})") from error


def interpret(
    x: np.ndarray, name: str, first: bool = False, known: Grid | None = None
) -> tuple[Tensor, Grid | None, list[str]]:
    """Samples as a tensor with event shape (C, H, W) or (d,), their grid, and how they were understood.

    Args:
        x: (N,), (N, d), (N, H, W), (N, H, W, C) or (N, C, H, W); integers, booleans or floats.
        name: The data, for messages.
        first: Channels are known to come first, as in torch tensors; otherwise it is read off the sizes.
        known: The grid of whole numbers that all lie between its ends; that of others is read off them.

    Raises:
        UserError: Other numbers of axes, values that are not finite numbers, no samples.
    """
    if x.dtype.kind not in "buif":
        raise UserError(f"{name}: values of type {x.dtype} are not numbers")
    if x.ndim not in (1, 2, 3, 4):
        raise UserError(f"{name}: an array of shape {x.shape} is neither vectors (N, d) nor images (N, C, H, W)")
    if 0 in x.shape:
        raise UserError(f"{name}: an array of shape {x.shape} holds no values")
    x, layout = _arrange(x, first)
    kind = "vectors" if x.ndim == 2 else "images"
    sizes = f"{x.shape[1]} columns" if x.ndim == 2 else "{} channel(s), {} x {} pixels".format(*x.shape[1:])
    notes = [f"{len(x)} {kind} of {sizes}, read as {layout}."]
    if x.dtype.kind != "f":
        low, high = int(x.min()), int(x.max())
        if high - low < 2**16:
            grid = known if known is not None and known[0] <= low and high <= known[1] else _grid(low, high)
            notes.append(f"whole numbers {low} ... {high}: {grid[1] - grid[0] + 1} grey levels.")
            dtype = np.uint8 if x.dtype.kind != "i" and grid[1] < 256 else np.float32
            return torch.from_numpy(np.ascontiguousarray(x, dtype)), grid, notes
        notes.append(f"whole numbers {low} ... {high} are too many levels for a grid: taken as continuous.")
    finite = np.isfinite(x).reshape(len(x), -1).all(1)
    if not finite.all():
        raise UserError(f"{name}: sample {int(finite.argmin())} holds a value that is not a finite number")
    if x.ndim == 2:
        check_resolution(x, [f"c{k}" for k in range(x.shape[1])], name)
    values = torch.from_numpy(np.ascontiguousarray(x, np.float32))
    return values, None, [*notes, *(_lattice_note(values) if values.ndim > 2 else [])]


def _arrange(x: np.ndarray, first: bool) -> tuple[np.ndarray, str]:
    """(N, d) or (N, C, H, W), and the name of the layout that was found."""
    if x.ndim == 1:
        return x[:, None], "(N,)"
    if x.ndim == 2:
        return x, "(N, d)"
    if x.ndim == 3:
        return x[:, None], "(N, H, W)"
    if first or channels_first(x.shape[1:]):
        return x, "(N, C, H, W)"
    return np.moveaxis(x, 3, 1), "(N, H, W, C)"


def channels_first(shape: Sequence[int]) -> bool:
    """Whether an image of this shape is (C, H, W) and not (H, W, C).

    Square images decide where only one reading gives them; else few channels do; a tie is (C, H, W).
    """
    a, b, c = shape
    if (a == b) != (b == c):
        return b == c
    return a <= c


def _grid(low: int, high: int) -> Grid:
    """The grid that whole numbers from low to high were stored on: 8 or 16 bits, or exactly those levels."""
    if low < 0:
        return low, high
    if high < 64:
        return 0, max(high, 1)
    return (0, 255) if high < 256 else (0, 65535)


def _grid_of(transform: DataTransform | None) -> Grid | None:
    """The whole numbers that a model takes; None where it takes no such, or there is no model."""
    if transform is None or transform.bin != 1 or transform.low is None or transform.high is None:
        return None
    return int(transform.low), int(transform.high)


def _lattice_note(values: Tensor) -> list[str]:
    """A warning where floats are grey levels in disguise: their density is unbounded."""
    sample = values[:1000].double()
    for factor, words in ((1, "whole numbers"), (255, "multiples of 1/255")):
        levels = sample * factor
        if (levels - levels.round()).abs().max() < 1e-3 * min(1.0, float(levels.abs().max()) or 1.0):
            return [
                f"floats that are all {words}, taken as continuous: their density has no upper bound; store the "
                "levels as integers (uint8) to get dequantisation and bits/dim."
            ]
    return []


def convert_images(x: Tensor, grid: Grid | None, options: DataOptions) -> Tensor:
    """Images (N, C, H, W) with the channels and the size that the options ask for; on the grid as before."""
    white = float(x.max()) if grid is None else grid[1]
    if options.channels is not None and options.channels != x.shape[1]:
        x = torch.stack([pixels.to_channels(image, options.channels, white) for image in x])
    if options.size is not None and options.size != tuple(x.shape[2:]):
        x = torch.stack([pixels.resize(image, options.size) for image in x])
    return x if grid is None or x.dtype == torch.uint8 else x.round()


def read_labels(
    y: np.ndarray | Sequence | None, count: int, name: str, class_names: Sequence[str] | None = None
) -> tuple[Tensor | None, tuple[str, ...] | None]:
    """Labels as long (N,) and the names of the classes.

    Args:
        y: Whole numbers 0 ... classes - 1, or texts, which are numbered in alphabetical order.
        count: Number of samples.
        name: The data, for messages.
        class_names: Names of the classes where they are known.

    Raises:
        UserError: A label out of range, or another number of labels than samples.
    """
    if y is None:
        return None, None
    y = np.asarray(y)
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.shape != (count,):
        raise UserError(f"{name}: labels have shape {y.shape}; one label for each of the {count} samples is needed")
    if y.dtype.kind in "USO":
        texts = [str(label) for label in y]
        names = sorted(set(texts))
        index = {text: number for number, text in enumerate(names)}
        return torch.tensor([index[text] for text in texts]), tuple(names)
    if y.dtype.kind == "b":
        y = y.astype(np.int64)
    if y.dtype.kind not in "uif" or not np.array_equal(y, np.round(y)):
        raise UserError(f"{name}: labels must be whole numbers 0, 1, ... or texts")
    limit = count if class_names is None else len(class_names)
    wrong = np.flatnonzero((y < 0) | (y >= limit))
    if len(wrong):
        label = f"{y[wrong[0]]:g} of sample {wrong[0]}"
        raise UserError(f"{name}: label {label} is out of range; classes are numbered 0 ... {limit - 1}")
    names = [str(k) for k in range(int(y.max()) + 1)] if class_names is None else class_names
    return torch.from_numpy(y.astype(np.int64)), tuple(names)


def measure(
    train: Split, grid: Grid | None, dequantize: bool, name: str, columns: Sequence[str] | None = None
) -> tuple[DataTransform, list[str]]:
    """The transform of a training split, and notes: the grid for grey levels, mean and deviation for continuous data.

    Raises:
        UserError: What does not vary.
    """
    shape = train[0][0].shape
    if grid is None:
        if len(shape) == 1:
            return measure_columns(train.tensors()[0], columns or [f"c{k}" for k in range(shape[0])], dequantize, name)
        x, _ = train.tensors(limit=10_000)
        if bool((x == x.flatten()[0]).all()):
            raise UserError(f"{name}: all values are equal; there is nothing to learn")
        return DataTransform.standardize(x), []
    low, high = grid
    if low == 0:
        return DataTransform.images(shape, high + 1, dequantize), []
    scale = (high - low + (1 if dequantize else 0)) / 2
    return DataTransform(shape, (low + high) / 2, scale, 1.0, dequantize, float(low), float(high)), []


def check_units(shape: tuple[int, ...], grid: Grid | None, transform: DataTransform, name: str) -> None:
    """Refuses data that a model of ``transform`` would take for others.

    Raises:
        UserError: Another shape, other grey levels, or grey levels for continuous values; names both.
    """
    if shape != transform.shape:
        raise UserError(f"{name}: has shape {shape}; the model takes {transform.shape}")
    found = None if grid is None else (*grid, 1)
    taken = None if transform.bin is None else (transform.low, transform.high, transform.bin)
    if found == taken:
        return
    if taken is None:
        mend = "give floats in the units of the training data"
    elif found is None:
        mend = "give whole numbers"
    else:
        mend = "rescale them"
    raise UserError(f"{name}: {_levels(found)}; the model takes {_levels(taken)}; {mend}")


def _levels(grid: tuple[float, float, float] | None) -> str:
    return "continuous values" if grid is None else "grey levels {:g} ... {:g}".format(*grid)


def source_from_splits(
    name: str,
    splits: tuple[Split, Split, Split],
    grid: Grid | None,
    options: DataOptions,
    class_names: tuple[str, ...] | None = None,
    columns: tuple[str, ...] | None = None,
    notes: Iterable[str] = (),
    layout: Layout | None = None,
) -> DataSource:
    """The source of splits that are made; its transform is the layout's, else measured on the first split."""
    if layout is None:
        transform, more = measure(splits[0], grid, options.dequantize, name, columns)
    else:
        transform, more = layout.transform, []
        check_units(tuple(splits[0][0][0].shape), grid, transform, name)
    return DataSource(name, *splits, transform, class_names, columns, (*notes, *more))


def source_from_pool(
    name: str,
    pool: Split,
    grid: Grid | None,
    options: DataOptions,
    class_names: tuple[str, ...] | None = None,
    columns: tuple[str, ...] | None = None,
    notes: Iterable[str] = (),
    layout: Layout | None = None,
) -> DataSource:
    """The source of samples that do not say what is for testing: split at random with the options' seed."""
    splits, note = complete_splits(name, {"train": pool}, options)
    return source_from_splits(name, splits, grid, options, class_names, columns, [*notes, note], layout)
