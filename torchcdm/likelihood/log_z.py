"""Estimates of log Z, the logarithm of what exp(log p_t) integrates to (section 5 of ``docs/method.md``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.moves import States
from torchcdm.annealing.particles import resampled, smc
from torchcdm.annealing.replicas import Trace, descend, exchange
from torchcdm.annealing.target import ModelTarget
from torchcdm.errors import UserError, nearest
from torchcdm.likelihood.flow import FlowSolver
from torchcdm.likelihood.noise import Batch
from torchcdm.likelihood.scoring import LARGEST_COUNT, Scoring, as_data
from torchcdm.models.denoiser import Denoiser
from torchcdm.models.density import DensityModel, require_density
from torchcdm.models.inputs import as_labels, check_count
from torchcdm.random import stream

ESTIMATORS = ("smc", "flow", "replica")
"""Sequential Monte Carlo; importance sampling from the probability flow; replica exchange from several starts."""

ISLANDS = 16
"""Independent populations, from whose spread the confidence interval comes."""

FEWEST_PARTICLES = 2 * ISLANDS
"""Two in each population."""

SMALLEST_ESS = 20
"""Effective sample size below which an estimate normalises nothing: at 20, Z has a standard error of 22 %."""

FLOW_PROBES = 8
"""Fewest probes of the flow's divergence when it draws: their noise inflates the weights."""

BOOTSTRAP = 2000

SWEEPS, REPLICAS = 100, 16
"""Of replica exchange: sweeps that count, and replicas of each rung from each start."""

AGREEMENT = 2.0
"""Standard errors by which runs from two starts, and the quarters of all runs, may differ."""

FEWEST_DESCENDING = 64
"""Particles that come down first, from whose works the rungs are chosen."""

FAR = 4.0
"""Deviations of continuous data at which replicas start that start far from all data."""

MBAR_PARTS = 4
"""Parts of the columns, each left out once, from which MBAR's error comes."""

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
        mean_log_weight: Mean of the logarithm of independent unbiased estimates of Z: below log Z in expectation;
            minus infinity where there are none.
        mean_log_weight_se: Its standard error.
        x: Draws of the model's normalised density at the level, model units, (n, *shape), equally weighted: resampled
            by their weights within each island, so that few effective ones repeat. None where there are none.
        check: A second estimate: by MBAR on the states of replica exchange, which checks the works.
        convergence: Of replica exchange: estimates by start with standard errors, bits/dim, the largest difference
            of two in standard errors; the quarters of the run and their trend in standard errors; levels, shares of
            swaps and moves accepted, replicas that came from the start density to the lowest level, and the sweeps
            that make one independent draw there.
        doubt: Why the estimate is not to be used, a clause; empty where nothing speaks against it.
    """

    value: float
    low: float
    high: float
    estimator: str
    ess: float
    level: int
    dim: int
    mean_log_weight: float = -math.inf
    mean_log_weight_se: float = 0.0
    x: Tensor | None = None
    check: LogZ | None = None
    convergence: dict[str, Any] | None = None
    doubt: str = ""

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

    @classmethod
    def of_replicas(cls, trace: Trace, starts: Sequence[str]) -> LogZ:
        """From replica exchange, equally many columns from each of ``starts``; doubted where these disagree.

        The standard error is from the columns, which are independent of each other, whatever the autocorrelation
        within them.
        """
        unit, level, dim = 1 / (trace.x[0, 0].numel() * math.log(2)), trace.levels[0], trace.x[0, 0].numel()
        rows = torch.arange(len(trace.arrivals)).view(len(starts), -1)
        runs = [trace.log_z(columns) for columns in rows]
        apart = [abs(a.total - b.total) / math.hypot(a.se, b.se) for a, b in combinations(runs, 2)]
        quarters, trend = trace.trend()
        ratios = trace.log_z()
        convergence = {
            "starts": {name: [run.total * unit, run.se * unit] for name, run in zip(starts, runs, strict=True)},
            "disagreement": max(apart, default=0.0), "quarters": [value * unit for value in quarters], "trend": trend,
            "levels": trace.levels, "swapped": trace.swapped.tolist(), "moved": trace.moved.tolist(),
            "arrivals": int(trace.arrivals.sum()), "autocorrelation": trace.log_gamma.numel() / trace.ess(),
        }  # fmt: skip
        doubt = ""
        if convergence["disagreement"] > AGREEMENT:
            doubt = f"runs from {', '.join(starts)} differ by {max(apart):.1f} standard errors"
        elif abs(trend) > AGREEMENT:
            doubt = f"the quarters of the run show a trend of {trend:+.1f} standard errors"
        size = f"{len(trace.levels)} rungs x {rows.numel()} columns, {len(trace.down)} sweeps"
        check = None if trace.columns is None else cls._normal(*trace.mbar(MBAR_PARTS), f"MBAR, {size}", level, dim)
        name = f"replica exchange, {size}"
        found = cls._normal(ratios.total, ratios.se, name, level, dim)
        return replace(found, x=trace.x.flatten(0, 1), check=check, convergence=convergence, doubt=doubt)

    @classmethod
    def _normal(cls, value: float, se: float, estimator: str, level: int, dim: int) -> LogZ:
        return cls(value, value - 1.96 * se, value + 1.96 * se, estimator, 1 / max(se, 1e-9) ** 2, level, dim)

    @property
    def usable(self) -> bool:
        """Whether it normalises: an effective sample size of at least :data:`SMALLEST_ESS`, and no doubt."""
        return self.ess >= SMALLEST_ESS and not self.doubt

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
        further = {} if self.convergence is None else {"convergence": self.convergence}
        return bits | {"estimator": self.estimator, "ess": self.ess} | further

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
    kernels: Kernels | None = None,
    sweeps: int = SWEEPS,
    replicas: int = REPLICAS,
    progress: bool = False,
) -> LogZ:
    """log of the integral of exp(log p_t), over all inputs.

    Args:
        model: Put into evaluation mode meanwhile.
        x: Held-out data, data units (N, *shape): one of the starts of ``replica``, beside samples of the model and
            images of the highest grey level, or points far out.
        y: A class, for the normaliser of log p(x|y); None for the unconditional density.
        scoring: Level 1 ... T - 1, or T but for replicas; seed and batch size; steps and probes of the flow.
        particles: Draws, in all islands together (``smc``, ``flow``).
        method: One of :data:`ESTIMATORS`.
        moves: Langevin steps with accept-reject after each level (``smc``) or in each sweep (``replica``), an
            evaluation each. Without any the particles see only what the reverse kernel proposes.
        islands: Independent populations.
        kernels: The proposals; measured on samples of the model when None.
        sweeps: Sweeps that count (``replica``); a quarter as many come before them. Each takes ``moves`` + 2
            evaluations of each replica.
        replicas: Replicas of each rung from each start, at least 2 (``replica``).
        progress: Shows a progress bar over the levels or the sweeps.

    Raises:
        UserError: An unknown method, a level that does not fit the model, or too few draws, islands, moves, sweeps or
            replicas.
    """
    if method not in ESTIMATORS:
        raise UserError(f"unknown estimator '{method}'; {nearest(method, ESTIMATORS)}")
    model, schedule = require_density(model, "log Z"), model.schedule
    level = scoring.level_of(model, 1, schedule.T - (method == "replica"))
    require_population(model, particles, moves, islands)
    x = None if x is None else as_data(model, x, None)[0]
    size, target, dim = particles // islands, ModelTarget(model, y, scoring.batch_size), math.prod(model.shape)
    if method == "flow":
        solver = FlowSolver(model, replace(scoring, probes=max(FLOW_PROBES, scoring.probes)))
        drawn, log_q = solver.sample(islands * size, as_labels(y, model, islands * size, one_for_all=True))
        states, generator = States.of(target, drawn, level), stream(scoring.seed, "resampling")
        estimates = states.at.log_gamma - log_q
        log_w, name = estimates[None], f"importance sampling from the probability flow, {islands * size} draws"
    else:
        kernels = kernels or Kernels.of_denoiser(model, target.y, scoring.seed, batch_size=scoring.batch_size)
        generator = stream(scoring.seed, "particles")
        if method == "replica":
            return _by_replicas(target, kernels, x, level, scoring, generator, sweeps, replicas, moves, progress)
        states, log_w, estimates = smc(
            target, kernels, level, islands, size, generator, moves, progress=progress
        )
        name = f"smc, {islands} x {size} particles, {schedule.T - level + 1} levels, {moves} moves"
    drawn = resampled(states, log_w, log_w[:, 0], math.inf, generator)[0].x
    return LogZ.of_weights(estimates, name, level, dim, islands * size, drawn)


def _by_replicas(
    target: ModelTarget,
    kernels: Kernels,
    x: Tensor | None,
    level: int,
    scoring: Scoring,
    generator: torch.Generator,
    sweeps: int,
    replicas: int,
    moves: int,
    progress: bool,
) -> LogZ:
    """By :func:`torchcdm.annealing.replicas.exchange`, a column for each replica of a start; see the caller."""
    check_count("sweeps", sweeps, 4, LARGEST_COUNT)
    check_count("replicas", replicas, 2, LARGEST_COUNT)
    model, transform, schedule = target.model, target.model.transform, target.schedule
    ladder = descend(target, kernels, level, max(FEWEST_DESCENDING, replicas), generator)
    starts = {"samples": ladder.x[:, :replicas]}

    def noised(x_0: Tensor) -> Tensor:
        noise = torch.randn(len(ladder.levels), *x_0.shape, generator=generator, dtype=torch.float64).to(x_0.device)
        return torch.stack([schedule.perturb(x_0, t, eps) for t, eps in zip(ladder.levels, noise, strict=True)])

    if x is not None:
        x = x[torch.arange(replicas) * len(x) // replicas]
        starts["data"] = noised(Batch(model, x, None, slice(0, replicas), scoring.seed).clean()[0])
    if transform is not None and transform.high is not None:
        white = torch.full((replicas, *target.shape), float(transform.high), dtype=torch.float64)
        starts["white"] = noised(Batch(model, white, None, slice(0, replicas), scoring.seed).clean()[0])
    else:
        reference = target.reference
        signs = torch.randint(0, 2, (replicas, math.prod(target.shape)), generator=generator) * 2.0 - 1
        far = FAR * signs.to(reference.variances) * reference.variances.sqrt()
        starts["far"] = noised(reference.mean + reference.rotation.inverse(far))
    trace = exchange(
        target, kernels, ladder.levels, torch.cat(list(starts.values()), 1), sweeps, -(-sweeps // 4), generator,
        ladder.step, moves, progress,
    )  # fmt: skip
    return LogZ.of_replicas(trace, list(starts))


def log_z_estimates(
    model: DensityModel,
    kernels: Kernels,
    scoring: Scoring,
    particles: int,
    moves: int = 1,
    x: Tensor | None = None,
    sweeps: int = 0,
    progress: bool = False,
) -> LogZ:
    """log Z with a second estimate, its ``check``.

    By replica exchange of so many ``sweeps``, checked by MBAR; without sweeps by sequential Monte Carlo, checked by a
    quarter as many draws of the flow. Arguments as in :func:`log_normalizer`.
    """
    shared = {"scoring": scoring, "moves": moves, "kernels": kernels, "progress": progress}
    if sweeps:
        return log_normalizer(model, x, method="replica", sweeps=sweeps, **shared)
    first = log_normalizer(model, particles=particles, **shared)
    few = max(FEWEST_PARTICLES, particles // 4)
    return replace(first, check=log_normalizer(model, scoring=scoring, particles=few, method="flow"))


def require_population(model: Denoiser, particles: int, moves: int, islands: int = ISLANDS) -> None:
    """Refuses numbers of particles, moves and islands that cannot be or do not fit into memory."""
    check_count("islands", islands, 2)
    check_count("moves", moves, 0, LARGEST_COUNT)
    check_count("particles", particles, 2 * islands, LARGEST_POPULATION // math.prod(model.shape or (1,)))


def convergence_text(found: dict[str, Any]) -> str:
    """:attr:`LogZ.convergence` as a sentence."""
    starts = ", ".join(f"{name} {value:+.4f} +- {se:.4f}" for name, (value, se) in found["starts"].items())
    quarters = " ".join(f"{value:+.4f}" for value in found["quarters"])
    swapped = found["swapped"]
    return (
        f"log2 Z / d by start: {starts} (at most {found['disagreement']:.1f} standard errors apart); by quarter of "
        f"the run {quarters} (trend {found['trend']:+.1f} standard errors); swaps accepted "
        f"{sum(swapped) / len(swapped):.0%}, least {min(swapped):.0%}; {found['arrivals']} replicas came all the way"
    )
