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
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchcdm.diffusion.prediction import Prediction
from torchcdm.errors import UserError, nearest
from torchcdm.likelihood.chain import CALIBRATION_SAMPLES, ReverseChain
from torchcdm.likelihood.flow import FlowSolver
from torchcdm.likelihood.noise import dithered
from torchcdm.likelihood.scoring import LARGEST_COUNT, Scoring, as_data
from torchcdm.models.denoiser import Denoiser, working_dtype
from torchcdm.models.density import DensityModel, require_density
from torchcdm.models.inputs import as_labels, check_count
from torchcdm.random import stream
from torchcdm.runtime.batching import labels_of
from torchcdm.runtime.processes import alone

ESTIMATORS = ("smc", "ais", "flow")
"""Sequential Monte Carlo; the same without resampling; importance sampling from the probability flow."""

ISLANDS = 16
"""Independent populations, from whose spread the confidence interval comes."""

FEWEST_PARTICLES = 2 * ISLANDS
"""Two in each population."""

SMALLEST_ESS = 20
"""Effective sample size below which an estimate normalises nothing: at 20, Z has a standard error of 22 %."""

FLOW_PROBES = 8
"""Fewest probes of the flow's divergence when it draws: their noise inflates the weights."""

BOOTSTRAP = 2000

LARGEST_POPULATION = 2**30
"""Values that all particles together may have."""


@dataclass(frozen=True)
class LogZ:
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
        x: Draws of the model's normalised density at the level, model units, (n, *shape), equally weighted: resampled
            by their weights within each island, so that few effective ones repeat. None where there are none.
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
    x: Tensor | None = None

    @classmethod
    def of_weights(
        cls, log_weights: Tensor, estimator: str, level: int, dim: int, draws: int, x: Tensor | None = None
    ) -> LogZ:
        """From the logarithms of K independent unbiased estimates of Z, (K,), that took so many ``draws``."""
        values = log_weights.cpu()
        shift, n = values.max(), len(values)
        weights = (values - shift).exp()
        picks = torch.randint(n, (BOOTSTRAP, n), generator=stream(0, "bootstrap"))
        resampled = weights[picks].mean(1).log() + shift
        low, high = resampled.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        relative_variance = float(weights.var() / weights.mean() ** 2) / n
        ess = min(1 / max(relative_variance, 1e-300), float(draws))
        value, error = float(weights.mean().log() + shift), float(values.std() / n**0.5)
        return cls(value, low, high, estimator, ess, level, dim, float(values.mean()), error, x)

    @property
    def usable(self) -> bool:
        """Whether enough draws carry the weight: the effective sample size is at least :data:`SMALLEST_ESS`."""
        return self.ess >= SMALLEST_ESS

    @property
    def se(self) -> float:
        """Standard error, nats: the interval is 1.96 of them to either side."""
        return (self.high - self.low) / 3.92

    def contradicts(self, other: LogZ) -> bool:
        """Whether the intervals are apart, or ``other``'s mean log weight, a lower bound, lies above this interval.

        An estimate of few effective samples errs low without limit: only that bound of ``other`` then says something.
        """
        if other.mean_log_weight > self.high + 3 * other.mean_log_weight_se:
            return True
        return other.usable and (other.low > self.high or other.high < self.low)

    def to_json(self) -> dict[str, Any]:
        """In bits per dimension, under the keys of the NLL contract."""
        bits = {key: getattr(self, key) / (self.dim * math.log(2)) for key in ("value", "low", "high")}
        return bits | {"estimator": self.estimator, "ess": self.ess}

    def reliability(self) -> str:
        """Interval in bits per dimension, effective sample size and estimator, for a reader."""
        bits = self.to_json()
        return f"95% [{bits['low']:+.4f}, {bits['high']:+.4f}], ess {self.ess:.1f}, {self.estimator}"


@torch.no_grad()
def log_normalizer(
    model: DensityModel,
    x: Tensor | None = None,
    y: int | None = None,
    scoring: Scoring = Scoring(),
    particles: int = 1024,
    method: str = "smc",
    moves: int = 1,
    islands: int = ISLANDS,
    chain: ReverseChain | None = None,
    progress: bool = False,
) -> LogZ:
    """log of the integral of exp(log p_t), over all inputs.

    Args:
        model: Put into evaluation mode meanwhile.
        x: Data on which the variances of the proposals are measured, data units, (N, *shape); samples of the model
            itself when None.
        y: A class, for the normaliser of log p(x|y); None for the unconditional density.
        scoring: Level 1 ... T, seed and batch size; steps and probes of the flow.
        particles: Draws, in all islands together.
        method: One of :data:`ESTIMATORS`.
        moves: Langevin steps with accept-reject after each level (``smc``, ``ais``), an evaluation each. Without any
            the particles see only what the reverse chain proposes.
        islands: Independent populations.
        chain: The proposals; measured as ``x`` says when None.
        progress: Shows a progress bar over the levels (``smc``, ``ais``).

    Raises:
        UserError: An unknown method, data or a level that do not fit the model, or too few draws, islands or moves.
    """
    if method not in ESTIMATORS:
        raise UserError(f"unknown estimator '{method}'; {nearest(method, ESTIMATORS)}")
    model, schedule = require_density(model, "log Z"), model.schedule
    level = scoring.level_of(model, 1, schedule.T)
    require_population(model, particles, moves, islands)
    size = particles // islands
    labels = as_labels(y, model, islands * size, one_for_all=True)
    if method == "flow":
        solver = FlowSolver(model, replace(scoring, probes=max(FLOW_PROBES, scoring.probes)))
        drawn, log_q = solver.sample(islands * size, labels)
        estimates = _evaluate(model, drawn, level, labels, scoring)[0] - log_q
        offset = torch.rand(1, generator=stream(scoring.seed, "resampling"), dtype=torch.float64)
        drawn = drawn[_systematic(estimates.softmax(0)[None], offset.to(drawn.device))[0]]
        name = f"importance sampling from the probability flow, {islands * size} draws"
    else:
        # Particles depend on each other: were there differences in rounding between processes, resampling would turn
        # them into other particles.
        chain = chain or _measured_chain(model, x, y, scoring)
        with alone():
            population = _Particles(model, chain, labels, islands, size, scoring)
            population.run(level, moves, resample=method == "smc", progress=progress)
        estimates = population.log_estimates()
        population.resample(below=math.inf)
        drawn = population.x
        name = f"{method}, {islands} x {size} particles, {schedule.T - level + 1} levels, {moves} moves"
    return LogZ.of_weights(estimates, name, level, drawn[0].numel(), islands * size, drawn)


def log_z_estimates(
    model: DensityModel, chain: ReverseChain, scoring: Scoring, particles: int, moves: int = 1, progress: bool = False
) -> tuple[LogZ, LogZ]:
    """log Z by sequential Monte Carlo, and a second estimate, from a quarter as many draws of the flow.

    Arguments as in :func:`log_normalizer`, for the first.
    """
    first = log_normalizer(model, None, None, scoring, particles, "smc", moves, chain=chain, progress=progress)
    return first, log_normalizer(model, None, None, scoring, max(FEWEST_PARTICLES, particles // 4), "flow")


def require_population(model: Denoiser, particles: int, moves: int, islands: int = ISLANDS) -> None:
    """Refuses numbers of particles, moves and islands that cannot be or do not fit into memory."""
    check_count("islands", islands, 2)
    check_count("moves", moves, 0, LARGEST_COUNT)
    check_count("particles", particles, 2 * islands, LARGEST_POPULATION // math.prod(model.shape or (1,)))


def _measured_chain(model: DensityModel, x: Tensor | None, y: int | None, scoring: Scoring) -> ReverseChain:
    """Variances measured on data, or on samples of the model."""
    if x is None:
        return ReverseChain.calibrated(model, as_labels(y, model, 1, one_for_all=True), scoring)
    x = as_data(model, x, None)[0][:CALIBRATION_SAMPLES]
    x_0 = dithered(model.transform, x, scoring.seed).to(model.schedule.alpha.device)
    labels = as_labels(y, model, len(x), one_for_all=True)
    return ReverseChain.calibrated(model, labels, scoring, x_0=model.transform(x_0))


def _evaluate(model: DensityModel, x: Tensor, t: int, y: Tensor | None, scoring: Scoring) -> tuple[Tensor, Tensor]:
    """log p_t of noisy inputs, (n,), and E[eps | x_t]."""
    dtype = working_dtype(model, torch.float64)

    def part(rows: slice) -> tuple[Tensor, Tensor]:
        found = model.evaluate(x[rows].to(dtype), t, labels_of(y, rows, x.device))
        return found.log_prob_levels[:, t], found.eps

    return scoring.by_batches(model, x, part)


def _systematic(weights: Tensor, offset: Tensor) -> Tensor:
    """Indices of n draws from each row of ``weights`` (k, n), at evenly spaced points from ``offset`` (k,) on."""
    n = weights.shape[1]
    points = (torch.arange(n, device=weights.device) + offset[:, None]) / n
    return torch.searchsorted(weights.cumsum(1).contiguous(), points).clamp_max(n - 1)


class _Particles:
    """Islands of weighted particles on their way down the levels; those of one island are neighbours."""

    def __init__(
        self, model: DensityModel, chain: ReverseChain, y: Tensor | None, islands: int, size: int, scoring: Scoring
    ) -> None:
        self.model, self.chain, self.y, self.scoring = model, chain, y, scoring
        self.islands, self.size = islands, size
        self.device = chain.schedule.alpha.device
        self.generator = stream(scoring.seed, "particles")
        self.x, log_start = chain.start(self._normal())
        self.t = chain.schedule.T
        self._look()
        self.log_w = (self.log_p - log_start).reshape(islands, size)
        self.log_z = torch.zeros(islands, dtype=torch.float64, device=self.device)
        self.step_size = 0.5

    def run(self, level: int, moves: int, resample: bool, progress: bool = False) -> None:
        """Down to ``level``."""
        from tqdm.auto import tqdm

        levels = range(self.t - 1, level - 1, -1)
        for _ in tqdm(levels, desc="log Z", unit="level", disable=not progress, leave=False):
            self._step()
            if resample:
                self.resample()
            for _ in range(moves):
                self._move()

    def log_estimates(self) -> Tensor:
        """Logarithms of estimates of Z, one for each island, (islands,)."""
        return self.log_z + self.log_w.logsumexp(1) - math.log(self.size)

    def _normal(self) -> Tensor:
        shape = self.islands * self.size, self.chain.reference.variances.numel()
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device)

    def _look(self) -> None:
        """log p and the noise where the particles are."""
        self.log_p, eps = _evaluate(self.model, self.x, self.t, self.y, self.scoring)
        self.eps = eps.double()

    def _step(self) -> None:
        x0 = Prediction(self.x, *self.chain.schedule.at(self.t, self.x), self.eps).x0
        self.x, log_ratio = self.chain.step(self.x, x0, self.t, self._normal())
        before, self.t = self.log_p, self.t - 1
        self._look()
        self.log_w = self.log_w + (self.log_p - before + log_ratio).reshape(self.islands, self.size)

    def resample(self, below: float = 0.5) -> None:
        """Systematic resampling of the islands whose effective sample size is ``below`` that share of their size."""
        weights = self.log_w.softmax(1)
        poor = 1 / weights.square().sum(1) < below * self.size
        offset = torch.rand(self.islands, generator=self.generator, dtype=torch.float64).to(self.device)
        chosen = torch.where(poor[:, None], _systematic(weights, offset), torch.arange(self.size, device=self.device))
        index = (chosen + self.size * torch.arange(self.islands, device=self.device)[:, None]).flatten()
        self.x, self.eps, self.log_p = self.x[index], self.eps[index], self.log_p[index]
        gained = self.log_w.logsumexp(1) - math.log(self.size)
        self.log_z = self.log_z + torch.where(poor, gained, 0)
        self.log_w = torch.where(poor[:, None], 0, self.log_w)

    def _move(self) -> None:
        """A Langevin step with accept-reject, which leaves exp(log p_t) invariant, scaled by direction."""
        rotation, sigma = self.chain.reference.rotation, self.chain.schedule.sigma[self.t]
        # E[eps²] = 1 - V alpha² / sigma²: the variance of a Gaussian with as much information in each direction.
        information = 1 - self.chain.variances[self.t - 1] / self.chain.schedule.ratio[self.t] ** 2
        step = self.step_size * (sigma**2 / information.clamp(0.05, 1))
        noise, x, eps, log_p = self._normal(), self.x, self.eps, self.log_p
        moved = -0.5 * step * rotation(eps) / sigma + step.sqrt() * noise
        self.x = x + rotation.inverse(moved)
        self._look()
        returned = moved - 0.5 * step * rotation(self.eps) / sigma
        log_backward, log_forward = -0.5 * (returned.square() / step).sum(1), -0.5 * noise.square().sum(1)
        log_accept = self.log_p - log_p + log_backward - log_forward
        uniform = torch.rand(len(noise), generator=self.generator, dtype=torch.float64).to(self.device)
        accepted = uniform.log() < log_accept
        for new, old in ((self.x, x), (self.eps, eps), (self.log_p, log_p)):
            new[~accepted] = old[~accepted]
        # Towards the acceptance that moves fastest in many dimensions, for the next move: a share over all islands, so
        # that what ties them together, and the bias that comes of it, vanish with the number of particles.
        rate = float(accepted.double().mean())
        self.step_size = float(min(max(self.step_size * math.exp(rate - 0.57), 1e-3), 2.0))
