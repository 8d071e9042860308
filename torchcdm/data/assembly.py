"""From the samples that a reader gives to a :class:`DataSource`: missing splits drawn, units measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from torchcdm.data.columns import check_resolution, constants_note, measure_columns, single
from torchcdm.data.options import DataOptions, Layout
from torchcdm.data.source import DataSource, MemorySplit, Split
from torchcdm.errors import UserError
from torchcdm.random import permutation
from torchcdm.units import DataTransform

Grid = tuple[int, int]
"""Smallest and largest grey level of integer data; None stands for continuous data."""

DEFAULT_FRACTION = 0.1
"""Share of the samples that validation and test each get where the data do not say it themselves."""

SMALLEST_SPLITTABLE = 10
"""Below this many samples data are not split at random."""


@dataclass(frozen=True)
class Samples:
    """What a reader gives.

    Attributes:
        name: The SPEC, or what kind of object.
        parts: The split ``train``, and ``validation`` and ``test`` where the data have them.
        grid: Grey levels; None for continuous data.
        class_names: Names of the classes 0, 1, ...; None without labels.
        columns: Names of the columns of a table; None elsewhere.
        notes: What was read off the data, one sentence each.
        row: What to call sample i of ``train``.
    """

    name: str
    parts: dict[str, Split]
    grid: Grid | None = None
    class_names: tuple[str, ...] | None = None
    columns: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    row: Callable[[int], str] = "sample {}".format


def assemble(samples: Samples, options: DataOptions, layout: Layout | None = None) -> DataSource:
    """The source of samples; columns of a table that are constant in training are left out.

    Args:
        samples: What was read.
        options: Seed and shares of the splits that the data do not have, and whether they are dequantised.
        layout: That of the model that scores the data; None to measure the units on the training split.

    Raises:
        UserError: Too few samples, nothing that varies, or data that do not fit the model.
    """
    name, columns = samples.name, samples.columns
    if not samples.parts["train"]:
        raise UserError(f"{name}: no training samples that can be read")
    splits, note = _complete_splits(samples, options)
    notes, constants = [*samples.notes, note], {}
    like = splits[0][0][0]
    if like.dtype == torch.float64:
        if layout is None:
            x = splits[0].tensors()[0].numpy()
            check_resolution(x, columns or [f"c{k}" for k in range(len(like))], name)
        splits = tuple(MemorySplit(single(part.tensors()[0].numpy(), name), part.labels) for part in splits)
    if columns is not None and layout is None:
        x, _ = splits[0].tensors()
        varying = (x != x[0]).any(0)
        constants = {column: float(x[0, k]) for k, column in enumerate(columns) if not varying[k]}
        columns = tuple(column for column in columns if column not in constants)
        if not columns:
            raise UserError(f"{name}: every column is constant; there is nothing to learn")
        if constants:
            notes.append(constants_note(constants))
            splits = tuple(MemorySplit(split.tensors()[0][:, varying], split.labels) for split in splits)
    if layout is None:
        transform, more = _measure(splits[0], samples.grid, options.dequantize, name, columns)
    else:
        transform, more = layout.transform, []
        _check_units(tuple(like.shape), samples.grid, transform, name)
    return DataSource(name, *splits, transform, samples.class_names, columns, (*notes, *more), constants)


def _complete_splits(samples: Samples, options: DataOptions) -> tuple[tuple[Split, Split, Split], str]:
    """The three splits, those that are missing drawn from ``train``, and one sentence on where they come from.

    A positive share gets at least one sample.
    """
    name, parts, pool = samples.name, samples.parts, samples.parts["train"]
    missing, how = [split for split in ("validation", "test") if split not in parts], "split by the data themselves"
    if missing:
        shares = {"validation": options.validation_fraction, "test": options.test_fraction}
        shares = {split: DEFAULT_FRACTION if shares[split] is None else shares[split] for split in missing}
        smallest = SMALLEST_SPLITTABLE if any(shares.values()) else 2
        if len(pool) < smallest:
            raise UserError(f"{name}: too few samples, {len(pool)}; at least {smallest} are needed")
        held_out = [max(1, round(share * len(pool))) if share else 0 for share in shares.values()]
        rest = len(pool) - sum(held_out)
        if rest < 2:
            raise UserError(f"{name}: validation and test take {sum(held_out)} of {len(pool)}; make them smaller")
        order = permutation(len(pool), options.seed).split([*held_out, rest])
        parts = parts | {split: pool.select(part) for split, part in zip((*missing, "train"), order, strict=True)}
        how = "split at random" if len(missing) == 2 else f"{missing[0]} drawn at random from training"
    splits = (parts["train"], parts["validation"], parts["test"])
    counts = "{} for training, {} for validation, {} for test".format(*map(len, splits))
    return splits, f"{how}: {counts} (seed {options.seed})." if missing else f"{how}: {counts}."


def _measure(
    train: Split, grid: Grid | None, dequantize: bool, name: str, columns: tuple[str, ...] | None
) -> tuple[DataTransform, list[str]]:
    """Transform of a training split, and notes: the grid for grey levels, mean and deviation for continuous data."""
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


def _check_units(shape: tuple[int, ...], grid: Grid | None, transform: DataTransform, name: str) -> None:
    """Refuses data that a model of ``transform`` would take for others: another shape or other grey levels."""
    if shape != transform.shape:
        raise UserError(f"{name}: has shape {shape}; the model takes {transform.shape}")
    found = None if grid is None else (*grid, 1)
    taken = None if transform.bin is None else (transform.low, transform.high, transform.bin)
    if found == taken:
        return
    if taken is None:
        mend = "give floats in the units of the training data"
    else:
        mend = "give whole numbers" if found is None else "rescale them"
    raise UserError(f"{name}: {_levels(found)}; the model takes {_levels(taken)}; {mend}")


def _levels(grid: tuple[float, float, float] | None) -> str:
    return "continuous values" if grid is None else "grey levels {:g} ... {:g}".format(*grid)
