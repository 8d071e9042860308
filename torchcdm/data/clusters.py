"""Groups of similar samples that stand for classes where there are none.

A generative model of data in groups is better than one without, whoever found the groups: k-means does for images
(arXiv 2212.00362, 2403.00570).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from torchcdm.data.source import NO_LABEL, DataSource, Split
from torchcdm.errors import UserError
from torchcdm.random import evenly_spaced, stream

ROWS, NUMBERS = 20_000, 2**24
"""Samples that groups are found in, at most, and numbers that are read at a time."""


def without_labels(source: DataSource) -> DataSource:
    """The same source, whose samples have no classes."""
    bare = source.mapped(lambda split: split.relabelled(torch.full((len(split),), NO_LABEL)))
    return replace(bare, class_names=None)


def in_clusters(source: DataSource, count: int, seed: int) -> DataSource:
    """The same source with ``count`` groups of its training samples, found by k-means in model units, as classes.

    The other splits have none: the group of a sample says something of it that a likelihood must not be told.
    UserError for fewer training samples than groups.
    """
    from sklearn.cluster import MiniBatchKMeans

    split, transform = source.train, source.transform
    if len(split) < count:
        raise UserError(f"{source.name}: data.clusters is {count}, but there are {len(split)} training samples")

    def numbers(split: Split, rows: torch.Tensor) -> np.ndarray:
        x = transform.encode(split.batch(rows)[0], stream(seed, "clusters"))
        return x.flatten(1).float().numpy()

    found = MiniBatchKMeans(count, random_state=seed, n_init=3).fit(numbers(split, evenly_spaced(len(split), ROWS)))
    parts = torch.arange(len(split)).split(max(1, NUMBERS // transform.dim))
    labels = torch.cat([torch.from_numpy(found.predict(numbers(split, rows))) for rows in parts])
    names = tuple(f"cluster {k}" for k in range(count))
    return replace(without_labels(source), train=split.relabelled(labels.long()), class_names=names)
