r"""Estimates of log Z, the logarithm of what exp(log p_t) integrates to (section 6 of ``docs/method.md``).

Annealed importance sampling along the reverse chain: with x_T drawn from the start density and
:math:`x_{t-1} \sim r(\cdot|x_t)`,

.. math:: \log w = \log \hat p_T(x_T) - \log p_{start}(x_T) + \sum_t [\log \hat p_{t-1}(x_{t-1}) + \log q(x_t|x_{t-1})
    - \log \hat p_t(x_t) - \log r(x_{t-1}|x_t)], \qquad E[w] = Z

for any :math:`\hat p`, as :math:`\hat p_{t-1}(x_{t-1}) q(x_t|x_{t-1})` integrates to Z over both. Resampling between
the steps (sequential Monte Carlo) keeps the mean. What the estimates have in common: the log of a mean errs low.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchcdm.diffusion.prediction import Prediction
from torchcdm.errors import UserError, nearest
from torchcdm.likelihood.chain import ReverseChain
from torchcdm.likelihood.common import labels_of
from torchcdm.likelihood.flow import flow_sample
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import evaluation_mode, working_dtype
from torchcdm.models.density import Evaluation
from torchcdm.runtime.batching import map_rows
from torchcdm.runtime.processes import alone

ESTIMATORS = ("smc", "ais", "flow")
"""Sequential Monte Carlo; the same without resampling; importance sampling from the probability flow."""

ISLANDS = 16
"""Independent populations, from whose spread the confidence interval comes."""

BOOTSTRAP = 2000


@dataclass(frozen=True)
class LogNormalizer:
    """An estimate of log Z.

    Attributes:
        value: Logarithm of the estimate of Z, nats.
        low: Lower end of a 95 % confidence interval (bootstrap), nats.
        high: Upper end.
        estimator: How it was obtained.
        ess: Effective sample size of the estimate of Z: 1 over its relative variance, at most the number of draws.
        level: The level whose density is integrated.
        dim: Dimensions of a sample.
        mean_log_weight: Mean of the logarithm of independent unbiased estimates of Z: below log Z in expectation.
        mean_log_weight_se: Its standard error.
        x: Draws at the level, model units, (n, *shape): of the model's normalised density (``smc``), of the proposal
            otherwise.
    """

    value: float
    low: float
    high: float
    estimator: str
    ess: float
    level: int
    dim: int
    mean_log_weight: float
    mean_log_weight_se: float
    x: Tensor

    def to_json(self) -> dict[str, Any]:
        """In bits per dimension, under the keys of the NLL contract."""
        bits = {key: getattr(self, key) / (self.dim * math.log(2)) for key in ("value", "low", "high")}
        return bits | {"estimator": self.estimator, "ess": self.ess}


@torch.no_grad()
def log_normalizer(
    model: ClassificationDiffusion,
    n: int = 1024,
    level: int = 1,
    method: str = "smc",
    y: int | None = None,
    moves: int = 0,
    chain: ReverseChain | None = None,
    islands: int = ISLANDS,
    steps: int | None = None,
    probes: int = 8,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> LogNormalizer:
    """log of the integral of exp(log p_level).

    Args:
        model: The model; put into evaluation mode meanwhile.
        n: Draws, in all islands together.
        level: Level of the density, 1 ... T.
        method: Of :data:`ESTIMATORS`.
        y: A class, for the normaliser of log p(x|y); None for the unconditional density.
        moves: Langevin steps with accept-reject after each level (``smc``, ``ais``), an evaluation each.
        chain: The proposals; calibrated on model samples when None.
        islands: Independent populations.
        steps: Of the flow; all levels when None.
        probes: Of the flow's divergence: their noise inflates the weights.
        seed: Seed of all noise.
        batch_size: Draws at a time; by their size, and what memory holds, when None.
        progress: Shows a progress bar over the levels (``smc``, ``ais``).

    Raises:
        UserError: An unknown method, a level without density to sample, or too few draws, islands or moves.
    """
    if method not in ESTIMATORS:
        raise UserError(f"unknown estimator '{method}'; {nearest(method, ESTIMATORS)}")
    if not 1 <= level <= model.schedule.T:
        raise UserError(f"level {level} has no normaliser to estimate; choose 1 ... {model.schedule.T}")
    if n < 2 * islands or islands < 2:
        raise UserError(f"n is {n}: {islands} islands need at least 2 draws each; at least 2 islands")
    if moves < 0:
        raise UserError(f"moves is {moves}; it must not be negative")
    size = n // islands
    labels = None if y is None else torch.full((islands * size,), y, device=model.schedule.alpha.device)
    if method == "flow":
        drawn = flow_sample(model, islands * size, labels, level, steps, probes, seed, batch_size)
        with evaluation_mode(model):
            log_p = _evaluate(model, drawn.x_t, level, labels, batch_size).log_prob_levels[:, level]
        log_weights = (log_p - drawn.log_prob)[:, None]
        name, x = f"importance sampling from the probability flow, {islands * size} draws", drawn.x_t
    else:
        if chain is None:
            chain = ReverseChain.calibrated(model, labels, seed=seed, batch_size=batch_size)
        # Particles depend on each other: were there differences in rounding between processes, resampling would turn
        # them into other particles.
        with evaluation_mode(model), alone():
            particles = _Particles(model, chain, labels, islands, size, seed, batch_size)
            particles.run(level, moves, resample=method == "smc", progress=progress)
        log_weights, x = particles.log_estimates(), particles.x
        name = f"{method}, {islands} x {size} particles, {model.schedule.T - level + 1} levels, {moves} moves"
    return _summary(log_weights, name, level, x, islands * size)


@torch.no_grad()
def log_normalizer_above(
    model: ClassificationDiffusion,
    x: Tensor,
    level: int = 1,
    y: int | None = None,
    chain: ReverseChain | None = None,
    seed: int = 0,
    batch_size: int | None = None,
) -> tuple[float, float]:
    """log Z from above, where there are exact samples: the weights of annealing on paths that lead up from them.

    From the model's own samples the mean log weight is at most log Z in expectation, from exact samples of its
    normalised density at least: together they enclose it (Grosse et al., 2015, arXiv 1511.02543).

    Args:
        model: The model; put into evaluation mode meanwhile.
        x: Exact samples of exp(log p_level) / Z, model units, (N, *shape).
        level: Level of the density, 1 ... T.
        y: A class, for the normaliser of log p(x|y); None for the unconditional density.
        chain: As in :func:`log_normalizer`.
        seed: Seed of the noise.
        batch_size: Samples at a time; by their size, and what memory holds, when None.

    Returns:
        Mean log weight, nats, and its standard error.
    """
    schedule, generator = model.schedule, torch.Generator().manual_seed(seed)
    x_s = x.to(schedule.alpha.device).double()
    labels = None if y is None else torch.full((len(x),), y, device=x_s.device)
    chain = ReverseChain.calibrated(model, labels, seed=seed, batch_size=batch_size) if chain is None else chain
    with evaluation_mode(model):
        log_w = _evaluate(model, x_s, level, labels, batch_size).log_prob_levels[:, level]
        for x_t, log_ratio in chain.rise(x_s, level, generator, labels, batch_size):
            log_w, x_s = log_w + log_ratio, x_t
        log_w = log_w - chain.start(chain.start_noise_of(x_s))[1]
    return float(log_w.mean()), float(log_w.std()) / len(x) ** 0.5


def _summary(log_weights: Tensor, name: str, level: int, x: Tensor, draws: int) -> LogNormalizer:
    """From independent unbiased estimates of Z, or groups of them (K, m)."""
    values = (log_weights.logsumexp(1) - math.log(log_weights.shape[1])).cpu()
    shift = values.max()
    weights = (values - shift).exp()
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(weights), (BOOTSTRAP, len(weights)), generator=generator)
    resampled = weights[picks].mean(1).log() + shift
    low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    relative_variance = float(weights.var() / weights.mean() ** 2) / len(weights)
    ess = min(1 / max(relative_variance, 1e-300), float(draws))
    value, mean, error = float(weights.mean().log() + shift), float(values.mean()), values.std() / len(values) ** 0.5
    return LogNormalizer(value, low, high, name, ess, level, x[0].numel(), mean, float(error), x)


def _evaluate(
    model: ClassificationDiffusion, x: Tensor, t: int, y: Tensor | None, batch_size: int | None
) -> Evaluation:
    dtype = working_dtype(model, torch.float64)

    def part(rows: slice) -> tuple[Tensor, ...]:
        result = model.evaluate(x[rows].to(dtype), t, labels_of(y, rows, x.device))
        return result.eps, result.log_prob_levels, result.unconditional

    return Evaluation(*map_rows(part, len(x), batch_size, dim=x.shape[1:].numel(), device=x.device))


class _Particles:
    """Islands of weighted particles on their way down the levels; those of one island are neighbours."""

    def __init__(
        self,
        model: ClassificationDiffusion,
        chain: ReverseChain,
        y: Tensor | None,
        islands: int,
        size: int,
        seed: int,
        batch_size: int | None,
    ) -> None:
        self.model, self.chain, self.y = model, chain, y
        self.islands, self.size, self.batch_size = islands, size, batch_size
        self.dim = chain.reference.variances.numel()
        self.device = chain.schedule.alpha.device
        self.generator = torch.Generator().manual_seed(seed)
        self.x, log_start = chain.start(self._normal())
        self.t = chain.schedule.T
        self._look()
        self.log_w = (self.log_p - log_start).reshape(islands, size)
        self.log_z = torch.zeros(islands, dtype=torch.float64, device=self.device)
        self.step_size = 0.5

    def run(self, level: int, moves: int, resample: bool, progress: bool = False) -> None:
        """Down to ``level``."""
        from tqdm.auto import tqdm

        for t in tqdm(range(self.t - 1, level - 1, -1), desc="log Z", unit="level", disable=not progress, leave=False):
            self._step(t)
            if resample:
                self._resample()
            for _ in range(moves):
                self._move()

    def log_estimates(self) -> Tensor:
        """Logarithms whose exponentials have mean Z, (islands, 1) after resampling: one mean for each island."""
        return (self.log_z + self.log_w.logsumexp(1) - math.log(self.size))[:, None]

    def _normal(self) -> Tensor:
        shape = (self.islands * self.size, self.dim)
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device)

    def _look(self) -> None:
        """log p and the denoiser's mean where the particles are."""
        result = _evaluate(self.model, self.x, self.t, self.y, self.batch_size)
        self.log_p, self.eps = result.log_prob_levels[:, self.t], result.eps.double()
        self.x0 = Prediction(self.x, *self.chain.schedule.at(self.t, self.x), self.eps).x0

    def _step(self, s: int) -> None:
        self.x, log_ratio = self.chain.step(self.x, self.x0, self.t, s, self._normal())
        before, self.t = self.log_p, s
        self._look()
        self.log_w = self.log_w + (self.log_p - before + log_ratio).reshape(self.islands, self.size)

    def _resample(self) -> None:
        """Systematic resampling of the islands whose effective sample size fell below half."""
        weights = self.log_w.softmax(1)
        poor = 1 / weights.square().sum(1) < self.size / 2
        offset = torch.rand(self.islands, generator=self.generator, dtype=torch.float64).to(self.device)
        points = (torch.arange(self.size, device=self.device) + offset[:, None]) / self.size
        chosen = torch.searchsorted(weights.cumsum(1).contiguous(), points).clamp_max(self.size - 1)
        chosen = torch.where(poor[:, None], chosen, torch.arange(self.size, device=self.device))
        index = (chosen + self.size * torch.arange(self.islands, device=self.device)[:, None]).flatten()
        self.x, self.x0, self.eps, self.log_p = self.x[index], self.x0[index], self.eps[index], self.log_p[index]
        gained = self.log_w.logsumexp(1) - math.log(self.size)
        self.log_z = self.log_z + torch.where(poor, gained, 0)
        self.log_w = torch.where(poor[:, None], 0, self.log_w)

    def _move(self) -> None:
        """A Langevin step with accept-reject, which leaves exp(log p_t) invariant, scaled by direction."""
        rotation, sigma = self.chain.reference.rotation, self.chain.schedule.sigma[self.t]
        # E[eps²] = 1 - V alpha² / sigma²: the variance of a Gaussian with as much information in each direction.
        information = 1 - self.chain.variances[self.t - 1] / self.chain.schedule.ratio[self.t] ** 2
        scale = sigma**2 / information.clamp(0.05, 1)
        noise = self._normal()
        here = self.x, self.x0, self.eps, self.log_p
        drift = -0.5 * self.step_size * scale * self.chain.rotate(self.eps) / sigma
        self.x = self.x + rotation.inverse(drift + (self.step_size * scale).sqrt() * noise)
        self._look()
        back = -0.5 * self.step_size * scale * self.chain.rotate(self.eps) / sigma
        returned = -(drift + (self.step_size * scale).sqrt() * noise) - back
        log_backward = -0.5 * (returned.square() / (self.step_size * scale)).sum(1)
        log_forward = -0.5 * noise.square().sum(1)
        log_accept = self.log_p - here[3] + log_backward - log_forward
        uniform = torch.rand(len(noise), generator=self.generator, dtype=torch.float64).to(self.device)
        accepted = uniform.log() < log_accept
        picked = accepted.reshape(-1, *[1] * (self.x.ndim - 1))
        self.x, self.x0, self.eps = (
            torch.where(picked, new, old) for new, old in zip((self.x, self.x0, self.eps), here, strict=False)
        )
        self.log_p = torch.where(accepted, self.log_p, here[3])
        # Towards the acceptance that moves fastest in many dimensions, for the next move: a share over all islands, so
        # that what ties them together, and the bias that comes of it, vanish with the number of particles.
        rate = float(accepted.double().mean())
        self.step_size = float(min(max(self.step_size * math.exp(rate - 0.57), 1e-3), 2.0))
