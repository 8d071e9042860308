r"""Code lengths of data on a grid through a noisy level: encoder and decoder of one grey level.

.. math:: -\log P(k) \le E_{q(z|k)}[\log q(z|k) - \log p_t(z) - \log P(k|z)]

with :math:`z = \alpha_t (k + u) + \sigma_t \epsilon`: a box (the cell; a point for a model that was trained without
dequantisation) convolved with a Gaussian. Section 5 of ``docs/method.md``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.schedules import NoiseSchedule
from torchcdm.units import DataTransform

NEWTON_STEPS = 12
"""Enough for the tilt of a decoder to converge to rounding error from the flat one."""


class NoisyCells:
    """q(z|k) and P(k|z) at one noise level, both factorised over the dimensions.

    Args:
        transform: Maps grey levels (data units) to model units; has a bin.
        schedule: The noise schedule.
        level: 1 ... T.

    Raises:
        UserError: Continuous data, or a level without both signal and noise.
    """

    def __init__(self, transform: DataTransform, schedule: NoiseSchedule, level: int) -> None:
        if transform.bin is None:
            raise UserError("code lengths through a noisy level need data on a grid; these are continuous")
        if not 1 <= level <= schedule.T:
            raise UserError(f"level {level} cannot carry a code length; choose 1 ... {schedule.T}")
        self.transform = transform
        self.alpha, self.sigma = schedule.alpha[level], schedule.sigma[level]
        self.half_width = 0.5 * transform.model_bin if transform.dequantize else torch.zeros_like(transform.scale)

    def noised(self, x: Tensor, cell: Tensor, eps: Tensor) -> Tensor:
        """A draw of z from q(z|k), model units, float64, (B, *shape).

        Args:
            x: Grey levels, data units.
            cell: Uniform on [0, 1].
            eps: Standard normal.
        """
        return self.alpha * (self.transform(x.double()) + self.half_width * (2 * cell - 1)) + self.sigma * eps

    def log_q(self, z: Tensor, x: Tensor) -> Tensor:
        """log q(z|k), nats in model units, (B,)."""
        return self._log_q(z.double(), self.transform(x.double())).flatten(1).sum(1)

    def log_decoder(self, z: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        """log P(k|z), nats, (B,): the flat decoder tilted to the denoiser's mean.

        Among the grey levels k' near z, P(k'|z) is proportional to q(z|k') exp(tilt * k'), with the tilt for which the
        mean of the data given z is ``x0``: the flat decoder where the denoiser agrees with it, and normalised for
        any ``x0``. The tilt is at most 20 nats a bin: where the noise is far below a bin networks don't know the mean
        well enough for more (measured: following it further costs 0.01 to 3 bits/dim). Grey levels further than eight
        deviations of the noise count as impossible.

        Args:
            z: Noisy input, model units, (B, *shape).
            x: Grey levels, data units, (B, *shape).
            x0: E[x_0 | z] of the model, model units, (B, *shape).
        """
        bin = self.transform.bin
        z, x0 = z.double(), x0.double()
        nearest = self.transform.quantize(self.transform.inverse(z / self.alpha))
        smallest_bin = float(self.transform.model_bin.min())
        reach = math.ceil(8 * float(self.sigma / self.alpha) / smallest_bin) + 1
        offsets = bin * torch.arange(-reach, reach + 1, device=z.device, dtype=torch.float64)
        candidates = nearest[..., None] + offsets
        low = -math.inf if self.transform.low is None else self.transform.low
        high = math.inf if self.transform.high is None else self.transform.high
        outside = (candidates < low - bin / 4) | (candidates > high + bin / 4)

        centres = self._last_axis(candidates)
        flat = self._log_q(z[..., None], centres, extra_axis=True).masked_fill(outside, -math.inf)
        means = self._mean_in_cell(z[..., None], centres)
        logits = flat + self._tilt(flat, means, x0, smallest_bin)
        chosen = ((x.double()[..., None] - candidates).abs() < bin / 4).to(torch.float64)
        # log_softmax is -inf for impossible levels: select before multiplying.
        log_p = logits.log_softmax(-1).masked_fill(chosen == 0, 0).sum(-1)
        log_p = log_p.masked_fill(chosen.sum(-1) == 0, -math.inf)
        return log_p.flatten(1).sum(1)

    def _mean_in_cell(self, z: Tensor, centre: Tensor) -> Tensor:
        """E[x_0 | z, k], model units: the mean of a Gaussian around z / alpha cut to the cell."""
        if not self.transform.dequantize:
            return centre
        r = self.sigma / self.alpha
        half = self.half_width.expand(self.transform.shape)[..., None]
        distance = centre - z / self.alpha
        # The same mirror as in _log_q; the density at both ends over the mass between them.
        mirrored = -distance.abs()
        log_mass = self._log_interval(mirrored / r, half / r)
        ends = [(-0.5 * ((mirrored + sign * half) / r).square() - log_mass).exp() for sign in (-1, 1)]
        shift = r * (ends[0] - ends[1]) / math.sqrt(2 * math.pi)
        mean = z / self.alpha + torch.where(distance > 0, -shift, shift)
        return mean.clamp(centre - half, centre + half)

    def _tilt(self, flat: Tensor, means: Tensor, x0: Tensor, unit: float) -> Tensor:
        """What to add to the flat decoder so that the mean of ``means`` under it is ``x0``; by Newton."""
        steps = (means - means.mean(-1, keepdim=True)) / unit
        goal = (x0 - means.mean(-1)) / unit
        tilt = torch.zeros_like(goal)
        for _ in range(NEWTON_STEPS):
            weights = (flat + tilt[..., None] * steps).softmax(-1)
            mean = (weights * steps).sum(-1)
            variance = (weights * (steps - mean[..., None]).square()).sum(-1)
            # A cautious step: where one level has all the mass the variance vanishes and no tilt is needed.
            tilt = (tilt + ((goal - mean) / variance.clamp_min(1e-3)).clamp(-2, 2)).clamp(-20, 20)
        return tilt[..., None] * steps

    def _last_axis(self, values: Tensor) -> Tensor:
        """Data to model units for values with candidates on the last axis."""
        return torch.movedim(self.transform(torch.movedim(values, -1, 0)), 0, -1)

    def _log_q(self, z: Tensor, centre: Tensor, extra_axis: bool = False) -> Tensor:
        """log density of z around ``centre`` (model units) for each dimension."""
        distance = z - self.alpha * centre
        half = self.alpha * self.half_width
        if extra_axis:
            half = half.expand(self.transform.shape)[..., None]
        if not self.transform.dequantize:
            return -0.5 * (distance / self.sigma).square() - self.sigma.log() - 0.5 * math.log(2 * math.pi)
        return self._log_interval(-distance.abs() / self.sigma, half / self.sigma) - (2 * half).log()

    @staticmethod
    def _log_interval(middle: Tensor, half: Tensor) -> Tensor:
        """log[Phi(middle + half) - Phi(middle - half)] for middle <= 0, where log_ndtr is accurate."""
        upper = torch.special.log_ndtr(middle + half)
        lower = torch.special.log_ndtr(middle - half)
        return upper + torch.log(-torch.expm1((lower - upper).clamp_max(-1e-300)))
