r"""The reverse chain that a denoiser induces: what the ELBO bounds with and annealing proposes from.

.. math:: r(x_s | x_t) = N(a x_t + b \hat x_0(x_t),\ c^2 I + b^2 V_t), \qquad s = t - 1

with the exact kernel :math:`q(x_s|x_t,x_0) = N(a x_t + b x_0, c^2 I)` and :math:`V_t` an estimate of the variance of
:math:`x_0 - \hat x_0(x_t)`, diagonal in the eigenbasis of the reference Gaussian. With V = 0 it is the plain
ancestral kernel, whose variance is too small by as much. Any V that was fixed beforehand leaves bounds and estimates
valid; a good one makes them tight.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from torchcdm.diffusion.prediction import Prediction
from torchcdm.likelihood.flow import reference_gaussian, start_kl
from torchcdm.likelihood.scoring import Scoring
from torchcdm.models.denoiser import Denoiser, working_dtype
from torchcdm.random import stream
from torchcdm.runtime.batching import labels_of
from torchcdm.units.normal import log_normal

CALIBRATION_SAMPLES = 256
"""Model samples from which the variances are measured: each is then right within about a tenth."""


@final
class ReverseChain:
    """Gaussian kernels from each level to the next lower one.

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
            squares[t - 1] = chain.reference.rotation(x_0 - chain.means(x_t, t, y)).square().sum(0)
        return cls(denoiser, squares / len(x_0), scoring)

    def sample(self, n: int, generator: torch.Generator, y: Tensor | None = None) -> Tensor:
        """Draws of x_0 by the chain itself over all levels, model units, float64 (n, *shape)."""
        device, dim = self.schedule.alpha.device, self.reference.variances.numel()

        def normal() -> Tensor:
            return torch.randn(n, dim, generator=generator, dtype=torch.float64).to(device)

        x, _ = self.start(normal())
        for t in range(self.schedule.T, 1, -1):
            x, _ = self.step(x, self.means(x, t, y), t, normal())
        return self.means(x, 1, y) + self.reference.rotation.inverse(normal() * self.variances[0].sqrt())

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

    def step(self, x_t: Tensor, x0: Tensor, t: int, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x_s, s = t - 1, drawn from r(x_s | x_t), and log q(x_t | x_s) - log r(x_s | x_t), nats (B,).

        Args:
            x_t: Model units, float64 (B, *shape).
            x0: The denoiser's mean at ``x_t``.
            t: Its level, 2 ... T; 1 has no such ratio.
            noise: Standard normal, (B, d).
        """
        a, b, c = self.schedule.reverse_kernel(t, t - 1, x_t)
        variance = c**2 + b**2 * self.variances[t - 1]
        x_s = a * x_t + b * x0 + self.reference.rotation.inverse(noise * variance.sqrt())
        keep, added = self.schedule.forward_kernel(t - 1, t, x_t)
        residual = ((x_t - keep * x_s) / added).flatten(1)
        log_q = -0.5 * residual.square().sum(1) - noise.shape[1] * added.log()
        log_r = -0.5 * noise.square().sum(1) - 0.5 * variance.log().sum()
        return x_s, log_q - log_r

    def kl(self, error: Tensor, t: Tensor) -> Tensor:
        """KL(q(x_{t-1} | x_t, x_0) || r(x_{t-1} | x_t)), nats (B,), from ``error`` = x_0 - x0_hat, levels t (B,)."""
        z = self.reference.rotation(error)
        _, b, c = self.schedule.reverse_kernel(t, t - 1, z)
        variance = c**2 + b**2 * self.variances[t - 1]
        moved = (c**2 + (b * z).square()) / variance
        return 0.5 * (moved - 1 + (variance / c**2).log()).sum(1)

    def log_decoder(self, x_0: Tensor, x0: Tensor, t: int) -> Tensor:
        """log N(x_0; x0_hat, V_t), nats (B,): the last step of the chain for continuous data."""
        return log_normal(self.reference.rotation(x_0 - x0), self.variances[t - 1]).sum(1)

    def start(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """x_T from the reference Gaussian by standard normal ``noise`` (B, d), and its log density (B,)."""
        mean, variances = self.reference.moments(self.schedule.T)
        x_T = mean + self.reference.rotation.inverse(noise * variances.sqrt())
        return x_T, (log_normal(noise) - 0.5 * variances.log()).sum(1)

    def prior_kl(self, x_0: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || reference Gaussian at T), nats (B,)."""
        return start_kl(self.reference, self.schedule.alpha[-2] * x_0.double(), self.schedule.sigma[-2])
