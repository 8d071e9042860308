"""Two data sets side by side: one source with the classes ``denominator`` and ``numerator``, for density ratios."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchcdm.data import arrays, tables
from torchcdm.data.assembly import Grid, Samples, assemble
from torchcdm.data.columns import check_discrete, check_resolution, constants_note, discrete_values, frequency_notes
from torchcdm.data.inputs import Inputs, read_inputs, without_columns
from torchcdm.data.objects import from_object
from torchcdm.data.options import DataOptions, Layout
from torchcdm.data.source import DataSource, MemorySplit, Split
from torchcdm.data.specs import load_data, spec_of
from torchcdm.data.tables import Table
from torchcdm.errors import UserError
from torchcdm.random import permutation, stream
from torchcdm.units import ColumnWarp, cell_width, spread

SOURCES = ("denominator", "numerator")
"""The classes 0 and 1."""

MIN_ROWS = 20
"""Fewest samples of each data set."""

CONSTANT = 1e-9
"""Relative difference from the value of a constant column that is none."""

HELD_OUT = 0.15
"""Share of each data set that is held out unless another is given."""

WHOLE = {"validation_fraction": 0.0, "test_fraction": 0.0}
"""Data are split once both are read."""

PAIR = "numerator / denominator"


@dataclass(frozen=True)
class Pair:
    """Numerator and denominator, ready for training.

    Attributes:
        source: Labels 0 for the denominator, 1 for the numerator; as many of each in training, the smaller data set
            repeated; no test split.
        counts: Samples of denominator and numerator as they were given.
        held_out: How many of each are held out; the first ones of their class in the validation split.
        columns: All columns of a table or of vectors; the model sees ``source.columns``, those that vary.
        warp: What brings the columns to the units of ``source``; None for images.
    """

    source: DataSource
    counts: tuple[int, int]
    held_out: tuple[int, int]
    columns: tuple[str, ...] | None
    warp: ColumnWarp | None


class _Images(NamedTuple):
    """Images (N, C, H, W) in data units, and their grid."""

    name: str
    x: Tensor
    grid: Grid | None


def pair_up(
    numerator: Any,
    denominator: Any,
    options: DataOptions | None = None,
    discrete: Literal["dequantize", "error"] = "dequantize",
) -> Pair:
    """Both data sets, split into training and validation and scaled alike.

    Args:
        numerator: As :func:`torchcdm.data.from_object` takes them, a SPEC as :func:`torchcdm.data.load_data` takes
            them, or the path of a table, an array or a folder of images. Of a data set with splits, the training one.
        denominator: Likewise, with the same columns or the same shape.
        options: ``validation_fraction`` is the share of each that is held out, :data:`HELD_OUT` when None; ``seed`` is
            that of the split and of the dequantisation; ``size``, ``channels`` and ``skip_bad`` are for images.
        discrete: Columns with few values: ``dequantize`` adds uniform noise between neighbouring values, ``error``
            names them in an error.

    Raises:
        UserError: Data that do not go together, with what differs; cells that are no numbers; too few samples.
    """
    check_discrete(discrete)
    options = options or DataOptions()
    fraction = HELD_OUT if options.validation_fraction is None else options.validation_fraction
    if not fraction:
        raise UserError("validation_fraction is 0; it must be above 0 and below 1")
    given = [_read(data, name, options) for data, name in ((denominator, SOURCES[0]), (numerator, SOURCES[1]))]
    first, second = given
    counts = (_count(first), _count(second))
    for side, count in zip(given, counts, strict=True):
        if count < MIN_ROWS:
            raise UserError(f"{side.name}: too few samples, {count}; at least {MIN_ROWS} are needed")
    held_out = (max(2, round(fraction * counts[0])), max(2, round(fraction * counts[1])))
    if min(count - held for count, held in zip(counts, held_out, strict=True)) < 2:
        raise UserError(f"validation_fraction is {fraction}, which leaves nothing to train on; lower it")
    cut = [permutation(n, options.seed).split([held, n - held]) for n, held in zip(counts, held_out, strict=True)]
    parts = {"train": _repeated(cut[0][1], cut[1][1]), "validation": _repeated(cut[0][0], cut[1][0])}
    if isinstance(first, Table) and isinstance(second, Table):
        source, warp = _from_tables(first, second, parts, discrete, options)
        return Pair(source, counts, held_out, tuple(first.columns), warp)
    if isinstance(first, _Images) and isinstance(second, _Images):
        return Pair(_from_images(first, second, parts, options), counts, held_out, None, None)
    words = ["rows of numbers" if isinstance(side, Table) else "images" for side in given]
    raise UserError(f"the denominator holds {words[0]}, the numerator {words[1]}; a ratio needs two of a kind")


def read_query(
    x: Any,
    layout: Layout,
    columns: Sequence[str] | None = None,
    warp: ColumnWarp | None = None,
    options: DataOptions | None = None,
) -> Inputs:
    """Samples to be scored, in the data units of ``layout.transform``.

    Args:
        x: As one data set of :func:`pair_up`; a table may have its columns in any order, and further ones.
        layout: Transform of the data that were fitted, and the columns that it is for.
        columns: All columns of those; None for images.
        warp: Of all columns.
        options: ``size``, ``channels`` and ``skip_bad`` of images.

    Raises:
        UserError: Missing columns, another number of columns, another shape, or cells that are no numbers.
    """
    if columns is None and isinstance(x, (str, Path)) and os.path.exists(x):
        return read_inputs(x, layout, options)
    query = _read(x, "query", options or DataOptions())
    if not _count(query):
        raise UserError(f"{query.name}: holds no rows; there is nothing to score")
    if columns is None or layout.columns is None or warp is None:
        shape = (len(query.columns),) if isinstance(query, Table) else tuple(query.x.shape[1:])
        if isinstance(query, Table) or shape != layout.transform.shape:
            raise UserError(f"{query.name}: samples have shape {shape}; the fitted ones have {layout.transform.shape}")
        return without_columns(query.x.float(), [f"sample {i}" for i in range(len(query.x))])
    if not isinstance(query, Table):
        raise UserError(f"{query.name}: holds images; rows of {len(columns)} numbers are needed")
    if _numbered(query):
        if len(query.columns) != len(columns):
            raise UserError(f"{query.name}: rows of {len(query.columns)} numbers; {len(columns)} are needed")
        query = replace(query, columns=dict(zip(columns, query.columns.values(), strict=True)))
    x = warp(torch.from_numpy(query.matrix(columns)))
    kept_at = [list(columns).index(column) for column in layout.columns]
    # The warp takes the value of a constant column to zero, to rounding.
    differs = x.abs() > CONSTANT * warp.location.abs().clamp_min(1)
    differs[:, kept_at] = False
    return Inputs(x[:, kept_at].float(), [query.row(i) for i in range(len(query))], differs.any(1))


# --- reading -----------------------------------------------------------------------------------------------------


def _read(data: Any, name: str, options: DataOptions) -> Table | _Images:
    """One data set: a table, also where it came as an array of vectors, or images."""
    if isinstance(data, (str, Path)):
        spec = spec_of(data) if isinstance(data, str) or os.path.isdir(data) else str(data)
        kind, _, argument = spec.partition(":")
        is_file = isinstance(data, Path) or os.path.isfile(data)
        if not os.path.isdir(data) and (is_file or (kind in ("table", "array") and argument)):
            path = Path(data if is_file else argument)
            name = f"{name} ({path})"
            if path.suffix.lower() in tables.SUFFIXES:
                return replace(tables.read(path), name=name)
            return _from_array(arrays.read(path)[0], name)
        return _from_source(load_data(options, spec=spec, **WHOLE), f"{name} ({data})")
    if tables.is_frame(data):
        return tables.from_frame(data, f"{name} (data frame)")
    if isinstance(data, (Tensor, list, np.ndarray)):
        return _from_array(arrays.as_array(data, name), name)
    return _from_source(from_object(data, **WHOLE), name)


def _from_array(x: np.ndarray, name: str) -> Table | _Images:
    if x.ndim not in (1, 2):
        values, grid, _ = arrays.interpret(x, name)
        return _Images(name, values, grid)
    arrays.check_numbers(x, name)
    x = x[:, None] if x.ndim == 1 else x
    return Table(name, {f"c{k}": x[:, k] for k in range(x.shape[1])}, lambda i: f"row {i} (counted from 0)")


def _from_source(source: DataSource, name: str) -> Table | _Images:
    x, _ = source.train.tensors()
    if x.ndim == 2:
        return _from_array(x.numpy(), name)
    low, high = source.transform.low, source.transform.high
    return _Images(name, x, None if low is None or high is None else (int(low), int(high)))


def _numbered(table: Table) -> bool:
    """Whether the columns have no names of their own."""
    return list(table.columns) == [f"c{k}" for k in range(len(table.columns))]


def _count(side: Table | _Images) -> int:
    return len(side) if isinstance(side, Table) else len(side.x)


def _repeated(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both as long as the longer one, the shorter one repeated."""
    count = max(len(a), len(b))
    return a[torch.arange(count) % len(a)], b[torch.arange(count) % len(b)]


# --- tables ------------------------------------------------------------------------------------------------------


def _from_tables(
    denominator: Table,
    numerator: Table,
    parts: dict[str, tuple[Tensor, Tensor]],
    discrete: str,
    options: DataOptions,
) -> tuple[DataSource, ColumnWarp]:
    columns = _common_columns(denominator, numerator)
    both = [denominator.matrix(columns), numerator.matrix(columns)]
    together = [np.concatenate([x[:, k] for x in both]) for k in range(len(columns))]
    found = [discrete_values(x, column) for x, column in zip(together, columns, strict=True)]
    widths = {column: cell_width(values) for column, values in zip(columns, found, strict=True) if values is not None}
    if widths and discrete == "error":
        raise UserError(
            f"few distinct values in the columns {', '.join(widths)}: leave them out, or set discrete='dequantize', "
            "which adds uniform noise between their values"
        )
    notes = [f"{len(numerator)} rows over {len(denominator)} rows, {len(columns)} columns: {', '.join(columns)}."]
    notes += dict.fromkeys((*numerator.notes, *denominator.notes))
    for column, x in zip(columns, together, strict=True):
        if column in widths:
            text = f"few distinct values: dequantised by uniform noise of width {widths[column]:g}"
            notes.append(f"column '{column}' has {text}.")
        elif (x != x[0]).any():
            notes += frequency_notes(x, column)
    noise, width = stream(options.seed, "dequantise"), np.array([widths.get(column, 0.0) for column in columns])
    both = [spread(x, width, torch.rand(x.shape, generator=noise, dtype=torch.float64).numpy()) for x in both]
    chosen = {split: np.concatenate([both[0][low], both[1][high]]) for split, (low, high) in parts.items()}
    order = permutation(len(chosen["train"]), options.seed).numpy()
    sources = np.repeat(np.arange(2), len(order) // 2)
    warp = ColumnWarp.fit(torch.from_numpy(chosen["train"][order]), torch.from_numpy(sources[order]))
    joined: dict[str, Split] = {}
    for split, x in chosen.items():
        z = warp(torch.from_numpy(x)).numpy()
        if split == "train":
            check_resolution(z, columns, PAIR)
        joined[split] = MemorySplit(arrays.single(z, PAIR), torch.arange(2).repeat_interleave(len(x) // 2))
    samples = Samples(PAIR, joined, class_names=SOURCES, columns=tuple(columns))
    source = assemble(samples, replace(options, **WHOLE, dequantize=False))
    if source.constants:
        notes.append(constants_note(source.constants))
    return replace(source, notes=tuple(notes)), warp


def _common_columns(denominator: Table, numerator: Table) -> list[str]:
    """The columns, in the order of the denominator.

    Raises:
        UserError: They differ.
    """
    counts = len(numerator.columns), len(denominator.columns)
    if _numbered(denominator) and _numbered(numerator) and counts[0] != counts[1]:
        raise UserError("numerator and denominator have {} and {} columns; give both the same".format(*counts))
    for mine, other in ((denominator, numerator), (numerator, denominator)):
        missing = [column for column in mine.columns if column not in other.columns]
        if missing:
            raise UserError(f"{other.name}: no column '{missing[0]}', which {mine.name} has; give both the same")
    return list(denominator.columns)


# --- images ------------------------------------------------------------------------------------------------------


def _from_images(
    denominator: _Images, numerator: _Images, parts: dict[str, tuple[Tensor, Tensor]], options: DataOptions
) -> DataSource:
    shapes = [tuple(side.x.shape[1:]) for side in (denominator, numerator)]
    if shapes[0] != shapes[1]:
        both = f"{shapes[1]} and {shapes[0]}"
        raise UserError(f"images of numerator and denominator have shapes {both}; give size and channels")
    grids = [side.grid for side in (denominator, numerator) if side.grid is not None]
    if len(grids) == 1:
        raise UserError("one of numerator and denominator holds grey levels, the other fractions; give both alike")
    grid = (min(low for low, _ in grids), max(high for _, high in grids)) if grids else None
    joined: dict[str, Split] = {"test": MemorySplit(denominator.x[:0])}
    for split, (low, high) in parts.items():
        x = torch.cat([denominator.x[low].float(), numerator.x[high].float()])
        joined[split] = MemorySplit(x, torch.arange(2).repeat_interleave(torch.tensor([len(low), len(high)])))
    source = assemble(Samples(PAIR, joined, grid, SOURCES), options)
    return replace(source, notes=(f"{len(numerator.x)} images over {len(denominator.x)} images.",))
