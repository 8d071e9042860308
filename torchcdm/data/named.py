"""Named data sets with fixed splits, in the formats in which they are published."""

from __future__ import annotations

import torch

from torchcdm.data.arrays import Grid, convert_images, source_from_splits
from torchcdm.data.options import DataOptions, Layout
from torchcdm.data.source import DataSource, MemorySplit, Split, permutation
from torchcdm.diffusion import exact as toys
from torchcdm.errors import UserError

POOL_SEED = 0
"""Seed of the permutation that parts training from validation. Fixed, so that published numbers compare."""

TOY_SIZES = (10_000, 2_000, 2_000)
"""Samples of a toy distribution for training, validation and test."""


def digits(argument: str, options: DataOptions, layout: Layout | None = None) -> DataSource:
    """scikit-learn's handwritten digits, 8x8, grey levels 0 ... 16.

    All rows are permuted with a fixed seed: 1300 for training, 200 for validation, 297 for test.
    """
    from sklearn.datasets import load_digits

    refuse_argument("digits", argument)
    data = load_digits()
    pool = MemorySplit(torch.from_numpy(data.images).to(torch.uint8)[:, None], torch.from_numpy(data.target))
    # The rows are ordered by writer: taken as they come, the test split is by other hands than the training split.
    pool = pool.select(permutation(len(pool), POOL_SEED))
    names = tuple(str(k) for k in range(10))
    return fixed_source("digits", pool, 1500, 200, (0, 16), options, names, layout)


def toy(argument: str, options: DataOptions, layout: Layout | None = None) -> DataSource:
    """A two-dimensional toy distribution: fresh samples, each split from its own stream of the seed."""
    splits = []
    for number, count in enumerate(TOY_SIZES):
        generator = torch.Generator().manual_seed(3 * options.seed + number)
        splits.append(MemorySplit(*toys.sample_named(argument, count, generator)))
    train, validation, test = splits
    names = tuple(str(k) for k in range(int(train.labels.max()) + 1))
    return source_from_splits(f"toy:{argument}", (train, validation, test), None, options, names, layout=layout)


def fixed_source(
    name: str,
    pool: MemorySplit,
    trainable: int,
    validation: int,
    grid: Grid,
    options: DataOptions,
    class_names: tuple[str, ...],
    layout: Layout | None = None,
) -> DataSource:
    """A source whose test split is fixed: the samples after the first ``trainable``.

    Args:
        name: SPEC.
        pool: Training samples, then test samples.
        trainable: Samples that training and validation share.
        validation: Samples of validation, unless the options give a fraction of ``trainable``.
        grid: Grey levels.
        options: ``seed`` and ``test_fraction`` have no influence: the splits are part of the data set.
        class_names: Names of the classes.
        layout: That of the model that scores the data.
    """
    if options.validation_fraction is not None:
        validation = round(options.validation_fraction * trainable)
        if trainable - validation < 2:
            raise UserError(f"{name}: validation takes {validation} of {trainable} samples; make it smaller")
    pool = MemorySplit(convert_images(pool.x, grid, options), pool.labels)
    order = permutation(trainable, POOL_SEED)
    splits: tuple[Split, Split, Split] = (
        pool.select(order[validation:]),
        pool.select(order[:validation]),
        pool.select(torch.arange(trainable, len(pool))),
    )
    notes = ["fixed splits: {} for training, {} for validation, {} for test.".format(*map(len, splits))]
    return source_from_splits(name, splits, grid, options, class_names, notes=notes, layout=layout)


def refuse_argument(name: str, argument: str) -> None:
    """For data sets that need no path."""
    if argument:
        raise UserError(f"'{name}' takes nothing after the colon; write: {name}")
