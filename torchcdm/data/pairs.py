"""Two data sets side by side: one source with the classes ``denominator`` and ``numerator``, for density ratios."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from torchcdm.data.assembly import Samples, assemble
from torchcdm.data.columns import check_discrete, constants_note, discrete_values, frequency_notes
from torchcdm.data.inputs import Inputs, read_inputs, without_columns
from torchcdm.data.objects import samples_of
from torchcdm.data.options import DataOptions, Layout
from torchcdm.data.source import DataSource, MemorySplit, Split
from torchcdm.data.specs import read_samples, spec_of
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
    counts = (len(given[0].parts["train"]), len(given[1].parts["train"]))
    for side, count in zip(given, counts, strict=True):
        if count < MIN_ROWS:
            raise UserError(f"{side.name}: too few samples, {count}; at least {MIN_ROWS} are needed")
    held_out = (max(2, round(fraction * counts[0])), max(2, round(fraction * counts[1])))
    if min(count - held for count, held in zip(counts, held_out, strict=True)) < 2:
        raise UserError(f"validation_fraction is {fraction}, which leaves nothing to train on; lower it")
    cut = [permutation(n, options.seed).split([held, n - held]) for n, held in zip(counts, held_out, strict=True)]
    parts = {"train": _repeated(cut[0][1], cut[1][1]), "validation": _repeated(cut[0][0], cut[1][0])}
    shapes = [_shape(side) for side in given]
    words = ["rows of numbers" if len(shape) == 1 else "images" for shape in shapes]
    if words[0] != words[1]:
        raise UserError(f"the denominator holds {words[0]}, the numerator {words[1]}; a ratio needs two of a kind")
    if len(shapes[0]) == 1:
        source, columns, warp = _from_tables(*given, parts, discrete, options)
        return Pair(source, counts, held_out, columns, warp)
    if shapes[0] != shapes[1]:
        both = f"{shapes[1]} and {shapes[0]}"
        raise UserError(f"images of numerator and denominator have shapes {both}; give size and channels")
    return Pair(_from_images(*given, parts, options), counts, held_out, None, None)


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
    needed = None if columns is None else Layout(layout.transform, tuple(columns))
    query = _read(x, "query", options or DataOptions(), needed)
    values, shape = query.parts["train"].tensors()[0], _shape(query)
    names = [query.row(i) for i in range(len(values))]
    if columns is None or layout.columns is None or warp is None:
        if shape != layout.transform.shape:
            raise UserError(f"{query.name}: samples have shape {shape}; the fitted ones have {layout.transform.shape}")
        return without_columns(values.float(), names)
    if len(shape) > 1:
        raise UserError(f"{query.name}: holds images; rows of {len(columns)} numbers are needed")
    if shape != (len(columns),):
        raise UserError(f"{query.name}: rows of {shape[0]} numbers; {len(columns)} are needed")
    z = warp(values.double())
    kept_at = [list(columns).index(column) for column in layout.columns]
    # The warp takes the value of a constant column to zero, to rounding.
    differs = z.abs() > CONSTANT * warp.location.abs().clamp_min(1)
    differs[:, kept_at] = False
    deviating = [", ".join(columns[k] for k in row.nonzero()[:, 0]) for row in differs]
    return Inputs(z[:, kept_at].float(), names, deviating)


def _read(data: Any, name: str, options: DataOptions, layout: Layout | None = None) -> Samples:
    """One data set: that of a file or SPEC, of a source, or of an object; all of it, or its training split."""
    if isinstance(data, (str, Path)):
        return read_samples(replace(options, spec=spec_of(data), **WHOLE), layout)
    if isinstance(data, DataSource):
        grid = None if data.transform.bin is None else (int(data.transform.low or 0), int(data.transform.high or 0))
        return Samples(name, {"train": data.train}, grid, columns=data.columns)
    return samples_of(data, None, options, name, layout)


def _shape(samples: Samples) -> tuple[int, ...]:
    return tuple(samples.parts["train"][0][0].shape)


def _columns(samples: Samples) -> tuple[str, ...]:
    return samples.columns or tuple(f"c{k}" for k in range(_shape(samples)[0]))


def _repeated(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both as long as the longer one, the shorter one repeated."""
    count = max(len(a), len(b))
    return a[torch.arange(count) % len(a)], b[torch.arange(count) % len(b)]


def _from_tables(
    denominator: Samples,
    numerator: Samples,
    parts: dict[str, tuple[Tensor, Tensor]],
    discrete: str,
    options: DataOptions,
) -> tuple[DataSource, tuple[str, ...], ColumnWarp]:
    columns, theirs = _columns(denominator), _columns(numerator)
    for one, other in ((denominator, numerator), (numerator, denominator)):
        missing = [column for column in _columns(one) if column not in _columns(other)]
        if missing:
            raise UserError(f"{other.name}: no column '{missing[0]}', which {one.name} has; give both the same")
    both = [side.parts["train"].tensors()[0].double().numpy() for side in (denominator, numerator)]
    both[1] = both[1][:, [theirs.index(column) for column in columns]]
    notes = [f"{len(both[1])} rows over {len(both[0])} rows."]
    notes += dict.fromkeys((*numerator.notes, *denominator.notes))
    widths = {}
    for column, x in zip(columns, np.concatenate(both).T, strict=True):
        values = discrete_values(x, column)
        if values is not None:
            widths[column] = cell_width(values)
            text = f"few distinct values: dequantised by uniform noise of width {widths[column]:g}"
            notes.append(f"column '{column}' has {text}.")
        elif (x != x[0]).any():
            notes += frequency_notes(x, column)
    if widths and discrete == "error":
        raise UserError(
            f"few distinct values in the columns {', '.join(widths)}: leave them out, or set discrete='dequantize', "
            "which adds uniform noise between their values"
        )
    noise, width = stream(options.seed, "dequantise"), np.array([widths.get(column, 0.0) for column in columns])
    both = [spread(x, width, torch.rand(x.shape, generator=noise, dtype=torch.float64).numpy()) for x in both]
    chosen = {split: np.concatenate([both[0][low], both[1][high]]) for split, (low, high) in parts.items()}
    order = permutation(len(chosen["train"]), options.seed).numpy()
    sources = np.repeat(np.arange(2), len(order) // 2)
    warp = ColumnWarp.fit(torch.from_numpy(chosen["train"][order]), torch.from_numpy(sources[order]))
    joined: dict[str, Split] = {
        split: MemorySplit(warp(torch.from_numpy(x)), torch.arange(2).repeat_interleave(len(x) // 2))
        for split, x in chosen.items()
    }
    samples = Samples(PAIR, joined, class_names=SOURCES, columns=columns)
    source = assemble(samples, replace(options, **WHOLE, dequantize=False))
    if source.constants:
        notes.append(constants_note(source.constants))
    return replace(source, notes=tuple(notes)), columns, warp


def _from_images(
    denominator: Samples, numerator: Samples, parts: dict[str, tuple[Tensor, Tensor]], options: DataOptions
) -> DataSource:
    grids = [side.grid for side in (denominator, numerator) if side.grid is not None]
    if len(grids) == 1:
        raise UserError("one of numerator and denominator holds grey levels, the other fractions; give both alike")
    grid = (min(low for low, _ in grids), max(high for _, high in grids)) if grids else None
    below, above = (side.parts["train"].tensors()[0].float() for side in (denominator, numerator))
    joined: dict[str, Split] = {"test": MemorySplit(below[:0])}
    for split, (low, high) in parts.items():
        joined[split] = MemorySplit(torch.cat([below[low], above[high]]), torch.arange(2).repeat_interleave(len(low)))
    source = assemble(Samples(PAIR, joined, grid, SOURCES), options)
    return replace(source, notes=(f"{len(above)} images over {len(below)} images.",))
