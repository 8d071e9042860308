r"""The kernels between two levels s < t, and the work of a pair of points: the one number of this package.

.. math:: q(x_t | x_s) = N(a' x_s, b'^2 I), \qquad r(x_s | x_t) = N(a x_t + b \hat x_0(x_t),\ c^2 I + b^2 V_t)

with the exact kernel :math:`q(x_s|x_t,x_0) = N(a x_t + b x_0, c^2 I)` and :math:`V_t` an estimate of the variance of
:math:`x_0 - \hat x_0(x_t)`, diagonal in the eigenbasis of the reference Gaussian. With V = 0 r is the plain
ancestral kernel, whose variance is too small by as much. Any V that was fixed beforehand leaves bounds and estimates
valid; a good one makes them tight.

.. math:: w(x_s, x_t) = \log\gamma_s(x_s) + \log q(x_t|x_s) - \log\gamma_t(x_t) - \log r(x_s|x_t)

has :math:`E[e^w] = Z_s / Z_t` for x_t from gamma_t and x_s from r, :math:`E[e^{-w}] = Z_t / Z_s` for x_s from
gamma_s and x_t from q.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from torchcdm.annealing.target import Evaluated, Target, in_batches, reference_gaussian
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.models.denoiser import Denoiser, working_dtype
from torchcdm.random import stream
from torchcdm.runtime.batching import labels_of
from torchcdm.units.normal import log_normal

CALIBRATION_SAMPLES = 256
"""Samples from which the variances are measured: each is then right within about a tenth."""


@final
class Kernels:
    """q and r between the levels of a schedule.

    Args:
        reference: The Gaussian whose eigenbasis is used; it has the schedule.
        variances: V_t for the levels 1 ... T in the eigenbasis, (T, d); those of the reference Gaussian's posterior,
            lambda r² / (lambda + r²), when None.
    """

    def __init__(self, reference: GaussianMarginals, variances: Tensor | None = None) -> None:
        self.reference, self.schedule = reference, reference.schedule
        if variances is None:
            r = self.schedule.ratio[1:-1, None]
            variances = reference.variances / (1 + reference.variances / r**2)
        self.variances = variances

    @classmethod
    def measured(
        cls,
        reference: GaussianMarginals,
        x0_of: Callable[[Tensor, int], Tensor],
        x_T: Tensor,
        generator: torch.Generator,
    ) -> Kernels:
        """Variances measured at every level, by 2 T evaluations of each sample: T draw it.

        Args:
            reference: The Gaussian, whose variances the samples are drawn with.
            x0_of: Gives E[x_0 | x_t], float64 (n, *shape), of x_t and the level t.
            x_T: Where the samples start, float64 (n, *shape).
            generator: Draws the noise; a CPU generator.
        """
        kernels, rotation, schedule, x = cls(reference), reference.rotation, reference.schedule, x_T

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64).to(x_T.device)

        dim = kernels.variances.shape[1]
        for t in range(schedule.T, 1, -1):
            x = kernels.down(x, x0_of(x, t), t, t - 1, normal(len(x), dim))
        x_0 = x0_of(x, 1) + rotation.inverse(normal(len(x), dim) * kernels.variances[0].sqrt())
        squares = torch.zeros_like(kernels.variances)
        for t in range(1, schedule.T + 1):
            x_t = schedule.perturb(x_0, t, normal(*x_0.shape))
            squares[t - 1] = rotation(x_0 - x0_of(x_t, t)).square().sum(0)
        return cls(reference, squares / len(x_0))

    @classmethod
    def of_target(cls, target: Target, seed: int = 0, n: int = CALIBRATION_SAMPLES) -> Kernels:
        """:meth:`measured` on ``n`` samples by a target's gradient."""
        generator = stream(seed, "chain")

        def x0_of(x_t: Tensor, t: int) -> Tensor:
            return denoised(target.schedule, x_t, t, target.evaluate(x_t, t).eps)

        return cls.measured(target.reference, x0_of, target.start(n, generator)[0], generator)

    @classmethod
    def of_denoiser(
        cls,
        denoiser: Denoiser,
        y: Tensor | None = None,
        seed: int = 0,
        n: int = CALIBRATION_SAMPLES,
        batch_size: int | None = None,
    ) -> Kernels:
        """:meth:`measured` on samples of any denoiser.

        Args:
            denoiser: The denoiser.
            y: Classes or contexts that the kernels are to be used with, of any number: the samples are spread evenly
                over them. None for none.
            seed: Seed of the samples and their noise.
            n: Number of samples.
            batch_size: Samples at a time; by their size, and what memory holds, when None.
        """
        labels = y if y is None else y[torch.arange(n, device=y.device) * len(y) // n]
        reference, generator = reference_gaussian(denoiser), stream(seed, "chain")
        noise = torch.randn(n, *reference.mean.shape, generator=generator, dtype=torch.float64)

        def x0_of(x_t: Tensor, t: int) -> Tensor:
            return denoiser_x0(denoiser, x_t, t, labels, batch_size)

        return cls.measured(reference, x0_of, reference.start(noise.to(reference.mean.device)), generator)

    def up(self, x_s: Tensor, s: Level, t: Level, noise: Tensor) -> Tensor:
        """x_t from q(x_t | x_s) by standard normal ``noise``; all (B, *shape)."""
        keep, added = self.schedule.forward_kernel(s, t, x_s)
        return keep * x_s + added * noise

    def down(self, x_t: Tensor, x0: Tensor, t: Level, s: Level, noise: Tensor) -> Tensor:
        """x_s from r(x_s | x_t).

        Args:
            x_t: Model units, float64 (B, *shape).
            x0: E[x_0 | x_t] of the target or of a denoiser.
            t: Level of ``x_t``.
            s: Level to reach, from 1 to t - 1.
            noise: Standard normal in the eigenbasis, (B, d).
        """
        mean, variance = self._reverse(x_t, x0, t, s)
        return mean + self.reference.rotation.inverse(noise * variance.sqrt())

    def log_ratio(self, x_s: Tensor, x_t: Tensor, x0: Tensor, s: Level, t: Level) -> Tensor:
        """log q(x_t | x_s) - log r(x_s | x_t), nats (B,); ``x0`` belongs to ``x_t``."""
        keep, added = self.schedule.forward_kernel(s, t, x_t.flatten(1))
        noise = (x_t.flatten(1) - keep * x_s.flatten(1)) / added
        mean, variance = self._reverse(x_t, x0, t, s)
        back = self.reference.rotation(x_s - mean).square() / variance
        return 0.5 * (back + variance.log() - noise.square() - 2 * added.log()).sum(1)

    def work(self, x_s: Tensor, x_t: Tensor, at_s: Evaluated, at_t: Evaluated, s: Level, t: Level) -> Tensor:
        """w(x_s, x_t), nats (B,), from what a target says of both points."""
        x0 = denoised(self.schedule, x_t, t, at_t.eps)
        return at_s.log_gamma - at_t.log_gamma + self.log_ratio(x_s, x_t, x0, s, t)

    def kl(self, error: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || r(x_{t-1} | x_t)), nats (B,), from ``error`` = x_0 - x0_hat, levels t (B,)."""
        z = self.reference.rotation(error)
        _, b, c = self.schedule.reverse_kernel(t, t - 1, z)
        variance = c**2 + b**2 * self.variances[t - 1]
        moved = (c**2 + (b * z).square()) / variance
        return 0.5 * (moved - 1 + (variance / c**2).log()).sum(1)

    def prior_kl(self, x_0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || reference Gaussian at T), nats (B,)."""
        return self.reference.start_kl(self.schedule.alpha[-2] * x_0.double(), self.schedule.sigma[-2])

    def log_decoder(self, x_0: Tensor, x0: Tensor, t: int) -> Tensor:
        """log N(x_0; x0_hat, V_t), nats (B,): the last step of the chain for continuous data."""
        return log_normal(self.reference.rotation(x_0 - x0), self.variances[t - 1]).sum(1)

    def _reverse(self, x_t: Tensor, x0: Tensor, t: Level, s: Level) -> tuple[Tensor, Tensor]:
        """Mean (B, *shape) and variances in the eigenbasis, (d,) or (B, d), of r(x_s | x_t)."""
        a, b, c = self.schedule.reverse_kernel(t, s, x_t)
        flat = [factor.reshape(-1, 1) if factor.ndim else factor for factor in (b, c)]
        return a * x_t + b * x0, flat[1] ** 2 + flat[0] ** 2 * self.variances[torch.as_tensor(t) - 1]


def denoised(schedule: NoiseSchedule, x_t: Tensor, t: Level, eps: Tensor) -> Tensor:
    """E[x_0 | x_t] (identity 4) in float64, shape of ``x_t``."""
    x_t = x_t.double()
    return Prediction(x_t, *schedule.at(t, x_t), eps).x0


def denoiser_x0(
    denoiser: Denoiser, x_t: Tensor, t: Level, y: Tensor | None = None, batch_size: int | None = None
) -> Tensor:
    """:func:`denoised` by a denoiser, (N, *shape), by batches; ``t`` an int, or long (N,)."""
    dtype = working_dtype(denoiser, torch.float64)

    def eps(rows: slice) -> Tensor:
        at = t if isinstance(t, int) else t[rows]
        return denoiser.denoise(x_t[rows].to(dtype), at, labels_of(y, rows, x_t.device)).eps

    return denoised(denoiser.schedule, x_t, t, in_batches(denoiser, x_t, eps, batch_size))
