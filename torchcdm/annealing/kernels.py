r"""The kernels between two levels s < t, and the work of a pair of points: the one number of this package.

.. math:: q(x_t | x_s) = N(a' x_s, b'^2 I), \qquad r(x_s | x_t) = N(a x_t + b \hat x_0(x_t),\ c^2 I + b^2 V_t)

with the exact kernel :math:`q(x_s|x_t,x_0) = N(a x_t + b x_0, c^2 I)` and :math:`V_t` an estimate of the variance of
:math:`x_0 - \hat x_0(x_t)`, diagonal in the eigenbasis of the reference Gaussian. With V = 0 r is the ancestral
kernel, of too small a variance. Any V fixed beforehand leaves bounds and estimates valid; a good one makes them tight.

.. math:: w(x_s, x_t) = \log\gamma_s(x_s) + \log q(x_t|x_s) - \log\gamma_t(x_t) - \log r(x_s|x_t)

has :math:`E[e^w] = Z_s / Z_t` for x_t from gamma_t and x_s from r, :math:`E[e^{-w}] = Z_t / Z_s` for x_s from
gamma_s and x_t from q.
"""

from typing import final

import torch
from torch import Tensor

from torchcdm.annealing.target import Evaluated, Target
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.random import evenly_spaced, normal, stream

CALIBRATION_SAMPLES = 256  # from which the variances are measured: each is then right within about a tenth
MEASURED = 50  # levels at which they are measured, at most


@final
class Kernels:
    """q and r between the levels of the schedule of a ``reference`` Gaussian, whose eigenbasis is used.

    The ``variances`` are V_t for the levels 1 ... T in it, (T, d); those of the Gaussian's posterior,
    lambda r² / (lambda + r²), when None.
    """

    def __init__(self, reference: GaussianMarginals, variances: Tensor | None = None) -> None:
        self.reference, self.schedule = reference, reference.schedule
        if variances is None:
            r = self.schedule.ratio[1:-1, None]
            variances = reference.variances / (1 + reference.variances / r**2)
        self.variances = variances

    @classmethod
    def of_target(cls, target: Target, seed: int = 0, n: int = CALIBRATION_SAMPLES) -> "Kernels":
        """Variances measured at ``MEASURED`` levels at most on ``n`` samples, which a step of each level draws.

        At levels between log V_t is linear in log r_t: from one of the lowest levels to the next they fall by much.
        """
        kernels, schedule, generator = cls(target.reference), target.schedule, stream(seed, "chain")
        (x, _), rotation, dim = target.start(n, generator), target.reference.rotation, kernels.variances.shape[1]
        for t in range(schedule.T, 1, -1):
            x = kernels.down(x, target.eps(x, t), t, t - 1, normal((n, dim), generator, x.device))
        noise = normal((n, dim), generator, x.device) * kernels.variances[0].sqrt()
        x_0 = kernels.x0(x, target.eps(x, 1), 1) + rotation.inverse(noise)
        levels = 1 + evenly_spaced(schedule.T, MEASURED)
        squares = kernels.variances.new_zeros(len(levels), dim)
        for k, t in enumerate(levels.tolist()):
            x_t = schedule.perturb(x_0, t, normal(x_0.shape, generator, x.device))
            squares[k] = rotation(x_0 - kernels.x0(x_t, target.eps(x_t, t), t)).square().sum(0)
        above = torch.searchsorted(levels, torch.arange(1, schedule.T + 1))
        below, log_r = (above - 1).clamp(min=0), schedule.ratio[1:-1].log().to(squares)
        span = log_r[levels[above] - 1] - log_r[levels[below] - 1]
        share = torch.where(span > 0, (log_r - log_r[levels[below] - 1]) / span, 1.0)[:, None]
        return cls(target.reference, squares[below] ** (1 - share) * squares[above] ** share / n)

    def x0(self, x_t: Tensor, eps: Tensor, t: Level) -> Tensor:
        """E[x_0 | x_t] (identity 4) from E[eps | x_t], float64 (B, *shape)."""
        return Prediction(x_t.double(), *self.schedule.at(t, x_t.double()), eps).x0

    def up(self, x_s: Tensor, s: Level, t: Level, noise: Tensor) -> Tensor:
        """x_t from q(x_t | x_s) by standard normal ``noise``; all (B, *shape)."""
        keep, added = self.schedule.forward_kernel(s, t, x_s)
        return keep * x_s + added * noise

    def down(self, x_t: Tensor, eps: Tensor, t: Level, s: Level, noise: Tensor) -> Tensor:
        """x_s (B, *shape), 1 <= s < t, from r(x_s | x_t) by standard normal ``noise`` in the eigenbasis, (B, d)."""
        mean, variance = self._reverse(x_t, eps, t, s)
        return mean + self.reference.rotation.inverse(noise * variance.sqrt())

    def log_ratio(self, x_s: Tensor, x_t: Tensor, eps: Tensor, s: Level, t: Level) -> Tensor:
        """log q(x_t | x_s) - log r(x_s | x_t), nats (B,); ``eps`` belongs to ``x_t``."""
        keep, added = self.schedule.forward_kernel(s, t, x_t.flatten(1))
        noise = (x_t.flatten(1) - keep * x_s.flatten(1)) / added
        mean, variance = self._reverse(x_t, eps, t, s)
        back = self.reference.rotation(x_s - mean).square() / variance
        return 0.5 * (back + variance.log() - noise.square() - 2 * added.log()).sum(1)

    def work(self, x_s: Tensor, x_t: Tensor, at_s: Evaluated, at_t: Evaluated, s: Level, t: Level) -> Tensor:
        """w(x_s, x_t), nats (B,), from what a target says of both points."""
        return at_s.log_gamma - at_t.log_gamma + self.log_ratio(x_s, x_t, at_t.eps, s, t)

    def _reverse(self, x_t: Tensor, eps: Tensor, t: Level, s: Level) -> tuple[Tensor, Tensor]:
        """Mean (B, *shape) and variances in the eigenbasis, (d,) or (B, d), of r(x_s | x_t)."""
        x_0 = self.x0(x_t, eps, t).flatten(1)
        a, b, c = self.schedule.reverse_kernel(t, s, x_0)
        mean = a * x_t.flatten(1) + b * x_0
        return mean.view_as(x_t), c**2 + b**2 * self.variances[torch.as_tensor(t) - 1]


def kl_of_step(schedule: NoiseSchedule, t: Level, s: Level, error: Tensor, variances: Tensor) -> Tensor:
    """KL(q(x_s | x_t, x_0) || r(x_s | x_t)) of each number, nats: ``error`` x_0 - x0_hat, ``variances`` of r's x_0."""
    _, b, c = schedule.reverse_kernel(t, s, error)
    variance = c**2 + b**2 * variances
    return 0.5 * ((c**2 + (b * error).square()) / variance - 1 + (variance / c**2).log())
