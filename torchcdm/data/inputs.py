"""Files for a trained model: images, folders, arrays and tables in the model's data units and shape."""

from __future__ import annotations

import stat
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchcdm.data import arrays, images, tables
from torchcdm.data.folders import find_files, left_out
from torchcdm.data.options import DataOptions
from torchcdm.data.source import places_of, single
from torchcdm.errors import UserError
from torchcdm.runtime.reading import file_status, printable
from torchcdm.units import DataTransform, TableEncoding

if TYPE_CHECKING:
    from pandas import DataFrame

# Parts of a file: all samples of it; or the one image that it is, as a file in a folder of images.
WHOLE, IMAGE = -1, 0


class Inputs(NamedTuple):
    """Samples that were read for a model."""

    x: Tensor  # data units, float32 (N, *shape)
    names: list[str]  # the path of each, or the path and the row
    deviating: list[str]  # columns in which it holds what training never had, such as a new level; empty for most
    notes: tuple[str, ...] = ()  # what was left out, one sentence each


def read_inputs(
    paths: str | Path | Sequence[str | Path], transform: DataTransform, options: DataOptions | None = None,
    noisy: bool = False, parts: Sequence[int] | None = None, tiled: bool = True,
) -> Inputs:  # fmt: skip
    """Samples for a model from files; UserError for nothing to read, damaged files, or ones that do not fit the model.

    An image file's full range, 0 ... 255 or 0 ... 65535, stands for the model's range of grey levels, as
    :func:`torchcdm.data.save_images` writes it. Images larger than the model's are tiled.

    Args:
        paths: Image files, folders of images (recursive), of tables for a model of rows, .npz and .npy arrays, tables.
        transform: That of the model. A table is read by its columns, in whatever order it has them.
        options: ``size``, ``channels`` and ``skip_bad`` of images.
        noisy: Values of arrays may lie beyond the model's grey levels, as those of noisy images do.
        parts: Parts of the files, one a path, as :func:`parts_of` numbers them; they may hold nothing to read.
        tiled: Whether larger images are; they are refused else.
    """
    paths, options = [paths] if isinstance(paths, (str, Path)) else paths, options or DataOptions()
    if parts is None:
        files, notes = parts_of(paths, transform, options, groups=False)
    else:
        files, notes = list(zip(paths, parts, strict=True)), []
    read = [_read(Path(path), part, transform, options, tiled) for path, part in files]
    found = [inputs for inputs in read if inputs is not None]
    if parts is None and not any(inputs.names for inputs in found):
        kind = "tables" if len(transform.shape) == 1 else "images"
        raise UserError(f"nothing to read in {', '.join(map(str, paths)) or 'an empty list of paths'}: no {kind}")
    notes += left_out([path for (path, _), inputs in zip(files, read, strict=True) if inputs is None])
    notes += dict.fromkeys(note for inputs in found for note in inputs.notes)
    x = torch.cat([torch.empty(0, *transform.shape), *(inputs.x for inputs in found)])
    names = [name for inputs in found for name in inputs.names]
    deviating = [columns for inputs in found for columns in inputs.deviating]
    check_range(x, names, transform, noisy)
    return Inputs(x, names, deviating, tuple(notes))


def parts_of(
    paths: Iterable[str | Path], transform: DataTransform, options: DataOptions, groups: bool = True
) -> tuple[list[tuple[str, int]], list[str]]:
    """The paths as files and parts of files that :func:`read_inputs` reads one at a time, in its order; and notes.

    Folders hold images, or tables for a model of rows. The part of a Parquet file is a row group, unless not
    ``groups``; that of an image in a folder is ``IMAGE``, of all others ``WHOLE``.
    """
    found, notes = [], []
    for path in map(Path, paths):
        files, part = [path], WHOLE
        if stat.S_ISDIR(file_status(path).st_mode):
            rows = len(transform.shape) == 1
            kind, part = ((tables.SUFFIXES, "._"), WHOLE) if rows else ((images.SUFFIXES,), IMAGE)
            (files,), said = find_files([path], options.skip_bad, *kind)
            notes += said
        for file in files:
            split = groups and file.suffix.lower() == ".parquet"
            found += [(str(file), number) for number in (range(tables.row_groups(file)) if split else (part,))]
    return found, notes


def read_pictures(
    paths: Sequence[str | Path], transform: DataTransform, options: DataOptions, shape: tuple[int, ...] | None = None
) -> tuple[list[Tensor], list[str], list[str]]:
    """Images of the model's size or larger, or of another ``shape``: data units, each (C, H, W); names, and notes.
    Arguments and errors as for :func:`read_inputs`, whose tiles would be apart. What was measured, or has noise, lies
    between the model's grey levels, too: it is not rounded to them."""
    files, notes = parts_of(paths, transform, options, groups=False)
    pictures, names, bad, own, options = [], [], [], [], replace(options, size=None)
    for path, part in ((Path(name), part) for name, part in files):
        if part == WHOLE and path.suffix.lower() in arrays.SUFFIXES:
            found = read_array(arrays.read(path)[0], path, shape or transform.shape, options)
            pictures += found.x
            names += found.names
            own += zip(found.x, found.names, strict=True)
        elif (found := _picture(path, transform, options, shape or transform.shape)) is None:
            bad.append(path)
        else:
            x, levels = found
            check_shape(tuple(x.shape), shape or tuple(x.shape), path)
            own += [] if levels else [(x, printable(path))]
            pictures.append(x)
            names.append(printable(path))
    if not pictures:
        raise UserError(f"nothing to read in {', '.join(map(str, paths))}")
    check_range(*(zip(*own, strict=True) if own else ((), ())), transform, noisy=True)
    if shape is None and any(x.shape != transform.shape for x in pictures):
        notes.append("images keep their size, by tiles of the model's {1} x {2} pixels".format(*transform.shape))
    return pictures, names, [*notes, *left_out(bad)]


def _read(path: Path, part: int, transform: DataTransform, options: DataOptions, tiled: bool) -> Inputs | None:
    """All samples of one file, or of a part of it; None of an image that cannot be read."""
    if tables.is_table(path):
        frame = tables.read(path, options, None if part == WHOLE else part)
        found = read_table(frame, str(path), transform, options)
        names = [f"{printable(path)}: {row}" for row in found.names]
        return found._replace(x=single(found.x.numpy(), str(path)), names=names)
    if part == WHOLE and path.suffix.lower() in arrays.SUFFIXES:
        return read_array(arrays.read(path)[0], path, transform.shape, options)
    picture = _picture(path, transform, options, transform.shape)
    if picture is None:
        return None
    x, levels = picture
    if not tiled:
        check_shape(tuple(x.shape), transform.shape, path)
    x = transform.quantize(x) if levels else x
    height, width = transform.shape[1:]
    places, notes = places_of(x.shape[1:], (height, width), 1.0), []
    names = [printable(path) + (f" at {top},{left}" if len(places) > 1 else "") for top, left in places]
    if len(places) > 1:
        notes.append(f"images larger than the model's {height} x {width} pixels are tiled: a row for each tile.")
    if options.size is not None:
        notes.append("images are resized to {} x {}, as in training.".format(*options.size))
    tiles = torch.stack([x[:, top : top + height, left : left + width] for top, left in places])
    return Inputs(tiles, names, [""] * len(names), tuple(notes))


def read_table(frame: DataFrame, name: str, transform: DataTransform, options: DataOptions) -> Inputs:
    """The rows of a table for a model of this transform; those that hold what training never had deviate."""
    table = transform.table or TableEncoding.numbers(frame.columns)
    check_shape((len(table.kept),), transform.shape, name)
    x, rows, deviating = table.encode(frame, name, options.skip_bad, deviating=True)
    names = [f"{frame.index.name or 'row'} {frame.index[i]}" for i in rows.tolist()]
    bad = len(frame) - len(rows)
    notes = (f"{name}: {bad} row(s) with cells that cannot be read are left out.",) if bad else ()
    return Inputs(x, names, deviating, notes)


def read_array(x: np.ndarray, path: Path, shape: tuple[int, ...], options: DataOptions) -> Inputs:
    """Samples of an array for a model of this shape; ``path`` names them."""
    if len(shape) == 1:
        one_sample = x.shape == shape and shape != (1,)
    else:
        one_sample = x.ndim == 2 or (x.ndim == 3 and shape in (x.shape, (x.shape[2], *x.shape[:2])))
    x = x[None] if one_sample else x
    values, grid, _ = arrays.interpret(x, str(path), first=x.shape[1:] == shape)
    values = arrays.convert_images(values, grid, options) if values.ndim == 4 else values
    check_shape(tuple(values.shape[1:]), shape, path)
    names = [f"{printable(path)}[{i}]" for i in range(len(values))]
    return Inputs(single(values.numpy(), str(path)), names, [""] * len(names))


def _picture(
    path: Path, transform: DataTransform, options: DataOptions, shape: tuple[int, ...]
) -> tuple[Tensor, bool] | None:
    """An image in data units, of the channels and at least the size of ``shape``, and whether its file has grey
    levels; None of a bad one to skip."""
    if path.suffix.lower() not in images.SUFFIXES:
        kinds = "images, .npz or .npy" if len(shape) == 3 else ".npz, .npy, .csv or .parquet"
        raise UserError(f"{path}: files ending in '{path.suffix.lower()}' are not read for this model; give {kinds}")
    try:
        x, high = images.decode(path)
        x = images.conform(x, high, options.size, options.channels)
    except UserError:
        if not options.skip_bad:
            raise
        return None
    if len(shape) != 3 or x.shape[0] != shape[0] or x.shape[1] < shape[1] or x.shape[2] < shape[2]:
        check_shape(tuple(x.shape), shape, path)
    levels = high is not None and path.suffix.lower() != ".npy"
    return (on_range(x.float(), high, transform, path) if levels else x.float()), levels


def on_range(x: Tensor, file_high: int, transform: DataTransform, path: Path) -> Tensor:
    """The grey levels of a file on the range of the model's, not rounded."""
    low, high = transform.low, transform.high
    if (low, high) == (0, file_high):
        return x
    if low is None or high is None:
        raise UserError(f"{path}: grey levels 0 ... {file_high}; the model's data are continuous: give an array")
    return low + x * ((high - low) / file_high)


def check_shape(found: tuple[int, ...], needed: tuple[int, ...], path: Path | str) -> None:
    """Refuses samples of another shape than the model's, in words."""
    if found != needed:
        both = ["vectors of {}", "", "images of {1} x {2} pixels, {0} channel(s)"]
        other = len(found) == len(needed) == 3 and found[0] != needed[0]
        mend = f"; convert them to {needed[0]} channel(s)" if other else ""
        found, needed = (both[len(shape) - 1].format(*shape) for shape in (found, needed))
        raise UserError(f"{path}: {found}; the model takes {needed}{mend}")


def check_range(x: Sequence[Tensor], names: Sequence[str], transform: DataTransform, noisy: bool = False) -> None:
    """Values of another scaling than the model's: all of them fractions of [-1, 1], nearly black among grey levels; or
    some beyond these, half a level being dequantisation, unless they are ``noisy``."""
    low, high, bin = transform.low, transform.high, transform.bin
    if bin is None or low is None or high is None:
        return
    levels = f"the model's grey levels are {low:g} ... {high:g}"
    small = bool(len(x)) and high - low > 2 and all(bool((part.abs() <= 1).all()) for part in x)
    if small and any(bool((part != part.round()).any()) for part in x):
        raise UserError(f"{names[0]}: fractions of [-1, 1]; {levels}: rescale them")
    for part, name in zip(x, names, strict=True):
        if not noisy and (part.min() < low - bin / 2 or part.max() > high + bin / 2):
            raise UserError(f"{name}: values from {part.min():g} to {part.max():g}; {levels}")
