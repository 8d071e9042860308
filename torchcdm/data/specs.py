"""From a SPEC string to a :class:`DataSource`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from torchcdm.data import arrays, celeba, folders, hub, named, published, tables
from torchcdm.data.source import DataSource, Options
from torchcdm.errors import UserError, nearest
from torchcdm.units import DataTransform

LOADERS: dict[str, Callable[[str, Options], DataSource]] = {
    "digits": named.digits,
    "fashion-mnist": published.fashion_mnist,
    "cifar10": published.cifar10,
    "celeba": celeba.celeba,
    "folder": folders.load,
    "array": arrays.load,
    "table": tables.load,
    "hf": hub.load,
    "toy": named.toy,
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


def load_data(
    spec: str,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    validation_fraction: float | None = None,
    test_fraction: float | None = None,
    seed: int = 0,
    limit: int | None = None,
    skip_bad: bool = False,
    label: str | None = None,
    dequantize: bool = True,
    transform: DataTransform | None = None,
    columns: Sequence[str] | None = None,
) -> DataSource:
    """The data set that a SPEC names, to train on or for a trained model to score.

    Args:
        spec: ``digits``, ``fashion-mnist[:PATH]``, ``cifar10[:PATH]``, ``celeba:PATH``, ``folder:PATH``,
            ``array:FILE.npz`` or ``.npy``, ``table:FILE.csv`` or ``.parquet``, ``hf:NAME``, ``toy:NAME``.
        size: Images are resized to this (H, W).
        channels: Images are converted to 1, 3 or 4 channels.
        validation_fraction: Share of validation. None: the data set's own split, or 0.1; 0: none.
        test_fraction: Share of test where the data have no test split of their own; 0.1 when None.
        seed: Seed of random splits and of toy samples. Named data sets have fixed splits.
        limit: At most this many samples in every split.
        skip_bad: Leave out images that cannot be read, and say how many; every file is read once to find them.
        label: Column of a table that holds the class.
        dequantize: Whether training and scoring add uniform noise to grey levels; False as in the paper.
        transform: Of the model that scores the data, which must have its shape and grey levels; measured on the
            training split when None.
        columns: The columns that the model was trained on; a table is read by them, in whatever order it has them.

    Raises:
        UserError: Anything wrong with the SPEC or with the files, named in one line.

    Example:
        >>> source = load_data("digits")
        >>> source.shape, len(source.train), len(source.validation), len(source.test)
        ((1, 8, 8), 1300, 200, 297)
    """
    check_spec(spec)
    kind, _, argument = spec.partition(":")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise UserError(f"size is {size}; it must be two positive numbers, height and width")
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}; it must be at least 1")
    size = None if size is None else (int(size[0]), int(size[1]))
    options = Options(
        size, channels, validation_fraction, test_fraction, seed, skip_bad, label, dequantize, transform, columns
    )
    if label is not None and kind not in ("table", "hf"):
        raise UserError(f"label '{label}' names a column of a table; {spec} has no columns")
    source = LOADERS[kind](argument, options).limited(limit)
    if len(source.shape) == 1 and (size is not None or channels is not None):
        raise UserError(f"size and channels are for images; {spec} holds vectors of {source.shape[0]} numbers")
    return source


def check_spec(spec: str) -> None:
    """Refuses what is no SPEC, or names a file or folder that is not there."""
    kind, _, argument = spec.partition(":")
    if kind in NEED_ARGUMENT and not argument:
        raise UserError(f"'{spec}' does not say which; write {NEED_ARGUMENT[kind]}")
    if kind not in LOADERS:
        raise UserError(_unknown(spec))
    if kind in ("folder", "array", "table") and not Path(argument).exists():
        raise UserError(f"{argument}: no such file or folder")


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
    prefix = "folder" if path.is_dir() else PREFIXES.get(path.suffix.lower())
    return f"{prefix}:{text}" if text and prefix and path.exists() else text


def _unknown(spec: str) -> str:
    """What to say of a text that is no SPEC: that of a bare path, that there is no such file, or the nearest name."""
    meant, kind = spec_of(spec), spec.partition(":")[0]
    if meant != spec:
        return f"unknown data '{spec}'; write {meant}"
    if kind == spec and (Path(spec).suffix or len(Path(spec).parts) > 1):
        return f"{spec}: no such file or folder"
    return f"unknown data '{spec}'; {nearest(kind, LOADERS)}"
