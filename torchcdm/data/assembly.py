"""From the samples that a reader gives to a :class:`DataSource`: missing splits drawn, units measured."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchcdm.data.options import DataOptions
from torchcdm.data.source import CropSplit, DataSource, MemorySplit, Split
from torchcdm.errors import UserError
from torchcdm.random import permutation
from torchcdm.units import ColumnTransform, DataTransform, TableEncoding
from torchcdm.units.lattice import Cells, cell_width, discrete_values, frequent_values
from torchcdm.units.table import beyond_float32

Grid = tuple[int, int]
"""Smallest and largest grey level of integer data; None stands for continuous data."""

DEFAULT_FRACTION = 0.1
"""Share of the samples that validation and test each get where the data do not say it themselves."""

SMALLEST_SPLITTABLE = 10
"""Below this many samples data are not split at random."""

ROUNDING = 0.01
"""Deviation of what rounding to float32 takes from a column, beside the column's own, above which it is refused."""


@dataclass(frozen=True)
class Samples:
    """What a reader gives: fields as of :class:`DataSource`, and

    Attributes:
        parts: The split ``train``, and ``validation`` and ``test`` where the data have them.
        grid: Grey levels; None for continuous data.
        table: What the codes of a table are; None elsewhere.
    """

    name: str
    parts: dict[str, Split]
    grid: Grid | None = None
    class_names: tuple[str, ...] | None = None
    table: TableEncoding | None = None
    notes: tuple[str, ...] = ()


def assemble(samples: Samples, options: DataOptions, like: DataTransform | None = None) -> DataSource:
    """The source of samples; columns of a table that are constant in training are left out.

    The ``options`` have seed and shares of missing splits, and say whether samples are dequantised. ``like`` is that
    of the model that scores the data; None to measure the units on the training split. UserError for too few samples,
    nothing that varies, or data that do not fit the model.
    """
    name, table = samples.name, samples.table
    if not samples.parts["train"]:
        raise UserError(f"{name}: no training samples that can be read")
    splits, note = _complete_splits(samples, options)
    notes = [*samples.notes, note]
    if table is not None and like is None:
        table, varying, found = table.varying(splits[0].tensors()[0], name)
        if found:
            notes += found
            splits = tuple(MemorySplit(split.tensors()[0][:, varying], split.labels) for split in splits)
    first = splits[0][0][0]
    if first.dtype == torch.float64:
        for k, column in enumerate(splits[0].tensors()[0].numpy().T if like is None else ()):
            what = f"{name}: column '{f'c{k}' if table is None else table.names[k]}'"
            if (single(column, what).numpy() - column).std() > ROUNDING * column.std():
                raise UserError(f"{what} varies less than float32 resolves; subtract an offset")
        splits = tuple(MemorySplit(single(part.tensors()[0].numpy(), name), part.labels) for part in splits)
    if like is not None:
        _check_units(tuple(first.shape), samples.grid, like, name)
        return DataSource(name, *splits, like, samples.class_names, tuple(notes))
    shape, more = tuple(first.shape), []
    if samples.grid is not None:
        low, high = samples.grid
        transform = DataTransform.images(shape, high - low + 1, options.dequantize, low)
    elif len(shape) == 1:
        transform, more = _measure_columns(splits[0].tensors()[0], table, options.dequantize, name)
    else:
        x, _ = splits[0].tensors(limit=10_000)
        if bool((x == x.flatten()[0]).all()):
            raise UserError(f"{name}: all values are equal; there is nothing to learn")
        transform = DataTransform.standardize(x)
    transform.table = table
    return DataSource(name, *splits, transform, samples.class_names, (*notes, *more))


def _complete_splits(samples: Samples, options: DataOptions) -> tuple[tuple[Split, Split, Split], str]:
    """The three splits, those that are missing drawn from ``train``, and one sentence on where they come from."""
    name, parts, pool = samples.name, samples.parts, samples.parts["train"]
    wholes = pool.wholes if isinstance(pool, CropSplit) else None
    count, missing = len(pool) if wholes is None else len(wholes), {}
    for split, share in (("validation", options.validation_fraction), ("test", options.test_fraction)):
        if split not in parts:
            share = DEFAULT_FRACTION if share is None else share
            missing[split] = max(1, round(share * count)) if share else 0
    how = "split by the data themselves"
    if missing:
        held_out = sum(missing.values())
        smallest = SMALLEST_SPLITTABLE if held_out else 2
        if count < smallest and wholes is None:
            raise UserError(f"{name}: too few samples, {count}; at least {smallest} are needed")
        rest = count - held_out
        if rest < (2 if wholes is None else 1):
            raise UserError(f"{name}: validation and test take {held_out} of {count}; make them smaller")
        order = permutation(count, options.seed).split([*missing.values(), rest])
        if wholes is not None:
            order = [torch.cat([part[:0], *(wholes[i] for i in part)]) for part in order]
        parts = parts | {split: pool.select(part) for split, part in zip((*missing, "train"), order, strict=True)}
        how = "split at random" if len(missing) == 2 else f"{next(iter(missing))} drawn at random from training"
    splits = (parts["train"], parts["validation"], parts["test"])
    counts = "{} for training, {} for validation, {} for test".format(*map(len, splits))
    return splits, f"{how}: {counts} (seed {options.seed})." if missing else f"{how}: {counts}."


def _measure_columns(
    x: Tensor, table: TableEncoding | None, dequantize: bool, data: str
) -> tuple[DataTransform, list[str]]:
    """The transform of the training rows (N, d) of vectors or a table, and notes on columns of vectors."""
    rows, notes = x.double().numpy(), []
    cells = {} if table is None else table.cells  # whose encoding has said the rest
    for k, column in enumerate(rows.T if table is None else ()):
        what = f"column 'c{k}'"
        if (column == column[0]).all():
            raise UserError(f"{data}: {what} is constant; leave it out")
        if beyond_float32(column):
            notes.append(f"{what} varies little beside its size, beyond float32: subtract an offset.")
        found, frequent = discrete_values(column, f"c{k}"), frequent_values(column)
        if found and dequantize:
            cells[k] = Cells(found, cell_width(found))
            has = f"has {len(found)} distinct values: dequantised with cells of {cells[k].width:g}"
            notes.append(f"{what} {has}; they have probabilities.")
        elif found:
            notes.append(f"{what} has {len(found)} distinct values: its density has no upper bound.")
        elif frequent:
            often = ", ".join(f"{value:g} in {100 * share:.0f} %" for value, share in frequent.items())
            notes.append(f"{what} holds {often} of the rows: its density has no upper bound there; give a data frame.")
    if not cells or not dequantize:
        return DataTransform.standardize(x), notes
    return ColumnTransform.fit(x, cells, bent=False), notes


def single(x: np.ndarray, name: str) -> Tensor:
    """Finite numbers as float32; UserError where one is beyond."""
    with np.errstate(over="ignore"):
        values = np.ascontiguousarray(x, np.float32)
    if not np.isfinite(values).all():
        raise UserError(f"{name}: holds values beyond float32 (3e38); divide them by a constant")
    return torch.from_numpy(values)


def _check_units(shape: tuple[int, ...], grid: Grid | None, transform: DataTransform, name: str) -> None:
    """Refuses samples of another shape, or other grey levels, than the model's."""
    if shape != transform.shape:
        raise UserError(f"{name}: has shape {shape}; the model takes {transform.shape}")
    found = None if grid is None else (*grid, 1)
    taken = None if transform.bin is None else (transform.low, transform.high, transform.bin)
    if found != taken:
        mend = "give floats in the units of the training data" if taken is None else "rescale them"
        mend = "give whole numbers" if found is None else mend
        has, takes = ("grey levels {:g} ... {:g}".format(*at) if at else "continuous values" for at in (found, taken))
        raise UserError(f"{name}: {has}; the model takes {takes}; {mend}")
