"""Groups of similar samples that stand for classes where there are none.

A generative model of data in groups is better than one without, whoever found the groups (arXiv 2212.00362,
2403.00570). They are found by spectral clustering of the graph of nearest neighbours, whose groups of clothes are
nearer to the true classes than those of k-means (``studies/JOURNAL.md``).
"""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from torchcdm.data.source import NO_LABEL, DataSource
from torchcdm.errors import UserError
from torchcdm.random import stream

# Most samples that groups are found in, numbers that are held at a time, and fewest samples for each group.
ROWS, NUMBERS, EACH = 12_000, 2**26, 10
# Of each sample in the graph, in so many main directions; and its ties to all samples over those to neighbours.
NEIGHBOURS, DIRECTIONS, TIE = 10, 50, 0.1


def without_labels(source: DataSource) -> DataSource:
    """The same source, whose samples have no classes."""
    bare = source.mapped(lambda split: split.relabelled(torch.full((len(split),), NO_LABEL)))
    return replace(bare, class_names=None)


def spectral_groups(x: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """The group of each row of ``x`` (N, dim), of ``count``: k-means of the leading eigenvectors of its graph.

    Rows of eigenvectors have length 1 (Ng, Jordan and Weiss, 2001). A weak tie of each row of ``x`` to all others
    (Qin and Rohe, arXiv 1309.4111) makes one graph of parts that have no neighbours in one another.
    """
    from scipy.sparse.linalg import LinearOperator, eigsh
    from sklearn.cluster import KMeans
    from sklearn.neighbors import kneighbors_graph

    graph = kneighbors_graph(x, min(NEIGHBOURS, len(x) - 1))
    graph = (graph + graph.T) / 2
    degrees = np.asarray(graph.sum(axis=1)).ravel()
    tie = TIE * degrees.mean()
    scale = 1 / np.sqrt(degrees + tie)

    def multiply(v: np.ndarray) -> np.ndarray:
        return scale * (graph @ (scale * v) + tie * (scale * v).mean())

    start = rng.normal(size=len(x))
    most = min(count, len(x) - 1)  # as many as the solver gives
    _, vectors = eigsh(LinearOperator(graph.shape, multiply, dtype=float), most, which="LA", v0=start)
    places = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return KMeans(count, n_init=10, random_state=int(rng.integers(2**31))).fit_predict(places)


def in_clusters(source: DataSource, count: int, seed: int) -> DataSource:
    """The same source with ``count`` groups of its training samples, found in model units, as classes.

    Groups are those of at most ``ROWS`` samples by their main directions; each other sample joins most of its
    nearest ones. The other splits have none: the group of a sample says something of it that a likelihood must not be
    told. UserError for fewer training samples than groups.
    """
    from sklearn.decomposition import PCA
    from sklearn.neighbors import KNeighborsClassifier

    split, most = source.train, max(1, NUMBERS // source.transform.dim)
    if len(split) < count:
        raise UserError(f"{source.name}: data.clusters is {count}, but there are {len(split)} training samples")

    def rows(z: Tensor) -> np.ndarray:
        return z.flatten(1).float().numpy()

    # Dequantised, as all that is fitted; which group a sample is in has no noise.
    x, _ = split.tensors(max(EACH * count, min(ROWS, most)))
    z = rows(source.transform.encode(x, stream(seed, "clusters")))
    main = PCA(min(DIRECTIONS, *z.shape), random_state=seed).fit(z)
    places = main.transform(z)
    groups = spectral_groups(places, count, np.random.default_rng(seed))
    found = KNeighborsClassifier(min(5, len(places)), weights="distance").fit(places, groups)
    parts = (source.transform(split.values(k).float()) for k in torch.arange(len(split)).split(most))
    labels = torch.from_numpy(np.concatenate([found.predict(main.transform(rows(part))) for part in parts])).long()
    names = tuple(f"cluster {k}" for k in range(count))
    notes = (*source.notes, *["the classes of the data are not used: groups stand for them."] * bool(source.classes))
    return replace(without_labels(source), train=split.relabelled(labels), class_names=names, notes=notes)
