r"""Densities tilted by something known of x_0: a reward, or a measurement.

.. math:: \log\gamma_t(x) = \log p_t(x) + \ell_t(\hat x_0(x)), \qquad \hat x_0 = E[x_0 | x_t]

The path ends at level 1, where :math:`\hat x_0` is x but for the noise of that level. The gradient of the second term
goes through the denoiser. By default it takes the reference Gaussian's derivative of it,
:math:`\partial\hat x_0 / \partial x \approx \alpha_t V_t / \sigma_t^2`, at no cost: it only proposes, and
accept-reject and weights mend what it lacks. The exact one is a second derivative of the network, about twice the time
of an evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.target import reference_gaussian
from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import Level
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser
from torchcdm.models.density import require_density
from torchcdm.models.inputs import as_numbers, check_real
from torchcdm.random import stream

Known = Callable[[Tensor, Tensor], Tensor]
"""ell_t(x0): nats (B,) of E[x_0 | x_t], model units float64 (B, *shape), and levels, long (B,)."""

DRAWS_LINEARISED = 16
"""Points at which a measurement is linearised that is not linear."""

LARGEST_MATRIX = 4096
"""Numbers measured, and of a sample, up to which a linear measurement becomes a matrix."""


@final
class Tilted(Denoiser):
    """p_t(x) exp(ell_t(x0_hat)) as a denoiser.

    Args:
        model: The density that is tilted.
        known: ell_t; need not be differentiable.
        exact: Whether the gradient goes through the denoiser itself.

    Raises:
        UserError: A model without a density, or of unknown shape.
    """

    def __init__(self, model: Denoiser, known: Known, exact: bool = False) -> None:
        model = require_density(model, "compose")
        super().__init__(model.schedule, model.transform, base=model.base)
        self.model, self.known, self.exact, self.reference = model, known, exact, reference_gaussian(model)
        # Of the reference Gaussian: V_t alpha_t / sigma_t², in its eigenbasis, (T, d).
        ratio, alpha = model.schedule.ratio[1:-1, None], model.schedule.alpha[1:-1, None]
        self.slope = Kernels(self.reference).variances / ratio**2 / alpha

    @property
    def shape(self) -> tuple[int, ...] | None:
        return self.model.shape

    def at_level(self, x_t: Tensor, t: Tensor, y: None = None, guidance: float = 0.0) -> tuple[Tensor, Tensor]:
        """log gamma_t(x_t), (B,), and -sigma_t times its gradient, (B, *shape), float64.

        Of ``x_t`` in the network's precision at levels ``t`` 1 ... T, long (B,); there are no classes to guide to.
        """
        x = x_t.detach()
        if self.exact:
            with torch.enable_grad():
                x = x.requires_grad_()
                found = self.model.evaluate_twice_differentiable(x, t)
                x0 = Prediction(x, *self.schedule.at(t, x), found.eps).x0.double()
                log_known = self.known(x0, t)
                pull = self._gradient(log_known, x)
        else:
            found = self.model.evaluate(x, t)
            x0 = Prediction(x, *self.schedule.at(t, x), found.eps).x0.double()
            with torch.enable_grad():
                x0 = x0.detach().requires_grad_()
                log_known = self.known(x0, t)
                pull = self._gradient(log_known, x0)
            rotation = self.reference.rotation
            pull = rotation.inverse(rotation(pull) * self.slope.to(pull.device)[t - 1])
        log_p = found.log_prob_levels.gather(1, t[:, None])[:, 0]
        sigma = self.schedule.at(t, x)[1].double()
        log_gamma = (log_p + log_known.double()).detach().nan_to_num(-math.inf, math.inf, -math.inf)
        return log_gamma, found.eps.detach().double() - sigma * pull.double()

    def denoise(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Prediction:
        self.checked(x_t, t, y)
        levels = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        return Prediction(x_t.detach(), *self.schedule.at(t, x_t), self.at_level(x_t, levels)[1].to(x_t.dtype))

    @staticmethod
    def _gradient(value: Tensor, x: Tensor) -> Tensor:
        """Of a sum in x; zero where what is known has no derivative, or none that is finite."""
        if not value.requires_grad:
            return torch.zeros_like(x)
        (found,) = torch.autograd.grad(value.sum(), x, allow_unused=True)
        return torch.zeros_like(x) if found is None else found.detach().nan_to_num(0, 0, 0)


def tilted(model: Denoiser, reward: Callable[[Tensor], Tensor], exact: bool = False) -> Tilted:
    """p(x) exp(R(x)): the model's samples, weighed by a reward or the log-likelihood of a classifier.

    Args:
        model: The density, or a composed one.
        reward: R, nats (B,) of samples in data units (B, *shape), on the model's device. Without a derivative it
            weighs and accepts, and proposes nothing.
        exact: Whether the gradient goes through the denoiser itself: a second derivative, about twice the time.

    Raises:
        UserError: A model without a density; in calls, a reward of another shape.

    Example:
        >>> heavy = torchcdm.compose.tilted(model, lambda x: x.flatten(1).sum(1) / 50)
        >>> x = torchcdm.sample(heavy, 64, particles=256)
    """

    def known(x0: Tensor, t: Tensor) -> Tensor:
        value = reward(x0 if model.transform is None else model.transform.inverse(x0))
        if not isinstance(value, Tensor) or value.shape != x0.shape[:1]:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"compose: the reward gives {found}; one number a sample is needed, ({len(x0)},)")
        return value

    return Tilted(model, known, exact)


def posterior(
    model: Denoiser,
    measurement: Callable[[Tensor], Tensor],
    y: Tensor,
    noise_std: float | None = None,
    exact: bool = False,
) -> Tilted:
    r"""p(x | y) of a measurement y = A(x) + s noise.

    :math:`\ell_t = \log N(y; A\hat x_0, s^2 I + A V_t A^T)` with the reference Gaussian's posterior variances V_t
    (twisted sequential Monte Carlo, arXiv 2306.17775); of a measurement that is not linear, with the mean variance of
    its linearisations at draws of that Gaussian. A Gaussian is solved exactly.

    Args:
        model: The density, or a composed one.
        measurement: A, of samples in data units (B, *shape) to (B, *m); differentiable. :func:`mask`, :func:`blur` and
            :func:`downsampling` make some.
        y: What was measured, (*m), data units.
        noise_std: s, data units, at least the noise of level 1. None: not known, of prior 1 / s above that.
        exact: As in :func:`tilted`.

    Raises:
        UserError: A measurement of another shape, noise below the model's first level, or a model of unknown shape.
    """
    dense = require_density(model, "a posterior")
    reference, schedule, device = reference_gaussian(dense), dense.schedule, dense.schedule.alpha.device
    y = as_numbers(y[None], device).double()[0]

    def of(z: Tensor) -> Tensor:
        return measurement(z if dense.transform is None else dense.transform.inverse(z)).flatten(1)

    mean = reference.mean[None].to(device)
    found = measurement(mean if dense.transform is None else dense.transform.inverse(mean))
    if found.shape[1:] != y.shape:
        raise UserError(f"posterior: a sample measures as {tuple(found.shape[1:])}, and y has shape {tuple(y.shape)}")
    y, d, m = y.flatten(), mean.numel(), found.numel()
    if max(m, d) > LARGEST_MATRIX:
        raise UserError(f"posterior: {d} numbers a sample and {m} measured; up to {LARGEST_MATRIX} are possible")
    jacobians = [_jacobian(of, mean)]
    scale = float(jacobians[0].square().sum(1).max().sqrt())
    draws = reference.draw((DRAWS_LINEARISED, *mean.shape[1:]), stream(0, "linearise")).to(mean)
    others = [_jacobian(of, z[None]) for z in draws[:2]]
    if not all(torch.allclose(one, jacobians[0], rtol=1e-3, atol=1e-6 * scale) for one in others):
        jacobians = others + [_jacobian(of, z[None]) for z in draws[2:]]
    in_basis = torch.stack([reference.rotation(one.reshape(m, *mean.shape[1:])).double() for one in jacobians])
    least = float(schedule.ratio[1]) * float(torch.stack(jacobians).square().sum(2).mean(0).max().sqrt())
    if noise_std is not None and noise_std < least:
        raise UserError(
            f"posterior: noise_std is {noise_std:g}; the model's first level has {least:.3g} in the units of y: "
            "give at least as much"
        )
    variances = Kernels(reference).variances
    known = _Gaussian(of, y, in_basis, variances, noise_std, least)
    return Tilted(dense, known, exact)


class _Gaussian(nn.Module):
    """log N(y; A(x0), s² I + A V_t A^T) of a linear or linearised measurement."""

    def __init__(
        self, of: Callable, y: Tensor, basis: Tensor, variances: Tensor, std: float | None, least: float
    ) -> None:
        super().__init__()
        self.of, self.y, self.basis, self.variances, self.std, self.least = of, y, basis, variances, std, least
        self.factors: dict[int, Tensor] = {}

    def forward(self, x0: Tensor, t: Tensor) -> Tensor:
        rest, value = self.y - self.of(x0).double(), torch.zeros(len(x0), dtype=torch.float64, device=x0.device)
        for level in t.unique().tolist():
            rows = t == level
            part = rest[rows]
            if self.std is None:
                # The unknown variance s² integrated out under the prior 1 / s, above the least that the model knows.
                spread = (self.basis.square() @ self.variances[level - 1]).mean(0).sum()
                spread = spread + len(self.y) * self.least**2
                found = -0.5 * len(self.y) * ((part.square().sum(1) + spread) / len(self.y)).log()
            else:
                factor = self._factor(level)
                z = torch.linalg.solve_triangular(factor, part.T, upper=False)
                found = -0.5 * z.square().sum(0) - factor.diagonal().log().sum()
            value = value.masked_scatter(rows, found)
        return value

    def _factor(self, level: int) -> Tensor:
        """Cholesky factor of the covariance at a level; those of the last few levels are kept."""
        if level not in self.factors:
            if len(self.factors) > 2**24 // len(self.y) ** 2:
                self.factors.pop(next(iter(self.factors)))
            covariance = (self.basis * self.variances[level - 1] @ self.basis.mT).mean(0)
            covariance.diagonal().add_(self.std**2)
            self.factors[level] = torch.linalg.cholesky(covariance)
        return self.factors[level]


def _jacobian(of: Callable[[Tensor], Tensor], mean: Tensor) -> Tensor:
    """(m, d) of a measurement of ``mean`` (1, *shape), float64."""
    with torch.enable_grad():
        found = torch.autograd.functional.jacobian(lambda z: of(z[None])[0], mean[0].double())
    return found.reshape(len(found), -1)


def mask(kept: Tensor) -> Callable[[Tensor], Tensor]:
    """The pixels or columns where ``kept``, boolean of a sample's shape or one that broadcasts to it: (B, m)."""
    return lambda x: x.flatten(1)[:, kept.to(x.device).bool().expand(x.shape[1:]).flatten()]


def blur(std: float) -> Callable[[Tensor], Tensor]:
    """Images (B, C, H, W) blurred by a Gaussian of ``std`` pixels, zero beyond the borders."""
    check_real("blur: std", std, 0.05, 100)
    reach = math.ceil(3 * std)
    kernel = (-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / std) ** 2).exp()
    kernel = kernel / kernel.sum()

    def measure(x: Tensor) -> Tensor:
        k = kernel.to(x).repeat(x.shape[1], 1)
        x = nn.functional.conv2d(x, k[:, None, :, None], padding=(reach, 0), groups=x.shape[1])
        return nn.functional.conv2d(x, k[:, None, None], padding=(0, reach), groups=x.shape[1])

    return measure


def downsampling(factor: int) -> Callable[[Tensor], Tensor]:
    """Images (B, C, H, W) averaged over squares of ``factor`` pixels."""
    return lambda x: nn.functional.avg_pool2d(x, factor)
