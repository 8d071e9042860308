r"""Distributions that are known exactly at every noise level: truth for tests and studies.

A mixture of Gaussians stays one under the forward process,

.. math:: p_t(x) = \sum_k w_k N(x;\ \alpha_t\mu_k,\ \alpha_t^2\Sigma_k + \sigma_t^2 I),

so its density, score and denoiser have a closed form at every level of every schedule. So has a mixture of boxes,
each coordinate the difference of two normal distribution functions. All named toys are one or the other.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from torchcdm.data.named import TOYS
from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.errors import UserError
from torchcdm.runtime.precision import Float64Module
from torchcdm.units.log_likelihood import log_normal


class ExactMixture(Float64Module, ABC):
    """A mixture whose components have a closed form at every level of every schedule, in float64.

    A subclass has the ``shape`` of its events, the logarithms of its normalised weights, (K,), the class of each
    component, long (K,), from 0 without gaps or None, and the functions of components.
    """

    shape: tuple[int, ...]
    log_weights: Tensor
    labels: Tensor | None

    @property
    def classes(self) -> int | None:
        """Number of classes; None for an unlabelled mixture."""
        return None if self.labels is None else int(self.labels.max()) + 1

    @property
    def class_prior(self) -> Tensor:
        """p(y), (classes,)."""
        return self._by_class(self.log_weights[None]).exp()[0]

    # --- components ------------------------------------------------------------------------------------------

    @abstractmethod
    def component_log_prob(self, x: Tensor, t: Level, schedule: NoiseSchedule) -> Tensor:
        """log density of every component at one level, an int or long (B,): (B, K)."""

    @abstractmethod
    def component_scores(self, x: Tensor, t: Level, schedule: NoiseSchedule) -> Tensor:
        """Gradient of :meth:`component_log_prob` with respect to the flattened ``x``: (B, K, d)."""

    @abstractmethod
    def draw(self, components: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One draw from each component of ``components``, long (n,): (n, *shape)."""

    def component_log_prob_levels(self, x: Tensor, schedule: NoiseSchedule) -> Tensor:
        """log density of every component at every level: (B, K, T+2)."""
        return torch.stack([self.component_log_prob(x, t, schedule) for t in range(schedule.T + 2)], 2)

    # --- densities -------------------------------------------------------------------------------------------

    def class_log_prob_levels(self, x: Tensor, schedule: NoiseSchedule) -> Tensor:
        """log p_t(x | y) for every class and level: (B, classes, T+2) (identity 10)."""
        joint = self._by_class(self.component_log_prob_levels(x, schedule) + self.log_weights[:, None])
        return joint - self.class_prior.log()[:, None]

    def log_prob_levels(self, x: Tensor, schedule: NoiseSchedule) -> Tensor:
        """log p_t(x) at every level: (B, T+2)."""
        return (self.component_log_prob_levels(x, schedule) + self.log_weights[:, None]).logsumexp(1)

    def log_prob(self, x: Tensor, t: Level, schedule: NoiseSchedule, y: Tensor | None = None) -> Tensor:
        """log p_t(x), or log p_t(x | y), at one level, an int or long (B,): (B,)."""
        log_joint = self.component_log_prob(x, t, schedule) + self._log_prior(y)
        return log_joint.logsumexp(1)

    def score(self, x: Tensor, t: Level, schedule: NoiseSchedule, y: Tensor | None = None) -> Tensor:
        """Gradient of :meth:`log_prob` with respect to x, shape of ``x``."""
        share = (self.component_log_prob(x, t, schedule) + self._log_prior(y)).softmax(1)
        scores = self.component_scores(x, t, schedule)
        return (share[..., None] * scores).sum(1).reshape(x.shape).to(x.dtype)

    def eps(self, x_t: Tensor, t: Level, schedule: NoiseSchedule, y: Tensor | None = None) -> Tensor:
        """E[eps | x_t], shape of ``x_t`` (identity 3)."""
        _, sigma_t = schedule.at(t, x_t)
        return -sigma_t * self.score(x_t, t, schedule, y)

    # --- draws -----------------------------------------------------------------------------------------------

    def sample(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """(n, *shape), float64."""
        return self.sample_components(n, generator)[0]

    def sample_labelled(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """x (n, *shape), float64, and classes, long (n,); UserError where the mixture has no labels."""
        if self.labels is None:
            raise UserError("this mixture has no labels; give it labels, or call sample")
        x, component = self.sample_components(n, generator)
        return x, self.labels[component]

    def sample_components(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """x (n, *shape), float64, and the component that each came from, long (n,)."""
        k = torch.multinomial(self.log_weights.cpu().exp(), n, replacement=True, generator=generator)
        k = k.to(self.log_weights.device)
        return self.draw(k, generator), k

    # --- parts -----------------------------------------------------------------------------------------------

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
class GaussianMixture(ExactMixture):
    """Sum over k of w_k N(mu_k, Sigma_k).

    Args:
        weights: w_k, (K,), normalised here.
        means: mu_k, (K, *shape).
        covariances: Sigma_k of the flattened event, (K, d, d); or variances (K,) of round components.
        labels: Class of each component, long (K,), from 0 without gaps; None for an unlabelled mixture.
    """

    means: Tensor
    variances: Tensor
    vectors: Tensor

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor, labels: Tensor | None = None) -> None:
        super().__init__()
        self.shape = tuple(means.shape[1:])
        means = means.double().flatten(1)
        if covariances.ndim == 1:
            covariances = covariances[:, None, None] * torch.eye(means.shape[1], dtype=torch.float64)
        variances, vectors = torch.linalg.eigh(covariances.double())
        self.register_buffer("log_weights", (weights / weights.sum()).double().log())
        self.register_buffer("labels", labels)
        self.register_buffer("means", means)
        self.register_buffer("variances", variances)
        self.register_buffer("vectors", vectors)

    def component_log_prob_levels(self, x: Tensor, schedule: NoiseSchedule) -> Tensor:
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

    def component_log_prob(self, x: Tensor, t: Level, schedule: NoiseSchedule) -> Tensor:
        z, variances = self._standardise(x, t, schedule)
        return log_normal(z, variances).sum(2)

    def component_scores(self, x: Tensor, t: Level, schedule: NoiseSchedule) -> Tensor:
        z, variances = self._standardise(x, t, schedule)
        return -torch.einsum("bkd,ked->bke", z / variances, self.vectors)

    def draw(self, components: Tensor, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(len(components), self.means.shape[1], generator=generator, dtype=torch.float64)
        scaled = noise.to(components.device) * self.variances[components].sqrt()
        spread = torch.empty_like(scaled)
        for k in components.unique():  # not by one (n, d, d) array of all their axes
            spread[components == k] = scaled[components == k] @ self.vectors[k].T
        return (self.means[components] + spread).reshape(-1, *self.shape)

    def _rotate(self, x: Tensor) -> Tensor:
        """Coordinates of ``x`` (B, K, d) in the eigenbasis of each component."""
        return torch.einsum("bke,ked->bkd", x, self.vectors)

    def _standardise(self, x: Tensor, t: Level, schedule: NoiseSchedule) -> tuple[Tensor, Tensor]:
        """x - alpha_t mu_k in the eigenbasis, and the variances along it: each (B or 1, K, d)."""
        flat = x.double().flatten(1)
        alpha_t, sigma_t = schedule.at(t, flat[:, None])
        return self._rotate(flat[:, None] - alpha_t * self.means), alpha_t**2 * self.variances + sigma_t**2


_NARROW = 1e-4
"""Width of a component, in noise deviations, from which its edges are told apart."""


@final
class BoxMixture(ExactMixture):
    """Sum over k of w_k times the uniform density between two corners: sharp edges, as dequantised pixels have.

    At level 0 the edges are blurred by 1e-4: the log density outside is very negative instead of minus infinity.

    Args:
        weights: w_k, (K,), normalised here.
        low: Lower corners, (K, *shape).
        high: Upper corners, (K, *shape).
        labels: Class of each component, long (K,), from 0 without gaps; None for an unlabelled mixture.
    """

    low: Tensor
    high: Tensor

    def __init__(self, weights: Tensor, low: Tensor, high: Tensor, labels: Tensor | None = None) -> None:
        super().__init__()
        self.shape = tuple(low.shape[1:])
        self.register_buffer("log_weights", (weights / weights.sum()).double().log())
        self.register_buffer("labels", labels)
        self.register_buffer("low", low.double().flatten(1))
        self.register_buffer("high", high.double().flatten(1))

    def component_log_prob(self, x: Tensor, t: Level, schedule: NoiseSchedule) -> Tensor:
        lower, upper, sigma_t = self._edges(x, t, schedule)
        # Between edges that nearly meet, as near level T+1, the normal density is constant.
        between = _log_normal_between(lower, upper) - (upper - lower).clamp_min(_NARROW).log()
        constant = log_normal((lower + upper) / 2)
        return (between.where(upper - lower > _NARROW, constant) - sigma_t.log()).sum(2)

    def component_scores(self, x: Tensor, t: Level, schedule: NoiseSchedule) -> Tensor:
        lower, upper, sigma_t = self._edges(x, t, schedule)
        between = _log_normal_between(lower, upper)
        ratio = (log_normal(upper) - between).exp() - (log_normal(lower) - between).exp()
        return ratio.where(upper - lower > _NARROW, -(lower + upper) / 2) / sigma_t

    def draw(self, components: Tensor, generator: torch.Generator | None = None) -> Tensor:
        share = torch.rand(len(components), self.low.shape[1], generator=generator, dtype=torch.float64)
        low, high = self.low[components], self.high[components]
        return (low + share.to(low.device) * (high - low)).reshape(-1, *self.shape)

    def _edges(self, x: Tensor, t: Level, schedule: NoiseSchedule) -> tuple[Tensor, Tensor, Tensor]:
        """(x - alpha high) / sigma and (x - alpha low) / sigma, (B, K, d), and sigma."""
        flat = x.double().flatten(1)[:, None]
        alpha_t, sigma_t = schedule.at(t, flat)
        sigma_t = sigma_t.clamp_min(1e-4)
        return (flat - alpha_t * self.high) / sigma_t, (flat - alpha_t * self.low) / sigma_t, sigma_t


def _log_normal_between(lower: Tensor, upper: Tensor) -> Tensor:
    """log(Phi(upper) - Phi(lower)), the interval first mirrored to the left half, where nothing cancels."""
    mirror = lower + upper > 0
    left, right = torch.where(mirror, -upper, lower), torch.where(mirror, -lower, upper)
    small, large = torch.special.log_ndtr(left), torch.special.log_ndtr(right)
    # The bound keeps the derivative finite between edges that meet.
    return large + torch.log1p(-(small - large).clamp_max(-1e-6).exp())


# --- named toys ----------------------------------------------------------------------------------------------


def ring_mixture(modes: int = 8, radius: float = 2.0, deviation: float = 0.2) -> GaussianMixture:
    """Equal round Gaussians on a circle, each a class of its own."""
    angle = 2 * math.pi * torch.arange(modes, dtype=torch.float64) / modes
    means = radius * torch.stack([angle.cos(), angle.sin()], 1)
    variances = torch.full((modes,), deviation**2, dtype=torch.float64)
    return GaussianMixture(torch.ones(modes), means, variances, torch.arange(modes))


def named(name: str) -> GaussianMixture:
    """The distribution of the toy of a name, in the plane, with classes; its density is known at every level.

    Example:
        >>> named("two-moons").log_prob_levels(torch.zeros(5, 2), UniformSigmaSchedule(100)).shape
        torch.Size([5, 102])
    """
    toy = TOYS[name]
    points = torch.cat(toy.classes)
    variances = torch.full((len(points),), toy.deviation**2, dtype=torch.float64)
    return GaussianMixture(toy.weights, points, variances, toy.labels)
