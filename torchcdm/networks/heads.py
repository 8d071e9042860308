"""Heads: from pooled features (B, features) to one number a noise level, in float32 or better."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor, nn

from torchcdm.errors import UserError, nearest

REFERENCE_STEPS = 100
"""Increments are multiplied by this over their number, so that Adam, which moves every weight by the same
amount, moves the accumulated logits equally fast for every T."""

FULL_RANK_CLASSES = 64
"""Up to here :class:`JointHead` gives every class its own rows; above, classes share as many factors."""


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` itself, or its float32 copy where it has half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def accumulate(increments: Tensor, direction: str) -> Tensor:
    """Levels from increments between neighbours.

    Args:
        increments: (..., T+1) from the noise end, (..., T+2) from the data end.
        direction: ``noise``: h_t is the sum of the increments t ... T, so h_{T+1} = 0. What is learned at high noise
            then reaches the data, level 0. ``data``: h_t is the sum of the increments 0 ... t (the paper's).

    Returns:
        (..., T+2).
    """
    if direction == "data":
        return increments.cumsum(-1)
    return nn.functional.pad(increments.flip(-1).cumsum(-1).flip(-1), (0, 1))


def knot_weights(knots: int, points: int) -> Tensor:
    """Linear interpolation from evenly spaced knots to evenly spaced points, (knots, points)."""
    position = torch.linspace(0, knots - 1, points, dtype=torch.float64)
    distance = (position - torch.arange(knots, dtype=torch.float64)[:, None]).abs()
    return (1 - distance).clamp_min(0)


class Head(nn.Module, ABC):
    """Last step of a network; computes in float32 under autocast too, because log p is a small difference of sums."""

    def forward(self, features: Tensor) -> Tensor:
        """h, (B, T+2) or (B, classes, T+2), from ``features`` (B, features)."""
        with torch.autocast(features.device.type, enabled=False):
            return self.levels_of(at_least_float32(features))

    @abstractmethod
    def levels_of(self, features: Tensor) -> Tensor:
        """h from features of at least float32."""


class HeadedBackbone(nn.Module, ABC):
    """A network whose logits are a head on its features.

    Args:
        levels: T + 2.
        classes: Number of classes; the label is added inside the blocks, or see ``joint``. None: unconditional.
        joint: Outputs for all classes from one pass instead of a label as input.
        knots: Outputs at so many levels, interpolated; one for each level when None.

    Raises:
        UserError: A joint head without classes.

    Attributes:
        head: Linear in the features.
    """

    head: Head

    @abstractmethod
    def features(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """What the head sees, (B, features); arguments as in :meth:`forward`."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """h of ``x``.

        Args:
            x: Images (B, channels, height, width), or vectors (B, dim).
            y: Classes, long (B,), null label ``classes``; None for the null label. Or the context, (B, context), of a
                network that takes one.

        Returns:
            (B, T+2); joint: (B, classes, T+2), whatever ``y`` is.
        """
        return self.head(self.features(x, y))


class _Linear(nn.Linear):
    """A linear layer that computes in the precision of its input, whatever that of its weights."""

    def __init__(self, features: int, outputs: int, zero_init: bool) -> None:
        super().__init__(features, outputs)
        if zero_init:
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


@final
class CumulativeHead(Head):
    """Linear outputs for the steps between neighbouring levels, accumulated over the levels.

    Args:
        features: Width of the input.
        levels: T + 2.
        direction: End where the sum starts: ``noise`` (h_{T+1} = 0) or ``data`` (the paper's).
        zero_init: Start at h = 0, so that the model starts as its base density.
        knots: Outputs at so many evenly spaced levels only, linearly interpolated; one for each level when None.
        scale: Factor on the increments; :data:`REFERENCE_STEPS` over their number when None.
    """

    weights: Tensor | None

    def __init__(
        self,
        features: int,
        levels: int,
        direction: str = "noise",
        zero_init: bool = True,
        knots: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if levels < 3:
            raise UserError(f"head: levels is {levels}; it is T + 2, at least 3")
        if direction not in ("noise", "data"):
            raise UserError(f"head: unknown direction '{direction}'; {nearest(direction, ['noise', 'data'])}")
        if knots is not None and knots < 2:
            raise UserError(f"head: knots is {knots}; at least 2 are needed, or none for one output a level")
        steps = levels - 1 if direction == "noise" else levels
        self.direction = direction
        self.scale = REFERENCE_STEPS / steps if scale is None else scale
        interpolated = knots is not None and knots < steps
        self.register_buffer("weights", knot_weights(knots, steps) if interpolated else None, persistent=False)
        self.linear = _Linear(features, knots if interpolated else steps, zero_init)

    def levels_of(self, features: Tensor) -> Tensor:
        increments = self.scale * self.linear(features)
        if self.weights is not None:
            increments = increments @ self.weights.to(increments.dtype)
        return accumulate(increments, self.direction)


@final
class JointHead(Head):
    """h_{y,t} for all classes at once: a part common to the classes plus a smooth part for each (identity 10).

    Both accumulate from the noise end, so all classes agree at level T+1. The class part lives on knots over the
    levels; with many classes it is a product of ``rank`` factors from the features and a table (classes, rank).

    Args:
        features: Width of the input.
        levels: T + 2.
        classes: Number of classes.
        knots: Evenly spaced levels that carry a class effect.
        rank: Number of factors; :data:`FULL_RANK_CLASSES` when None, and one for each class below that.
        common_knots: Knots of the common part; one output a level when None.
    """

    weights: Tensor

    def __init__(
        self,
        features: int,
        levels: int,
        classes: int,
        knots: int = 32,
        rank: int | None = None,
        common_knots: int | None = None,
    ) -> None:
        super().__init__()
        if classes < 2:
            raise UserError(f"joint head: classes is {classes}; at least 2 are needed")
        self.common = CumulativeHead(features, levels, knots=common_knots)
        self.knots = min(knots, levels - 1)
        # Accumulated once here: the sum over levels is linear, and (classes, T+2) outputs are the costly part.
        accumulated = accumulate(knot_weights(self.knots, levels - 1), "noise")
        self.register_buffer("weights", REFERENCE_STEPS / (levels - 1) * accumulated, persistent=False)
        rank = FULL_RANK_CLASSES if rank is None else rank
        self.factors: nn.Parameter | None = None
        if classes > rank:
            self.factors = nn.Parameter(torch.randn(classes, rank) / rank**0.5)
        self.linear = _Linear(features, min(classes, rank) * self.knots, zero_init=True)

    def levels_of(self, features: Tensor) -> Tensor:
        effects = self.linear(features).unflatten(1, (-1, self.knots))
        if self.factors is not None:
            effects = self.factors.to(effects.dtype) @ effects
        return self.common.levels_of(features)[:, None] + effects @ self.weights.to(effects.dtype)


def make_head(features: int, levels: int, classes: int | None, joint: bool, knots: int | None = None) -> Head:
    """The head of our own networks: cumulative from the noise end, zero at the start.

    Args:
        features: Width of the input.
        levels: T + 2.
        classes: Number of classes, or None.
        joint: Outputs for all classes at once.
        knots: Knots of the part common to all classes; one output a level when None.

    Raises:
        UserError: A joint head without classes, or fewer than three levels.
    """
    if not joint:
        return CumulativeHead(features, levels, knots=knots)
    if classes is None:
        raise UserError("network: a joint head needs the number of classes; give classes or set joint to false")
    return JointHead(features, levels, classes, common_knots=knots)
