"""Groups of similar samples that stand for classes where there are none.

A generative model of data in groups is better than one without, whoever found the groups: k-means does for images
(arXiv 2212.00362, 2403.00570).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from torchcdm.data.source import NO_LABEL, DataSource
from torchcdm.errors import UserError
from torchcdm.random import stream

ROWS, NUMBERS, EACH = 20_000, 2**26, 10
"""Most samples that groups are found in, numbers that are held at a time, and fewest samples for each group."""


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

    split, most = source.train, max(1, NUMBERS // source.transform.dim)
    if len(split) < count:
        raise UserError(f"{source.name}: data.clusters is {count}, but there are {len(split)} training samples")

    def rows(z: Tensor) -> np.ndarray:
        return z.flatten(1).float().numpy()

    # Dequantised, as all that is fitted; which group a sample is in has no noise.
    x, _ = split.tensors(max(EACH * count, min(ROWS, most)))
    z = source.transform.encode(x, stream(seed, "clusters"))
    found = MiniBatchKMeans(count, random_state=seed, n_init=3).fit(rows(z))
    parts = (source.transform(split.values(k).float()) for k in torch.arange(len(split)).split(most))
    labels = torch.from_numpy(np.concatenate([found.predict(rows(part)) for part in parts])).long()
    names = tuple(f"cluster {k}" for k in range(count))
    return replace(without_labels(source), train=split.relabelled(labels), class_names=names)
