"""Toy distributions in the plane: round Gaussians along curves, or squares of a board; the class is the curve or row.

Closer than 1.3 deviations, the Gaussians of a curve sum to one that is smooth to 1e-4.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Toy:
    """A distribution that is as likely in each of its classes.

    Attributes:
        classes: Points of each class, float64 (K, 2): the middles of Gaussians, or the lower corners of unit squares.
        deviation: Of the Gaussians; None for squares.
    """

    classes: list[Tensor]
    deviation: float | None

    @property
    def labels(self) -> Tensor:
        """The class of each point, long (K,)."""
        return torch.arange(len(self.classes)).repeat_interleave(torch.tensor([len(part) for part in self.classes]))

    @property
    def weights(self) -> Tensor:
        """Of the points, (K,); they sum to one."""
        return torch.cat([torch.full((len(part),), 1 / len(part)) for part in self.classes]) / len(self.classes)

    def sample(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Draws x, float32 (n, 2), and their classes, long (n,)."""
        chosen = torch.multinomial(self.weights.double(), n, replacement=True, generator=generator)
        draw = torch.rand if self.deviation is None else torch.randn
        noise = draw(n, 2, generator=generator, dtype=torch.float64)
        scale = 1.0 if self.deviation is None else self.deviation
        return (torch.cat(self.classes)[chosen] + scale * noise).float(), self.labels[chosen]


def _polar(radius: Tensor | float, angle: Tensor) -> Tensor:
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1)


def _fractions(n: int) -> Tensor:
    return (torch.arange(n, dtype=torch.float64) + 0.5) / n


_MOON = _polar(1.0, math.pi * _fractions(32)) - torch.tensor([0.5, 0.25], dtype=torch.float64)
_MODES = _polar(2.0, 2 * math.pi * torch.arange(8, dtype=torch.float64) / 8)
_BOARD = [[[column - 2.0, row - 2.0] for column in range(row % 2, 4, 2)] for row in range(4)]
_RADIUS = 1 + math.sqrt(0.3**2 - 0.1**2) * torch.special.ndtri(_fractions(80))
_ANGLE = 3 * math.pi * _fractions(140).sqrt()
_SPIRAL = _polar(_ANGLE / 5, _ANGLE)

TOYS = {
    "two-moons": Toy([_MOON, -_MOON], 0.08),
    "rings": Toy([_polar(0.7 * k, 2 * math.pi * _fractions(50 * k)) for k in (1, 2, 3)], 0.07),
    "eight-gaussians": Toy(list(_MODES[:, None]), 0.2),
    "checkerboard": Toy([torch.tensor(row, dtype=torch.float64) for row in _BOARD], None),
    "pinwheel": Toy([_polar(_RADIUS, 2 * math.pi / 5 * y + 0.3 * _RADIUS.exp()) for y in range(5)], 0.1),
    "two-spirals": Toy([_SPIRAL, -_SPIRAL], 0.06),
}
