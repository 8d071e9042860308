r"""Noise schedules on the levels 0 (data) ... T+1 (pure noise).

.. math:: x_t = \alpha_t x_0 + \sigma_t \epsilon, \qquad \epsilon \sim N(0, I)

with :math:`\alpha_0 = 1, \sigma_0 = 0` and :math:`\alpha_{T+1} = 0, \sigma_{T+1} = 1`. Sampling starts
at level T, the last one that still holds signal. Notation: section 1 of ``docs/method.md``.
"""

import math
from abc import ABC, abstractmethod
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from torchcdm.errors import UserError
from torchcdm.runtime.precision import Float64Module
from torchcdm.runtime.validation import Levels, NotNegative, Positive, checked

Level = int | Tensor  # one for the whole batch, or a long tensor with one for each sample (B,)


def readable(values: Tensor) -> bool:
    """Whether a call may look at ``values``: they are numbers, neither compiled nor under ``torch.func``."""
    if torch.compiler.is_compiling() or values.is_meta:
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(values)


class NoiseSchedule(Float64Module, ABC):
    """The pair (alpha_t, sigma_t) at the levels 0 ... T+1.

    A subclass gives :meth:`inner_levels`, and says of further arguments; the two ends are the same for every schedule.

    Args:
        T: Number of noise levels between data and pure noise.

    Attributes:
        alpha: Signal scale, float64, shape (T+2,).
        sigma: Noise scale, float64, shape (T+2,).
    """

    @checked
    def __init__(self, T: Levels = 200) -> None:
        super().__init__()
        self.T = T
        alpha, sigma = self.inner_levels(torch.arange(1, T + 1, dtype=torch.float64))
        log_ratio = sigma.log() - alpha.log()
        if not alpha.shape == sigma.shape == (T,) or not log_ratio.isfinite().all() or (log_ratio.diff() <= 0).any():
            what = f"alpha and sigma of shape ({T},), both positive, and sigma / alpha rising from level to level"
            raise UserError(f"schedule: inner_levels must give {what}")
        one, zero = alpha.new_ones(1), alpha.new_zeros(1)
        self.alpha = nn.Buffer(torch.cat([one, alpha, zero]), persistent=False)
        self.sigma = nn.Buffer(torch.cat([zero, sigma, one]), persistent=False)

    @abstractmethod
    def inner_levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t at the levels ``t`` = 1 ... T, all float64 of shape (T,)."""

    @property
    def ratio(self) -> Tensor:
        """Noise-to-signal ratio r_t = sigma_t / alpha_t, shape (T+2,); infinite at level T+1."""
        return self.sigma / self.alpha

    def at(self, t: Level, x: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t in the dtype of ``x`` (B, ...), shaped to multiply it; UserError for no level 0 ... T+1.

        Levels on a GPU are not looked at, which would wait; public calls of models ask :meth:`check_levels`.
        """
        self.check_levels(t, x, wait=False)
        return self._like(self.alpha[t], x), self._like(self.sigma[t], x)

    def check_levels(self, t: Level, x: Tensor, wait: bool = True) -> None:
        """Refuses what is no level 0 ... T+1 of each sample, or of all, of ``x`` (B, ...); on a GPU with ``wait``."""
        if isinstance(t, (int, np.integer)) and not isinstance(t, bool):
            wrong = [] if 0 <= t <= self.T + 1 else [t]
        elif not isinstance(t, Tensor):
            raise UserError(f"the level is {t!r}; give an int, or a long tensor with one for each sample")
        elif t.dtype not in (torch.int64, torch.int32) or t.shape not in ((), x.shape[:1]):
            raise UserError(f"levels are {t.dtype} {tuple(t.shape)}; give an int, or a long tensor ({len(x)},)")
        else:
            looked = readable(t) and (wait or t.device.type == "cpu")
            wrong = t[(t < 0) | (t > self.T + 1)].tolist() if looked else []
        if wrong:
            raise UserError(f"level {wrong[0]} does not exist; levels are 0 ... {self.T + 1}")

    def perturb(self, x_0: Tensor, t: Level, eps: Tensor) -> Tensor:
        """The forward process x_t = alpha_t x_0 + sigma_t eps; all (B, ...)."""
        alpha_t, sigma_t = self.at(t, x_0)
        return alpha_t * x_0 + sigma_t * eps

    def forward_kernel(self, s: Level, t: Level, x: Tensor) -> tuple[Tensor, Tensor]:
        """q(x_t | x_s) = N(a x_s, b² I) for s <= t: returns (a, b), shaped to multiply ``x``.

        a = alpha_t / alpha_s and b² = sigma_t² - a² sigma_s², for any two levels, so that a chain
        that skips levels uses the kernels of the skipping chain.
        """
        a = self.alpha[t] / self.alpha[s]
        variance = self.sigma[t] ** 2 - (a * self.sigma[s]) ** 2
        return self._like(a, x), self._like(variance.clamp_min(0).sqrt(), x)

    def reverse_kernel(self, t: Level, s: Level, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q(x_s | x_t, x_0) = N(a x_t + b x_0, c² I) for s < t: returns (a, b, c) to multiply ``x``."""
        step = self.alpha[t] / self.alpha[s]
        noise = (self.sigma[t] ** 2 - (step * self.sigma[s]) ** 2).clamp_min(0)
        share = self.sigma[s] ** 2 / self.sigma[t] ** 2
        a, b = step * share, self.alpha[s] * noise / self.sigma[t] ** 2
        return self._like(a, x), self._like(b, x), self._like((noise * share).sqrt(), x)

    def log_prob_change(self, x_t: Tensor, t: Tensor, eps: Tensor, energy: Tensor) -> Tensor:
        """log p_{t+1}(x_t) - log p_{t-1}(x_t) at a fixed point, by the slope at level t (identity 11): float64 (B,).

        Of x_t (B, *shape) at levels (B,), 2 ... T - 1; ``eps`` is E[eps | x_t], ``energy`` E[|eps|² | x_t], (B,).
        """
        log_r, log_alpha = self.ratio.log(), self.alpha.log()
        along = (eps.double() * x_t.double()).flatten(1).sum(1) / self.sigma[t]
        d = x_t[0].numel()
        slope_r = (energy.double() - d) * (log_r[t + 1] - log_r[t - 1])
        return slope_r + (along - d) * (log_alpha[t + 1] - log_alpha[t - 1])

    def time_grid(self, steps: int, top: int | None = None) -> list[int]:
        """``steps`` falling levels from ``top``, T when None, to 1, even (one: the top); UserError beyond it."""
        top = self.T if top is None else top
        if not 1 <= steps <= top:
            raise UserError(f"steps is {steps}; this schedule takes 1 to {top} sampling steps")
        return [top] if steps == 1 else [top - (i * (top - 1) + (steps - 1) // 2) // (steps - 1) for i in range(steps)]

    @staticmethod
    def _like(value: Tensor, x: Tensor) -> Tensor:
        return value.to(x.dtype).reshape(-1, *[1] * (x.ndim - 1)) if value.ndim else value.to(x.dtype)


@final
class LinearSchedule(NoiseSchedule):
    """Variance-preserving schedule with linear betas (Ho et al., 2020, arXiv 2006.11239).

    Args:
        beta_min: First beta at T = 1000; scaled by 1000 / T, so that the last level is noise for any T.
        beta_max: Last beta at T = 1000.
    """

    @checked
    def __init__(self, T: Levels = 1000, beta_min: Positive = 1e-4, beta_max: Positive = 0.02) -> None:
        if 1000 * beta_max >= T:
            raise UserError(f"linear schedule: T is {T}; it needs more than {1000 * beta_max:g}")
        self.beta_min, self.beta_max = beta_min, beta_max
        super().__init__(T)

    def inner_levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        betas = torch.linspace(self.beta_min, self.beta_max, len(t), dtype=torch.float64)
        abar = torch.cumprod(1 - betas * (1000 / len(t)), 0)
        return abar.sqrt(), (1 - abar).sqrt()


@final
class CosineSchedule(NoiseSchedule):
    """abar_t = cos² of a quarter turn with a small offset (Nichol and Dhariwal, arXiv 2102.09672).

    Args:
        offset: Part of a quarter turn at which level 0 lies.
    """

    @checked
    def __init__(self, T: Levels = 1000, offset: NotNegative = 0.008) -> None:
        self.offset = offset
        super().__init__(T)

    def inner_levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # Over T+1 intervals: level T+1, pure noise, is the end of the quarter turn.
        angle = (t / (len(t) + 1) + self.offset) / (1 + self.offset) * math.pi / 2
        start = math.cos(self.offset / (1 + self.offset) * math.pi / 2)
        alpha = torch.cos(angle) / start
        return alpha, (1 - alpha**2).sqrt()


@final
class UniformSigmaSchedule(NoiseSchedule):
    """sigma_t = t / (T+1), alpha_t = (1 - sigma_t²)^½: the paper's CDM (unif.)."""

    def inner_levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t / (len(t) + 1)
        return (1 - sigma**2).sqrt(), sigma


@final
class OptimalTransportSchedule(NoiseSchedule):
    """sigma_t = t / (T+1), alpha_t = 1 - t / (T+1): the paper's CDM (OT), straight lines to noise."""

    def inner_levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma = t / (len(t) + 1)
        return 1 - sigma, sigma


@final
class LogSNRSchedule(NoiseSchedule):
    """log r_t evenly spaced from ``r_min`` at level 1 to ``r_max`` at level T; variance preserving.

    Args:
        r_min: Noise-to-signal ratio of level 1, model units. When None, half a grey level, or a hundredth of the
            scale of continuous data, in a training; else 0.004, half a level of 256.
        r_max: Noise-to-signal ratio of level T.
    """

    @checked
    def __init__(self, T: Levels = 200, r_min: Positive | None = None, r_max: Positive = 80.0) -> None:
        r_min = 0.004 if r_min is None else r_min
        if r_min >= r_max:
            raise UserError(f"log-snr schedule: needs 0 < r_min < r_max, got {r_min:g} and {r_max:g}")
        self.r_min, self.r_max = r_min, r_max
        super().__init__(T)

    def inner_levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        log_r = torch.linspace(math.log(self.r_min), math.log(self.r_max), len(t), dtype=torch.float64)
        alpha = (1 + (2 * log_r).exp()).rsqrt()
        return alpha, alpha * log_r.exp()
