r"""Densities tilted by something known of x_0: a reward, or a measurement.

.. math:: \log\gamma_t(x) = \log p_t(x) + \ell_t(\hat x_0(x)), \qquad \hat x_0 = E[x_0 | x_t]

The path ends at level 1, where :math:`\hat x_0` is x but for the noise of that level. The gradient of the second term
goes through the denoiser as that of the reference Gaussian,
:math:`\partial\hat x_0 / \partial x \approx \alpha_t V_t / \sigma_t^2`, at no cost: it only proposes, and
accept-reject and weights mend what it lacks. The true one is a second derivative and three times as long.
"""

import math
from collections.abc import Callable
from typing import Annotated, final

import numpy as np
import torch
from annotated_types import Ge, Le
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.target import reference_gaussian
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser, Unnormalised
from torchcdm.models.density import DensityModel, require_density
from torchcdm.models.inputs import as_numbers, as_tensor
from torchcdm.random import stream
from torchcdm.runtime.validation import Count, Float, checked

Map = Callable[[Tensor], Tensor]  # a function of samples (B, *shape)
Known = Callable[[Tensor, Tensor], Tensor]
"""ell_t(x0): nats (B,) of E[x_0 | x_t], model units float64 (B, *shape), and levels, long (B,)."""

DRAWS_LINEARISED = 16  # points at which a measurement is linearised that is not linear
TRIED = 64  # points at which a reward is tried
FALL = 0.2  # a floor falls by so many nats over r_t: slowly, or particles near a bound are lost that end within
HEAVY = 0.25  # share of the square by which y is away that counts to the variance of what only a curve explains
LARGEST_MATRIX = 4096  # numbers measured, and of a sample, up to which a linear measurement becomes a matrix

NODES = torch.from_numpy(np.array(np.polynomial.hermite_e.hermegauss(5)) / np.c_[[1.0, (2 * math.pi) ** 0.5]])
"""Where a curve of a normal number is read, and the weights: Gauss-Hermite quadrature, (2, 5)."""


@final
class Tilted(Unnormalised):
    """p_t(x) exp(ell_t(x0_hat)) as a denoiser, of the density of a ``model`` and ell_t, what is ``known``.

    The latter need not be differentiable. UserError for a model of unknown shape.
    """

    def __init__(self, model: DensityModel, known: Known) -> None:
        super().__init__(model.schedule, model.transform, base=model.base)
        self.model, self.known, self.reference = model, known, reference_gaussian(model)
        # Of the reference Gaussian: V_t alpha_t / sigma_t², in its eigenbasis, (T, d).
        ratio, alpha = model.schedule.ratio[1:-1, None], model.schedule.alpha[1:-1, None]
        self.slope = Kernels(self.reference).variances / ratio**2 / alpha

    def at_level(self, x_t: Tensor, t: Tensor, y: None = None, guidance: float = 0.0) -> tuple[Tensor, Tensor]:
        """log gamma_t(x_t), (B,), and -sigma_t times its gradient, (B, *shape), float64.

        Of ``x_t`` in the network's precision at levels ``t`` 1 ... T, long (B,); there are no classes to guide to.
        """
        log_p, eps, _ = self.model.at_level(x_t, t, None, 0.0)
        with torch.enable_grad():
            x0 = Prediction(x_t, *self.schedule.at(t, x_t), eps).x0.detach().double().requires_grad_()
            log_known, pull = self.known(x0, t), None
            if log_known.requires_grad:
                (pull,) = torch.autograd.grad(log_known.sum(), x0, allow_unused=True)
        # Zero where what is known has no derivative, or none that is finite.
        pull = torch.zeros_like(x0) if pull is None else pull.nan_to_num(0, 0, 0)
        rotation = self.reference.rotation
        pull = rotation.inverse(rotation(pull) * self.slope.to(pull.device)[t - 1])
        log_gamma = (log_p + log_known.double()).detach().nan_to_num(-math.inf, math.inf, -math.inf)
        return log_gamma, eps.detach() - self.schedule.at(t, x_t)[1].double() * pull

    def differentiable_eps(self, x_t: Tensor, t: Level, y: Tensor | None = None) -> Tensor:
        raise UserError("flow: the noise of a tilted density has no derivative; ask for the method elbo alone")


def of_data(model: Denoiser, function: Map) -> Map:
    """A function of samples in data units as one of samples in model units."""
    return function if model.transform is None else lambda z: function(model.transform.inverse(z))


def one_each(values: Tensor, x: Tensor, what: str) -> Tensor:
    """Values (B,) of samples x (B, *shape), or UserError where ``what`` gives something else."""
    if not isinstance(values, Tensor) or values.shape != x.shape[:1]:
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise UserError(f"{what} gives {found}; one number a sample is needed, ({len(x)},)")
    return values


def floored(known: Known, tried: Tensor, schedule: NoiseSchedule, or_else: str) -> Known:
    """What is ``known``, above level 1 with a floor where it is -inf: its least value at ``tried``, less FALL / r_t.

    Under much noise E[x_0 | x_t] is near the middle, wherever x_0 is. Were there no mass beyond a bound, particles
    there would be lost, though their x_0 may be within: log Z would be too low. ``tried`` are model units
    (N, *shape); UserError, with the words ``or_else``, where it is finite at none of them.
    """
    with torch.enable_grad():
        values = known(tried.requires_grad_(), torch.ones(len(tried), dtype=torch.long, device=tried.device)).detach()
    if not len(values := values[values.isfinite()]):
        raise UserError(or_else)
    least = float(values.min())

    def bounded(x0: Tensor, t: Tensor) -> Tensor:
        found = known(x0, t)
        floor = torch.where(t > 1, least - FALL / schedule.ratio[t], -torch.inf)
        return torch.where(found > -torch.inf, found, floor)

    return bounded


def tilted(model: Denoiser, reward: Map) -> Tilted:
    """p(x) exp(R(x)): the model's samples, weighed by a reward or the log-likelihood of a classifier.

    Args:
        model: The density, or a composed one; UserError for a model without.
        reward: R, nats (B,) of samples in data units (B, *shape), float64, on the model's device; UserError for
            another shape, or one that is finite at none of some draws. Bounds are where it is -inf: with a large
            negative number instead log Z is too low. Without a derivative it weighs and accepts, and proposes nothing.

    Example:
        >>> heavy = torchcdm.compose.tilted(model, lambda x: x.flatten(1).sum(1) / 50)
        >>> x = torchcdm.sample(heavy, 64, particles=256)
    """
    dense = require_density(model, "compose")
    measured, reference = of_data(dense, reward), reference_gaussian(dense)
    tried = reference.draw((TRIED, *reference.mean.shape), stream(0, "reward")).double()
    or_else = f"compose: the reward is -inf at all of {TRIED} draws; let it fall slowly from where it is highest"
    known = floored(lambda x0, t: one_each(measured(x0), x0, "compose: the reward"), tried, dense.schedule, or_else)
    return Tilted(dense, known)


def posterior(model: Denoiser, measurement: Map, y: Tensor, noise_std: float | None = None) -> Tilted:
    r"""p(x | y) of a measurement y = A(x) + s noise.

    :math:`\ell_t = \log N(y; A\hat x_0, s^2 I + A V_t A^T)` with the reference Gaussian's posterior variances V_t
    (twisted sequential Monte Carlo, arXiv 2306.17775). Where model units are a curve of data units, mean and slope are
    those over the spread V_t of each number around :math:`\hat x_0`; of a measurement that is not linear, the variance
    is the mean of its linearisations at draws of that Gaussian. A Gaussian is solved exactly. UserError for a
    measurement of another shape, or noise below the model's first level.

    Args:
        model: The density, or a composed one.
        measurement: A, differentiable, of samples in data units (B, *shape), float64, to (B, *m), such as :func:`mask`
            makes, each by itself.
        y: What was measured, (*m), data units.
        noise_std: s, data units, at least the noise of level 1. None: not known, of prior 1 / s above that.
    """
    dense = require_density(model, "a posterior")
    reference, schedule, of = reference_gaussian(dense), dense.schedule, of_data(dense, lambda x: x)
    y = as_numbers(as_tensor(y, "posterior: y", schedule.alpha.device)[None], schedule.alpha.device).double()[0]
    mean = reference.mean.to(y.device)
    for count in (1, 2):
        found = measurement(of(mean.expand(count, *mean.shape)))
        if tuple(found.shape) != (count, *y.shape):
            what = f"{count} sample(s) measure as {tuple(found.shape)}, and y has shape {tuple(y.shape)}"
            raise UserError(f"posterior: {what}; {(count, *y.shape)} is needed")
    d, m = mean.numel(), y.numel()
    if max(m, d) > LARGEST_MATRIX:
        raise UserError(f"posterior: {d} numbers a sample and {m} measured; up to {LARGEST_MATRIX} are possible")
    draws = reference.draw((DRAWS_LINEARISED, *mean.shape), stream(0, "linearise")).to(mean).requires_grad_()
    with torch.enable_grad():
        (slopes,) = torch.autograd.grad(of(draws).sum(), draws)

    def linearised(x: Tensor) -> Tensor:
        return jacobian(lambda z: measurement(z[None])[0], x).reshape(m, d)

    x = of(draws.detach()).double()
    matrices, moved = linearised(x[0])[None], measurement(x).flatten(1) - measurement(x[:1]).flatten(1)
    beside = moved - (x - x[0]).flatten(1) @ matrices[0].T
    if not beside.abs().max() <= 1e-3 * moved.abs().max():  # else the first stands for all: images have gigabytes
        matrices = torch.stack([matrices[0], *map(linearised, x[1:])])
    bent = (matrices * slopes.double().flatten(1)[:, None]).square().sum(2)
    least = float(schedule.ratio[1]) * float(bent.mean(0).max().sqrt())
    if noise_std is not None and not least <= noise_std < math.inf:
        has = f"the model's first level has {least:.3g} in the units of y"
        raise UserError(f"posterior: noise_std is {noise_std:g}; {has}: give at least as much")
    return Tilted(dense, _gaussian(measurement, of, y.flatten(), matrices, reference, noise_std, least))


def _gaussian(
    measure: Map, of: Map, y: Tensor, matrices: Tensor, reference: GaussianMarginals, std: float | None, least: float
) -> Known:
    """log N(y; A(E[x]), s² I + A Cov[x] A^T) of x = of(z), z of N(x0_hat, V_t), for ``matrices`` A (draws, m, d).

    ``of`` takes each number along a line or a curve; ``std`` is s, or None where only its ``least`` value is known.
    """
    m, d = matrices.shape[1:]
    basis = reference.rotation(torch.eye(d, dtype=y.dtype, device=y.device).reshape(d, *reference.mean.shape)).double()
    variances = Kernels(reference).variances

    def part(x0: Tensor, level: int) -> Tensor:
        spread = basis * variances[level - 1] @ basis.T
        deviation = spread.diagonal().sqrt()
        nodes, weights = NODES.to(deviation)
        finite, each = x0.nan_to_num().clamp(-1e4, 1e4), deviation.view(x0.shape[1:])
        found = torch.stack([of(finite + node * each) for node in nodes])
        rest = y - measure(torch.tensordot(weights, found, 1)).flatten(1).double()
        values = found.detach().flatten(2)
        slope = torch.tensordot(weights * nodes, values, 1) / deviation
        straight = torch.allclose(slope, slope[:1].expand_as(slope), rtol=1e-6)
        bent = matrices * (slope[:1] if straight else slope)[:, None, None]
        covariance = (bent @ spread @ bent.mT).mean(1)
        if not straight:
            lacking = torch.tensordot(weights, (values - torch.tensordot(weights, values, 1)).square(), 1)
            lacking = (lacking - (slope * deviation).square()).clamp_min(0)[:, None, None]
            covariance += (matrices * lacking @ matrices.mT).mean(1)
            # A curve has heavier tails than its line says: what y is away counts to the variance.
            beyond = HEAVY * rest.detach().square() * (matrices.square() * lacking).sum(3).mean(1)
            covariance += (beyond / (covariance.diagonal(dim1=1, dim2=2) + (std or least) ** 2)).diag_embed()
        diagonal = covariance.diagonal(dim1=1, dim2=2)
        if std is None:
            # The unknown variance s² integrated out under the prior 1 / s, above the least that the model knows.
            return -0.5 * m * ((rest.square().sum(1) + diagonal.sum(1) + m * least**2) / m).log()
        diagonal += std**2
        factor = torch.linalg.cholesky(covariance)
        z = torch.linalg.solve_triangular(factor, rest.T[None] if straight else rest[..., None], upper=False)
        log_scale = factor.diagonal(dim1=1, dim2=2).log().sum(1) + m / 2 * math.log(2 * math.pi)
        return -0.5 * z.square().sum(1).flatten() - log_scale

    def known(x0: Tensor, t: Tensor) -> Tensor:
        value = x0.new_zeros(len(x0))
        for level in t.unique().tolist():
            for some in (t == level).nonzero()[:, 0].split(max(1, 2**24 // matrices.numel())):
                value = value.index_put((some,), part(x0[some], level))
        return value

    return known


def mask(kept: Tensor) -> Map:
    """The pixels or columns where ``kept``, boolean of a sample's shape or one that broadcasts to it: (B, m)."""
    known = as_tensor(kept, "mask", torch.device("cpu"))
    if known.dtype != torch.bool and not bool(((known == 0) | (known == 1)).all()):
        raise UserError("mask: gives other numbers than 0 and 1; it says of every pixel or column whether it is kept")
    known = known.bool()

    def measure(x: Tensor) -> Tensor:
        try:
            chosen = known.expand(x.shape[1:])
        except RuntimeError:
            raise UserError(f"mask: its shape is {tuple(known.shape)}; samples have {tuple(x.shape[1:])}") from None
        return x.flatten(1)[:, chosen.flatten().to(x.device)]

    return measure


@checked
def blur(std: Annotated[Float, Ge(0.05), Le(100)]) -> Map:
    """Images (B, C, H, W) blurred by a Gaussian of ``std`` pixels, zero beyond the borders."""
    reach = math.ceil(3 * std)

    def measure(x: Tensor) -> Tensor:
        if x.ndim != 4:
            raise UserError(f"blur: samples of shape {tuple(x.shape[1:])} are no images (C, H, W)")
        # As products with matrices, which autograd knows.
        blurred = (gaussian_filter1d(np.eye(side), std, 0, mode="constant", radius=reach) for side in x.shape[2:])
        rows, columns = (torch.from_numpy(matrix).to(x) for matrix in blurred)
        return rows @ x @ columns.T

    return measure


@checked
def downsampling(factor: Count) -> Map:
    """Images (B, C, H, W) averaged over squares of ``factor`` pixels, into which their sides divide."""

    def measure(x: Tensor) -> Tensor:
        if x.ndim != 4 or any(side % factor for side in x.shape[2:]):
            raise UserError(f"downsampling: squares of {factor} pixels do not fit into samples {tuple(x.shape[1:])}")
        return nn.functional.avg_pool2d(x, factor)

    return measure
