"""Files for a trained model: images, folders, arrays and tables in the model's data units and shape."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchcdm.data import arrays, images, tables
from torchcdm.data.assembly import single
from torchcdm.data.folders import find_images, left_out
from torchcdm.data.options import DataOptions
from torchcdm.data.reading import file_status, printable
from torchcdm.data.source import places_of
from torchcdm.errors import UserError
from torchcdm.units import DataTransform, TableEncoding

if TYPE_CHECKING:
    from pandas import DataFrame


WHOLE = -1
"""The part of a file that is all of it."""


class Inputs(NamedTuple):
    """Samples that were read for a model.

    Attributes:
        x: Data units, float32 (N, *shape).
        names: The path of each, or the path and the row.
        deviating: The columns in which it holds what training never had, where a model knows nothing, such as another
            value where all were alike: their names, empty for most.
        notes: What was left out, one sentence each.
    """

    x: Tensor
    names: list[str]
    deviating: list[str]
    notes: tuple[str, ...] = ()


def read_inputs(
    paths: str | Path | Sequence[str | Path],
    transform: DataTransform,
    options: DataOptions | None = None,
    noisy: bool = False,
    parts: Sequence[int] | None = None,
) -> Inputs:
    """Samples for a model from files.

    An image file's full range, 0 ... 255 or 0 ... 65535, stands for the model's range of grey levels: a digit
    saved as a PNG by :func:`torchcdm.data.save_images` is read back with levels 0 ... 16.

    Args:
        paths: Image files, folders of images (recursive), of tables for a model of rows, .npz and .npy arrays, tables.
        transform: That of the model. A table is read by its columns, in whatever order it has them.
        options: ``size``, ``channels`` and ``skip_bad`` of images.
        noisy: Values of arrays may lie beyond the model's grey levels, as those of noisy images do.
        parts: Parts of the files, one a path, as :func:`parts_of` numbers them; the paths may then hold nothing to
            read.

    Raises:
        UserError: Nothing to read, a file that cannot be read or does not fit the model, with both shapes.

    Example:
        >>> x, names, deviating, notes = read_inputs(["a.png", "folder", "more.npz"], model.transform)
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    options = options or DataOptions()
    pairs = zip(map(Path, paths), parts or [WHOLE] * len(paths), strict=True)
    read = [_read(path, transform, options, part) for path, part in pairs]
    if parts is None and not any(found.names for found in read):
        raise UserError(f"nothing to read in {', '.join(map(str, paths)) or 'an empty list of paths'}")
    x, names, deviating, notes = zip(*read, strict=True)
    found = Inputs(torch.cat(x), sum(names, []), sum(deviating, []), sum(notes, ()))
    if not noisy:
        check_range(found, transform)
    return found


def parts_of(
    paths: Sequence[str | Path], transform: DataTransform, options: DataOptions
) -> tuple[list[tuple[str, int]], list[str]]:
    """The paths as files and parts of files that :func:`read_inputs` reads one at a time, in its order; and notes.

    Args:
        paths: As :func:`read_inputs` takes them.
        transform: That of the model.
        options: ``skip_bad``.

    Returns:
        Pairs of a file and its part: of a Parquet file each row group; 0 of an image in a folder; -1, the whole, of
        all others.

    Raises:
        UserError: A path that is not there, or a Parquet file that cannot be read.
    """
    found, notes = [], []
    for path in map(Path, paths):
        files = [path]
        folder = stat.S_ISDIR(file_status(path).st_mode)
        if folder:
            files, said = _files_of(path, transform, options)
            notes += said
        for file in files:
            if str(file).lower().endswith(".parquet"):
                found += [(str(file), number) for number in range(tables.row_groups(file))]
            else:
                found.append((str(file), 0 if folder and not tables.is_table(file) else WHOLE))
    return found, notes


def _files_of(folder: Path, transform: DataTransform, options: DataOptions) -> tuple[list[Path], list[str]]:
    """What a model takes of a folder: its images, or for a model of rows its tables, where there are some."""
    if len(transform.shape) == 1:
        files = sorted(path for path in folder.rglob("*") if tables.is_table(path) and path.is_file()
                       and not any(part[0] in "._" for part in path.relative_to(folder).parts))  # fmt: skip
        if files:
            return files, []
    (files,), notes = find_images([folder], options.skip_bad)
    return files, notes


def _read(path: Path, transform: DataTransform, options: DataOptions, part: int = WHOLE) -> Inputs:
    """All samples of one file or folder, or of a part of a file."""
    if stat.S_ISDIR(file_status(path).st_mode):
        files, notes = _files_of(path, transform, options)
        if files and tables.is_table(files[0]):
            return read_inputs(files, transform, options, noisy=True)
        found = _read_images(files, transform, options)
        return found._replace(notes=(*notes, *found.notes))
    suffix = path.suffix.lower()
    if tables.is_table(path):
        frame = tables.read(path, options.skip_bad, None if part == WHOLE else part)
        table = transform.table or TableEncoding.numbers(frame.columns)
        _check_shape((len(table.kept),), transform.shape, path)
        found = read_table(frame, str(path), table, options)
        names = [f"{printable(path)}: {row}" for row in found.names]
        return found._replace(x=single(found.x.numpy(), str(path)), names=names)
    if part != WHOLE:
        return _read_images([path], transform, options)
    if suffix in (".npz", ".npy"):
        x, _, _ = arrays.read(path)
        return read_array(x, path, transform.shape, options)
    if suffix in images.SUFFIXES:
        return _read_images([path], transform, options)
    raise UserError(f"{path}: files ending in '{suffix}' are not read; give images, .npz, .npy, .csv or .parquet")


def read_table(frame: DataFrame, name: str, table: TableEncoding, options: DataOptions) -> Inputs:
    """The rows of a table for a model; those that hold what training never had deviate."""
    problems = frame.attrs.get("problems", ())
    x, rows, deviating = table.encode(frame, name, options.skip_bad, deviating=True, problems=problems)
    word = frame.index.name or "row"
    names = [f"{word} {frame.index[i]}" for i in rows.tolist()]
    left_out = len(frame) - len(rows)
    notes = (f"{name}: {left_out} row(s) with cells that cannot be read are left out.",) if left_out else ()
    return Inputs(x, names, deviating, notes)


def read_pictures(
    paths: Sequence[str | Path], transform: DataTransform, options: DataOptions
) -> tuple[list[Tensor], list[str], list[str]]:
    """Images of the model's size or larger, as they are: data units, each (C, H, W); their names, and notes.

    Arguments and errors as for :func:`read_inputs`, whose tiles would be apart.
    """
    pictures, names, notes = [], [], []
    for path in map(Path, paths):
        folder = stat.S_ISDIR(file_status(path).st_mode)
        if not folder and path.suffix.lower() not in images.SUFFIXES - {".npy"}:  # an array holds many
            found = read_inputs(path, transform, options, noisy=True)
            pictures, names = pictures + list(found.x), names + found.names
            continue
        (files,), said = find_images([path], options.skip_bad) if folder else ([[path]], [])
        found, bad = _pictures(files, transform, replace(options, size=None))
        pictures, names = pictures + list(found.values()), names + list(map(printable, found))
        notes += [*said, *left_out(bad)]
    if not pictures:
        raise UserError(f"nothing to read in {', '.join(map(str, paths))}")
    return pictures, names, notes


def read_measured(
    paths: Sequence[str | Path], transform: DataTransform, options: DataOptions, shape: tuple[int, ...]
) -> tuple[Tensor, list[str]]:
    """Images (N, *shape) of one shape that need not be the model's, data units, and their names.

    Arguments and errors as for :func:`read_inputs`.
    """
    parts, names = [], []
    for path in map(Path, paths):
        folder = stat.S_ISDIR(file_status(path).st_mode)
        if not folder and path.suffix.lower() in (".npy", ".npz"):
            found = read_array(arrays.read(path)[0], path, shape, options)
            parts, names = [*parts, found.x.float()], names + found.names
            continue
        (files,), _ = find_images([path], options.skip_bad) if folder else ([[path]], [])
        pictures, _ = _pictures(files, transform, replace(options, size=None), shape)
        for file, x in pictures.items():
            _check_shape(tuple(x.shape), shape, file)
            parts.append(x[None])
            names.append(printable(file))
    if not parts:
        raise UserError(f"nothing to read in {', '.join(map(str, paths))}")
    return torch.cat(parts), names


def _read_images(paths: list[Path], transform: DataTransform, options: DataOptions) -> Inputs:
    """Images of the model's size; the tiles that cover a larger one, so that none is resized unless training was."""
    found, bad = _pictures(paths, transform, options)
    samples, names, notes = [torch.empty(0, *transform.shape)], [], list(left_out(bad))
    height, width = transform.shape[1:]
    for path, x in found.items():
        places = places_of(x.shape[1:], (height, width), 1.0)
        samples += [x[None, :, top : top + height, left : left + width] for top, left in places]
        names += [printable(path) + (f" at {top},{left}" if len(places) > 1 else "") for top, left in places]
    if len(names) > len(found):
        notes.append(f"images larger than the model's {height} x {width} pixels are tiled: a row for each tile.")
    if options.size is not None:
        notes.append("images are resized to {} x {}, as in training.".format(*options.size))
    return without_columns(torch.cat(samples), names)._replace(notes=tuple(notes))


def _pictures(
    paths: list[Path], transform: DataTransform, options: DataOptions, shape: tuple[int, ...] | None = None
) -> tuple[dict[Path, Tensor], list[Path]]:
    """Images in data units, of the channels and at least the size of ``shape``, the model's; and files that cannot
    be read."""
    found, bad = {}, []
    shape = transform.shape if shape is None else shape
    for path in paths:
        try:
            info = images.describe(path)
            x = images.read_image(path, info.high, options.size, options.channels)
        except UserError:
            if not options.skip_bad:
                raise
            bad.append(path)
            continue
        larger = x.shape[0] == shape[0] and len(shape) == 3
        if not (larger and x.shape[1] >= shape[1] and x.shape[2] >= shape[2]):
            _check_shape(tuple(x.shape), shape, path)
        x = x.float()
        found[path] = x if path.suffix.lower() == ".npy" else on_grid(x, info.high, transform, path)
    return found, bad


def on_grid(x: Tensor, file_high: int | None, transform: DataTransform, path: Path) -> Tensor:
    """File values to the model's grey levels; files of floats hold data units already."""
    low, high = transform.low, transform.high
    if file_high is None or (low, high) == (0, file_high):
        return x
    if low is None or high is None:
        raise UserError(f"{path}: grey levels 0 ... {file_high}; the model's data are continuous: give an array")
    return transform.quantize(low + x * ((high - low) / file_high))


def read_array(x: np.ndarray, path: Path, shape: tuple[int, ...], options: DataOptions) -> Inputs:
    """Samples of an array for a model of this shape; ``path`` names them."""
    if len(shape) == 1:
        one_sample = x.shape == shape and shape != (1,)
    else:
        one_sample = x.ndim == 2 or (x.ndim == 3 and shape in (x.shape, (x.shape[2], *x.shape[:2])))
    x = x[None] if one_sample else x
    values, grid, _ = arrays.interpret(x, str(path), first=x.shape[1:] == shape)
    if values.ndim == 4:
        values = arrays.convert_images(values, grid, options)
    _check_shape(tuple(values.shape[1:]), shape, path)
    names = [f"{printable(path)}[{i}]" for i in range(len(values))]
    return without_columns(single(values.numpy(), str(path)), names)


def _check_shape(found: tuple[int, ...], needed: tuple[int, ...], path: Path) -> None:
    if found != needed:
        raise UserError(f"{path}: {_words(found)}; the model takes {_words(needed)}")


def check_range(found: Inputs, transform: DataTransform) -> None:
    """Values beyond the grey levels mean another scaling than the model's; half a level is dequantisation."""
    low, high, bin = transform.low, transform.high, transform.bin
    if bin is None or low is None or high is None:
        return
    x = found.x.flatten(1)
    beyond = ((x < low - bin / 2) | (x > high + bin / 2)).any(1)
    if beyond.any():
        first = int(beyond.int().argmax())
        values, levels = f"{x[first].min():g} to {x[first].max():g}", f"{low:g} ... {high:g}"
        raise UserError(f"{found.names[first]}: values from {values}; the model's grey levels are {levels}")


def without_columns(x: Tensor, names: list[str]) -> Inputs:
    """Samples that have no columns, so that none deviates."""
    return Inputs(x, names, [""] * len(x))


def _words(shape: tuple[int, ...]) -> str:
    if len(shape) == 1:
        return f"vectors of {shape[0]}"
    return "images of {1} x {2} pixels, {0} channel(s)".format(*shape)
