"""Heads: from pooled features (B, features) to one number a noise level, in float32 or better."""

from abc import ABC, abstractmethod
from typing import Annotated, Literal, TypeVar, final

import torch
from annotated_types import Ge
from torch import Tensor, nn

from torchcdm.errors import UserError
from torchcdm.runtime.validation import Count, Int, checked

Layer = TypeVar("Layer", bound=nn.Module)

# Increments are multiplied by this over their number, so that Adam, which moves every weight by the same amount, moves
# the accumulated logits equally fast for every T.
REFERENCE_STEPS = 100

CLASS_KNOTS = 32  # evenly spaced levels that carry the effect of a class, which is linear between them


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` itself, or its float32 copy where it has half precision."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def from_the_noise(increments: Tensor) -> Tensor:
    """Levels (..., T+2) from increments (..., T+1): h_t is the sum of the increments t ... T, so h_{T+1} = 0. What is
    learned at high noise then reaches the data, level 0."""
    return nn.functional.pad(increments.flip(-1).cumsum(-1).flip(-1), (0, 1))


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
        joint: Outputs for all classes from one pass instead of a label as input; UserError without classes.
    """

    head: Head

    @abstractmethod
    def features(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """What the head sees, (B, features); arguments as in :meth:`forward`."""

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """h, (B, T+2), of images (B, channels, height, width) or vectors (B, dim); joint: (B, classes, T+2).

        Classes ``y``, long (B,), have the null label ``classes``, which None stands for; or they are the context,
        (B, context), of a network that takes one. A joint network ignores them.
        """
        return self.head(self.features(x, y))


class _Linear(nn.Linear):
    """A linear layer that computes in the precision of its input, whatever that of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


def from_zero(layer: Layer) -> Layer:
    """The layer, zero at first, so that a model starts as its base density."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


@final
class CumulativeHead(Head):
    """Linear outputs for the steps between neighbouring levels, accumulated over the levels.

    Args:
        features: Width of the input.
        levels: T + 2.
        direction: End where the sum starts. ``noise``: :func:`from_the_noise`, h = 0 at first. ``data``: the paper's,
            a plain linear layer, h_t the sum of the increments 0 ... t.
    """

    @checked
    def __init__(
        self, features: Count, levels: Annotated[Int, Ge(3)], direction: Literal["noise", "data"] = "noise"
    ) -> None:
        super().__init__()
        self.direction = direction
        self.linear = _Linear(features, levels) if direction == "data" else from_zero(_Linear(features, levels - 1))

    def levels_of(self, features: Tensor) -> Tensor:
        increments = self.linear(features)
        if self.direction == "data":
            return increments.cumsum(-1)
        return from_the_noise(REFERENCE_STEPS / self.linear.out_features * increments)


@final
class JointHead(Head):
    """h_{y,t} for all classes at once: a part common to the classes plus a smooth part for each (identity 10).

    Both accumulate from the noise end, so all classes agree at level T+1. The class part lives on ``CLASS_KNOTS``
    levels. Arguments as in :class:`CumulativeHead`.
    """

    @checked
    def __init__(self, features: Count, levels: Count, classes: Annotated[Int, Ge(2)]) -> None:
        super().__init__()
        self.common = CumulativeHead(features, levels)
        self.knots = min(CLASS_KNOTS, levels - 1)
        position = torch.linspace(0, self.knots - 1, levels - 1, dtype=torch.float64)
        distance = (position - torch.arange(self.knots, dtype=torch.float64)[:, None]).abs()
        # Accumulated once here: the sum over levels is linear, and (classes, T+2) outputs are the costly part.
        accumulated = from_the_noise((1 - distance).clamp_min(0))
        self.weights = nn.Buffer(REFERENCE_STEPS / (levels - 1) * accumulated, persistent=False)
        self.linear = from_zero(_Linear(features, classes * self.knots))

    def levels_of(self, features: Tensor) -> Tensor:
        effects = self.linear(features).unflatten(1, (-1, self.knots))
        return self.common.levels_of(features)[:, None] + effects @ self.weights.to(effects.dtype)


@final
class DeepHead(Head):
    """A ``head`` that sees ``features`` and so many ``hidden`` units of them."""

    def __init__(self, head: Head, features: int, hidden: int) -> None:
        super().__init__()
        self.hidden, self.head = _Linear(features, hidden), head

    def levels_of(self, features: Tensor) -> Tensor:
        scaled = nn.functional.layer_norm(features, features.shape[1:])
        return self.head.levels_of(torch.cat([features, nn.functional.silu(self.hidden(scaled))], 1))


def make_head(features: int, levels: int, classes: int | None, joint: bool, hidden: int | None = None) -> Head:
    """The head of our own networks: from the noise end, zero at the start; other arguments as in
    :class:`HeadedBackbone` and :class:`DeepHead`, whose layer is there unless None."""
    if hidden is not None:
        return DeepHead(make_head(features + hidden, levels, classes, joint), features, hidden)
    if not joint:
        return CumulativeHead(features, levels)
    if classes is None:
        raise UserError("network: a joint head needs the number of classes; give classes or set joint to false")
    return JointHead(features, levels, classes)
