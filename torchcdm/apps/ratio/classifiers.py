"""Classifiers of the source: what their log ratio has that neither Gaussians nor noise levels show.

The logits of a classifier are the log ratio where both sources are as frequent: identity 1 without noise. They say
little where the sources hardly overlap, so that held-out samples decide how far they are followed, see
:func:`torchcdm.apps.ratio.blending.blend`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.nn.functional import silu

from torchcdm.random import derive, evenly_spaced, stream
from torchcdm.runtime.processes import map_rows

MEMBERS, WIDTH, LAYERS = 4, 64, 3

STEPS, BATCH, RATE, DECAY, EVERY = 1500, 256, 3e-3, 1e-2, 100
"""Most steps of AdamW, samples of each of them, largest rate, weight decay, and steps from one check to the next."""

EDGES, EDGE_ROWS = (0.001, 0.999), 20_000
"""Quantiles of a column beyond which rows count as lying there, and rows that they are measured on."""

WORSE = 0.02
"""Nats above its best at which a member has learned its training rows by heart."""

TREES, DEPTH, SHRINKAGE, PATIENCE = 300, 4, 0.05, 20
"""Most trees, their depth, how much of each is added, and trees without a gain that end the boosting."""

TREE_ROWS, TREE_COLUMNS = 4000, 8
"""Most rows and columns that a tree is grown from; at most half of them all."""

MOST_ROWS, FEW = 50_000, 20
"""Most rows that classifiers are trained on, and rows too few to hold some out for the end of the boosting."""

NODES = {
    "column": torch.long,
    "left": torch.long,
    "right": torch.long,
    "threshold": torch.double,
    "value": torch.double,
}
"""What each node of each tree has; a leaf is its own left and right."""


def folds(rows: int) -> Tensor:
    """The member of the committee that is not trained on a row, long (rows,)."""
    return torch.arange(rows) % MEMBERS


@final
class Committee(nn.Module):
    """Small networks of which each is trained on all folds of the rows but one, which ends its training.

    Args:
        columns: d.
    """

    low: Tensor
    high: Tensor

    def __init__(self, columns: int) -> None:
        super().__init__()
        sizes = [columns, *[WIDTH] * LAYERS, 1]
        shapes = list(zip(sizes[:-1], sizes[1:], strict=True))
        self.weights = nn.ParameterList(torch.zeros(MEMBERS, *shape) for shape in shapes)
        self.biases = nn.ParameterList(torch.zeros(MEMBERS, 1, width) for _, width in shapes)
        for name in ("low", "high"):
            self.register_buffer(name, torch.zeros(columns))

    def forward(self, x: Tensor) -> Tensor:
        """Log odds (members, B) of rows (members, B, d); beyond the training rows as at their edge."""
        h = x.clamp(self.low, self.high)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h = torch.baddbmm(bias, h if layer == 0 else silu(h), weight)
        return h[..., 0]

    @torch.no_grad()
    def members(self, x: Tensor) -> Tensor:
        """Log odds (N, members), float64, of rows (N, d)."""
        return self(x.expand(MEMBERS, -1, -1)).T.double()

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, steps: int, seed: int) -> Committee:
        """Trains all members at once; each is kept as it was when it told its own fold best.

        Args:
            x: Rows (N, d).
            y: Their sources 0 or 1, (N,).
            steps: Most steps.
            seed: Seed of weights and batches.
        """
        committee, draw, fold = cls(x.shape[1]), stream(seed, "committee"), folds(len(x))
        edges = np.quantile(x[evenly_spaced(len(x), EDGE_ROWS)].numpy(), EDGES, axis=0)
        committee.low, committee.high = torch.from_numpy(edges).float()
        weights = (len(y) / (2 * y.bincount()))[y]
        with torch.no_grad():
            for weight in committee.weights[:-1]:
                weight.copy_(torch.randn(weight.shape, generator=draw) / weight.shape[1] ** 0.5)
        seen = [(fold != member).nonzero()[:, 0] for member in range(MEMBERS)]
        apart = torch.stack([(fold == member).nonzero()[: len(x) // MEMBERS, 0] for member in range(MEMBERS)])

        def losses(rows: Tensor) -> Tensor:
            """Of each member on its rows (members, B), both sources as frequent, (members,)."""
            return cross_entropy(committee(x[rows]), y[rows].float(), weights[rows], reduction="none").mean(1)

        groups = [{"params": committee.weights}, {"params": committee.biases, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, RATE, weight_decay=DECAY)
        # A rise of a single step would be a division by zero there.
        rise = min(1.0, max(0.1, 2 / steps))
        rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=rise)
        with torch.no_grad():
            least = losses(apart)
        best = [parameter.detach().clone() for parameter in committee.parameters()]
        for step in range(1, steps + 1):
            rows = torch.stack([part[torch.randint(len(part), (BATCH,), generator=draw)] for part in seen])
            optimizer.zero_grad()
            losses(rows).sum().backward()
            optimizer.step()
            if step < steps:
                rate.step()
            if step % EVERY and step < steps:
                continue
            with torch.no_grad():
                reached = losses(apart)
            for kept, parameter in zip(best, committee.parameters(), strict=True):
                kept[reached < least] = parameter.detach()[reached < least]
            least = least.minimum(reached)
            if (reached > least + WORSE).all():
                break
        for kept, parameter in zip(best, committee.parameters(), strict=True):
            parameter.data = kept
        return committee.requires_grad_(False)


def grown(x: Tensor, y: Tensor, seed: int) -> dict[str, Tensor]:
    """Trees by gradient boosting (Friedman 2001) of rows (N, d), sources (N,): :data:`NODES`, each (nodes, trees)."""
    from sklearn.ensemble import GradientBoostingClassifier

    rows, columns = x.shape
    model = GradientBoostingClassifier(
        learning_rate=SHRINKAGE, n_estimators=TREES, max_depth=DEPTH,
        n_iter_no_change=PATIENCE if rows > FEW else None, random_state=derive(seed, "trees"),
        subsample=min(0.5, TREE_ROWS / rows), max_features=max(1, min(columns // 2, TREE_COLUMNS)),
    )  # fmt: skip
    model.fit(x.numpy(), y.numpy())  # its start, the log odds of the counts, is no part of a ratio of densities
    trees = [tree.tree_ for tree in model.estimators_[:, 0]]
    shape = max(tree.node_count for tree in trees), len(trees)
    found = {name: torch.zeros(shape, dtype=dtype) for name, dtype in NODES.items()}
    for k, tree in enumerate(trees):
        leaf, own = tree.children_left < 0, np.arange(tree.node_count)
        left, right = (np.where(leaf, own, child) for child in (tree.children_left, tree.children_right))
        parts = (np.where(leaf, 0, tree.feature), left, right, tree.threshold, SHRINKAGE * tree.value[:, 0, 0])
        for tensor, part in zip(found.values(), parts, strict=True):
            tensor[: len(own), k] = torch.from_numpy(part)
    return found


@final
class Classifiers(nn.Module):
    """A committee and boosted trees, as sources of real tables are often told apart by thresholds.

    Args:
        columns: d.
        nodes: Most nodes of a tree, and number of trees.

    Attributes:
        unseen: Mean log odds, each row's by the member that was not trained on it, and its squared standard error: of
            the numerator's training rows, and of the denominator's. Not in the ``state_dict``.
    """

    unseen: list[tuple[float, float]]

    def __init__(self, columns: int, nodes: Sequence[int]) -> None:
        super().__init__()
        self.committee = Committee(columns)
        for name, dtype in NODES.items():
            self.register_buffer(name, torch.zeros(tuple(nodes), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Log odds of the committee and of the trees, float64 (N, 2), of rows (N, d)."""
        return map_rows(lambda rows: self._both(x[rows]), len(x), dim=len(x.T), device=x.device)

    def _both(self, x: Tensor) -> Tensor:
        node = torch.zeros(len(x), self.value.shape[1], dtype=torch.long)
        for _ in range(DEPTH):
            below = x.double().gather(1, self.column.gather(0, node)) <= self.threshold.gather(0, node)
            node = torch.where(below, self.left.gather(0, node), self.right.gather(0, node))
        return torch.stack([self.committee.members(x).mean(1), self.value.gather(0, node).sum(1)], 1)

    @classmethod
    def fit(cls, x: Tensor, y: Tensor, steps: int, seed: int) -> Classifiers:
        """Of rows (N, d) and their sources (N,), none of them a copy; ``steps`` are those of the ratio's network."""
        order = torch.randperm(len(x), generator=stream(seed, "classifiers"))
        if len(x) > MOST_ROWS:  # all of a source that is rare
            of_rare = y[order] == y.bincount().argmin()
            rare = order[of_rare][: MOST_ROWS // 2]
            order = torch.cat([rare, order[~of_rare][: MOST_ROWS - len(rare)]])
        x, y = x[order].float(), y[order]
        committee = Committee.fit(x, y, min(STEPS, 5 * steps // 2), seed)
        state = {f"committee.{name}": value for name, value in committee.state_dict().items()} | grown(x, y, seed)
        fitted = cls.of(state)
        unseen = committee.members(x).gather(1, folds(len(x))[:, None])[:, 0]
        parts = [unseen[y == label] for label in (1, 0)]
        fitted.unseen = [(float(part.mean()), float(part.var()) / len(part)) for part in parts]
        return fitted

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Classifiers:
        """From a ``state_dict``."""
        fitted = cls(len(state["committee.low"]), state["value"].shape).requires_grad_(False)
        fitted.load_state_dict(state)
        return fitted
