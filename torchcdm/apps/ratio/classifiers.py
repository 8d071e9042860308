"""Classifiers of the source: what their log ratio has that neither Gaussians nor noise levels show.

The logits of a classifier are the log ratio where both sources are as frequent: identity 1 without noise. They say
little where the sources hardly overlap, so that held-out samples decide how far they are followed (``blending.py``).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import final

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy, silu

from torchcdm.random import derive, evenly_spaced, stream
from torchcdm.runtime.processes import map_rows, progress_bar

MEMBERS, WIDTH, LAYERS = 4, 64, 3  # of the committee
STEPS, BATCH, EVERY = 1500, 256, 100  # most steps of AdamW, samples of each, and steps from one check to the next
RATE, DECAY = 3e-3, 1e-2  # largest rate, and weight decay
EDGES = (0.001, 0.999)  # quantiles of a column beyond which rows count as lying there
EDGE_ROWS = 20_000  # rows that these are measured on
WORSE = 0.02  # nats above its best at which a member has learned its training rows by heart

TREES, PATIENCE = 300, 20  # most trees, and trees without a gain that end the boosting
DEPTH, SHRINKAGE = 4, 0.05  # of each, and how much of it is added
TREE_ROWS, TREE_COLUMNS = 4000, 8  # most rows and columns that a tree is grown from; at most half of them all
MOST_ROWS = 50_000  # rows that classifiers are trained on, at most
FEW = 20  # rows too few to hold some out for the end of the boosting

NODES = dict.fromkeys(("column", "left", "right"), torch.long) | dict.fromkeys(("threshold", "value"), torch.double)
"""What each node of each tree has; a leaf is its own left and right."""


def folds(rows: int) -> Tensor:
    """The member of the committee that is not trained on a row, long (rows,)."""
    return torch.arange(rows) % MEMBERS


class Networks(nn.Module):
    """Perceptrons of all members of a committee, side by side; their last layer starts at zero unless it has a scale.

    They have the ``sizes`` of input, hidden layers and output; first weights are drawn by ``draw``, zeros when None.
    """

    def __init__(self, sizes: Sequence[int], draw: Generator | None = None, scale: float = 0.0) -> None:
        super().__init__()
        shapes, single = list(pairwise(sizes)), torch.float32
        self.weights = nn.ParameterList(torch.zeros(MEMBERS, *shape, dtype=single) for shape in shapes)
        self.biases = nn.ParameterList(torch.zeros(MEMBERS, 1, width, dtype=single) for _, width in shapes)
        for weight in self.weights if draw is not None else ():
            factor = scale if weight is self.weights[-1] else 1.0
            weight.data = factor * torch.randn(weight.shape, generator=draw, dtype=single) / weight.shape[1] ** 0.5

    def forward(self, x: Tensor) -> Tensor:
        """(members, B, d) to (members, B, outputs)."""
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x if layer == 0 else silu(x), weight)
        return x


def train(
    networks: nn.Module, losses: Callable[[Tensor], Tensor], rows: int, draw: Generator, steps: int, rate: float,
    decay: float, until: float, progress: bool = False,
) -> None:  # fmt: skip
    """Trains all members at once, each on all folds of the ``rows``, so many, but its own.

    Each stays as it was at the step at which the *others* told their own folds best, so that its own fold has chosen
    nothing and an average over it is that of rows that were not seen. The ``losses`` of each member on its rows
    (members, B), (members,), depend on ``networks``, whose parameters begin with the members. At most ``steps`` of
    AdamW with the largest ``rate`` and the weight ``decay`` of all but biases, and none after the second ``until`` of
    ``time.monotonic``; ``draw`` is the generator of the batches, and ``progress`` shows a bar.
    """
    fold = folds(rows)
    seen = [(fold != member).nonzero()[:, 0] for member in range(MEMBERS)]
    apart = torch.stack([(fold == member).nonzero()[: rows // MEMBERS, 0] for member in range(MEMBERS)])
    named = dict(networks.named_parameters())
    biases, weights = ([own for name, own in named.items() if ("biases" in name) == of] for of in (True, False))
    groups = [{"params": weights, "weight_decay": decay}, {"params": biases, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, rate)
    # A rise of a single step would be a division by zero there.
    rise = min(1.0, max(0.1, 2 / steps))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(2, steps), pct_start=rise)

    @torch.no_grad()
    def of_others() -> Tensor:
        own = losses(apart)
        return (own.sum() - own) / (MEMBERS - 1)

    least, best = of_others(), [parameter.detach().clone() for parameter in named.values()]
    for step in progress_bar(range(1, steps + 1), "classifiers", progress):
        batch = torch.stack([part[torch.randint(len(part), (BATCH,), generator=draw)] for part in seen])
        optimizer.zero_grad()
        losses(batch).sum().backward()
        optimizer.step()
        late = time.monotonic() > until
        if step < steps:
            scheduler.step()
            if step % EVERY and not late:
                continue
        reached = of_others()
        for kept, parameter in zip(best, named.values(), strict=True):
            kept[reached < least] = parameter.detach()[reached < least]
        least = least.minimum(reached)
        if late or (reached > least + WORSE).all():
            break
    for kept, parameter in zip(best, named.values(), strict=True):
        parameter.data = kept


def grown(x: Tensor, y: Tensor, seed: int, until: float = np.inf) -> dict[str, Tensor]:
    """Trees by gradient boosting (Friedman 2001) of rows (N, d), sources (N,): :data:`NODES`, each (nodes, trees)."""
    from sklearn.ensemble import GradientBoostingClassifier

    rows, columns = x.shape
    size = {"learning_rate": SHRINKAGE, "n_estimators": TREES, "max_depth": DEPTH}
    part = {"subsample": min(0.5, TREE_ROWS / rows), "max_features": max(1, min(columns // 2, TREE_COLUMNS))}
    stop = {"n_iter_no_change": PATIENCE if rows > FEW else None}
    model = GradientBoostingClassifier(random_state=derive(seed, "trees"), **size, **part, **stop)
    # Its start, the log odds of the counts, is no part of a ratio of densities.
    model.fit(x.numpy(), y.numpy(), monitor=lambda *_: time.monotonic() > until)
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
    """A committee of small networks, each trained on all folds of the rows but one, and boosted trees.

    Sources of real tables are often told apart by thresholds. Of rows with d ``columns``; the ``nodes`` are those of
    the largest tree, and the number of trees; ``draw`` as for :class:`Networks`.
    """

    def __init__(self, columns: int, nodes: Sequence[int] = (0, 0), draw: Generator | None = None) -> None:
        super().__init__()
        self.committee = Networks([columns, *[WIDTH] * LAYERS, 1], draw)
        for name in ("low", "high"):
            self.register_buffer(name, torch.zeros(columns, dtype=torch.float32))
        for name, dtype in NODES.items():
            self.register_buffer(name, torch.zeros(tuple(nodes), dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Log odds of the committee and of the trees, float64 (N, 2), of rows (N, d)."""

        def both(rows: slice) -> Tensor:
            part = x[rows]
            node = torch.zeros(len(part), self.value.shape[1], dtype=torch.long)
            for _ in range(DEPTH):
                below = part.double().gather(1, self.column.gather(0, node)) <= self.threshold.gather(0, node)
                node = torch.where(below, self.left.gather(0, node), self.right.gather(0, node))
            committee = self._members(part.expand(MEMBERS, -1, -1)).double().mean(0)
            return torch.stack([committee, self.value.gather(0, node).sum(1)], 1)

        return map_rows(both, len(x), dim=len(x.T), device=x.device)

    def _members(self, x: Tensor) -> Tensor:
        """Log odds (members, B) of rows (members, B, d); beyond the training rows as at their edge."""
        return self.committee(x.clamp(self.low, self.high))[..., 0]

    @classmethod
    def fit(
        cls, x: Tensor, y: Tensor, steps: int, seed: int, until: float = np.inf, progress: bool = False
    ) -> "Classifiers":
        """Of rows (N, d) and their sources (N,), none of them a copy; ``steps`` are those of the ratio's network."""
        order = torch.randperm(len(x), generator=stream(seed, "classifiers"))
        if len(x) > MOST_ROWS:  # all of a source that is rare
            of_rare = y[order] == y.bincount().argmin()
            rare = order[of_rare][: MOST_ROWS // 2]
            order = torch.cat([rare, order[~of_rare][: MOST_ROWS - len(rare)]])
        x, y, draw = x[order].float(), y[order], stream(seed, "committee")
        fitted = cls(x.shape[1], draw=draw)
        edges = np.quantile(x[evenly_spaced(len(x), EDGE_ROWS)].numpy(), EDGES, axis=0)
        fitted.low, fitted.high = torch.from_numpy(edges).float()
        weights = (len(y) / (2 * y.bincount()))[y]

        def losses(rows: Tensor) -> Tensor:
            """Both sources as frequent."""
            return cross_entropy(fitted._members(x[rows]), y[rows].float(), weights[rows], reduction="none").mean(1)

        train(fitted.committee, losses, len(x), draw, min(STEPS, 5 * steps // 2), RATE, DECAY, until, progress)
        for name, tensor in grown(x, y, seed, until).items():
            setattr(fitted, name, tensor)
        return fitted.requires_grad_(False)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "Classifiers":
        """From a ``state_dict``."""
        fitted = cls(len(state["low"]), state["value"].shape).requires_grad_(False)
        fitted.load_state_dict(state)
        return fitted
