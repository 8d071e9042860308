r"""Code lengths of data on a grid through a noisy level: encoder and decoder of one grey level.

.. math:: -\log P(k) \le E_{q(z|k)}[\log q(z|k) - \log p_t(z) - \log P(k|z)]

with :math:`z = \alpha_t x + \sigma_t \epsilon` and x spread over the cell of k. Section 5 of ``docs/method.md``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.schedules import NoiseSchedule
from torchcdm.units import DataTransform, GaussianizedTransform

NEWTON_STEPS = 12
"""Enough for the tilt of a decoder to converge to rounding error from the flat one."""

LARGEST_TABLE = 2**22
"""Numbers (samples times dimensions times candidates) that a decoder handles at once."""


def noisy_cells(transform: DataTransform, schedule: NoiseSchedule, level: int) -> NoisyCells:
    """The cells of a transform at one noise level.

    Args:
        transform: Maps grey levels (data units) to model units; has a bin.
        schedule: The noise schedule.
        level: 1 ... T.

    Raises:
        UserError: Continuous data, or a level without both signal and noise.
    """
    if transform.bin is None:
        raise UserError("code lengths through a noisy level need data on a grid; these are continuous")
    if not 1 <= level <= schedule.T:
        raise UserError(f"level {level} cannot carry a code length; choose 1 ... {schedule.T}")
    if isinstance(transform, GaussianizedTransform):
        return NormalCells(transform, schedule, level)
    return (UniformCells if transform.dequantize else PointCells)(transform, schedule, level)


class NoisyCells(ABC):
    """q(z|k) and P(k|z) at one noise level, both factorised over the dimensions; see :func:`noisy_cells`.

    Candidates are grey levels in data units on a last axis: (B, *shape, n).
    """

    def __init__(self, transform: DataTransform, schedule: NoiseSchedule, level: int) -> None:
        self.transform = transform
        self.alpha, self.sigma = schedule.alpha[level], schedule.sigma[level]

    @property
    @abstractmethod
    def unit(self) -> Tensor:
        """Width of a cell, what a decoder's tilt is measured in: model units, broadcastable to the event."""

    @abstractmethod
    def candidates(self, z: Tensor) -> Tensor:
        """The grey levels that can have led to ``z``: (B, *shape, n), or (*shape, n) where all can."""

    @abstractmethod
    def log_q_each(self, z: Tensor, candidates: Tensor) -> Tensor:
        """log q(z|k) for each dimension and candidate, (B, *shape, n)."""

    @abstractmethod
    def mean_in_cell(self, z: Tensor, candidates: Tensor) -> Tensor:
        """E[x_0 | z, k] for each dimension and candidate, model units, (B, *shape, n)."""

    def noised(self, x: Tensor, cell: Tensor, eps: Tensor) -> Tensor:
        """A draw of z from q(z|k), model units, float64, (B, *shape).

        Args:
            x: Grey levels, data units.
            cell: Uniform on [0, 1].
            eps: Standard normal.
        """
        return self.alpha * self.transform.place(x, cell) + self.sigma * eps

    def log_q(self, z: Tensor, x: Tensor) -> Tensor:
        """log q(z|k), nats in model units, (B,)."""
        return self.log_q_each(z.double(), x.double()[..., None])[..., 0].flatten(1).sum(1)

    def log_decoder(self, z: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        """log P(k|z), nats, (B,): the flat decoder tilted to the denoiser's mean.

        Among the grey levels k' near z, P(k'|z) is proportional to q(z|k') exp(tilt * k'), times the histogram where
        there is one, with the tilt for which the mean of the data given z is ``x0``: the flat decoder where the
        denoiser agrees with it, and normalised for any ``x0``. The tilt is at most 20 nats a cell: where the noise is
        far below a cell networks don't know the mean well enough for more (measured: following it further costs 0.01
        to 3 bits/dim). Grey levels further than eight deviations of the noise count as impossible.

        Args:
            z: Noisy input, model units, (B, *shape).
            x: Grey levels, data units, (B, *shape).
            x0: E[x_0 | z] of the model, model units, (B, *shape).
        """
        z, x, x0 = z.double(), x.double(), x0.double()
        rows = max(1, LARGEST_TABLE // (z[0].numel() * self.candidates(z[:1]).shape[-1]))
        parts = zip(z.split(rows), x.split(rows), x0.split(rows), strict=True)
        return torch.cat([self._log_decoder(*part) for part in parts])

    def log_prior(self, candidates: Tensor) -> Tensor:
        """log of the flat decoder's prior over the candidates, up to a constant; -inf outside the range."""
        low = -math.inf if self.transform.low is None else self.transform.low
        high = math.inf if self.transform.high is None else self.transform.high
        outside = (candidates < low - self.transform.bin / 4) | (candidates > high + self.transform.bin / 4)
        return torch.zeros_like(candidates).masked_fill(outside, -math.inf)

    def _log_decoder(self, z: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        candidates = self.candidates(z)
        flat = self.log_q_each(z, candidates) + self.log_prior(candidates)
        logits = flat + self._tilt(flat, self.mean_in_cell(z, candidates), x0)
        chosen = ((x[..., None] - candidates).abs() < self.transform.bin / 4).to(torch.float64)
        # log_softmax is -inf for impossible levels: select before multiplying.
        log_p = logits.log_softmax(-1).masked_fill(chosen == 0, 0).sum(-1)
        log_p = log_p.masked_fill(chosen.sum(-1) == 0, -math.inf)
        return log_p.flatten(1).sum(1)

    def _tilt(self, flat: Tensor, means: Tensor, x0: Tensor) -> Tensor:
        """What to add to the flat decoder so that the mean of ``means`` under it is ``x0``; by Newton."""
        centre = (flat.softmax(-1) * means).sum(-1)
        steps = (means - centre[..., None]) / self.unit[..., None]
        goal = (x0 - centre) / self.unit
        tilt = torch.zeros_like(goal)
        for _ in range(NEWTON_STEPS):
            weights = (flat + tilt[..., None] * steps).softmax(-1)
            mean = (weights * steps).sum(-1)
            variance = (weights * (steps - mean[..., None]).square()).sum(-1)
            # A cautious step: where one level has all the mass the variance vanishes and no tilt is needed.
            tilt = (tilt + ((goal - mean) / variance.clamp_min(1e-3)).clamp(-2, 2)).clamp(-20, 20)
        return tilt[..., None] * steps


class _EquallySpaced(NoisyCells):
    """Cells of the same width in every dimension's own unit."""

    @property
    def unit(self) -> Tensor:
        return self.transform.model_bin.min()

    def candidates(self, z: Tensor) -> Tensor:
        nearest = self.transform.quantize(self.transform.inverse(z / self.alpha))
        reach = math.ceil(8 * float(self.sigma / self.alpha / self.unit)) + 1
        offsets = torch.arange(-reach, reach + 1, device=z.device, dtype=torch.float64)
        return nearest[..., None] + self.transform.bin * offsets

    def centres(self, candidates: Tensor) -> Tensor:
        """Middles of the cells, model units."""
        return torch.movedim(self.transform(torch.movedim(candidates, -1, 0)), 0, -1)


@final
class PointCells(_EquallySpaced):
    """Grey levels without a cell: models that were trained without dequantisation."""

    def log_q_each(self, z: Tensor, candidates: Tensor) -> Tensor:
        distance = z[..., None] - self.alpha * self.centres(candidates)
        return -0.5 * (distance / self.sigma).square() - self.sigma.log() - 0.5 * math.log(2 * math.pi)

    def mean_in_cell(self, z: Tensor, candidates: Tensor) -> Tensor:
        return self.centres(candidates)


@final
class UniformCells(_EquallySpaced):
    """x uniform over the cell: z is a box convolved with a Gaussian."""

    def log_q_each(self, z: Tensor, candidates: Tensor) -> Tensor:
        lower, upper, width = self._interval(z, candidates)
        return log_interval(lower, upper) - (self.alpha * width).log()

    def mean_in_cell(self, z: Tensor, candidates: Tensor) -> Tensor:
        lower, upper, _ = self._interval(z, candidates)
        r = self.sigma / self.alpha
        return (z / self.alpha)[..., None] + r * truncated_normal_mean(lower, upper)

    def _interval(self, z: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Edges of the cell about z / alpha in deviations of the noise, and its width in model units."""
        width = self.transform.model_bin.expand(self.transform.shape)[..., None]
        r = self.sigma / self.alpha
        middle = (self.centres(candidates) - (z / self.alpha)[..., None]) / r
        half = 0.5 * width / r
        return middle - half, middle + half, width


@final
class NormalCells(NoisyCells):
    """x a standard normal cut to the cell, the cells as likely as in the histogram: Gaussianised grey levels."""

    transform: GaussianizedTransform

    def __init__(self, transform: GaussianizedTransform, schedule: NoiseSchedule, level: int) -> None:
        super().__init__(transform, schedule, level)
        # z is N(0, v), and x given z is N(mean_weight * z, deviation²).
        self.v = self.alpha**2 + self.sigma**2
        self.mean_weight, self.deviation = self.alpha / self.v, self.sigma / self.v.sqrt()
        self.edges, self.log_mass = transform.cell_edges, transform.log_mass

    @property
    def unit(self) -> Tensor:
        return self.transform.cell_width

    def candidates(self, z: Tensor) -> Tensor:
        count = self.log_mass.shape[-1]
        levels = torch.arange(count, device=z.device, dtype=torch.float64)
        return (self.transform.low + self.transform.bin * levels).expand(*self.transform.shape, count)

    def log_q_each(self, z: Tensor, candidates: Tensor) -> Tensor:
        log_normal = -0.5 * (z.square() / self.v + (2 * math.pi * self.v).log())
        log_mass = self._of(self.log_mass, candidates)
        return log_normal[..., None] + log_interval(*self._interval(z, candidates)) - log_mass

    def log_prior(self, candidates: Tensor) -> Tensor:
        return self._of(self.log_mass, candidates)

    def mean_in_cell(self, z: Tensor, candidates: Tensor) -> Tensor:
        lower, upper = self._interval(z, candidates)
        return (self.mean_weight * z)[..., None] + self.deviation * truncated_normal_mean(lower, upper)

    def _interval(self, z: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """Edges of the cell about the mean of x given z, in its deviations."""
        middle = (self.mean_weight * z)[..., None]
        edges = [self._of(self.edges[..., side:][..., : self.log_mass.shape[-1]], candidates) for side in (0, 1)]
        lower, upper = ((edge - middle) / self.deviation for edge in edges)
        return lower, upper

    def _of(self, table: Tensor, candidates: Tensor) -> Tensor:
        """Entries of ``table`` (*shape, levels) for the candidates."""
        if candidates.shape == table.shape:
            return table
        index = ((candidates - self.transform.low) / self.transform.bin).round().long()
        return table.expand(*candidates.shape[:-1], -1).gather(-1, index)


def log_interval(lower: Tensor, upper: Tensor) -> Tensor:
    """log[Phi(upper) - Phi(lower)] for lower <= upper, accurate in both tails; the ends may be infinite."""
    # By symmetry to the left tail, where log_ndtr is accurate.
    right = lower + upper > 0
    low, high = torch.where(right, -upper, lower), torch.where(right, -lower, upper)
    top, bottom = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    return top + torch.log(-torch.expm1((bottom - top).clamp_max(-1e-300)))


def truncated_normal_mean(lower: Tensor, upper: Tensor) -> Tensor:
    """Mean of a standard normal cut to [lower, upper]."""
    log_mass = log_interval(lower, upper)
    low, high = ((-0.5 * end.square() - log_mass).exp() / math.sqrt(2 * math.pi) for end in (lower, upper))
    return (low - high).nan_to_num().clamp(lower, upper)
