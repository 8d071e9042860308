"""Files for a trained model: images, folders, arrays and tables in the model's data units and shape."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchcdm.data import arrays, images, tables
from torchcdm.data.columns import single
from torchcdm.data.folders import Search, left_out
from torchcdm.data.options import DataOptions, Layout
from torchcdm.data.reading import file_status, printable
from torchcdm.errors import UserError
from torchcdm.units import DataTransform


class Inputs(NamedTuple):
    """Samples that were read for a model.

    Attributes:
        x: Data units, float32 (N, *shape).
        names: The path of each, or the path and the row.
        deviating: Whether it holds another value in a column that was constant in training, where a model knows
            nothing: bool (N,).
        notes: What was left out, one sentence each.
    """

    x: Tensor
    names: list[str]
    deviating: Tensor
    notes: tuple[str, ...] = ()


def read_inputs(
    paths: str | Path | Sequence[str | Path],
    layout: Layout,
    options: DataOptions | None = None,
    noisy: bool = False,
) -> Inputs:
    """Samples for a model from files.

    An image file's full range, 0 ... 255 or 0 ... 65535, stands for the model's range of grey levels: a digit
    saved as a PNG by :func:`torchcdm.data.save_images` is read back with levels 0 ... 16.

    Args:
        paths: Image files, folders of images (recursive), .npz and .npy arrays, tables.
        layout: That of the model. A table is read by its columns, in whatever order it has them.
        options: ``size``, ``channels`` and ``skip_bad`` of images.
        noisy: Values of arrays may lie beyond the model's grey levels, as those of noisy images do.

    Raises:
        UserError: Nothing to read, a file that cannot be read or does not fit the model, with both shapes.

    Example:
        >>> x, names, deviating, notes = read_inputs(["a.png", "folder", "more.npz"], Layout(model.transform))
    """
    if isinstance(paths, (str, Path)):
        paths = [paths]
    target = _Target(layout, options or DataOptions(), noisy)
    parts = [target.read(path) for path in map(Path, paths)]
    if not any(part.names for part in parts):
        raise UserError(f"nothing to read in {', '.join(map(str, paths)) or 'an empty list of paths'}")
    x, names, deviating, notes = zip(*parts, strict=True)
    return Inputs(torch.cat(x), sum(names, []), torch.cat(deviating), sum(notes, ()))


@dataclass(frozen=True)
class _Target:
    """What files are brought to."""

    layout: Layout
    options: DataOptions
    noisy: bool

    @property
    def transform(self) -> DataTransform:
        return self.layout.transform

    @property
    def shape(self) -> tuple[int, ...]:
        return self.transform.shape

    def read(self, path: Path) -> Inputs:
        """All samples of one file or folder."""
        if stat.S_ISDIR(file_status(path).st_mode):
            search = Search(self.options.skip_bad)
            found = self._images(search.below(path))
            return found._replace(notes=(*search.notes(), *found.notes))
        suffix = path.suffix.lower()
        if suffix in tables.SUFFIXES:
            return self._table(path)
        if suffix in (".npz", ".npy"):
            return self._array(path)
        if suffix in images.SUFFIXES:
            return self._images([path])
        raise UserError(f"{path}: files ending in '{suffix}' are not read; give images, .npz, .npy, .csv or .parquet")

    def _images(self, paths: list[Path]) -> Inputs:
        samples, names, bad = [torch.empty(0, *self.shape)], [], []
        for path in paths:
            try:
                info = images.describe(path)
                x = images.ImageReader(info.high, self.options.size, self.options.channels)(path)
            except UserError:
                if not self.options.skip_bad:
                    raise
                bad.append(path)
                continue
            self._check_shape(tuple(x.shape), str(path))
            x = self._on_grid(x.float(), info.high, str(path))
            samples.append(self._check_range(x[None], str(path)))
            names.append(printable(path))
        return without_columns(torch.cat(samples), names)._replace(notes=left_out(bad))

    def _on_grid(self, x: Tensor, file_high: int | None, name: str) -> Tensor:
        """File values to the model's grey levels; float files, and .npy images, hold data units already."""
        low, high = self.transform.low, self.transform.high
        if file_high is None or (low, high) == (0, file_high) or name.lower().endswith(".npy"):
            return x
        if low is None or high is None:
            raise UserError(f"{name}: grey levels 0 ... {file_high}; the model's data are continuous: give an array")
        return self.transform.quantize(low + x * ((high - low) / file_high))

    def _array(self, path: Path) -> Inputs:
        x, _, _ = arrays.read(path)
        if len(self.shape) == 1:
            one_sample = x.shape == self.shape and self.shape != (1,)
        else:
            one_sample = x.ndim == 2 or (x.ndim == 3 and self.shape in (x.shape, (x.shape[2], *x.shape[:2])))
        x = x[None] if one_sample else x
        values, grid, _ = arrays.interpret(x, str(path), first=x.shape[1:] == self.shape)
        if values.ndim == 4:
            values = arrays.convert_images(values, grid, self.options)
        self._check_shape(tuple(values.shape[1:]), str(path))
        names = [f"{printable(path)}[{i}]" for i in range(len(values))]
        values = single(values.numpy(), str(path))
        return without_columns(self._check_range(values, str(path)), names)

    def _table(self, path: Path) -> Inputs:
        table = tables.read(path)
        columns = self.layout.columns or tuple(table.columns)
        self._check_shape((len(columns),), str(path))
        x = single(table.matrix(columns), str(path))
        deviating = torch.zeros(len(x), dtype=torch.bool)
        for column, value in self.layout.constants.items():
            if column in table.columns:
                deviating |= torch.from_numpy(table.numbers(column).astype(np.float32)) != value
        names = [f"{printable(path)}: {table.row(i)}" for i in range(len(x))]
        return Inputs(self._check_range(x, str(path)), names, deviating)

    def _check_shape(self, shape: tuple[int, ...], name: str) -> None:
        if shape != self.shape:
            raise UserError(f"{name}: {_words(shape)}; the model takes {_words(self.shape)}")

    def _check_range(self, x: Tensor, name: str) -> Tensor:
        """Values beyond the grey levels mean another scaling than the model's; half a level is dequantisation."""
        low, high, bin = self.transform.low, self.transform.high, self.transform.bin
        if len(x) and not self.noisy and bin is not None and low is not None and high is not None:
            smallest, largest = float(x.min()), float(x.max())
            if smallest < low - bin / 2 or largest > high + bin / 2:
                found, levels = f"{smallest:g} to {largest:g}", f"{low:g} ... {high:g}"
                raise UserError(f"{name}: values from {found}; the model's grey levels are {levels}")
        return x


def without_columns(x: Tensor, names: list[str]) -> Inputs:
    """Samples that have no columns, so that none deviates."""
    return Inputs(x, names, torch.zeros(len(x), dtype=torch.bool))


def _words(shape: tuple[int, ...]) -> str:
    if len(shape) == 1:
        return f"vectors of {shape[0]}"
    return "images of {1} x {2} pixels, {0} channel(s)".format(*shape)
