r"""Code lengths of data on a grid through a noisy level: encoder and decoder of one grey level.

.. math:: -\log P(k) \le E_{q(z|k)}[\log q(z|k) - \log p_t(z) - \log P(k|z)]

with :math:`z = \alpha_t x + \sigma_t \epsilon` and x spread over the cell of k. Section 5 of ``docs/method.md``.
"""

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from torchcdm.diffusion.schedules import NoiseSchedule
from torchcdm.units import DataTransform, GaussianizedTransform, log_normal

# Of a decoder's tilt, nats a cell: enough to converge to rounding error, unless one cell has nearly all mass.
NEWTON_STEPS, LARGEST_TILT = 12, 20.0
REACH = 9.0  # deviations of the noise within which a decoder weighs cells: exp(-REACH²/2) is below float64's rounding
LARGEST_TABLE = 2**16  # samples times dimensions times candidates of a decoder at once: they stay in the cache


def noisy_cells(transform: DataTransform, schedule: NoiseSchedule, level: int) -> "NoisyCells":
    """The cells of a transform with a bin at a noise level 1 ... T."""
    return (NormalCells if isinstance(transform, GaussianizedTransform) else EqualCells)(transform, schedule, level)


def grey_levels(transform: DataTransform, x: Tensor) -> tuple[Tensor, Tensor]:
    """Number of the nearest grey level of a range, long, and whether a value lies between them; both as ``x``."""
    nearest = transform.quantize(x)
    return ((nearest - transform.low) / transform.bin).round().long(), (x - nearest).abs() > transform.bin / 4


class NoisyCells(ABC):
    """q(z|k) and P(k|z) at one noise level, both factorised over the dimensions; see :func:`noisy_cells`."""

    def __init__(self, transform: DataTransform, schedule: NoiseSchedule, level: int) -> None:
        self.transform = transform
        self.alpha, self.sigma = schedule.alpha[level], schedule.sigma[level]

    @abstractmethod
    def log_q(self, z: Tensor, x: Tensor) -> Tensor:
        """log q(z|k) for each dimension, nats in model units; all float64 (B, *shape)."""

    @abstractmethod
    def log_decoder(self, z: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        """log P(k|z) for each dimension, nats: the flat decoder tilted to the mean of the denoiser; (B, *shape).

        Among the grey levels k' near z, P(k'|z) is proportional to q(z|k') exp(tilt * k'), times the histogram where
        there is one, with the tilt for which the mean of the data given z is ``x0``, E[x_0 | z] of the model: the flat
        decoder where they agree, and normalised for any ``x0``. The tilt is at most 20 nats a cell: where the noise is
        far below a cell networks don't know the mean well enough for more. Of equally spaced levels those further than
        ``REACH`` deviations count as impossible. Model units, but data units of the grey levels ``x``.
        """


@final
class EqualCells(NoisyCells):
    """Cells of the same width in every dimension's own unit, x uniform over them, or in their middles.

    In the middles for models trained without dequantisation. Candidates are grey levels nearby, on a last axis.
    """

    def log_q(self, z: Tensor, x: Tensor) -> Tensor:
        return self._posterior(z, x[..., None])[0][..., 0]

    def log_decoder(self, z: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        low, high = self.transform.low, self.transform.high
        reach = math.ceil(REACH * float(self.sigma / self.alpha / self.transform.model_bin.min())) + 1
        if low is not None and high is not None:
            reach = min(reach, round((high - low) / self.transform.bin))  # there are no more levels
        offsets = self.transform.bin * torch.arange(-reach, reach + 1, device=z.device, dtype=torch.float64)
        rows = max(1, LARGEST_TABLE // (z[0].numel() * len(offsets)))
        parts = zip(z.split(rows), x.split(rows), x0.split(rows), strict=True)
        return torch.cat([self._decoded(*part, offsets) for part in parts])

    def _decoded(self, z: Tensor, x: Tensor, x0: Tensor, offsets: Tensor) -> Tensor:
        """:meth:`log_decoder` among the levels that are ``offsets`` away from the nearest one."""
        transform = self.transform
        candidates = transform.quantize(transform.inverse(z / self.alpha))[..., None] + offsets
        log_q, means = self._posterior(z, candidates)
        low = -math.inf if transform.low is None else transform.low - transform.bin / 4
        high = math.inf if transform.high is None else transform.high + transform.bin / 4
        flat = log_q.masked_fill((candidates < low) | (candidates > high), -math.inf)
        other = (x[..., None] - candidates).abs() > transform.bin / 4
        return tilted(flat, means, x0, transform.model_bin.min()).masked_fill(other, -math.inf).amax(-1)

    def _posterior(self, z: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
        """log q(z|k) and E[x_0 | z, k], model units, for each dimension and candidate, (B, *shape, n)."""
        middles = torch.movedim(self.transform(torch.movedim(candidates, -1, 0)), 0, -1)
        if not self.transform.dequantize:
            return log_normal(z[..., None] - self.alpha * middles, self.sigma**2), middles
        # z is a box convolved with a Gaussian.
        width = self.transform.model_bin.expand(self.transform.shape)[..., None]
        centre, r = (z / self.alpha)[..., None], self.sigma / self.alpha
        lower = middles - 0.5 * width - centre
        edges = torch.cat([lower, lower[..., -1:] + width], -1) / r
        log_mass = log_masses(edges)
        return log_mass - (self.alpha * width).log(), centre + r * truncated_normal_means(edges, log_mass)


@final
class NormalCells(NoisyCells):
    """x a standard normal cut to the cell, the cells as likely as in the histogram: Gaussianised grey levels.

    ``edges`` of the cells are (d, levels + 1), and ``unit`` is their typical width, (d,), both model units.
    """

    def __init__(self, transform: GaussianizedTransform, schedule: NoiseSchedule, level: int) -> None:
        super().__init__(transform, schedule, level)
        # z is N(0, v), and x given z is N(mean_weight * z, deviation²).
        self.v = self.alpha**2 + self.sigma**2
        self.mean_weight, self.deviation = self.alpha / self.v, self.sigma / self.v.sqrt()
        self.edges = torch.special.ndtri(transform.cumulative).flatten(0, -2)
        self.unit = transform.cell_width.flatten()

    def log_q(self, z: Tensor, x: Tensor) -> Tensor:
        dimension = torch.arange(len(self.edges), device=z.device).repeat(len(z))
        index = grey_levels(self.transform, x)[0].flatten()
        log_mass, _ = self._posterior(z.flatten(), dimension, index, 1)
        prior = self.transform.log_mass.flatten(0, -2)[dimension, index]
        return log_normal(z, self.v) + (log_mass[:, 0] - prior).reshape(z.shape)

    def log_decoder(self, z: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        index, off_grid = (part.flatten() for part in grey_levels(self.transform, x))
        first, count = self._window(z, index, x0)
        rows = torch.arange(len(self.edges), device=z.device).repeat(len(z))
        columns = z.flatten(), x0.flatten(), rows, first, index - first
        log_p = torch.empty_like(columns[0])
        for n in count.unique().tolist():
            for part in (count == n).nonzero()[:, 0].split(max(1, LARGEST_TABLE // n)):
                z_part, x0_part, dimension, start, chosen = (column[part] for column in columns)
                flat, means = self._posterior(z_part, dimension, start, n)
                log_p[part] = tilted(flat, means, x0_part, self.unit[dimension]).gather(1, chosen[:, None])[:, 0]
        return log_p.masked_fill(off_grid, -math.inf).reshape(z.shape)

    def _posterior(self, z: Tensor, dimension: Tensor, first: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """log P(k|z) of the flat decoder and E[x_0 | z, k] in the ``n`` cells from ``first`` on, (P, n)."""
        middle = (self.mean_weight * z)[:, None]
        edges = self.edges[dimension[:, None], first[:, None] + torch.arange(n + 1, device=z.device)]
        edges = (edges - middle) / self.deviation
        log_mass = log_masses(edges)
        return log_mass, middle + self.deviation * truncated_normal_means(edges, log_mass)

    def _window(self, z: Tensor, index: Tensor, x0: Tensor) -> tuple[Tensor, Tensor]:
        """The cells that can have mass, and that of the data: the first of them and their number, (P,).

        In deviations of x given z a tilt of theta >= 0 gives the cells beyond R at most exp(theta R - R²/2), by
        Jensen's inequality, and all of them at least 1. So R = theta + sqrt(theta² + REACH²) with the largest tilt is
        enough on the side of the denoiser's mean, and REACH on the other one.
        """
        middle = (self.mean_weight * z).flatten(1)
        theta = LARGEST_TILT * self.deviation / self.unit
        far, near = theta + (theta.square() + REACH**2).sqrt(), torch.full_like(theta, REACH)
        right = x0.flatten(1) > middle
        start = middle - self.deviation * torch.where(right, near, far)
        end = middle + self.deviation * torch.where(right, far, near)
        first, last = (torch.searchsorted(self.edges, side.T.contiguous()).T.flatten() - 1 for side in (start, end))
        first, last = torch.minimum(first.clamp_min(0), index), torch.maximum(last, index)
        # Rounded up to a power of sqrt(2): pixels with equally many cells are handled together.
        count = 2 ** ((2 * (last - first + 1).double().log2()).ceil() / 2)
        count = count.ceil().long().clamp_max(self.edges.shape[1] - 1)
        return torch.minimum(first, self.edges.shape[1] - 1 - count), count


def tilted(flat: Tensor, means: Tensor, x0: Tensor, unit: Tensor) -> Tensor:
    """log probabilities of candidates with weights exp(``flat``), tilted so that the mean of ``means`` is ``x0``.

    ``flat`` is up to a constant; what each candidate contributes to the mean is ``means``, both (..., n); ``x0`` is
    (...), and so is the ``unit`` of the tilt, but for broadcasting.
    """
    centre, _ = _moments(flat, means)
    steps, goal = (means - centre[..., None]) / unit[..., None], (x0 - centre) / unit
    # The mean goes the way of the tilt.
    low, high = (LARGEST_TILT * (sign * goal > 0) for sign in (-1, 1))
    tilt = torch.zeros_like(goal)
    for _ in range(NEWTON_STEPS):
        mean, variance = _moments(torch.addcmul(flat, tilt[..., None], steps), steps)
        # A cautious step: where one candidate has all the mass the variance vanishes and no tilt is needed.
        step = ((goal - mean) / variance.clamp_min(1e-3)).clamp(-2, 2)
        tilt = (tilt + step).clamp(-low, high)
    logits = torch.addcmul(flat, tilt[..., None], steps)
    return logits - logits.logsumexp(-1, keepdim=True)


def _moments(logits: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over the last axis of ``values`` with weights exp(``logits``), (...)."""
    # Not softmax, which takes ten times as long for rows as short as these.
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    total, weighted = weights.sum(-1), weights * values
    mean = weighted.sum(-1) / total
    return mean, (weighted * values).sum(-1) / total - mean.square()


def log_masses(edges: Tensor) -> Tensor:
    """log of the mass of a standard normal between neighbours of the ascending ``edges``, (..., n + 1) to (..., n).

    Accurate in both tails; edges may be infinite, and cells without width have next to no mass.
    """
    # Mass beyond each edge, on the side of its tail.
    tail = torch.special.log_ndtr(-edges.abs())
    left, right = tail[..., :-1], tail[..., 1:]
    top, bottom = torch.maximum(left, right), torch.minimum(left, right)
    one_side = top + torch.log(-torch.expm1((bottom - top).nan_to_num(nan=0.0).clamp_max(-1e-300)))
    # Around 0 the two halves add up.
    both_sides = (0.5 * torch.erf(edges / math.sqrt(2)).diff(dim=-1)).log()
    return torch.where((edges[..., :-1] < 0) & (edges[..., 1:] > 0), both_sides, one_side)


def truncated_normal_means(edges: Tensor, log_mass: Tensor) -> Tensor:
    """Means of a standard normal cut to the cells between neighbouring edges, whose :func:`log_masses` are given."""
    lower, upper = edges[..., :-1], edges[..., 1:]
    # Not log_normal: its constant, rounded beside a large square, would show where neighbouring edges nearly cancel.
    low, high = ((-0.5 * end.square() - log_mass).exp() / math.sqrt(2 * math.pi) for end in (lower, upper))
    # Anything finite for cells without width at infinity: nothing is in them.
    return (low - high).nan_to_num().clamp(lower, upper).nan_to_num(posinf=0.0, neginf=0.0)
