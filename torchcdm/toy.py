r"""Distributions that are known exactly at every noise level: truth for tests and tutorials; and 2-D toys.

A mixture of Gaussians stays one under the forward process,

.. math:: p_t(x) = \sum_k w_k N(x;\ \alpha_t\mu_k,\ \alpha_t^2\Sigma_k + \sigma_t^2 I),

so its density, score and denoiser have a closed form at every level of every schedule.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from torchcdm.errors import UserError, nearest
from torchcdm.float64 import Float64Module
from torchcdm.gaussian import BaseDensity, StandardNormal
from torchcdm.schedules import Level, NoiseSchedule


@final
class GaussianMixture(Float64Module):
    """Sum over k of w_k N(mu_k, Sigma_k), in float64.

    Args:
        weights: w_k, (K,), normalised here.
        means: mu_k, (K, *shape).
        covariances: Sigma_k of the flattened event, (K, d, d); or variances (K,) of round components.
        labels: Class of each component, long (K,), from 0 without gaps; None for an unlabelled mixture.
    """

    log_weights: Tensor
    means: Tensor
    variances: Tensor
    vectors: Tensor
    labels: Tensor | None

    def __init__(
        self, weights: Tensor, means: Tensor, covariances: Tensor, labels: Tensor | None = None
    ) -> None:
        super().__init__()
        self.shape = tuple(means.shape[1:])
        means = means.double().flatten(1)
        if covariances.ndim == 1:
            covariances = covariances[:, None, None] * torch.eye(means.shape[1], dtype=torch.float64)
        variances, vectors = torch.linalg.eigh(covariances.double())
        self.register_buffer("log_weights", (weights / weights.sum()).double().log())
        self.register_buffer("means", means)
        self.register_buffer("variances", variances)
        self.register_buffer("vectors", vectors)
        self.register_buffer("labels", labels)

    @property
    def classes(self) -> int | None:
        """Number of classes; None for an unlabelled mixture."""
        return None if self.labels is None else int(self.labels.max()) + 1

    @property
    def class_prior(self) -> Tensor:
        """p(y), (classes,)."""
        return self._by_class(self.log_weights[None]).exp()[0]

    # --- densities -------------------------------------------------------------------------------------------

    def component_log_prob_levels(self, x: Tensor, schedule: NoiseSchedule) -> Tensor:
        """log N(x; component k at level t) for every component and level: (B, K, T+2)."""
        # As in gaussian.py, the square is expanded about the mean, so that no (B, K, T+2, d) array is made.
        z = self._rotate(x.double().flatten(1)[:, None] - self.means)
        m = self._rotate(self.means[None])[0]
        variances = schedule.alpha**2 * self.variances[..., None] + schedule.sigma**2
        rest, precision = 1 - schedule.alpha, 1 / variances
        square = (
            torch.einsum("bkd,kdt->bkt", z.square(), precision)
            + 2 * rest * torch.einsum("bkd,kdt->bkt", z * m, precision)
            + rest**2 * torch.einsum("kd,kdt->kt", m.square(), precision)
        )
        return -0.5 * (square + (2 * math.pi * variances).log().sum(1))

    def class_log_prob_levels(self, x: Tensor, schedule: NoiseSchedule) -> Tensor:
        """log p_t(x | y) for every class and level: (B, classes, T+2) (identity 10)."""
        joint = self._by_class(self.component_log_prob_levels(x, schedule) + self.log_weights[:, None])
        return joint - self.class_prior.log()[:, None]

    def log_prob_levels(self, x: Tensor, schedule: NoiseSchedule) -> Tensor:
        """log p_t(x) at every level: (B, T+2)."""
        return (self.component_log_prob_levels(x, schedule) + self.log_weights[:, None]).logsumexp(1)

    def log_prob(self, x: Tensor, t: Level, schedule: NoiseSchedule, y: Tensor | None = None) -> Tensor:
        """log p_t(x), or log p_t(x | y), at one level, an int or long (B,): (B,)."""
        log_joint = self._component_log_prob(x, t, schedule) + self._log_prior(y)
        return log_joint.logsumexp(1)

    def score(self, x: Tensor, t: Level, schedule: NoiseSchedule, y: Tensor | None = None) -> Tensor:
        """Gradient of :meth:`log_prob` with respect to x, shape of ``x``."""
        z, variances = self._standardise(x, t, schedule)
        share = (self._component_log_prob(x, t, schedule) + self._log_prior(y)).softmax(1)
        pull = torch.einsum("bkd,ked->bke", z / variances, self.vectors)
        return -(share[..., None] * pull).sum(1).reshape(x.shape).to(x.dtype)

    def eps(self, x_t: Tensor, t: Level, schedule: NoiseSchedule, y: Tensor | None = None) -> Tensor:
        """E[eps | x_t], shape of ``x_t`` (identity 3)."""
        _, sigma_t = schedule.at(t, x_t)
        return -sigma_t * self.score(x_t, t, schedule, y)

    # --- draws -----------------------------------------------------------------------------------------------

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """(n, *shape), float64."""
        return self.sample_components(n, generator)[0]

    def sample_labelled(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """x (n, *shape), float64, and classes, long (n,).

        Raises:
            UserError: The mixture has no labels.
        """
        if self.labels is None:
            raise UserError("this mixture has no labels; give it labels, or call sample")
        x, component = self.sample_components(n, generator)
        return x, self.labels[component]

    def sample_components(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """x (n, *shape), float64, and the component that each came from, long (n,)."""
        k = torch.multinomial(self.log_weights.exp(), n, replacement=True, generator=generator)
        noise = torch.randn(n, self.means.shape[1], generator=generator, dtype=torch.float64)
        spread = torch.einsum("nd,ned->ne", noise.to(k.device) * self.variances[k].sqrt(), self.vectors[k])
        return (self.means[k] + spread).reshape(n, *self.shape), k

    # --- parts -----------------------------------------------------------------------------------------------

    def _rotate(self, x: Tensor) -> Tensor:
        """Coordinates of ``x`` (B, K, d) in the eigenbasis of each component."""
        return torch.einsum("bke,ked->bkd", x, self.vectors)

    def _standardise(self, x: Tensor, t: Level, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        """x - alpha_t mu_k in the eigenbasis, and the variances along it: each (B or 1, K, d)."""
        flat = x.double().flatten(1)
        alpha_t, sigma_t = schedule.at(t, flat[:, None])
        return self._rotate(flat[:, None] - alpha_t * self.means), alpha_t**2 * self.variances + sigma_t**2

    def _component_log_prob(self, x: Tensor, t: Level, schedule: NoiseSchedule) -> Tensor:
        z, variances = self._standardise(x, t, schedule)
        return -0.5 * (z.square() / variances + (2 * math.pi * variances).log()).sum(2)

    def _log_prior(self, y: Tensor | None) -> Tensor:
        """log p(component | y), (B or 1, K)."""
        if y is None:
            return self.log_weights[None]
        allowed = self.labels == y[:, None]
        return self.log_weights.where(allowed, -math.inf) - self.class_prior.log()[y, None]

    def _by_class(self, log_joint: Tensor) -> Tensor:
        """Sums components (B, K, ...) into classes (B, classes, ...)."""
        parts = [log_joint[:, self.labels == y].logsumexp(1) for y in range(self.classes or 0)]
        return torch.stack(parts, 1)


@final
class MixtureClassifier(nn.Module):
    """The Bayes classifier of noise levels of a mixture, in the form of a backbone: h_t = log p_t(x) - base_t(x).

    Args:
        mixture: The data.
        schedule: The noise schedule.
        base: The base density of the model that this is the backbone of; the standard normal when None.
        joint: Gives all classes in one pass, (B, classes, T+2), instead of those asked for.
    """

    def __init__(
        self,
        mixture: GaussianMixture,
        schedule: NoiseSchedule,
        base: BaseDensity | None = None,
        joint: bool = False,
    ) -> None:
        super().__init__()
        self.mixture, self.schedule = mixture, schedule
        self.base = StandardNormal(schedule) if base is None else base
        self.joint = joint
        self.classes = mixture.classes

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """h, float64 (B, T+2) or (B, classes, T+2); label ``classes`` is the null label."""
        base = self.base.log_prob_levels(x)
        if self.joint:
            return self.mixture.class_log_prob_levels(x, self.schedule) - base[:, None]
        log_p = self.mixture.log_prob_levels(x, self.schedule)
        if y is not None:
            by_class = self.mixture.class_log_prob_levels(x, self.schedule)
            log_p = torch.cat([by_class, log_p[:, None]], 1)[torch.arange(len(x), device=x.device), y]
        return log_p - base


# --- named toys ----------------------------------------------------------------------------------------------


def ring_mixture(modes: int = 8, radius: float = 2.0, deviation: float = 0.2) -> GaussianMixture:
    """Equal round Gaussians on a circle, each a class of its own."""
    angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    variances = torch.full((modes,), deviation**2, dtype=torch.float64)
    return GaussianMixture(torch.ones(modes), means, variances, torch.arange(modes))


Draws = tuple[Tensor, Tensor]
Generator = torch.Generator | None


def _two_moons(n: int, generator: Generator) -> Draws:
    """Two interleaved half circles; the class is the moon."""
    y = torch.randint(2, (n,), generator=generator)
    angle = math.pi * torch.rand(n, generator=generator)
    sign = 1.0 - 2.0 * y
    x = torch.stack([angle.cos() * sign + y - 0.5, angle.sin() * sign + 0.5 * y - 0.25], 1)
    return x + 0.08 * torch.randn(n, 2, generator=generator), y


def _rings(n: int, generator: Generator) -> Draws:
    """Three concentric circles of equal weight; the class is the circle."""
    y = torch.randint(3, (n,), generator=generator)
    angle = 2 * math.pi * torch.rand(n, generator=generator)
    x = (0.7 * (y + 1.0))[:, None] * torch.stack([angle.cos(), angle.sin()], 1)
    return x + 0.07 * torch.randn(n, 2, generator=generator), y


def _eight_gaussians(n: int, generator: Generator) -> Draws:
    """:func:`ring_mixture`; the class is the mode."""
    return ring_mixture().sample_labelled(n, generator)


def _checkerboard(n: int, generator: Generator) -> Draws:
    """The dark cells of a 4 x 4 board on [-2, 2]²; the class is the row."""
    y = torch.randint(4, (n,), generator=generator)
    column = 2 * torch.randint(2, (n,), generator=generator) + y % 2
    x = torch.stack([column, y], 1) - 2 + torch.rand(n, 2, generator=generator)
    return x, y


def _pinwheel(n: int, generator: Generator) -> Draws:
    """Five bent arms; the class is the arm."""
    y = torch.randint(5, (n,), generator=generator)
    along, across = (0.3 * torch.randn(2, n, generator=generator)).unbind(0)
    radius = 1 + along
    angle = 2 * math.pi / 5 * y + 0.3 * radius.exp()
    across = across / 3
    x = torch.stack(
        [radius * angle.cos() - across * angle.sin(), radius * angle.sin() + across * angle.cos()], 1
    )
    return x, y


def _two_spirals(n: int, generator: Generator) -> Draws:
    """Two arms of a spiral; the class is the arm."""
    y = torch.randint(2, (n,), generator=generator)
    angle = 3 * math.pi * torch.rand(n, generator=generator).sqrt()
    x = (angle * (1.0 - 2.0 * y))[:, None] / 5 * torch.stack([angle.cos(), angle.sin()], 1)
    return x + 0.06 * torch.randn(n, 2, generator=generator), y


_NAMED: dict[str, Callable[[int, Generator], Draws]] = {
    "two-moons": _two_moons,
    "rings": _rings,
    "eight-gaussians": _eight_gaussians,
    "checkerboard": _checkerboard,
    "pinwheel": _pinwheel,
    "two-spirals": _two_spirals,
}

TOYS: tuple[str, ...] = tuple(_NAMED)
"""Names that :func:`sample_named` knows."""


def sample_named(name: str, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Draws from a named distribution in the plane.

    Returns:
        x, float32 (n, 2), and classes, long (n,).

    Raises:
        UserError: Unknown name.
    """
    if name not in _NAMED:
        raise UserError(f"unknown toy '{name}'; {nearest(name, TOYS)}")
    x, y = _NAMED[name](n, generator)
    return x.float(), y
