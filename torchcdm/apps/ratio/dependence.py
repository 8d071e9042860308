"""Log ratios of pairs (x, y) over strangers, x of one row and y of another: log p(x, y) / p(x) p(y).

Every row is judged by what was learned from other folds of the rows. Columns become normal scores by their ranks,
which changes no ratio. Beside them each side has its canonical variates: directions of x, of its squared length, and
of products of the two, that correlate most with such directions of y. Rotations by the length are nearly linear there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.special import ndtri
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.functional import softplus

from torchcdm.apps.ratio.classifiers import LAYERS, MEMBERS, WIDTH, Networks, folds, train
from torchcdm.random import derive, stream

STEPS, RATE, DECAY, RANK = 600, 5e-3, 0.5, 16
"""Most steps of the networks, their largest rate, weight decay, and products in their log ratio."""

CHECKED = 1000
"""Rows of a fold on which a step is judged: the loss is of all pairs among them."""

VARIATES, FARTHEST = 8, 4.0
"""Most bent variates of a side, and deviations beyond which a row counts as lying there."""

WIDEST = 2000
"""Features of both sides beyond which there are no variates: their time grows with the cube."""

STRANGERS = 2
"""Strangers of each row that estimates are compared on."""

TREES, LEAVES, SHRINKAGE, MIN_STOPPING = 100, 16, 0.1, 200
"""Most boosted trees, their leaves, how much of each is added, and rows that allow to hold some out for their end."""

FEW = 8
"""Most columns of a side that trees are given beside its variates."""

LogRatio = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Of rows of x and of their partners, rows of y: numbers of both to log ratios, (N,)."""


def strangers(rows: np.ndarray) -> list[np.ndarray]:
    """Other rows in the place of each, :data:`STRANGERS` times."""
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

    def gaussians(self, seen: np.ndarray) -> LogRatio:
        """The sum of the first terms, as many as tell pairs of ``seen`` rows best: later ones may repeat these."""
        pairs, others = (self.terms(seen, partners).cumsum(1) for partners in (seen, *strangers(seen)[:1]))
        losses = np.logaddexp(0, -pairs).mean(0) + np.logaddexp(0, others).mean(0)
        count = 1 + int(losses.argmin()) if losses.min(initial=np.inf) < 2 * np.log(2) else 0
        return lambda rows, partners: self.terms(rows, partners)[:, :count].sum(1)


def canonical(x: np.ndarray, y: np.ndarray, seen: np.ndarray, most: int | None = None) -> Canonical:
    """At most so many canonical variates (Hotelling 1936) of features (N, a) and (N, b), from the rows ``seen``.

    A squared correlation of ``seen`` rows is too large by (1 - square)(a + b) / rows, on others too small by as much:
    what remains is kept. None where rows are fewer than four for each feature.
    """
    rows, white = len(seen), []
    if x.shape[1] + y.shape[1] > min(rows / 4, WIDEST):
        return Canonical(x[:, :0], y[:, :0], np.zeros(0))
    for side in (x, y):
        values, vectors = np.linalg.eigh(np.cov(side[seen].T).reshape(side.shape[1], -1))
        kept = values > 1e-8 * values.max()
        white.append((side - side[seen].mean(0)) @ (vectors[:, kept] / values[kept] ** 0.5))
    left, found, right = np.linalg.svd(white[0][seen].T @ white[1][seen] / rows, full_matrices=False)
    excess = 2 * sum(side.shape[1] for side in white) / rows
    square = np.clip(found**2 - (1 - found**2) * excess, 0, 1 - 1e-6)
    kept = np.flatnonzero(square)[:most]
    u, v = (
        np.clip(side @ turn[:, kept], -FARTHEST, FARTHEST) for side, turn in ((white[0], left), (white[1], right.T))
    )
    return Canonical(u, v, square[kept] ** 0.5)


def with_length(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows (N, d) with their squared length in deviations of a normal's, and with products of it, and of their sum."""
    length = (np.square(x).mean(1, keepdims=True) - 1) * (x.shape[1] / 2) ** 0.5
    few = np.hstack([x, length])
    total = x.sum(1, keepdims=True) / x.shape[1] ** 0.5
    return few, np.hstack([few, length * few, length * length * x, total * x])


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


def towers(x: Tensor, y: Tensor, steps: int, seed: int, until: float) -> list[np.ndarray]:
    """Both factors of the log ratio, (members, N, rank + 2), after training on (members, N, a) and (members, N, b)."""
    networks = Towers((x.shape[-1], y.shape[-1]), seed).to(x.device)
    member = torch.arange(MEMBERS)[:, None]

    def losses(rows: Tensor) -> Tensor:
        """Log loss of telling the pairs of the rows from all strangers among them."""
        rows = rows[:, :CHECKED]
        f, g = networks(x[member, rows], y[member, rows])
        table, own = f @ g.mT, (f * g).sum(-1)
        strangers = softplus(table).sum((1, 2)) - softplus(own).sum(1)
        return 0.5 * (softplus(-own).mean(1) + strangers / (own.shape[1] * (own.shape[1] - 1)))

    train(networks, losses, x.shape[1], stream(seed, "towers", 1), steps, RATE, DECAY, until)
    with torch.no_grad():
        return [part.double().cpu().numpy() for part in networks(x, y)]


def trees(x: np.ndarray, y: np.ndarray, bent: Canonical, seen: np.ndarray, seed: int) -> LogRatio:
    """Boosted trees of variates, their differences, and the columns where these are few; by the rows ``seen``."""
    from sklearn.ensemble import HistGradientBoostingClassifier

    few = max(x.shape[1], y.shape[1]) <= FEW

    def columns(rows: np.ndarray, partners: np.ndarray) -> np.ndarray:
        u, v = bent.left[rows], bent.right[partners]
        return np.hstack([u, v, u - v, *((x[rows], y[partners]) if few or not u.size else ())])

    partners = [seen, *strangers(seen)]
    model = HistGradientBoostingClassifier(
        learning_rate=SHRINKAGE, max_iter=TREES, max_leaf_nodes=LEAVES, class_weight="balanced",
        early_stopping=len(seen) > MIN_STOPPING, random_state=seed,
    )  # fmt: skip
    model.fit(np.vstack([columns(seen, other) for other in partners]), np.arange(len(partners)).repeat(len(seen)) == 0)
    return lambda rows, partners: model.decision_function(columns(rows, partners))


def estimates(
    x: np.ndarray, y: np.ndarray, steps: int, seed: int, until: float = math.inf, device: str | torch.device = "cpu"
) -> tuple[np.ndarray, np.ndarray]:
    """Log ratios by Gaussians, by Gaussians of bent variates, by networks and by trees: at pairs, and at strangers.

    Of two sides, (N, a) and (N, b), row by row, no column constant. Gives (N, 4) and (2 N, 4), in the order of the
    folds. Training has at most so many ``steps`` and ends at the second ``until`` of ``time.monotonic``; the
    ``device`` is that of the networks.
    """
    x, y = (ndtri(rankdata(side, axis=0) / (len(side) + 1)) for side in (x, y))
    (few_x, many_x), (few_y, many_y) = with_length(x), with_length(y)
    seen, own = ([np.flatnonzero((folds(len(x)) == k) == held) for k in range(MEMBERS)] for held in (False, True))
    straight = [canonical(x, y, rows) for rows in seen]
    bent = [canonical(many_x, many_y, rows, VARIATES) for rows in seen]
    normal = [[part.gaussians(rows) for part in parts] for *parts, rows in zip(straight, bent, seen, strict=True)]
    most = max(found.correlations.size for found in bent)
    inputs = [
        np.stack([np.hstack([few, np.pad(found[side], ((0, 0), (0, most - found[side].shape[1])))]) for found in bent])
        for side, few in enumerate((few_x.clip(-FARTHEST, FARTHEST), few_y.clip(-FARTHEST, FARTHEST)))
    ]
    factors = towers(*(torch.from_numpy(side).float().to(device) for side in inputs), steps, seed, until)
    at_pairs, at_strangers = [], []
    for k in range(MEMBERS):
        f, g = factors[0][k], factors[1][k]
        late = time.monotonic() > until
        boosted = None if late else trees(x, y, bent[k], seen[k], derive(seed, "trees", k))
        for found, partners in ((at_pairs, [own[k]]), (at_strangers, strangers(own[k]))):
            for other in partners:
                by_trees = 0.0 if boosted is None else boosted(own[k], other)
                gaussians = [log_ratio(own[k], other) for log_ratio in normal[k]]
                by_towers = (f[own[k]] * g[other]).sum(1)
                found.append(np.stack(np.broadcast_arrays(*gaussians, by_towers, by_trees), 1))
    return np.concatenate(at_pairs), np.concatenate(at_strangers)
