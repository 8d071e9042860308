"""The exponential moving average of a model's weights."""

from __future__ import annotations

import copy
from typing import final

import torch
from torch import nn


@final
class EMA:
    """A copy of ``model``, in eval mode, whose weights trail those of the model.

    The decay is ramped, min(decay, (1 + n) / (10 + n)) after n updates: with a fixed decay of 0.9999 the average
    would be made of the initial noise for the first ten thousand steps. Buffers are constants in these models.

    The averaged copy is ``model``; the number of ``updates`` so far is part of a saved state.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    def update(self, model: nn.Module) -> None:
        """One step towards the weights of ``model``."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
