"""Arrays: which axis is what, which values lie on a grid, and what the classes are."""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchcdm.data.images import channels_first, conform
from torchcdm.data.options import DataOptions
from torchcdm.data.source import NO_LABEL, Grid, MemorySplit, Samples, shared, single
from torchcdm.errors import UserError, reason
from torchcdm.runtime.reading import reading
from torchcdm.units import DataTransform

SUFFIXES = (".npy", ".npz")  # of files of arrays
DATA_KEYS = ("x", "images", "data")
LABEL_KEYS = ("y", "labels")
NUMBER = re.compile(r"\s*(0|-?[1-9][0-9]*)\s*")  # labels that are whole numbers; 01 is a text, another one than 1
LARGEST = 2**20  # grey levels are smaller: float32 has no 16 places left in the cell of a larger one


def load(path: str, options: DataOptions, like: DataTransform | None = None) -> Samples:
    """``array:FILE.npz`` or ``array:FILE.npy``, split at random."""
    x, y, notes = read(Path(path))
    found = samples_of(x, y, f"array:{path}", options, like=like)
    return replace(found, notes=(*notes, *found.notes))


def samples_of(
    x: np.ndarray, y: Any, name: str, options: DataOptions, first: bool = False, like: DataTransform | None = None
) -> Samples:
    """All samples of an array, resized and converted; arguments as in :func:`read_labels` and :func:`interpret`."""
    values, grid, notes = interpret(x, name, first, like)
    values = convert_images(values, grid, options) if values.ndim == 4 else values
    (labels,), class_names = read_labels(y, [len(values)], name)
    return Samples(name, {"train": MemorySplit(values, labels)}, grid, class_names, notes=tuple(notes))


def read(path: Path) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Data, labels and notes of an .npy or .npz file; UserError without a key that is understood."""
    with reading(path, "a numpy array without pickled objects") as file:
        arrays = np.load(file, allow_pickle=False)
        if isinstance(arrays, np.ndarray):
            return arrays, None, []
        known, labels = ([key for key in keys if key in arrays] for keys in (DATA_KEYS, LABEL_KEYS))
        others = [key for key in arrays if key not in labels]
        wanted = known or (others if len(others) == 1 else [])
        # What is not asked for is not read.
        x, y = (np.asarray(arrays[keys[0]]) if keys else None for keys in (wanted, labels))
    if x is None:
        found = ", ".join(sorted(others)) or "none"
        raise UserError(f"{path}: no array called {' or '.join(DATA_KEYS)} (found: {found}); rename the data to x")
    return x, y, [] if known else [f"the only array of the file, '{others[0]}', is taken as the data."]


def as_array(data: Any, name: str) -> np.ndarray:
    """A tensor, a list or an array as an array of numbers or texts; objects that are numbers as float64. UserError for
    rows of unequal length, objects that are no numbers, masked values, a tensor that is not dense."""
    if np.ma.is_masked(data):
        raise UserError(f"{name}: some values are masked; leave their rows out, or fill them")
    try:
        if isinstance(data, Tensor):
            data = data.detach()
            half = data.is_floating_point() and data.element_size() <= 2  # bfloat16 is no type of numpy
            return (data.float() if half else data).numpy(force=True)
        x = np.asarray(data)
        if x.dtype.kind == "O" or x.dtype == np.longdouble:
            return x.astype(np.float64)
        return np.require(x, x.dtype.newbyteorder("="), "C")  # as torch takes them
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise UserError(f"{name}: not an array of numbers ({reason(error)})") from error


def interpret(
    x: np.ndarray, name: str, first: bool = False, like: DataTransform | None = None
) -> tuple[Tensor, Grid | None, list[str]]:
    """Samples with event shape (C, H, W) or (d,), their grid, and how they were understood.

    On a grid they are uint8 or float32; else images are float32, and vectors float64 until their columns are measured.
    ``x`` is (N,), (N, d), (N, H, W), (N, H, W, C) or (N, C, H, W), integers, booleans or floats. Channels are known to
    come ``first``, as in torch tensors, or it is read off the sizes. Whole numbers on the grid of the transform
    ``like``, that of a model, have that grid. UserError for other axes, values that are not finite, or no samples.
    """
    check_numbers(x, name)
    if x.ndim not in (1, 2, 3, 4):
        raise UserError(f"{name}: an array of shape {x.shape} is neither vectors (N, d) nor images (N, C, H, W)")
    axes = ("(N,)", "(N, d)", "(N, H, W)", "(N, C, H, W)")[x.ndim - 1]
    if x.ndim in (1, 3):
        x = x[:, None]
    elif x.ndim == 4 and not first and not channels_first(x.shape[1:]):
        x, axes = np.moveaxis(x, 3, 1), "(N, H, W, C)"
    sizes = f"{x.shape[1]} columns" if x.ndim == 2 else "{} channel(s), {} x {} pixels".format(*x.shape[1:])
    notes = [f"{len(x)} {'vectors' if x.ndim == 2 else 'images'} of {sizes}, read as {axes}."]
    if x.dtype.kind != "f":
        low, high = int(x.min()), int(x.max())
        if high - low < 2**16 and max(high, -low) < LARGEST:
            grid = _grid(low, high, like)
            notes.append(f"whole numbers {low} ... {high}: {grid[1] - grid[0] + 1} grey levels.")
            dtype = np.uint8 if x.dtype.kind != "i" and grid[1] < 256 else np.float32
            return shared(np.ascontiguousarray(x, dtype)), grid, notes
        notes.append(f"whole numbers {low} ... {high} are too many or too large for grey levels: taken as continuous.")
    finite = np.isfinite(x).reshape(len(x), -1).all(1)
    if not finite.all():
        raise UserError(f"{name}: sample {int(finite.argmin())} holds a value that is not a finite number")
    if x.ndim == 2:
        return torch.from_numpy(x.astype(np.float64)), None, notes
    values = single(x, name)
    return values, None, notes + _lattice_note(values)


def check_numbers(x: np.ndarray, name: str) -> None:
    """Refuses, by shape or type, what holds no values, or none that are numbers."""
    if x.dtype.kind not in "buif":
        raise UserError(f"{name}: values of type {x.dtype} are not numbers; texts and dates need a data frame")
    if 0 in x.shape:
        raise UserError(f"{name}: an array of shape {x.shape} holds no values")


def _grid(low: int, high: int, like: DataTransform | None) -> Grid:
    """The grid that whole numbers were stored on: the model's, 8 or 16 bits, or exactly those levels."""
    limits = None if like is None or like.bin != 1 else (like.low, like.high)
    if limits is not None and None not in limits and limits[0] <= low and high <= limits[1]:
        return int(limits[0]), int(limits[1])
    if low < 0 or high >= 2**16:
        return low, high
    if high < 64:
        return 0, max(high, 1)
    return (0, 255) if high < 256 else (0, 65535)


def _lattice_note(values: Tensor) -> list[str]:
    """A warning where floats are grey levels in disguise: their density is unbounded."""
    for factor, words in ((1, "whole numbers"), (255, "multiples of 1/255")):
        levels = values[:1000].double() * factor
        if (levels - levels.round()).abs().max() < 1e-3 * min(1.0, float(levels.abs().max()) or 1.0):
            what = f"floats that are all {words}, taken as continuous: their density has no upper bound"
            return [f"{what}; store the levels as integers (uint8) to get dequantisation and bits/dim."]
    return []


def convert_images(x: Tensor, grid: Grid | None, options: DataOptions) -> Tensor:
    """Images (N, C, H, W) with the channels and the size that the options ask for; on the grid as before."""
    if options.channels in (None, x.shape[1]) and options.size in (None, tuple(x.shape[2:])):
        return x
    high, white = (None, float(x.max())) if grid is None else (grid[1], 1.0)
    return torch.stack([conform(image, high, options.size, options.channels, white) for image in x])


def read_labels(
    y: Any, sizes: Sequence[int], name: str, class_names: Sequence[str] | None = None, by_value: bool = False,
    hidden: bool = False,
) -> tuple[list[Tensor | None], tuple[str, ...] | None]:  # fmt: skip
    """Labels as long tensors, one for each part of the data of these ``sizes``, and the names of the classes.

    ``y`` holds whole numbers 0 ... classes - 1, or texts, one part after the other; None where there are no labels.
    Texts that occur are the classes in rising order, and with ``by_value`` so are whole numbers, unless
    ``class_names`` are known. With ``hidden``, -1 stands for no label. UserError for a label that is missing or out
    of range, another number of labels than samples, or nearly as many classes as samples.
    """
    count = sum(sizes)
    if y is None:
        return [None] * len(sizes), None
    y = as_array(y, f"{name}, labels") if isinstance(y, Tensor) or np.ma.is_masked(y) else np.asarray(y)
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.shape != (count,):
        raise UserError(f"{name}: labels have shape {y.shape}; one label for each of the {count} samples is needed")
    for row, label in enumerate(y.tolist()):
        if label is None or str(label).strip() in ("", "nan", "NaN", "NaT", "<NA>"):
            raise UserError(f"{name}: row {row} (counted from 0) has no label ({label})")
    y = np.char.decode(y, "utf-8", "backslashreplace") if y.dtype.kind == "S" else y
    if y.dtype.kind in "UO":  # a text file gives every cell as text
        by_value = True
        if not any(isinstance(label, str) and not NUMBER.fullmatch(label) for label in y):
            y = np.array([int(label) if isinstance(label, str) else label for label in y])
        y = y if y.dtype.kind in "buif" else y.astype(str)
    if y.dtype.kind not in "buifU" or (y.dtype.kind == "f" and not np.array_equal(y, y.round())):
        raise UserError(f"{name}: labels must be whole numbers 0, 1, ... or texts")
    if by_value and class_names is None:
        values, y = np.unique(y, return_inverse=True)
        if hidden and values[0] == NO_LABEL:  # the least of the labels
            values, y = values[1:], y + NO_LABEL
        if len(values) > max(2, count // 2):
            raise UserError(f"{name}: {len(values)} classes in {count} rows; is the label an identifier?")
        class_names = [str(int(value) if values.dtype.kind == "f" else value) for value in values]
    y, limit = y.astype(np.int64), count if class_names is None else len(class_names)
    wrong = np.flatnonzero((y < (NO_LABEL if hidden else 0)) | (y >= limit))
    if len(wrong):
        label = f"{y[wrong[0]]} of sample {wrong[0]}"
        raise UserError(f"{name}: label {label} is out of range; classes are numbered 0 ... {limit - 1}")
    names = [str(k) for k in range(int(y.max()) + 1)] if class_names is None else class_names
    return list(torch.from_numpy(y).split(list(sizes))), tuple(names) or None
