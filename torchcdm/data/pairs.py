"""Two data sets side by side: one source with the classes ``denominator`` and ``numerator``, for density ratios."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from torchcdm.data import tables
from torchcdm.data.inputs import Inputs, check_range, check_shape, read_inputs, read_table
from torchcdm.data.loading import check_spec, read_samples, samples_of, spec_of
from torchcdm.data.options import DataOptions
from torchcdm.data.source import DataSource, Grid, MemorySplit, single, split_rows
from torchcdm.errors import UserError
from torchcdm.random import permutation, stream
from torchcdm.units import ColumnTransform, DataTransform, TableEncoding
from torchcdm.units.frames import as_frame, by_place, check_only_numbers, is_frame, noted, unnamed, without_counter
from torchcdm.units.lattice import Discrete, by_chance, spread
from torchcdm.units.table import ID, may_be_id

if TYPE_CHECKING:
    from pandas import DataFrame

SOURCES = ("denominator", "numerator")  # the classes 0 and 1
MIN_ROWS = 20  # fewest samples of each data set
DEPTH = 255  # times as wide a range of grey levels is another scale, as of 8 and 16 bits, not another brightness
HELD_OUT = 0.15  # share of each data set that is held out unless another is given
PAIR = "numerator / denominator"  # what messages call both


@dataclass(frozen=True)
class Pair:
    """Numerator and denominator, ready for training."""

    # Labels 0 for the denominator, 1 for the numerator; as many of each, the smaller data set repeated: the first ones
    # of a class are all of its samples, and then they come back.
    source: DataSource
    counts: tuple[int, int]  # samples of denominator and numerator as they were given
    held_out: tuple[int, int]  # how many of each are held out
    warp: ColumnTransform | None  # brings codes of a table, or vectors, to the units of ``source``; None for images


def pair_up(
    numerator: Any, denominator: Any, options: DataOptions | None = None, discrete: Discrete = "dequantize"
) -> Pair:
    """Both data sets, split into training and validation and scaled alike; UserError where they do not go together.

    Args:
        numerator: As :func:`torchcdm.data.from_object` takes them, but no DataSource; a SPEC, or the path of a table,
            an array or a folder of images. Of a data set with splits, the training one.
        denominator: Another, with the same columns or the same shape.
        options: ``validation_fraction`` is the share of each that is held out, ``HELD_OUT`` when None; ``seed`` is
            that of the split and of the dequantisation; ``size``, ``channels``, ``dequantize`` are for images.
        discrete: Columns with few values: ``dequantize`` adds uniform noise over their cells, ``error`` names them.
    """
    options = options or DataOptions()
    if options.validation_fraction == 0:
        raise UserError("validation_fraction is 0; it must be above 0 and below 1")
    values, table, transform, notes, _ = read_pair(numerator, denominator, options, discrete)
    if table is not None and not options.dequantize:
        raise UserError("data.dequantize is of images; discrete='error' refuses columns that would be dequantised")
    counts, warp = (len(values[0]), len(values[1])), None
    fraction = HELD_OUT if options.validation_fraction is None else options.validation_fraction
    cells = {} if table is None else table.cells
    cut = [split_rows(x, by_chance(x, cells), fraction, options.seed) for x in values]
    # Both as long as the longer one, the shorter one repeated.
    longest = [max(map(len, pair)) for pair in zip(*cut, strict=True)]
    held, kept = ([part[k][torch.arange(n) % len(part[k])] for part in cut] for k, n in enumerate(longest))
    if table is not None:
        values, warp, constant = _warped(values, table, kept, options.seed)
        notes += constant
    train, validation = (
        MemorySplit(torch.cat([values[0][low], values[1][high]]), torch.arange(2).repeat_interleave(len(low)))
        for low, high in (kept, held)
    )
    turn = torch.cat([torch.arange(longest[1]) // len(rows) for _, rows in cut])
    order = permutation(len(train), options.seed)
    train = train.select(order[turn[order].argsort(stable=True)])
    transform = transform or DataTransform.standardize(train.x)
    source = DataSource(PAIR, train, validation, MemorySplit(train.x[:0]), transform, SOURCES, tuple(notes))
    return Pair(source, counts, (len(cut[0][0]), len(cut[1][0])), warp)


def read_pair(
    numerator: Any, denominator: Any, options: DataOptions, discrete: Discrete = "dequantize"
) -> tuple[list[Tensor], TableEncoding | None, DataTransform | None, list[str], list[Tensor]]:
    """Samples of denominator and numerator, what encodes a table, the transform of grey levels, notes, and the places
    of the samples in the data, from 0."""
    given = [read_side(data, name, options) for data, name in ((denominator, SOURCES[0]), (numerator, SOURCES[1]))]
    sides, grids = [side for side, _ in given], [grid for _, grid in given if grid is not None]
    counts = (len(sides[0]), len(sides[1]))
    names = [noted(side, "name", name) for side, name in zip(sides, SOURCES, strict=True)]
    _check_counts(names, counts)
    words = ["images" if isinstance(side, Tensor) else "rows of numbers" for side in sides]
    if words[0] != words[1]:
        raise UserError(f"the denominator holds {words[0]}, the numerator {words[1]}; a ratio needs two of a kind")
    table = transform = None
    if isinstance(sides[0], Tensor):
        shapes = [tuple(side.shape[1:]) for side in sides]
        if shapes[0] != shapes[1]:
            both = f"{shapes[1]} and {shapes[0]}"
            raise UserError(f"images of numerator and denominator have shapes {both}; give size and channels")
        if len(grids) == 1:
            raise UserError("one of numerator and denominator holds grey levels, the other fractions; give both alike")
        if grids:
            widths = [high - low for low, high in grids]
            if max(widths) >= DEPTH * max(1, min(widths)):
                both = "the denominator has grey levels {} ... {}, numerator {} ... {}".format(*grids[0], *grids[1])
                raise UserError(f"{both}; convert both to one depth, or give floats of one scale")
            low, high = min(low for low, _ in grids), max(high for _, high in grids)
            transform = DataTransform.images(shapes[0], high - low + 1, options.dequantize, low)
        values, notes = [side.float() for side in sides], [f"{counts[1]} images over {counts[0]} images."]
        rows = [torch.arange(count) for count in counts]
    else:
        if options.size is not None or options.channels is not None:
            raise UserError("size and channels are for images; numerator and denominator hold rows of numbers")
        values, rows, table, notes = _coded(sides, names, discrete, options.skip_bad)
    return values, table, transform, notes, rows


def read_query(x: Any, transform: DataTransform, warp: ColumnTransform | None, options: DataOptions) -> Inputs:
    """Samples to be scored, in the data units of ``transform``, that of the data that were fitted.

    ``x`` is as one data set of :func:`pair_up`; a table may have its columns in any order, and further ones. ``warp``
    is that of the pair. UserError for missing columns, another shape, or cells that cannot be read.
    """
    table = None if warp is None else warp.table
    if table is None and isinstance(x, (str, Path)) and os.path.exists(x):
        return read_inputs(x, transform, options, tiled=False)
    query, grid = read_side(x, "query", options, table)
    if table is None:
        check_shape(tuple(query.shape[1:]), transform.shape, "query")
        if grid is not None and transform.bin is None:
            raise UserError("query: grey levels; the fitted samples are continuous values: give such")
        if grid is not None and transform.high - transform.low >= DEPTH * max(1, grid[1] - grid[0]):
            fitted = f"the fitted ones are {transform.low:g} ... {transform.high:g}"
            raise UserError("query: grey levels {} ... {}; {}: convert both to one depth".format(*grid, fitted))
        names = [f"sample {i}" for i in range(len(query))]
        check_range(query, names, transform)
        return Inputs(query.float(), names, [""] * len(query))
    if isinstance(query, Tensor):
        raise UserError(f"query: holds images; rows of {len(table.columns)} numbers are needed")
    found = read_table(query, "query", warp, options)
    return found._replace(x=warp(found.x).float())


def read_side(
    data: Any, name: str, options: DataOptions, like: TableEncoding | None = None
) -> tuple[DataFrame | Tensor, Grid | None]:
    """One data set as :func:`pair_up` reads it, all or its training split: a data frame, or images and their grid.
    Images are (N, C, H, W); vectors become a table, whose columns are those of ``like``, in its order."""
    import pandas as pd

    if is_frame(data):
        return as_frame(data) if like is not None else without_counter(as_frame(data)), None
    if isinstance(data, (str, Path)):
        spec = spec_of(data)
        if spec.startswith("table:"):
            check_spec(spec)
            frame = tables.read(Path(spec.removeprefix("table:")), options)
            return tables.chosen(frame, options, str(data)) if like is None else frame, None
        found = read_samples(replace(options, spec=spec))
    else:
        found = samples_of(data, None, options, name)
    x, _ = found.parts["train"].tensors()
    if x.ndim > 2:
        return x, found.grid
    if found.table is not None:
        return found.table.decode(x), None
    frame = pd.DataFrame(x.numpy(), pd.RangeIndex(len(x), name="sample"), [f"c{k}" for k in range(x.shape[1])])
    return frame if like is None else by_place(frame, [column.name for column in like.columns], name), None


def _check_counts(names: Sequence[str], counts: Sequence[int]) -> None:
    """UserError for too few samples of a side."""
    for name, count in zip(names, counts, strict=True):
        if count < MIN_ROWS:
            raise UserError(f"{name}: too few samples, {count}; at least {MIN_ROWS} are needed")


def _coded(
    frames: list[DataFrame], names: list[str], discrete: Discrete, skip_bad: bool
) -> tuple[list[Tensor], list[Tensor], TableEncoding, list[str]]:
    """Codes of both tables, float64, the rows of each that they are, their encoding, and notes."""
    if set(frames[0].columns) != set(frames[1].columns):
        k = int(unnamed(frames[1].columns))
        if unnamed(frames[k].columns):
            check_only_numbers(frames[1 - k], names[1 - k])
        frames[k] = by_place(frames[k], frames[1 - k].columns, names[k])
    for one, other in ((0, 1), (1, 0)):
        missing = [column for column in frames[one].columns if column not in frames[other].columns]
        if missing:
            raise UserError(f"{names[other]}: no column '{missing[0]}', which {names[one]} has; give both the same")
    notes = list(dict.fromkeys(note for frame in frames[::-1] for note in noted(frame, "notes")))
    notes.append(f"{len(frames[0].columns)} columns: {', '.join(frames[0].columns)}.")
    whole, both = tables.joined(frames), " / ".join(names[::-1])
    try:
        table, more = TableEncoding.fit(whole, both, skip_bad)
    except UserError:
        table, _ = TableEncoding.fit(whole, both, skip_bad=True)
        for frame, name in zip(frames, names, strict=True):
            table.encode(frame, name)  # tells which of the two holds what cannot be read
        raise
    few = [column.name for column in table.kept if column.values and not column.mixed]
    if few and discrete == "error":
        mend = "leave them out, or set discrete='dequantize', which adds uniform noise between their values"
        raise UserError(f"few distinct values in the columns {', '.join(few)}: {mend}")
    encoded = [table.encode(frame, name, skip_bad) for frame, name in zip(frames, names, strict=True)]
    codes, rows = [one.x for one in encoded], [one.rows for one in encoded]
    counts = list(map(len, rows))
    _check_counts(names, counts)
    notes.insert(0, f"{counts[1]} rows over {counts[0]} rows.")
    for frame, name, count in zip(frames[::-1], names[::-1], counts[::-1], strict=True):
        if bad := len(frame) - count:
            more.append(f"{name}: {bad} row(s) with cells that cannot be read are left out.")
    for column, *sides in zip(table.kept, *(x.T.numpy() for x in codes), strict=True):
        # Ids that begin anew on each side are not all different, and yet tell the sides apart.
        if column.kind == "number" and all(map(may_be_id, sides)) and not may_be_id(np.concatenate(sides)):
            more.append(f"column '{column.name}' {ID}.")
    return codes, rows, table, [*notes, *more]


def _warped(
    codes: list[Tensor], table: TableEncoding, train: Sequence[Tensor], seed: int
) -> tuple[list[Tensor], ColumnTransform, list[str]]:
    """Both tables in units of a warp, float32, that is fitted to the rows of ``train``; a note of constant columns."""
    table, varying, constant = table.varying(torch.cat([x[part] for x, part in zip(codes, train, strict=True)]), PAIR)
    codes, noise = [x[:, varying] for x in codes], stream(seed, "dequantise")
    codes = [spread(x, torch.rand(x.shape, generator=noise, dtype=x.dtype), table.cells) for x in codes]
    trained = torch.cat([x[part] for x, part in zip(codes, train, strict=True)])
    order, sources = permutation(len(trained), seed), torch.arange(2).repeat_interleave(len(train[0]))
    warp = ColumnTransform.fit(trained[order], sources=sources[order])
    warp.table = table
    return [single(warp(x).numpy(), PAIR) for x in codes], warp, constant
