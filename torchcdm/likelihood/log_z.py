"""Estimates of log Z, the logarithm of what exp(log p_t) integrates to (section 5 of ``docs/method.md``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.ratios import half_width
from torchcdm.annealing.replicas import FAMILY, Ladder, Replicas, ladder
from torchcdm.annealing.target import COMPARED, Fence, Fenced, ModelTarget, in_batches
from torchcdm.diffusion.gaussian import mean_and_spread
from torchcdm.errors import UserError, warn
from torchcdm.likelihood.restricted import BINS, MeasuredStep, Restricted, measured_steps, prior_of
from torchcdm.likelihood.scoring import ScoredBatch, Scoring, as_data
from torchcdm.models.density import DensityModel, require_density
from torchcdm.random import normal, permutation, stream
from torchcdm.runtime.artefact import read_artefact, read_sealed, write_artefact
from torchcdm.runtime.processes import labels_of
from torchcdm.runtime.validation import Count, checked
from torchcdm.units import standard_error

Sweeps = Annotated[Count, Ge(4)]
SWEEPS = 200  # that count
LONGEST = 4  # times as many may be made where they are doubted
REPLICAS = 12  # of each level from each start: of all classes together, where these are taken one by one
RUNGS = 16  # levels that replicas of a restricted density cross, unless its level is given: N take about N² sweeps
USUAL, MEASURING = 128, 512  # samples of a class that make a fence, and of all data that make decoders, at most
FAR = 4.0  # deviations of continuous data at which replicas start that start far from all data
AGREEMENT = 2.0  # standard errors by which several starts may differ in root mean square, and the trend over quarters
SMALLEST_ESS = 20  # below, an estimate normalises nothing
KNOWN = 0.01  # bits/dim to which it normalises all the same
NAME, TENSORS = "log_z.json", "log_z.safetensors"  # files in the folder of a model, of log Z that was measured once
TRAINING = 5000  # training samples that say what is usual, at most


@dataclass(frozen=True)
class LogZ:
    """An estimate of log Z, nats, of the density of samples of ``dim`` dimensions at a ``level``."""

    value: float  # logarithm of the estimate of Z
    se: float  # its standard error
    estimator: str  # how it was obtained
    level: int
    dim: int
    x: Tensor | None = None  # draws of the normalised density at the level, model units, (n, *shape), if there are any
    check: LogZ | None = None  # a second estimate: by MBAR on the states of replica exchange, which checks the works
    # Of replica exchange: estimates by start and by quarter of the run, bits/dim, how far they are apart in standard
    # errors, and shares of swaps accepted.
    convergence: dict[str, Any] | None = None
    doubt: str = ""  # why the estimate is not to be used, a clause; empty where nothing speaks against it
    restricted: Restricted | None = None  # of a restricted density: what integrates to one, for any input
    width: float = 1.96  # half a 95 % interval, in standard errors

    @classmethod
    def of_weights(cls, log_weights: Tensor, estimator: str, level: int, dim: int) -> LogZ:
        """From the logarithms of K independent unbiased estimates of Z, (K,). The log of a mean errs low."""
        value = float(log_weights.logsumexp(0)) - math.log(len(log_weights))
        weights = (log_weights.cpu() - value).exp()  # their mean is 1
        return cls(value, standard_error(weights), estimator, level, dim, width=half_width((weights - 1)[None]))

    @classmethod
    def of_replicas(cls, run: Replicas, starts: Sequence[str], shares: Sequence[float] = (1.0,)) -> LogZ:
        """From replica exchange, equally many columns from each of ``starts``; doubted where these disagree.

        Of several densities, in equally many neighbouring columns of each start, the mean by their ``shares``. The
        standard error is from the columns, which are independent of each other, whatever the autocorrelation within
        them. Of few columns it is rough: intervals and tests are Student's.
        """
        level, dim, every = run.levels[0], math.prod(run.target.shape), slice(None)
        unit, columns = 1 / (dim * math.log(2)), torch.arange(run.columns).view(len(starts), len(shares), -1)

        def mean(columns: Tensor, sweeps: slice = every, check: bool = False) -> tuple[float, Tensor]:
            """log Z, and what each column of each density adds to its error."""
            own = [part.flatten() for part in columns.unbind(1)]
            parts = [run.mbar(part) if check else run.log_z(part, sweeps) for part in own]
            errors = torch.stack([share * part.errors() for share, part in zip(shares, parts, strict=True)])
            return sum(share * part.total for share, part in zip(shares, parts, strict=True)), errors

        (value, errors), parts = mean(columns), [mean(part) for part in columns.split(1)]
        values, spread = torch.tensor([[part, float(off.norm())] for part, off in parts], dtype=torch.float64).T
        middle = (values / spread**2).sum() / (1 / spread**2).sum()
        apart = float((((values - middle) / spread).square().sum() / max(1, len(parts) - 1)).sqrt())
        apart *= 1.96 / half_width(torch.cat([off for _, off in parts]))
        edges = [len(run.down) * k // 4 for k in range(5)]
        quarters = [mean(columns, slice(*ends)) for ends in pairwise(edges)]
        slope, error = (sum(w * part[i] for w, part in zip((-3, -1, 1, 3), quarters, strict=True)) for i in (0, 1))
        trend = slope / float(error.norm()) * 1.96 / half_width(error)
        by_start = {name: [float(values[k]) * unit, float(spread[k]) * unit] for k, name in enumerate(starts)}
        convergence = {"starts": by_start, "disagreement": apart, "quarters": [part * unit for part, _ in quarters]}
        convergence |= {"trend": trend, "levels": run.levels}
        convergence |= {"swapped": run.swapped.tolist(), "arrivals": int(run.arrivals.sum())}
        if len(shares) > 1:
            classes = (run.log_z(part.flatten()) for part in columns.unbind(1))
            convergence["classes"] = [[part.total * unit, part.se * unit] for part in classes]
        doubt = f"the quarters of the run show a trend of {trend:+.1f} standard errors" * (abs(trend) > AGREEMENT)
        if apart > AGREEMENT:
            doubt = f"runs from {', '.join(starts)} differ by {apart:.1f} standard errors"
        size = f"{len(run.levels)} levels x {run.columns} columns, {len(run.down)} sweeps"

        def known(value: float, errors: Tensor, name: str, **more: Any) -> LogZ:
            return cls(value, float(errors.norm()), f"{name}, {size}", level, dim, width=half_width(errors), **more)

        more: dict[str, Any] = {"check": known(*mean(columns, check=True), "MBAR")} if run.densities else {}
        more |= {"x": run.x.flatten(0, 1), "convergence": convergence, "doubt": doubt}
        return known(value, errors, "replica exchange", **more)

    @property
    def low(self) -> float:
        """Lower end of a 95 % confidence interval."""
        return self.value - self.width * self.se

    @property
    def high(self) -> float:
        """Its upper end."""
        return self.value + self.width * self.se

    @property
    def ess(self) -> float:
        """Effective sample size of the estimate of Z: 1 over its relative variance."""
        return 1 / max(self.se, 1e-9) ** 2

    @property
    def lacking(self) -> str:
        """Why it normalises nothing, a clause; empty where it does."""
        known = self.width * self.se <= KNOWN * self.dim * math.log(2)  # not a number is no evidence
        if not self.doubt and not (known or self.ess >= SMALLEST_ESS):
            return f"the effective sample size of log Z is {self.ess:.1f}, below {SMALLEST_ESS}"
        if not self.doubt and self.check and (self.check.low > self.high or self.check.high < self.low):
            said = (f"{z['value']:+.4f} ({z['estimator']})" for z in (self.to_json(), self.check.to_json()))
            return f"two estimators of log2 Z / d disagree, {' and '.join(said)}"
        return self.doubt

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
            agreement = f"log2 Z / d by start: {starts}, {found['disagreement']:.1f} standard errors apart"
            trend = f"by quarter of the run: {quarters}, trend {found['trend']:+.1f} standard errors"
            moved = f"swaps accepted {sum(swapped) / len(swapped):.0%}, least {min(swapped):.0%}"
            lines.append(f"{agreement}; {trend}; {moved}; {found['arrivals']} replicas came all the way down")
        return lines


def weights_of(folder: Path) -> str | None:
    """Checksum of the weights in the folder of a model; None where there are none."""
    path = folder / "config.json"
    return read_sealed(path)["files"].get("model.safetensors") if path.exists() else None


def write_log_z(folder: Path, z: LogZ, weights: str | None) -> None:
    """Writes log Z into the folder of its model; UserError where that cannot be. It is not kept, which a warning says,
    where others than the ``weights`` lie there by now that it was measured with, by :func:`weights_of`."""
    if weights != weights_of(folder):
        warn(f"{folder}: log Z is not kept: other weights were written there meanwhile")
        return
    found, tensors, plain = z.restricted, {}, replace(z, x=None, restricted=None, check=None)
    check = z.check and asdict(replace(z.check, x=None))
    content: dict[str, Any] = {"weights": weights, "log_z": asdict(plain), "check": check}
    if found is not None:
        content |= {"steps": [step.level for step in found.steps], "fence": found.fence.levels}
        tensors = {"log_z": found.log_z, "mean": found.mean, "variances": found.variances}
        tensors |= {"middle": found.fence.middle, "whiten": found.fence.whiten}
        for k, step in enumerate(found.steps):
            tensors |= {f"{k}.{name}": part for name, part in vars(step).items() if isinstance(part, Tensor)}
    write_artefact(folder / NAME, "log_z", content, {TENSORS: tensors})


def read_log_z(folder: Path, device: str | torch.device = "cpu") -> LogZ | None:
    """What :func:`write_log_z` wrote; None where there is nothing, or of other weights. UserError if damaged."""
    if not (folder / NAME).exists():
        return None
    content, (tensors,) = read_artefact(folder / NAME, "log_z", [TENSORS])
    if content["weights"] != weights_of(folder):
        return None
    tensors, restricted = {name: part.to(device) for name, part in tensors.items()}, None
    if "steps" in content:
        names = ("edges", "variances", "table")
        levels = enumerate(content["steps"])
        steps = [MeasuredStep(t, *(tensors.get(f"{k}.{name}") for name in names)) for k, t in levels]
        fence = Fence(content["fence"], tensors["middle"], tensors["whiten"])
        restricted = Restricted(steps, fence, tensors["log_z"], tensors["mean"], tensors["variances"])
    check = content["check"] and LogZ(**content["check"])
    return LogZ(**content["log_z"] | {"check": check, "restricted": restricted})


@checked
def log_normalizer(
    model: DensityModel, x: Tensor | None = None, y: int | None = None, scoring: Scoring = Scoring(),
    sweeps: Sweeps = SWEEPS, replicas: Annotated[Count, Ge(2)] = REPLICAS, kernels: Kernels | None = None,
    restricted: bool = False, progress: bool = False, training: Tensor | None = None,
) -> LogZ:  # fmt: skip
    """log of the integral of exp(log p_t), over all inputs, by replica exchange from several starts.

    The starts are samples of the model, held-out data where they are given, and images of the highest grey level, or
    points far out for continuous data. Their estimates must agree. UserError for a level or data that do not fit the
    model, none where some are needed, or too few sweeps or replicas.

    Args:
        model: Put into evaluation mode meanwhile.
        x: Held-out data, data units (N, *shape), N at least 1.
        y: A class, for the normaliser of log p(x|y), not ``restricted``; None for the unconditional density.
        scoring: Level 1 ... T - 1, seed and batch size.
        sweeps: Sweeps that count, at least 4, after up to as many that do not. While their estimate is doubted, as
            many as have counted so far follow in their place, up to ``LONGEST`` times ``sweeps`` in all. Each
            takes three evaluations of each replica.
        replicas: Replicas of each level from each start, at least 2.
        kernels: The proposals; measured when None.
        restricted: Only over inputs whose profile of log p over the levels is usual, by a
            :class:`torchcdm.annealing.target.Fence`: without the last of the starts. Of a model that gives its classes
            in one pass class by class, the mean of log Z over the classes; at the lowest level that ``RUNGS``
            steps reach from the noise, where none is given.
        progress: Shows a progress bar over the sweeps.
        training: Other data than ``x``, which say what is usual; ``x`` when None.
    """
    model, training = require_density(model, "log Z"), x if training is None else training
    held, usual = (None if part is None else as_data(model, part, None, scoring)[0] for part in (x, training))
    if restricted and y is not None:
        raise UserError("y is given, but a restricted density is one of all classes; leave y out")
    if restricted and usual is None:
        raise UserError("a restricted density is one like data: give some")
    if restricted and len(usual) < 2:
        raise UserError("a restricted density is one like data: give two samples at least")
    target = ModelTarget(model, y, scoring.batch_size)
    kernels = kernels or Kernels.of_target(target, scoring.seed)
    by_class, first = restricted and model.joint, -RUNGS if restricted and scoring.level is None else 0
    points = _Points(target, kernels, scoring, replicas, by_class, first)
    starts = points.starts(held, anywhere=not restricted)
    x_t, within, lost, noisy = torch.cat(list(starts.values()), 1), target, "", []
    if restricted:
        usual = usual[permutation(len(usual), scoring.seed)]  # some of it stand for all, and it may be sorted by class
        # A fence about fewer, whose covariance is hardly known, shuts all others out.
        parts = points.by_classes(usual, 2 * COMPARED)
        noisy = [points.noised(points.clean(part[:USUAL])) for part in parts]
        within = points.fenced(noisy, x_t.shape[1])
        lost = points.move_within(within, x_t)
    # Until each replica may have come from the noise; of many rungs a trend shows what is not enough.
    burn_in = min(sweeps, max(-(-sweeps // 4), len(points.levels) ** 2))
    run = Replicas(within, kernels, points.rungs._replace(x=x_t), points.generator).go_on(sweeps, burn_in, progress)
    z, made = LogZ.of_replicas(run, list(starts), points.shares), sweeps
    while z.doubt and made < LONGEST * sweeps:
        z, made = LogZ.of_replicas(run.go_on(made, progress=progress), list(starts), points.shares), 2 * made
    if not restricted:
        return z
    steps = [MeasuredStep(points.levels[0])]
    if model.transform.bin is not None and len(usual) >= BINS:
        steps = measured_steps(model, usual[:MEASURING], points.levels[0], scoring)
    cover = mean_and_spread(torch.cat([parts[0] for parts in noisy]), "cosine")
    density = Restricted(steps, within.fence, points.upper_ends(run), *cover)
    return replace(z, restricted=density, doubt=f"{lost} lie outside the restricted density" if lost else z.doubt)


class _Points:
    """The levels of :func:`log_normalizer`, and points at each: where replicas start, and what is usual there.

    Levels are those that particles found on their way down, from number ``first`` on, with samples of the model there.
    """

    def __init__(
        self, target: ModelTarget, kernels: Kernels, scoring: Scoring, replicas: int, by_class: bool, first: int
    ) -> None:
        self.target, self.model, self.scoring = target, target.model, scoring
        self.generator, self.by_class = stream(scoring.seed, "replicas"), by_class
        self.shares = prior_of(self.model).exp().tolist() if by_class else [1.0]  # of the classes, one by one
        # Columns of a start and a class; those of a start lie together, in it those of a class.
        self.replicas, classes = max(2, replicas // len(self.shares)), len(self.shares)
        self.labels = torch.arange(classes, device=self.model.schedule.alpha.device)
        level, n = scoring.level_of(self.model), classes * self.replicas
        if by_class:
            target.y = self.labels.repeat_interleave(FAMILY * self.replicas)
        rungs = ladder(target, kernels, level, n, self.generator)
        self.rungs = Ladder(rungs.levels[first:], rungs.step[first:], rungs.x[first:])
        self.levels = self.rungs.levels

    def starts(self, held: Tensor | None, anywhere: bool) -> dict[str, Tensor]:
        """Where replicas start, (rungs, columns, *shape) each: samples, ``held``-out data, far points if ``anywhere``.

        Far are images of the highest grey level, or points beyond all continuous data.
        """
        starts, transform, n = {"samples": self.rungs.x}, self.model.transform, self.replicas
        if held is not None:
            parts = self.by_classes(held)
            orders = [torch.randperm(len(part), generator=self.generator) for part in parts]
            some = [part[order[torch.arange(n) % len(order)]] for part, order in zip(parts, orders, strict=True)]
            starts["data"] = self.noised(self.clean(torch.cat(some)))
        if anywhere and transform is not None and transform.high is not None:
            white = torch.full((n, *self.target.shape), float(transform.high), dtype=torch.float64)
            starts["white"] = self.noised(self.clean(white))
        elif anywhere:
            reference = self.target.reference
            signs = 2.0 * torch.randint(0, 2, (n, math.prod(self.target.shape)), generator=self.generator) - 1
            far = FAR * signs.to(reference.variances) * reference.variances.sqrt()
            starts["far"] = self.noised(reference.mean + reference.rotation.inverse(far))
        return starts

    def by_classes(self, x: Tensor, least: int = 2) -> list[Tensor]:
        """Data by class, as the model sees it; a class of fewer than the ``least`` number has all of them."""
        if not self.by_class:
            return [x]
        model, level, size = self.model, self.levels[0], self.scoring.batch_size
        x_0 = self.clean(x)
        noise = normal(x_0.shape, stream(self.scoring.seed, "classes"), x_0.device)
        x_t = model.schedule.perturb(x_0, level, noise).to(self.target.dtype)
        classes = in_batches(model, x_t, lambda rows: model.class_posterior(x_t[rows], level).argmax(1), size)
        classes = classes.to(x.device)
        return [part if len(part := x[classes == k]) >= least else x for k in range(len(self.shares))]

    def noised(self, x_0: Tensor) -> Tensor:
        """Points, model units (n, *shape), with the noise of each rung, (rungs, n, *shape)."""
        noise = normal((len(self.levels), *x_0.shape), self.generator, x_0.device)
        return self.model.schedule.perturb(x_0.expand_as(noise), torch.tensor(self.levels), noise)

    def clean(self, x: Tensor) -> Tensor:
        """Data as a noisy level sees them, model units."""
        return ScoredBatch(self.model, x, None, slice(0, len(x)), self.scoring.seed).clean()[0]

    def fenced(self, usual: Sequence[Tensor], count: int) -> Fenced:
        """The target where it is as at ``usual`` points of each class, (rungs, n, *shape), in ``count`` columns."""

        def profile(x: Tensor, k: int) -> Tensor:
            """log p at every level, (n, T+2), of one class or of all."""
            y = self.labels[k].expand(len(x)) if self.by_class else None
            passed = lambda rows: self.model.log_prob_levels(x[rows], labels_of(y, rows, x.device))  # noqa: E731
            return in_batches(self.model, x, passed, self.scoring.batch_size)

        profiles = [[profile(part.to(self.target.dtype), k) for part in parts] for k, parts in enumerate(usual)]
        return Fenced(self.target, Fence.of(self.levels, profiles), self.columns(count) if self.by_class else None)

    def move_within(self, target: Fenced, x: Tensor) -> str:
        """Points (rungs, columns, *shape) outside the fence become others of their class; says what should be inside.

        The first columns are samples of the model.
        """
        classes = self.columns(len(x[0]))
        for t, points in reversed(list(zip(self.levels, x, strict=True))):
            inside = target.evaluate(points, t).log_gamma.isfinite()
            for row in (~inside).nonzero()[:, 0].tolist():
                others = (inside & (classes == classes[row])).nonzero()[:, 0]
                if not len(others):
                    return "all samples of a level"
                points[row] = points[others[row % len(others)]]
        data = inside[self.rungs.x.shape[1] :]
        return "most of the data" if len(data) and 2 * int(data.sum()) < len(data) else ""

    def upper_ends(self, run: Replicas) -> Tensor:
        """Upper ends of 95 % intervals of log Z of each class, (classes,)."""
        classes = self.columns(run.columns).cpu()
        ends = [run.log_z(torch.arange(run.columns)[classes == k]) for k in range(len(self.shares))]
        upper = [end.total + half_width(end.errors()[None]) * end.se for end in ends]
        return torch.tensor(upper, dtype=torch.float64)

    def columns(self, count: int) -> Tensor:
        """Class of each of so many columns."""
        return self.labels.repeat_interleave(self.replicas).repeat(count // (self.replicas * len(self.shares)))
