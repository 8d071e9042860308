"""Named data sets with fixed splits, in the formats in which they are published."""

from __future__ import annotations

import torch

from torchcdm.data import tables
from torchcdm.data.arrays import convert_images
from torchcdm.data.assembly import Grid, Samples
from torchcdm.data.options import DataOptions, Layout
from torchcdm.data.source import MemorySplit, Split
from torchcdm.diffusion import exact as toys
from torchcdm.errors import UserError
from torchcdm.random import permutation, stream

POOL_SEED = 0
"""Seed of the permutation that parts training from validation. Fixed, so that published numbers compare."""

TOY_SIZES = {"train": 10_000, "validation": 2_000, "test": 2_000}
"""Samples of a toy distribution."""


def digits(argument: str, options: DataOptions, _: Layout | None = None) -> Samples:
    """scikit-learn's handwritten digits, 8x8, grey levels 0 ... 16.

    All rows are permuted with a fixed seed: 1300 for training, 200 for validation, 297 for test.
    """
    from sklearn.datasets import load_digits

    if argument:
        raise UserError("'digits' takes nothing after the colon; write: digits")
    data = load_digits()
    pool = MemorySplit(torch.from_numpy(data.images).to(torch.uint8)[:, None], torch.from_numpy(data.target))
    # The rows are ordered by writer: taken as they come, the test split is by other hands than the training split.
    pool = pool.select(permutation(len(pool), POOL_SEED))
    return fixed("digits", pool, 1500, 200, (0, 16), options, tuple(str(k) for k in range(10)))


def wine(argument: str, options: DataOptions, layout: Layout | None = None) -> Samples:
    """scikit-learn's wine: 178 rows of 13 measured columns, three classes, split at random."""
    from sklearn.datasets import load_wine

    if argument:
        raise UserError("'wine' takes nothing after the colon; write: wine")
    data = load_wine()
    columns = dict(zip(data.feature_names, data.data.T, strict=True))
    table = tables.Table("wine", columns, "row {}".format)
    return tables.samples_of({"train": table}, "wine", options, data.target, layout)


def toy(argument: str, options: DataOptions, _: Layout | None = None) -> Samples:
    """A two-dimensional toy distribution: fresh samples, each split from its own stream of the seed."""
    parts: dict[str, Split] = {}
    for split, count in TOY_SIZES.items():
        parts[split] = MemorySplit(*toys.sample_named(argument, count, stream(options.seed, split)))
    names = tuple(str(k) for k in range(int(parts["train"].labels.max()) + 1))
    return Samples(f"toy:{argument}", parts, class_names=names)


def fixed(
    name: str,
    pool: MemorySplit,
    trainable: int,
    validation: int,
    grid: Grid,
    options: DataOptions,
    class_names: tuple[str, ...],
) -> Samples:
    """Samples whose splits are part of the data set, whatever seed and test fraction the options give.

    Args:
        name: SPEC.
        pool: Samples of training and validation, ``trainable`` in number, then those of test.
        trainable: See above.
        validation: Number of samples of validation, unless the options give a fraction of ``trainable``.
        grid: Grey levels.
        options: Size, channels and validation fraction.
        class_names: Names of the classes.
    """
    if options.validation_fraction is not None:
        validation = round(options.validation_fraction * trainable)
    if trainable - validation < 2:
        raise UserError(f"{name}: validation takes {validation} of {trainable} samples; make it smaller")
    pool = MemorySplit(convert_images(pool.x, grid, options), pool.labels)
    order = permutation(trainable, POOL_SEED)
    parts: dict[str, Split] = {
        "train": pool.select(order[validation:]),
        "validation": pool.select(order[:validation]),
        "test": pool.select(torch.arange(trainable, len(pool))),
    }
    return Samples(name, parts, grid, class_names)
