"""From a SPEC string or a Python object to a :class:`DataSource`."""

import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchcdm.data import arrays, folders, hub, named, tables
from torchcdm.data.clusters import in_clusters, without_labels
from torchcdm.data.images import channels_first, from_pillow
from torchcdm.data.options import DataOptions
from torchcdm.data.source import CropSplit, DataSource, Grid, LazySplit, MemorySplit, Samples, Split, single
from torchcdm.errors import UserError, nearest
from torchcdm.random import evenly_spaced, permutation
from torchcdm.runtime.reading import file_status
from torchcdm.units import ColumnTransform, DataTransform, TableEncoding
from torchcdm.units.frames import as_frame, is_frame
from torchcdm.units.lattice import Cells, cell_width, discrete_values, frequent_values
from torchcdm.units.table import beyond_float32

# Share of the samples that validation and test each get where the data do not say it themselves.
DEFAULT_FRACTION = 0.1
SMALLEST_SPLITTABLE = 10  # below this many samples data are not split at random
# Deviation of what rounding to float32 takes from a column, beside the column's own, above which it is refused.
ROUNDING = 0.01

# What a SPEC may begin with: the loader, which gets what follows the colon, and how that is written.
LOADERS: dict[str, tuple[Callable[[str, DataOptions, DataTransform | None], Samples], str]] = {
    "digits": (named.digits, ""), "fashion-mnist": (named.fashion_mnist, "[:PATH]"),
    "cifar10": (named.cifar10, "[:PATH]"), "celeba": (named.celeba, "[:PATH]"), "folder": (folders.load, ":PATH"),
    "array": (arrays.load, ":FILE.npz"), "table": (tables.load, ":FILE.csv"),
    "hf": (hub.load, ":NAME, such as hf:ylecun/mnist"), "toy": (named.toy, ":NAME, such as toy:two-moons"),
    "wine": (named.wine, ""),
}  # fmt: skip


def load_data(data: str | DataOptions, like: DataTransform | None = None, **fields: Any) -> DataSource:
    """The data set that a SPEC names, to train on or for a trained model to score, or UserError with what is wrong.

    Args:
        data: A SPEC (``digits``, ``folder:PATH``, ``table:FILE.csv`` ...), or all options with it.
        like: That of the model that scores the data, which must have its shape, columns and grey levels. None to
            train: the units are measured on the training split.
        **fields: Fields of :class:`torchcdm.data.DataOptions`; they replace those of ``data``.

    Example:
        >>> source = load_data("digits")
        >>> source.shape, len(source.train), len(source.validation), len(source.test)
        ((1, 8, 8), 1300, 200, 297)
    """
    options = replace(data if isinstance(data, DataOptions) else DataOptions(data), **fields)
    source = replace(assemble(read_samples(options, like), options, like), options=options)
    if len(source.shape) == 1 and (options.size is not None or options.channels is not None):
        raise UserError(f"size and channels are for images; {source.name} holds vectors of {source.shape[0]} numbers")
    return source


def from_object(data: Any, labels: Any = None, options: DataOptions | None = None, **fields: Any) -> DataSource:
    """A data source from a Python object, split at random; UserError where it is not understood.

    Integers are grey levels; floats are continuous.

    Args:
        data: Tensor or array (N, d), (N, C, H, W) or (N, H, W, C) as the sizes tell, of a tensor with up to four
            channels; a pandas DataFrame or Series; a torch Dataset of samples or (sample, label) pairs, samples being
            tensors, arrays or Pillow images; a pair (samples, labels); or a DataSource, which is given back.
        labels: Classes 0 ... K - 1, (N,), or texts; for a data frame also the name of a column. None for a DataSource.
        options: How the data are split (``validation_fraction``, ``test_fraction``, ``seed``, ``limit``) and read
            (``dequantize``; ``label``, ``columns``, ``drop`` and ``skip_bad`` of a data frame).
        **fields: Fields of :class:`torchcdm.data.DataOptions`; they replace those of ``options``.

    Example:
        >>> from_object(torch.randn(100, 3)).shape
        (3,)
    """
    if isinstance(data, DataSource):
        if labels is not None:
            raise UserError("labels have no effect on a DataSource, which has its own; make it with them")
        return data
    options = replace(options or DataOptions(), **fields)
    return assemble(samples_of(data, labels, options), options)


def samples_of(data: Any, labels: Any, options: DataOptions, name: str | None = None) -> Samples:
    """All samples of an object, as :func:`from_object` takes it, that is no DataSource; ``name`` is for messages."""
    if isinstance(data, tuple) and len(data) == 2 and labels is None:
        data, labels = data
    if not is_frame(data):
        _check_no_columns(options, "an array or a Dataset")
    if isinstance(data, (Tensor, np.ndarray, list, memoryview)):
        tensor = isinstance(data, Tensor)
        x = arrays.as_array(data, name := name or ("tensor" if tensor else "array"))
        return arrays.samples_of(x, labels, name, options, first=x.ndim == 4 and channels_first(x.shape[1:], tensor))
    if is_frame(data):
        if labels is not None:
            column = labels if isinstance(labels, str) else None
            labels, options = None if column else labels, replace(options, label=column)
        return tables.samples_of({"train": as_frame(data)}, name or "data frame", options, labels)
    known = hasattr(data, "__getitem__") and hasattr(data, "__len__")
    if not known or isinstance(data, (str, bytes, Mapping)) or hasattr(data, "tocsr"):
        kind = type(data).__name__
        raise UserError(f"data of type {kind} are not understood; give a tensor, an array, a data frame or a Dataset")
    return _from_dataset(data, labels, options)


def read_samples(options: DataOptions, like: DataTransform | None = None) -> Samples:
    """The samples that a SPEC names, before units are measured; arguments and errors as for :func:`load_data`."""
    spec = options.spec
    if spec is None:
        raise UserError("no data: this preset has none of its own; give --data, such as folder:PATH or table:FILE.csv")
    check_spec(spec)
    kind, _, argument = spec.partition(":")
    if kind not in ("table", "hf"):
        _check_no_columns(options, spec)
    if options.crop is not None and kind != "folder":
        raise UserError(f"crop is for folders of images of any size (folder:PATH); {spec} is none")
    if options.crop is not None and options.size is not None:
        raise UserError("crops are cut from images as they are; give --crop or --size, not both")
    return LOADERS[kind][0](argument, options, like)


def _check_no_columns(options: DataOptions, name: str) -> None:
    columns = [*([options.label] if options.label else []), *(options.columns or ()), *options.drop]
    if columns:
        raise UserError(f"'{columns[0]}' names a column of a table; {name} has no columns")


def check_spec(spec: str) -> None:
    """Refuses what is no SPEC, or names a file or folder that is not there."""
    kind, _, argument = spec.partition(":")
    if kind not in LOADERS:
        meant = spec_of(spec)
        if meant != spec:
            raise UserError(f"unknown data '{spec}'; write {meant}")
        if os.path.exists(spec):
            raise UserError(f"{spec}: no table, array or folder of images; give .csv, .parquet, .npz or a folder")
        if kind == spec and (Path(spec).suffix or Path(spec).name != spec):
            raise UserError(f"{spec}: no such file or folder")
        raise UserError(f"unknown data '{spec}'; {nearest(kind, LOADERS)}")
    needed = LOADERS[kind][1]
    if argument and not needed:
        raise UserError(f"'{kind}' takes nothing after the colon; write: {kind}")
    if needed.startswith(":") and not argument:
        raise UserError(f"'{spec}' does not say which; write {kind}{needed}")
    if kind in ("folder", "array", "table"):
        is_folder, meant = stat.S_ISDIR(file_status(Path(argument)).st_mode), spec_of(argument)
        if (kind == "folder") != is_folder or meant not in (spec, argument):
            mend = f"write {meant}" if meant != argument else "give the folder that it lies in"
            raise UserError(f"{argument}: a {'folder' if is_folder else 'file'}, no {kind}; {mend}")


def parse_size(text: str) -> tuple[int, int]:
    """``HxW`` or one number for squares, as on the command line; UserError for any other text."""
    match = re.fullmatch(r"([1-9]\d*)(?:[xX]([1-9]\d*))?", text.strip())
    if not match:
        raise UserError(f"size '{text}' is not understood; write height x width, such as 64x64")
    return int(match[1]), int(match[2] or match[1])


def spec_of(path: str | Path) -> str:
    """The SPEC of a table, an array or a folder; a SPEC as it is."""
    text, path = str(path), Path(path)
    prefix = "array" if path.suffix.lower() in arrays.SUFFIXES else "table" if tables.is_table(path) else None
    prefix = "folder" if os.path.isdir(path) else prefix
    return f"{prefix}:{text}" if text and prefix and os.path.exists(path) else text


def _item(dataset: Any, index: int) -> tuple[Tensor, Any]:
    """A sample as a tensor of event shape, and its label or None."""
    item, what = dataset[index], f"sample {index} of the Dataset"
    value, label = item[:2] if isinstance(item, (tuple, list)) and len(item) >= 2 else (item, None)
    value = value[0] if isinstance(value, (tuple, list)) and len(value) == 1 else value
    if hasattr(value, "getbands"):
        value, _ = from_pillow(value)
    elif not isinstance(value, (Tensor, np.ndarray)):
        raise UserError(f"{what} is a {type(value).__name__}; give tensors or images")
    last = value.ndim == 3 and not channels_first(value.shape, isinstance(value, Tensor))
    value = arrays.as_array(value, what)
    arrays.check_numbers(value, what)
    value = torch.from_numpy(np.moveaxis(value, 2, 0) if last else value)
    return value[None] if value.ndim == 2 else value, label


def _sample(read: Callable[[int], tuple[Tensor, Any]], index: int) -> Tensor:
    """Of an item the sample alone."""
    return read(index)[0]


def _from_dataset(dataset: Any, y: Any, options: DataOptions) -> Samples:
    """The samples in memory where they are small, else read when they are asked for; labels by a pass over all."""
    count = len(dataset)
    if count == 0:
        raise UserError("the Dataset is empty")
    read: Callable[[int], tuple[Tensor, Any]] = partial(_item, dataset)
    pool = LazySplit(partial(_sample, read), range(count), name="the Dataset: sample ")
    if pool.is_small(count):  # read once, with the labels
        read = [read(index) for index in range(count)].__getitem__
        pool.read = partial(_sample, read)
    if y is None and read(0)[1] is not None:
        y = [read(index)[1] for index in range(count)]
    pool = pool.in_memory_if_small(count)
    if isinstance(pool, MemorySplit):
        return arrays.samples_of(pool.x.numpy(), y, "Dataset", options, first=True)
    shape, dtype = tuple(pool.like.shape), pool.like.dtype
    if dtype not in (torch.uint8, torch.float32):
        raise UserError(f"the Dataset gives {dtype}; a large one must give uint8 or float32")
    (numbers,), class_names = arrays.read_labels(y, [count], "Dataset")
    notes = (f"{count} samples of shape {shape}, read when they are asked for.",)
    pool = pool if numbers is None else pool.relabelled(numbers)
    return Samples("Dataset", {"train": pool}, (0, 255) if dtype == torch.uint8 else None, class_names, notes=notes)


def assemble(samples: Samples, options: DataOptions, like: DataTransform | None = None) -> DataSource:
    """The source of samples; columns of a table that are constant in training are left out.

    ``like`` is the transform of the model that scores the data; None to measure the units on the training split.
    UserError for too few samples, nothing that varies, or data that do not fit the model.
    """
    name, table = samples.name, samples.table
    if not samples.parts["train"]:
        raise UserError(f"{name}: no training samples that can be read")
    splits, note = _complete_splits(samples, options)
    notes = [*samples.notes, note]
    if table is not None and like is None:
        table, varying, constant = table.varying(splits[0].tensors()[0], name)
        splits = tuple(MemorySplit(split.tensors()[0][:, varying], split.labels) for split in splits)
        notes += constant
    first = splits[0][0][0]
    if first.dtype == torch.float64:
        for k, column in enumerate(splits[0].tensors()[0].numpy().T if like is None else ()):
            what = f"{name}: column '{f'c{k}' if table is None else table.names[k]}'"
            if (single(column, what).numpy() - column).std() > ROUNDING * column.std():
                raise UserError(f"{what} varies less than float32 resolves; subtract an offset")
        splits = tuple(MemorySplit(single(part.tensors()[0].numpy(), name), part.labels) for part in splits)
    shape, transform = tuple(first.shape), like
    if like is not None:
        _check_units(shape, samples.grid, like, name)
    elif samples.grid is not None:
        low, high = samples.grid
        transform = DataTransform.images(shape, high - low + 1, options.dequantize, low)
    elif len(shape) == 1:
        transform, more = _measure_columns(splits[0].tensors()[0], table, options.dequantize, name)
        notes += more
    else:
        x, _ = splits[0].tensors(limit=10_000)
        if bool((x == x.flatten()[0]).all()):
            raise UserError(f"{name}: all values are equal; there is nothing to learn")
        transform = DataTransform.standardize(x)
    if like is None:
        transform.table = table
        seen = set(splits[0].labels.tolist())
        unseen = [label for k, label in enumerate(samples.class_names or ()) if k not in seen]
        notes += [f"no training sample has the class {', '.join(unseen)}."] if unseen else []
    source = DataSource(name, *splits, transform, samples.class_names, tuple(notes))
    if options.clusters is not None:
        source = in_clusters(source, options.clusters, options.seed) if like is None else without_labels(source)
    if options.limit is not None:
        source = source.mapped(lambda split: split.select(evenly_spaced(len(split), options.limit)))
    return source


def _complete_splits(samples: Samples, options: DataOptions) -> tuple[tuple[Split, Split, Split], str]:
    """The three splits, those that are missing drawn from ``train``, and one sentence on where they come from."""
    name, parts, pool = samples.name, samples.parts, samples.parts["train"]
    wholes = pool.wholes if isinstance(pool, CropSplit) else None
    count = len(pool if wholes is None else wholes)
    shares = {"validation": options.validation_fraction, "test": options.test_fraction}
    shares = {split: DEFAULT_FRACTION if share is None else share for split, share in shares.items()}
    taken = {split: max(1, round(share * count)) if share else 0 for split, share in shares.items()}
    missing = {split: rows for split, rows in taken.items() if split not in parts}
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
