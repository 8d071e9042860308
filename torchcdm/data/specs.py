"""From a SPEC string to a :class:`DataSource`."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from torchcdm.data import arrays, celeba, folders, hub, named, published, tables
from torchcdm.data.assembly import Samples, assemble
from torchcdm.data.options import DataOptions, Layout
from torchcdm.data.reading import file_status
from torchcdm.data.source import DataSource
from torchcdm.errors import UserError, nearest

LOADERS: dict[str, Callable[[str, DataOptions, Layout | None], Samples]] = {
    "digits": named.digits,
    "fashion-mnist": published.fashion_mnist,
    "cifar10": published.cifar10,
    "celeba": celeba.celeba,
    "folder": folders.load,
    "array": arrays.load,
    "table": tables.load,
    "hf": hub.load,
    "toy": named.toy,
    "wine": named.wine,
}
"""What a SPEC may begin with; the loader gets what follows the colon."""

PREFIXES = dict.fromkeys((".npz", ".npy"), "array") | dict.fromkeys(tables.SUFFIXES, "table")
"""Kinds of data by the suffix of their file."""

NEED_ARGUMENT = {
    "folder": "folder:PATH",
    "array": "array:FILE.npz",
    "table": "table:FILE.csv",
    "hf": "hf:NAME, such as hf:ylecun/mnist",
    "toy": "toy:NAME, such as toy:two-moons",
}


def load_data(data: str | DataOptions, layout: Layout | None = None, **fields: Any) -> DataSource:
    """The data set that a SPEC names, to train on or for a trained model to score.

    Args:
        data: A SPEC (``digits``, ``folder:PATH``, ``table:FILE.csv`` ...), or all options with it.
        layout: That of the model that scores the data, which must have its shape, columns and grey levels. None to
            train: the units are measured on the training split.
        **fields: Fields of :class:`torchcdm.data.DataOptions`; they replace those of ``data``.

    Raises:
        UserError: Anything wrong with the options or with the files, named in one line.

    Example:
        >>> source = load_data("digits")
        >>> source.shape, len(source.train), len(source.validation), len(source.test)
        ((1, 8, 8), 1300, 200, 297)
    """
    options = replace(data if isinstance(data, DataOptions) else DataOptions(data), **fields)
    source = assemble(read_samples(options, layout), options, layout).limited(options.limit)
    if len(source.shape) == 1 and (options.size is not None or options.channels is not None):
        raise UserError(f"size and channels are for images; {source.name} holds vectors of {source.shape[0]} numbers")
    return source


def read_samples(options: DataOptions, layout: Layout | None = None) -> Samples:
    """The samples that a SPEC names, before units are measured; arguments and errors as for :func:`load_data`."""
    spec = options.spec
    if spec is None:
        raise UserError("no data: this preset has none of its own; give --data, such as folder:PATH or table:FILE.csv")
    check_spec(spec)
    kind, _, argument = spec.partition(":")
    if options.label is not None and kind not in ("table", "hf"):
        raise UserError(f"label '{options.label}' names a column of a table; {spec} has no columns")
    return LOADERS[kind](argument, options, layout)


def check_spec(spec: str) -> None:
    """Refuses what is no SPEC, or names a file or folder that is not there."""
    kind, _, argument = spec.partition(":")
    if kind in NEED_ARGUMENT and not argument:
        raise UserError(f"'{spec}' does not say which; write {NEED_ARGUMENT[kind]}")
    if kind not in LOADERS:
        raise UserError(_unknown(spec))
    if kind in ("folder", "array", "table"):
        path = Path(argument)
        if (kind == "folder") != stat.S_ISDIR(file_status(path).st_mode):
            raise UserError(f"{path}: a {'file' if kind == 'folder' else 'folder'}; write {spec_of(path)}")


def parse_size(text: str) -> tuple[int, int]:
    """``HxW`` or one number for squares, as on the command line.

    Raises:
        UserError: Neither.
    """
    match = re.fullmatch(r"([1-9]\d*)(?:[xX]([1-9]\d*))?", text.strip())
    if not match:
        raise UserError(f"size '{text}' is not understood; write height x width, such as 64x64")
    return int(match[1]), int(match[2] or match[1])


def spec_of(path: str | Path) -> str:
    """The SPEC of a table, an array or a folder; a SPEC as it is."""
    text, path = str(path), Path(path)
    prefix = "folder" if os.path.isdir(path) else PREFIXES.get(path.suffix.lower())
    return f"{prefix}:{text}" if text and prefix and os.path.exists(path) else text


def _unknown(spec: str) -> str:
    """What to say of a text that is no SPEC: that of a bare path, that there is no such file, or the nearest name."""
    meant, kind = spec_of(spec), spec.partition(":")[0]
    if meant != spec:
        return f"unknown data '{spec}'; write {meant}"
    if kind == spec and (Path(spec).suffix or len(Path(spec).parts) > 1):
        return f"{spec}: no such file or folder"
    return f"unknown data '{spec}'; {nearest(kind, LOADERS)}"
