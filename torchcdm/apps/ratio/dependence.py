"""Log ratios of pairs (x, y) over strangers, x of one row and y of another: log p(x, y) / p(x) p(y).

Every row is judged by what was learned from other folds of the rows. Columns become normal scores by their ranks,
which changes no ratio. Beside them each side has bent variates: directions of x, of its squared length, and of
products of the two, that correlate most with such directions of y. Rotations by the length are nearly linear there.
"""

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import logsumexp, ndtri
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.functional import softplus

from torchcdm.apps.ratio.classifiers import LAYERS, MEMBERS, WIDTH, Networks, folds, train
from torchcdm.apps.ratio.coordinates import unmixing
from torchcdm.random import derive, stream
from torchcdm.runtime.processes import map_rows

STEPS, RATE, DECAY = 600, 5e-3, 0.5  # most steps of the networks, their largest rate, and weight decay
RANK = 16  # products in their log ratio
CHECKED = 1000  # rows of a fold on which a step is judged: the loss is of all pairs among them
STRANGERS = 2  # strangers of each row that estimates are compared on

ROWS_EACH = 4  # rows for each feature below which they are few
VARIATES = 8  # bent variates of a side, at most
FARTHEST = 4.0  # deviations beyond which a row counts as lying there
WIDEST = 2000  # features of both sides beyond which there are no variates: their time grows with the cube
# Standard errors from 0 that the weight of a feature needs to stay, in turn: few features, less noise in variates.
SIGNIFICANT = 2.0, 3.0, 4.0

TREES, LEAVES, SHRINKAGE = 100, 16, 0.1  # most boosted trees, their leaves, and how much of each is added
MIN_STOPPING = 200  # rows that allow to hold some out for the end of the boosting
PSEUDO = 0.5  # meetings that frequencies count from
FEW = 8  # columns of a side that trees are given beside its variates, at most

LogRatio = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of rows of x and of their partners, rows of y: numbers of both to log ratios, (N,)."""


def strangers(rows: np.ndarray) -> list[np.ndarray]:
    """Other rows in the place of each, ``STRANGERS`` times."""
    return [np.roll(rows, 1 + k + k * len(rows) // STRANGERS) for k in range(STRANGERS)]


class Canonical(NamedTuple):
    """Canonical variates of both sides, (N, r) each, and their correlations on rows that were not fitted, (r,)."""

    left: np.ndarray
    right: np.ndarray
    correlations: np.ndarray

    def terms(self, rows: np.ndarray, partners: np.ndarray) -> np.ndarray:
        """Log ratios of Gaussians with these correlations, of each pair of variates, (N, r)."""
        u, v, square = self.left[rows], self.right[partners], self.correlations**2
        exponent = self.correlations * u * v - square * (u**2 + v**2) / 2
        return exponent / (1 - square) - 0.5 * np.log1p(-square)

    def losses(self, seen: np.ndarray) -> np.ndarray:
        """Log loss of telling pairs of ``seen`` rows from strangers by the sum of the first 0 ... r terms, nats."""
        pairs, others = (self.terms(seen, partners).cumsum(1) for partners in (seen, *strangers(seen)[:1]))
        return np.append(2 * np.log(2), np.logaddexp(0, -pairs).mean(0) + np.logaddexp(0, others).mean(0))

    def gaussians(self, seen: np.ndarray) -> LogRatio:
        """The sum of the first terms, as many as tell pairs of ``seen`` rows best: later ones may repeat these."""
        count = int(self.losses(seen).argmin())
        return lambda rows, partners: self.terms(rows, partners)[:, :count].sum(1)


def canonical(x: np.ndarray, y: np.ndarray, seen: np.ndarray, most: int | None = None) -> Canonical:
    """At most so many canonical variates (Hotelling 1936) of features (N, a) and (N, b), from the rows ``seen``.

    A squared correlation of ``seen`` rows is too large by (1 - square)(a + b) / rows, on others too small by as much:
    what remains is kept. None where rows are fewer than ``ROWS_EACH`` for each feature.
    """
    rows, white = len(seen), []
    if x.shape[1] + y.shape[1] > min(rows / ROWS_EACH, WIDEST):
        return Canonical(x[:, :0], y[:, :0], np.zeros(0))
    for side in (x, y):
        values, vectors = np.linalg.eigh(np.cov(side[seen].T).reshape(side.shape[1], -1))
        kept = values > 1e-8 * values.max()
        white.append((side - side[seen].mean(0)) @ (vectors[:, kept] / values[kept] ** 0.5))
    left, found, right = np.linalg.svd(white[0][seen].T @ white[1][seen] / rows, full_matrices=False)
    excess = 2 * sum(side.shape[1] for side in white) / rows
    square = np.clip(found**2 - (1 - found**2) * excess, 0, 1 - 1e-6)
    kept = np.flatnonzero(square)[:most]
    turned = white[0] @ left[:, kept], white[1] @ right.T[:, kept]
    return Canonical(*(np.clip(side, -FARTHEST, FARTHEST) for side in turned), square[kept] ** 0.5)


def shrunk(x: np.ndarray, y: np.ndarray, seen: np.ndarray) -> Canonical:
    """Canonical variates of columns (N, a) and (N, b) where the ``seen`` rows are few for them.

    By covariances shrunk towards a multiple of the identity (Ledoit and Wolf 2004). All correlations are less by one
    factor (James and Stein 1961), the share of their squares that is beyond chance, which has to be significant.
    """
    from sklearn.covariance import ledoit_wolf

    white = []
    for side in (x, y):
        values, vectors = np.linalg.eigh(ledoit_wolf(side[seen])[0])
        white.append((side - side[seen].mean(0)) @ (vectors / values**0.5))
    left, found, right = np.linalg.svd(white[0][seen].T @ white[1][seen] / len(seen), full_matrices=False)
    chance = np.prod([np.square(side[seen]).sum() for side in white]) / len(seen) ** 3
    proven = np.square(found).sum() > chance * (1 + SIGNIFICANT[0] * (2 / left.shape[0] / right.shape[1]) ** 0.5)
    share = 1 - chance / np.square(found).sum() if proven else 0.0
    turned = white[0] @ left, white[1] @ right.T
    return Canonical(*(np.clip(side, -FARTHEST, FARTHEST) for side in turned), (share * found).clip(0, 1 - 1e-6))


def normal_scores(x: np.ndarray) -> np.ndarray:
    """Rows (N, d) to those of normals with the same ranks in each column."""
    return ndtri(rankdata(x, axis=0) / (len(x) + 1))


def products(x: np.ndarray) -> np.ndarray:
    """Columns (N, d) about the origin with their squared length in deviations, and products of it: (N, 3 d + 2)."""
    x = x / np.abs(x).max()
    length = np.square(x).sum(1, keepdims=True)
    length = (length - length.mean()) / (length.std() or 1.0)
    few = np.hstack([x, length])
    many = np.hstack([few, length * few, length * length * x])
    return many / many.std(0).clip(1e-150)


def significant(x: np.ndarray, variates: np.ndarray, errors: float) -> np.ndarray:
    """Columns of (N, a) whose weight is so many standard errors from 0 in a regression of any of the variates."""
    x = x - x.mean(0)
    inverse = np.linalg.pinv(x.T @ x, hermitian=True)
    weights = inverse @ x.T @ variates
    error = (variates - x @ weights).std(0) * np.sqrt(np.diag(inverse).clip(1e-150)[:, None])
    return (np.abs(weights) > errors * error).any(1)


def turned(x: np.ndarray, y: np.ndarray, seen: np.ndarray) -> Canonical:
    """Canonical variates of the features that matter, turned to independent components, and these by their ranks."""
    found = canonical(x, y, seen, VARIATES)
    for errors in SIGNIFICANT if found.correlations.size else ():
        left, right = significant(x[seen], found.right[seen], errors), significant(y[seen], found.left[seen], errors)
        if not (left.any() and right.any()):
            break
        x, y = x[:, left], y[:, right]
        found = canonical(x, y, seen, VARIATES)
    if (count := int(found.losses(seen).argmin())) < 2:
        return found
    sides = (side[:, :count] for side in found[:2])
    return canonical(*(normal_scores(side @ unmixing(side[seen]).T) for side in sides), seen)


class Towers(nn.Module):
    """Networks f of x and g of y, log ratio f(x)·g(y) + a(x) + b(y): all pairs of a batch at the cost of its rows."""

    def __init__(self, columns: tuple[int, int], seed: int) -> None:
        super().__init__()
        draw = stream(seed, "towers")
        for name, width in zip(("left", "right"), columns, strict=True):
            setattr(self, name, Networks([width, *[WIDTH] * (LAYERS - 1), RANK + 1], draw, 0.5))
            setattr(self, f"{name}_straight", Networks([width, RANK + 1], draw, 0.1))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """f and a of x, g and b of y, (members, B, rank + 2) each: the log ratio is the product of two rows."""
        f, g = self.left(x) + self.left_straight(x), self.right(y) + self.right_straight(y)
        one = torch.ones_like(f[..., :1])
        return torch.cat([f, one], -1), torch.cat([g[..., :-1], one, g[..., -1:]], -1)


def towers(x: Tensor, y: Tensor, steps: int, seed: int, until: float, progress: bool = False) -> list[LogRatio]:
    """The log ratio of each member, after training on (members, N, a) and (members, N, b)."""
    networks = Towers((x.shape[-1], y.shape[-1]), seed).to(x.device)
    member = torch.arange(MEMBERS)[:, None]

    def losses(rows: Tensor) -> Tensor:
        """Log loss of telling the pairs of the rows from all strangers among them."""
        rows = rows[:, :CHECKED]
        f, g = networks(x[member, rows], y[member, rows])
        table, own = f @ g.mT, (f * g).sum(-1)
        strangers = softplus(table).sum((1, 2)) - softplus(own).sum(1)
        return 0.5 * (softplus(-own).mean(1) + strangers / (own.shape[1] * (own.shape[1] - 1)))

    train(networks, losses, x.shape[1], stream(seed, "towers", 1), steps, RATE, DECAY, until, progress)

    @torch.no_grad()
    def of_rows(rows: slice) -> tuple[Tensor, ...]:
        return tuple(part.transpose(0, 1) for part in networks(x[:, rows], y[:, rows]))

    f, g = map_rows(of_rows, x.shape[1], dim=x.shape[2] + y.shape[2], device=x.device)
    f, g = f.cpu().numpy(), g.cpu().numpy()  # in float32: those of all members, of a million rows, are large
    return [lambda rows, partners, k=k: (np.double(f[rows, k]) * g[partners, k]).sum(1) for k in range(MEMBERS)]


def trees(x: np.ndarray, y: np.ndarray, bent: Canonical, seen: np.ndarray, seed: int, until: float) -> LogRatio:
    """Boosted trees of variates, their differences, and the columns where these are few; by the rows ``seen``."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    if time.monotonic() > until:
        return lambda rows, _: np.zeros(len(rows))
    few = max(x.shape[1], y.shape[1]) <= FEW

    def columns(rows: np.ndarray, partners: np.ndarray) -> np.ndarray:
        u, v = bent.left[rows], bent.right[partners]
        return np.hstack([u, v, u - v, *((x[rows], y[partners]) if few or not u.size else ())])

    partners = [seen, *strangers(seen)]
    options = {"learning_rate": SHRINKAGE, "max_iter": TREES, "max_leaf_nodes": LEAVES, "class_weight": "balanced"}
    stopping = len(seen) > MIN_STOPPING
    model = HistGradientBoostingClassifier(early_stopping=stopping, random_state=seed, **options)
    model.fit(np.vstack([columns(seen, other) for other in partners]), np.arange(len(partners)).repeat(len(seen)) == 0)
    return lambda rows, partners: model.decision_function(columns(rows, partners))


def frequencies(x: np.ndarray, y: np.ndarray, seen: np.ndarray) -> LogRatio:
    """Log ratio of kinds of rows, whole numbers (N,) each: how often two meet among ``seen`` rows, over what is
    expected of strangers. Both count ``PSEUDO`` more, so that what is rare is no evidence."""
    met = np.zeros((x.max() + 1, y.max() + 1))
    np.add.at(met, (x[seen], y[seen]), 1.0)
    expected = met.sum(1, keepdims=True) * met.sum(0) / len(seen)
    log_ratio = np.log((met + PSEUDO) / (expected + PSEUDO))
    return lambda rows, partners: log_ratio[x[rows], y[partners]]


def of_kinds(kinds: np.ndarray, views: Sequence[np.ndarray], seen: np.ndarray) -> LogRatio:
    """log p(z | kind) / p(z) of ``kinds`` of rows, (N,), and partners z, by a Gaussian for each kind.

    Of several views of the rows, (N, b) each, the one that tells the kinds of ``seen`` rows best. Means count one row
    of the whole more, covariances as many of what all kinds share as a covariance needs.
    """
    from sklearn.covariance import ledoit_wolf

    own, found = kinds[seen], []
    counts, more = np.bincount(own, minlength=kinds.max() + 1), views[0].shape[1] + 2
    for view in views:
        z = (view - view[seen].mean(0)) / view[seen].std(0).clip(1e-150)
        means = np.stack([z[seen][own == k].sum(0) / (count + 1) for k, count in enumerate(counts)])
        apart = z[seen] - means[own]
        shared, log_probs = ledoit_wolf(apart)[0] + 1e-6 * np.eye(more - 2), np.log(counts + PSEUDO)
        given = np.empty((len(z), len(counts)))
        for k, count in enumerate(counts):
            root = np.linalg.cholesky((apart[own == k].T @ apart[own == k] + more * shared) / (count + more))
            square = np.square(np.linalg.solve(root, (z - means[k]).T)).sum(0)
            given[:, k] = -0.5 * square - np.log(np.diag(root)).sum()
        found.append(given - logsumexp(given + log_probs - logsumexp(log_probs), axis=1, keepdims=True))
    best = max(found, key=lambda log_ratios: log_ratios[seen, own].mean())
    return lambda rows, partners: best[partners, kinds[rows]]


def estimates(
    x: np.ndarray, y: np.ndarray, steps: int, seed: int, until: float = np.inf, device: str | torch.device = "cpu",
    progress: bool = False, kinds: Sequence[np.ndarray] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Log ratios by Gaussians, by Gaussians of bent variates, by networks and by trees: at pairs, and at strangers.

    Of two sides, (N, a) and (N, b), row by row, no column constant. Gives (N, 4) and (2 N, 4), in the order of the
    folds; given the ``kinds`` of rows of both sides, whole numbers (N,) each, :func:`frequencies` are a fifth column,
    and given those of x alone Gaussians :func:`of_kinds`. Training has at most so many ``steps`` and ends at the
    second ``until`` of ``time.monotonic``; the ``device`` is that of the networks; ``progress`` shows a bar.
    """
    scores, fold = (normal_scores(x), normal_scores(y)), folds(len(x))
    features = [[products(side) for side in sides] for sides in ((x, y), scores)]
    seen = [np.flatnonzero(fold != k) for k in range(MEMBERS)]
    variates_of = shrunk if x.shape[1] + y.shape[1] > len(seen[0]) / ROWS_EACH else canonical
    straight = [variates_of(*scores, rows) for rows in seen]
    bent = [min((turned(*sides, rows) for sides in features), key=lambda one: one.losses(rows).min()) for rows in seen]
    # A tower reads its side's columns and the variates of its member, padded to one length.
    most, inputs = max(one.correlations.size for one in bent), []
    for side, (columns, products_of) in enumerate(zip(scores, features[1], strict=True)):
        few = products_of[:, : columns.shape[1] + 1].clip(-FARTHEST, FARTHEST)
        variates = [np.pad(one[side], ((0, 0), (0, most - one.correlations.size))) for one in bent]
        member_inputs = np.stack([np.hstack([few, own]) for own in variates])
        inputs.append(torch.from_numpy(member_inputs).float().to(device))
    networks = towers(*inputs, steps, seed, until, progress)
    at_pairs, at_strangers = [], []
    for k, rows in enumerate(seen):
        own = np.flatnonzero(fold == k)
        by_trees = trees(*scores, bent[k], rows, derive(seed, "trees", k), until)
        found = [straight[k].gaussians(rows), bent[k].gaussians(rows), networks[k], by_trees]
        if len(kinds) == 2:
            found.append(frequencies(*kinds, rows))
        elif len(kinds) == 1:
            found.append(of_kinds(*kinds, (y, scores[1]), rows))
        at_pairs.append(np.stack([log_ratio(own, own) for log_ratio in found], 1))
        at_strangers += [np.stack([log_ratio(own, other) for log_ratio in found], 1) for other in strangers(own)]
    return np.concatenate(at_pairs), np.concatenate(at_strangers)
