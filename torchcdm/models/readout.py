"""A second reading of a network's features: values of log p that its gradient does not have to serve as well."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from torchcdm.units.float64 import Float64Module

LIMIT = 6.0
"""Deviations within which a feature counts: hardly any data are further off, and what the network makes of images
that no data ever were lies tens of them away."""

VALUES_HELD = 2**22


@final
class Readout(Float64Module):
    """What the network adds to the base density, linear in its features at each level.

    .. math:: w_t \\cdot \\mathrm{clamp}((f - m_t) / s_t, \\pm L) + b_t

    Args:
        mean: m, mean of each feature over data at each level that was fitted, (T+2, features).
        scale: s, their deviations, (T+2, features).
        weight: w, (T+2, features).
        offset: b, (T+2,).
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    offset: Tensor

    def __init__(self, mean: Tensor, scale: Tensor, weight: Tensor, offset: Tensor) -> None:
        super().__init__()
        for name, value in (("mean", mean), ("scale", scale), ("weight", weight), ("offset", offset)):
            self.register_buffer(name, value.double())

    @classmethod
    def blank(cls, levels: int, features: int) -> Readout:
        """One that is 0 everywhere, to be filled by ``load_state_dict``."""
        zeros = torch.zeros(levels, features)
        return cls(zeros, torch.ones_like(zeros), zeros, torch.zeros(levels))

    def forward(self, features: Tensor) -> Tensor:
        """h - h_{T+1} with the constants of the levels, float64 (B, T+2), from (B, features)."""
        slope = self.weight / self.scale
        linear = features.double() @ slope.T + (self.offset - (self.mean * slope).sum(1))
        # What lies within the limit, nearly all, is in the product above: the rest needs no double precision. Some
        # levels at a time, as (B, T+2, features) is more than all else that a pass takes.
        mean, scale, weight = (value.float() for value in (self.mean, self.scale, self.weight))
        excess = []
        for rows in torch.arange(len(mean), device=mean.device).split(max(1, VALUES_HELD // features.numel())):
            z = (features.float()[:, None] - mean[rows]) / scale[rows]
            excess.append(((z - z.clamp(-LIMIT, LIMIT)) * weight[rows]).sum(2))
        return linear - torch.cat(excess, 1)
