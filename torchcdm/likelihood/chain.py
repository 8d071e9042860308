r"""The reverse chain that a denoiser induces: what the ELBO bounds with and annealing proposes from.

.. math:: r(x_s | x_t) = N(a x_t + b \hat x_0(x_t),\ c^2 I + b^2 V_t), \qquad s < t

with the exact kernel :math:`q(x_s|x_t,x_0) = N(a x_t + b x_0, c^2 I)` and :math:`V_t` an estimate of the variance of
:math:`x_0 - \hat x_0(x_t)`, diagonal in the eigenbasis of the reference Gaussian. With V = 0 it is the plain
ancestral kernel, whose variance is too small by as much. Any V that was fixed beforehand leaves bounds and estimates
valid; a good one makes them tight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import final

import torch
from torch import Tensor

from torchcdm.diffusion.prediction import Prediction
from torchcdm.likelihood.flow import reference_gaussian
from torchcdm.likelihood.scoring import Scoring
from torchcdm.models.denoiser import Denoiser, working_dtype
from torchcdm.random import stream
from torchcdm.runtime.batching import labels_of
from torchcdm.units.normal import log_normal

CALIBRATION_SAMPLES = 256
"""Model samples from which the variances are measured: each is then right within about a tenth."""


@final
class ReverseChain:
    """Gaussian kernels between any two levels s < t.

    Args:
        denoiser: Any denoiser.
        variances: V_t for the levels 1 ... T in the eigenbasis, (T, d); those of the reference Gaussian's posterior,
            lambda r² / (lambda + r²), when None.
        scoring: Its batch size is used.
    """

    def __init__(self, denoiser: Denoiser, variances: Tensor | None = None, scoring: Scoring = Scoring()) -> None:
        self.denoiser, self.scoring = denoiser, scoring
        self.schedule = denoiser.schedule
        self.reference = reference_gaussian(denoiser)
        if variances is None:
            r = self.schedule.ratio[1:-1, None]
            variances = self.reference.variances / (1 + self.reference.variances / r**2)
        self.variances = variances

    @classmethod
    def calibrated(
        cls,
        denoiser: Denoiser,
        y: Tensor | None = None,
        scoring: Scoring = Scoring(),
        n: int = CALIBRATION_SAMPLES,
        x_0: Tensor | None = None,
    ) -> ReverseChain:
        """Variances measured at every level: T network evaluations of each sample, and T to draw it.

        Args:
            denoiser: Any denoiser.
            y: Classes or contexts that the chain is to be used with, of any number: the samples are spread evenly
                over them. None for none.
            scoring: Seed and batch size.
            n: Samples of the model itself.
            x_0: Samples to use instead, model units, float64 (n, *shape), with a ``y`` for each.
        """
        chain, generator = cls(denoiser, None, scoring), stream(scoring.seed, "chain")
        if x_0 is None:
            y = y if y is None else y[torch.arange(n, device=y.device) * len(y) // n]
            x_0 = chain.sample(n, generator, y)
        squares = torch.zeros_like(chain.variances)
        for t in range(1, denoiser.schedule.T + 1):
            eps = torch.randn(x_0.shape, generator=generator, dtype=x_0.dtype).to(x_0.device)
            x_t = denoiser.schedule.perturb(x_0, t, eps)
            squares[t - 1] = chain.rotate(x_0 - chain.means(x_t, t, y)).square().sum(0)
        return cls(denoiser, squares / len(x_0), scoring)

    def sample(self, n: int, generator: torch.Generator, y: Tensor | None = None) -> Tensor:
        """Draws of x_0 by the chain itself over all levels, model units, float64 (n, *shape)."""
        device, dim = self.schedule.alpha.device, self.reference.variances.numel()

        def normal() -> Tensor:
            return torch.randn(n, dim, generator=generator, dtype=torch.float64).to(device)

        x, _ = self.start(normal())
        for t in range(self.schedule.T, 1, -1):
            x, _ = self.step(x, self.means(x, t, y), t, t - 1, normal())
        spread = self.reference.rotation.inverse(normal() * self.variances[0].sqrt())
        return self.means(x, 1, y) + spread

    def means(self, x_t: Tensor, t: int, y: Tensor | None = None) -> Tensor:
        """:meth:`x0` of many samples, by batches, in evaluation mode."""
        return self.scoring.by_batches(
            self.denoiser, x_t, lambda rows: self.x0(x_t[rows], t, labels_of(y, rows, x_t.device))
        )

    def x0(self, x_t: Tensor, t: int | Tensor, y: Tensor | None = None) -> Tensor:
        """E[x_0 | x_t], float64, shape of ``x_t``."""
        x = x_t.to(working_dtype(self.denoiser, torch.float64))
        with torch.no_grad():
            eps = self.denoiser.denoise(x, t, y).eps
        exact = x_t.double()
        return Prediction(exact, *self.schedule.at(t, exact), eps).x0

    def rotate(self, x: Tensor) -> Tensor:
        """Coordinates in the eigenbasis, (B, d)."""
        return self.reference.rotation(x.double())

    def step(self, x_t: Tensor, x0: Tensor, t: int, s: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x_s drawn from r(x_s | x_t), and log q(x_t | x_s) - log r(x_s | x_t), nats (B,).

        Args:
            x_t: Model units, float64 (B, *shape).
            x0: The denoiser's mean at ``x_t``.
            t: Its level.
            s: The level to go to, 1 ... t - 1.
            noise: Standard normal, (B, d).
        """
        a, b, c = self.schedule.reverse_kernel(t, s, x_t)
        variance = self._kernel_variances(b, c**2, t)
        spread = self.reference.rotation.inverse(noise * variance.sqrt())
        x_s = a * x_t + b * x0 + spread
        keep, added = self.schedule.forward_kernel(s, t, x_t)
        residual = ((x_t - keep * x_s) / added).flatten(1)
        log_q = -0.5 * residual.square().sum(1) - noise.shape[1] * added.log()
        log_r = -0.5 * noise.square().sum(1) - 0.5 * variance.log().sum()
        return x_s, log_q - log_r

    def rise(
        self, x_s: Tensor, level: int, generator: torch.Generator, y: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Paths of the noise up from ``x_s``: at each level above, up to T, x_t and what :meth:`step` says of the way
        back.

        Args:
            x_s: Model units, float64 (B, *shape).
            level: Its level.
            generator: CPU generator of the noise.
            y: Classes, long (B,), or None.
        """
        for t in range(level + 1, self.schedule.T + 1):
            keep, added = self.schedule.forward_kernel(t - 1, t, x_s)
            noise = torch.randn(x_s.shape, generator=generator, dtype=torch.float64).to(x_s.device)
            x_t = keep * x_s + added * noise
            x0 = self.means(x_t, t, y)
            yield x_t, self.step(x_t, x0, t, t - 1, self.noise_of(x_s, x_t, x0, t, t - 1))[1]
            x_s = x_t

    def noise_of(self, x_s: Tensor, x_t: Tensor, x0: Tensor, t: int, s: int) -> Tensor:
        """The noise (B, d) with which :meth:`step` goes from ``x_t`` to ``x_s``."""
        a, b, c = self.schedule.reverse_kernel(t, s, x_t)
        return self.rotate(x_s - a * x_t - b * x0) / self._kernel_variances(b, c**2, t).sqrt()

    def _kernel_variances(self, b: Tensor, c2: Tensor, t: int | Tensor) -> Tensor:
        """c² + b² V_t along the eigenbasis, (d,) for one level or (B, d)."""
        return c2 + b**2 * self.variances[t - 1]

    def kl(self, error: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || r(x_{t-1} | x_t)), nats (B,), from ``error`` = x_0 - x0_hat, levels t (B,)."""
        z = self.rotate(error)
        _, b, c = self.schedule.reverse_kernel(t, t - 1, z)
        variance = self._kernel_variances(b, c**2, t)
        moved = (c**2 + (b * z).square()) / variance
        return 0.5 * (moved - 1 + (variance / c**2).log()).sum(1)

    def log_decoder(self, x_0: Tensor, x0: Tensor, t: int) -> Tensor:
        """log N(x_0; x0_hat, V_t), nats (B,): the last step of the chain for continuous data."""
        return log_normal(self.rotate(x_0 - x0), self.variances[t - 1]).sum(1)

    def start(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x_T from the reference Gaussian by standard normal ``noise`` (B, d), and its log density (B,)."""
        mean, variances = self.reference.moments(self.schedule.T)
        x_T = mean + self.reference.rotation.inverse(noise * variances.sqrt())
        return x_T, (log_normal(noise) - 0.5 * variances.log()).sum(1)

    def start_noise_of(self, x_T: Tensor) -> Tensor:
        """The noise (B, d) with which :meth:`start` gives ``x_T``."""
        mean, variances = self.reference.moments(self.schedule.T)
        return self.rotate(x_T - mean) / variances.sqrt()

    def prior_kl(self, x_0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || reference Gaussian at T), nats (B,)."""
        alpha_T, sigma_T = self.schedule.alpha[-2], self.schedule.sigma[-2]
        mean, variances = self.reference.moments(self.schedule.T)
        square = self.rotate(alpha_T * x_0.double() - mean).square()
        return 0.5 * ((sigma_T**2 + square) / variances - 1 + (variances / sigma_T**2).log()).sum(1)
