"""Estimates of log Z, the logarithm of what exp(log p_t) integrates to (section 5 of ``docs/method.md``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.replicas import Replicas, ladder
from torchcdm.annealing.target import Fenced, ModelTarget
from torchcdm.likelihood.scoring import Batch, Scoring, as_data
from torchcdm.models.density import DensityModel, require_density
from torchcdm.random import stream
from torchcdm.runtime.validation import Count, checked

Sweeps = Annotated[Count, Ge(4)]
SWEEPS, LONGEST, REPLICAS = 200, 4, 12
"""Sweeps that count, how many times as many may be made where they are doubted, and replicas of each level from each
start."""

DESCENDING = 128
"""Particles that come down first, at least: the levels are chosen by their works."""

REACH = 6.0
"""Deviations of the model's own samples within which a restricted density has all of its mass: of log p, by level."""

FAR = 4.0
"""Deviations of continuous data at which replicas start that start far from all data."""

AGREEMENT = 2.0
"""Standard errors by which runs from several starts may differ in the root mean square, and the trend over the
quarters of all runs."""

SMALLEST_ESS = 20
"""Effective sample size below which an estimate normalises nothing: at 20, Z has a standard error of 22 %."""


@dataclass(frozen=True)
class LogZ:
    """An estimate of log Z, nats.

    Attributes:
        value: Logarithm of the estimate of Z.
        se: Its standard error.
        estimator: How it was obtained.
        level: The level whose density is integrated.
        dim: Dimensions of a sample.
        x: Draws of the normalised density at the level, model units, (n, *shape); None where there are none.
        check: A second estimate: by MBAR on the states of replica exchange, which checks the works.
        convergence: Of replica exchange: estimates by start and by quarter of the run, bits/dim, how far they are
            apart in standard errors, and shares of swaps accepted.
        doubt: Why the estimate is not to be used, a clause; empty where nothing speaks against it.
        fence: Of a restricted density: tells where it has mass.
    """

    value: float
    se: float
    estimator: str
    level: int
    dim: int
    x: Tensor | None = None
    check: LogZ | None = None
    convergence: dict[str, Any] | None = None
    doubt: str = ""
    fence: Fenced | None = None

    @classmethod
    def of_weights(cls, log_weights: Tensor, estimator: str, level: int, dim: int) -> LogZ:
        """From the logarithms of K independent unbiased estimates of Z, (K,). The log of a mean errs low."""
        values = log_weights.cpu()
        weights = (values - values.max()).exp()
        se = float(weights.std() / weights.mean()) / len(weights) ** 0.5
        return cls(float(weights.mean().log() + values.max()), se, estimator, level, dim)

    @classmethod
    def of_replicas(cls, run: Replicas, starts: Sequence[str]) -> LogZ:
        """From replica exchange, equally many columns from each of ``starts``; doubted where these disagree.

        The standard error is from the columns, which are independent of each other, whatever the autocorrelation
        within them.
        """
        level, dim, columns = run.levels[0], math.prod(run.target.shape), run.columns
        unit, ratios, (quarters, trend) = 1 / (dim * math.log(2)), run.log_z(), run.trend()
        parts = [run.log_z(rows) for rows in torch.arange(columns).view(len(starts), -1)]
        values, errors = torch.tensor([[part.total, part.se] for part in parts], dtype=torch.float64).T
        middle = (values / errors**2).sum() / (1 / errors**2).sum()
        apart = float((((values - middle) / errors).square().sum() / max(1, len(parts) - 1)).sqrt())
        convergence = {
            "starts": {name: [part.total * unit, part.se * unit] for name, part in zip(starts, parts, strict=True)},
            "disagreement": apart, "quarters": [value * unit for value in quarters], "trend": trend,
            "levels": run.levels, "swapped": run.swapped.tolist(), "arrivals": int(run.arrivals.sum()),
        }  # fmt: skip
        doubt = f"the quarters of the run show a trend of {trend:+.1f} standard errors" * (abs(trend) > AGREEMENT)
        if apart > AGREEMENT:
            doubt = f"runs from {', '.join(starts)} differ by {apart:.1f} standard errors"
        size = f"{len(run.levels)} levels x {columns} columns, {len(run.down)} sweeps"
        others = run.mbar() if run.densities else None
        check = others and cls(others.total, others.se, f"MBAR, {size}", level, dim)
        name, x = f"replica exchange, {size}", run.x.flatten(0, 1)
        return cls(ratios.total, ratios.se, name, level, dim, x, check, convergence, doubt)

    @property
    def low(self) -> float:
        """Lower end of a 95 % confidence interval."""
        return self.value - 1.96 * self.se

    @property
    def high(self) -> float:
        """Its upper end."""
        return self.value + 1.96 * self.se

    @property
    def ess(self) -> float:
        """Effective sample size of the estimate of Z: 1 over its relative variance."""
        return 1 / max(self.se, 1e-9) ** 2

    @property
    def lacking(self) -> str:
        """Why it normalises nothing, a clause; empty where it does."""
        if not self.doubt and not self.ess >= SMALLEST_ESS:  # not a number is no evidence either
            return f"the effective sample size of log Z is {self.ess:.1f}, below {SMALLEST_ESS}"
        if not self.doubt and self.check and (self.check.low > self.high or self.check.high < self.low):
            said = (f"{z['value']:+.4f} ({z['estimator']})" for z in (self.to_json(), self.check.to_json()))
            return f"two estimators of log2 Z / d disagree, {' and '.join(said)}"
        return self.doubt

    @property
    def usable(self) -> bool:
        """Whether it normalises."""
        return not self.lacking

    def to_json(self) -> dict[str, Any]:
        """In bits per dimension, under the keys of the NLL contract."""
        bits = {key: getattr(self, key) / (self.dim * math.log(2)) for key in ("value", "low", "high")}
        further = {} if self.convergence is None else {"convergence": self.convergence}
        return bits | {"estimator": self.estimator, "ess": self.ess} | further

    def reliability(self) -> str:
        """Interval in bits per dimension, effective sample size and estimator, for a reader."""
        bits = self.to_json()
        return f"95% [{bits['low']:+.4f}, {bits['high']:+.4f}], ess {self.ess:.1f}, {self.estimator}"

    def notes(self) -> list[str]:
        """The second estimate and :attr:`convergence`, a sentence each."""
        found, lines = self.convergence, []
        if self.check is not None:
            value, text = self.check.to_json()["value"], self.check.reliability()
            lines.append(f"log2 Z / d, second estimator on the same states: {value:+.4f}, {text}")
        if found is not None:
            starts = ", ".join(f"{name} {value:+.4f} +- {se:.4f}" for name, (value, se) in found["starts"].items())
            quarters, swapped = " ".join(f"{value:+.4f}" for value in found["quarters"]), found["swapped"]
            lines.append(
                f"log2 Z / d by start: {starts}, {found['disagreement']:.1f} standard errors apart; by "
                f"quarter of the run: {quarters}, trend {found['trend']:+.1f} standard errors; swaps accepted "
                f"{sum(swapped) / len(swapped):.0%}, least {min(swapped):.0%}; {found['arrivals']} replicas came all "
                "the way down"
            )
        return lines


@checked
@torch.no_grad()
def log_normalizer(
    model: DensityModel,
    x: Tensor | None = None,
    y: int | None = None,
    scoring: Scoring = Scoring(),
    sweeps: Sweeps = SWEEPS,
    replicas: Annotated[Count, Ge(2)] = REPLICAS,
    kernels: Kernels | None = None,
    restricted: bool = False,
    progress: bool = False,
) -> LogZ:
    """log of the integral of exp(log p_t), over all inputs, by replica exchange from several starts.

    The starts are samples of the model, held-out data where they are given, and images of the highest grey level, or
    points far out for continuous data. Their estimates must agree.

    Args:
        model: Put into evaluation mode meanwhile.
        x: Held-out data, data units (N, *shape), N at least 1.
        y: A class, for the normaliser of log p(x|y); None for the unconditional density.
        scoring: Level 1 ... T - 1, seed and batch size.
        sweeps: Sweeps that count, at least 4, after up to as many that do not. While their estimate is doubted, as
            many as have counted so far follow in their place, up to :data:`LONGEST` times ``sweeps`` in all. Each
            takes three evaluations of each replica.
        replicas: Replicas of each level from each start, at least 2.
        kernels: The proposals; measured on samples of the model when None.
        restricted: Only over inputs whose log p_s, at this level and those above, is within :data:`REACH` deviations
            of what the model's own samples have: without the last of the starts.
        progress: Shows a progress bar over the sweeps.

    Raises:
        UserError: A level or data that do not fit the model, or too few sweeps or replicas.
    """
    model = require_density(model, "log Z")
    level, schedule, transform = scoring.level_of(model), model.schedule, model.transform
    given = {} if x is None else {"data": as_data(model, x, None, scoring)[0]}
    target = ModelTarget(model, y, scoring.batch_size)
    reference, generator = target.reference, stream(scoring.seed, "replicas")
    kernels = kernels or Kernels.of_target(target, scoring.seed)
    rungs = ladder(target, kernels, level, max(DESCENDING, replicas), generator)
    # Particles that were resampled from one are neighbours.
    starts = {"samples": rungs.x[:, torch.arange(replicas) * rungs.x.shape[1] // replicas]}

    def noised(x_0: Tensor) -> Tensor:
        noise = torch.randn(len(rungs.levels), *x_0.shape, generator=generator, dtype=torch.float64).to(x_0.device)
        return torch.stack([schedule.perturb(x_0, t, eps) for t, eps in zip(rungs.levels, noise, strict=True)])

    if restricted:
        profiles = [target.evaluate(x, t).levels[:, rungs.levels] for x, t in zip(rungs.x, rungs.levels, strict=True)]
        own = torch.stack(profiles, 1)
        target = Fenced(target, rungs.levels, own.mean(0), REACH * own.std(0))
    elif transform is not None and transform.high is not None:
        given["white"] = torch.full((1, *target.shape), float(transform.high), dtype=torch.float64)
    for name, points in given.items():
        points = points[torch.arange(replicas) * len(points) // replicas]
        starts[name] = noised(Batch(model, points, None, slice(0, replicas), scoring.seed).clean()[0])
    if "white" not in given and not restricted:
        signs = 2.0 * torch.randint(0, 2, (replicas, math.prod(target.shape)), generator=generator) - 1
        far = FAR * signs.to(reference.variances) * reference.variances.sqrt()
        starts["far"] = noised(reference.mean + reference.rotation.inverse(far))
    x = torch.cat(list(starts.values()), 1)
    if restricted:
        # Replicas start where the density has mass: what is outside is replaced by samples that are not.
        replaced, empty = [], False
        for t, points, own in zip(rungs.levels, x, rungs.x, strict=True):
            within = own[target.evaluate(own, t).log_gamma.isfinite()]
            empty = empty or not len(within)
            outside = target.evaluate(points, t).log_gamma.isinf().nonzero()[:, 0]
            points[outside] = (within if len(within) else own)[outside % (len(within) or len(own))]
            replaced.append(int((outside >= replicas).sum()))
    # Until each replica may have come from the noise; of many rungs a trend shows what is not enough.
    burn_in = min(sweeps, max(-(-sweeps // 4), len(rungs.levels) ** 2))
    run = Replicas(target, kernels, rungs._replace(x=x), generator).go_on(sweeps, burn_in, progress)
    z, made = LogZ.of_replicas(run, list(starts)), sweeps
    while z.doubt and made < LONGEST * sweeps:
        z, made = LogZ.of_replicas(run.go_on(made, progress=progress), list(starts)), 2 * made
    if not restricted:
        return z
    unseen = "data" in given and 2 * replaced[0] > replicas
    what = "all samples of a level" if empty else "most of the data" if unseen else ""
    return replace(z, fence=target, doubt=f"{what} lie outside the restricted density" if what else z.doubt)
