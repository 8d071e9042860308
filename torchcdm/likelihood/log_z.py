"""Estimates of log Z, the logarithm of what exp(log p_t) integrates to (section 5 of ``docs/method.md``)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.moves import States
from torchcdm.annealing.particles import resampled, smc
from torchcdm.annealing.target import ModelTarget
from torchcdm.errors import UserError, nearest
from torchcdm.likelihood.flow import FlowSolver
from torchcdm.likelihood.scoring import LARGEST_COUNT, Scoring
from torchcdm.models.denoiser import Denoiser
from torchcdm.models.density import DensityModel, require_density
from torchcdm.models.inputs import as_labels, check_count
from torchcdm.random import stream

ESTIMATORS = ("smc", "flow")
"""Sequential Monte Carlo; importance sampling from the probability flow."""

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
    y: int | None = None,
    scoring: Scoring = Scoring(),
    particles: int = 1024,
    method: str = "smc",
    moves: int = 1,
    islands: int = ISLANDS,
    kernels: Kernels | None = None,
    progress: bool = False,
) -> LogZ:
    """log of the integral of exp(log p_t), over all inputs.

    Args:
        model: Put into evaluation mode meanwhile.
        y: A class, for the normaliser of log p(x|y); None for the unconditional density.
        scoring: Level 1 ... T, seed and batch size; steps and probes of the flow.
        particles: Draws, in all islands together.
        method: One of :data:`ESTIMATORS`.
        moves: Langevin steps with accept-reject after each level (``smc``), an evaluation each. Without any the
            particles see only what the reverse kernel proposes.
        islands: Independent populations.
        kernels: The proposals; measured on samples of the model when None.
        progress: Shows a progress bar over the levels (``smc``).

    Raises:
        UserError: An unknown method, a level that does not fit the model, or too few draws, islands or moves.
    """
    if method not in ESTIMATORS:
        raise UserError(f"unknown estimator '{method}'; {nearest(method, ESTIMATORS)}")
    model, schedule = require_density(model, "log Z"), model.schedule
    level = scoring.level_of(model, 1, schedule.T)
    require_population(model, particles, moves, islands)
    size, target = particles // islands, ModelTarget(model, y, scoring.batch_size)
    if method == "flow":
        solver = FlowSolver(model, replace(scoring, probes=max(FLOW_PROBES, scoring.probes)))
        x, log_q = solver.sample(islands * size, as_labels(y, model, islands * size, one_for_all=True))
        states, generator = States.of(target, x, level), stream(scoring.seed, "resampling")
        estimates = states.at.log_gamma - log_q
        log_w, name = estimates[None], f"importance sampling from the probability flow, {islands * size} draws"
    else:
        kernels = kernels or Kernels.of_denoiser(model, target.y, scoring.seed, batch_size=scoring.batch_size)
        generator = stream(scoring.seed, "particles")
        states, log_w, estimates = smc(
            target, kernels, level, islands, size, generator, moves, progress=progress
        )
        name = f"smc, {islands} x {size} particles, {schedule.T - level + 1} levels, {moves} moves"
    x = resampled(states, log_w, log_w[:, 0], math.inf, generator)[0].x
    return LogZ.of_weights(estimates, name, level, x[0].numel(), islands * size, x)


def log_z_estimates(
    model: DensityModel, kernels: Kernels, scoring: Scoring, particles: int, moves: int = 1, progress: bool = False
) -> tuple[LogZ, LogZ]:
    """log Z by sequential Monte Carlo, and a second estimate, from a quarter as many draws of the flow.

    Arguments as in :func:`log_normalizer`, for the first.
    """
    first = log_normalizer(model, None, scoring, particles, "smc", moves, kernels=kernels, progress=progress)
    return first, log_normalizer(model, None, scoring, max(FEWEST_PARTICLES, particles // 4), "flow")


def require_population(model: Denoiser, particles: int, moves: int, islands: int = ISLANDS) -> None:
    """Refuses numbers of particles, moves and islands that cannot be or do not fit into memory."""
    check_count("islands", islands, 2)
    check_count("moves", moves, 0, LARGEST_COUNT)
    check_count("particles", particles, 2 * islands, LARGEST_POPULATION // math.prod(model.shape or (1,)))
