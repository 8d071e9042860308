"""The likelihood report: every row of one model on one data set, and whether the headline is to be believed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from torchcdm.errors import UserError, nearest
from torchcdm.likelihood.chain import ReverseChain
from torchcdm.likelihood.common import labels_of, require_transform, scoring_level
from torchcdm.likelihood.elbo import elbo
from torchcdm.likelihood.flow import probability_flow
from torchcdm.likelihood.flow_bound import FlowOptions, flow_likelihood
from torchcdm.likelihood.normalizer import LogNormalizer, log_normalizer
from torchcdm.likelihood.single_pass import combine, published_convention, single_draws
from torchcdm.likelihood.summary import ROWS, NLLGap, NLLReport, Row
from torchcdm.likelihood.verdict import Evidence, judge
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import Denoiser
from torchcdm.units import LogLikelihood, standard_error

METHODS = ("single", "elbo", "flow", "logz")
"""Groups of rows that can be asked for."""

HALVED_SAMPLES = 64
"""So many samples show what the flow's steps cost in accuracy."""


@dataclass(frozen=True)
class LogZOptions:
    """How log Z is estimated in a report.

    Attributes:
        particles: Of the sequential Monte Carlo.
        moves: Langevin steps at each level. Without any the particles see only what the reverse chain proposes, and
            miss density that a network has put elsewhere: on digits, with a network that was not trained for
            consistency, 0.12 bits/dim without moves and 0.25 with two, the first outside its own interval.
        draws: Of the second estimator, from the flow.
    """

    particles: int = 1024
    moves: int = 1
    draws: int = 256


BY_CONSTRUCTION = "ELBO and flow integrate to one by construction; the flow up to its step and probe errors."
"""What is to be said of a plain diffusion model."""

OF_CLASSIFIERS = ("single", "logz")
"""Those that need a density in one pass."""


def methods_of(model: Denoiser) -> tuple[str, ...]:
    """Those of :data:`METHODS` that a model has: a plain diffusion model none that need a density in one pass."""
    classifier = isinstance(model, ClassificationDiffusion)
    return tuple(method for method in METHODS if classifier or method not in OF_CLASSIFIERS)


def check_methods(methods: Sequence[str]) -> None:
    """Refuses a name that is none of :data:`METHODS`."""
    for method in methods:
        if method not in METHODS:
            raise UserError(f"unknown likelihood method '{method}'; {nearest(method, METHODS)}")


def report(
    model: Denoiser,
    x: Tensor,
    methods: Sequence[str] = METHODS,
    y: Tensor | None = None,
    level: int | None = None,
    limit: int | None = None,
    draws: int = 1,
    seed: int = 0,
    name: str = "",
    split: str = "",
    flow: FlowOptions | None = None,
    log_z: LogZOptions | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> NLLReport:
    """Scores data by every method asked for, on the same samples and the same noisy inputs.

    Args:
        model: The model, with a transform; put into evaluation mode meanwhile. A plain diffusion model has ELBO and
            flow alone.
        x: Data units, (N, *shape); every sample is scored, in order.
        methods: Of :data:`METHODS`.
        y: Classes, long (N,), for the conditional density, whose log Z is not estimated; None for the unconditional.
        level: The noisy level of the headline, of log Z, and of all that is compared with them; when None the first
            with noise of half a bin, or level 1 for continuous data.
        limit: Score only the first so many samples.
        draws: Noise draws of the one-pass rows; more than one adds the importance-weighted bound.
        seed: Seed of all noise.
        name: Of the data, for the report.
        split: Of the data, for the report.
        flow: How finely the flow is integrated.
        log_z: How log Z is estimated.
        batch_size: Samples at a time; by their size, and what memory holds, when None. Without influence on the
            numbers.
        progress: Shows a progress bar.

    Raises:
        UserError: An unknown method, a level or a number of draws that does not exist, or a model without transform.
    """
    check_methods(methods)
    lacking = [method for method in methods if method not in methods_of(model)]
    if lacking:
        raise UserError(f"{' and '.join(lacking)}: a ddm has no density in one pass; its methods are elbo and flow")
    level = scoring_level(model) if level is None else level
    if not 1 <= level < model.schedule.T:
        raise UserError(f"level {level} cannot be scored through; choose 1 ... {model.schedule.T - 1}")
    if draws < 1:
        raise UserError(f"draws is {draws}; at least one is needed")
    x, y = x[:limit], None if y is None else y[:limit]
    flow = flow or FlowOptions()
    table = _Table(model, x, y, level, draws, seed, batch_size)
    for stage in _progress([stage for stage in METHODS if stage in methods], progress):
        if stage == "single":
            table.add_single()
        elif stage == "elbo":
            table.add_elbo()
        elif stage == "flow":
            table.add_flow(flow)
        elif y is None:
            table.add_log_z(log_z or LogZOptions(), flow, progress)
    return table.finish(name, split)


def log_z_estimates(
    model: ClassificationDiffusion,
    chain: ReverseChain,
    level: int,
    options: LogZOptions,
    flow: FlowOptions,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = False,
) -> tuple[LogNormalizer, LogNormalizer]:
    """log Z by sequential Monte Carlo, and a second, independent estimate from the flow.

    Args:
        model: The model, with a transform.
        chain: The proposals of the first.
        level: Level of the density.
        options: How.
        flow: How finely the flow of the second is integrated.
        seed: Seed of all noise.
        batch_size: Draws at a time, likewise.
        progress: Shows a progress bar.
    """
    shared = {"level": level, "seed": seed, "batch_size": batch_size}
    first = log_normalizer(model, options.particles, moves=options.moves, chain=chain, progress=progress, **shared)
    steps = flow.steps_from(model, level)
    return first, log_normalizer(model, options.draws, method="flow", steps=steps, **shared)


@dataclass
class _Table:
    """A report in the making."""

    model: Denoiser
    x: Tensor
    y: Tensor | None
    level: int
    draws: int
    seed: int
    batch_size: int | None
    likelihoods: dict[str, LogLikelihood] = field(default_factory=dict)
    chain: ReverseChain | None = None
    gap: NLLGap | None = None
    log_z: LogNormalizer | None = None
    second: LogNormalizer | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        transform = require_transform(self.model)
        # From nats of a sample to the unit of the report.
        self.per_nat = 1.0 if transform.bin is None else 1 / (transform.dim * math.log(2))

    def add_single(self) -> None:
        """published-convention, one-pass, one-pass-level."""
        arguments = self.model, self.x, self.y
        self.likelihoods["published-convention"] = published_convention(*arguments, self.batch_size)
        for name, level in (("one-pass", 0), ("one-pass-level", self.level)):
            values = single_draws(*arguments, level, self.draws, self.seed, self.batch_size)
            self.likelihoods[name] = combine(self.model, values, level, importance=False)
            if level == 0 and self.draws > 1:
                self.likelihoods["one-pass-importance"] = combine(self.model, values, level, importance=True)

    def add_flow(self, options: FlowOptions) -> None:
        """flow, and how far one pass reads above it on the first draw of the noisy inputs."""
        result = flow_likelihood(self.model, self.x, self.y, self.level, options, self.seed, self.batch_size)
        self.likelihoods["flow"], flow, scored = result.likelihood, result.flow, result.scored
        # The mean of two independent halves has a quarter of the variance of their difference.
        probe_variance = (self.per_nat * flow.probe_gap.cpu()).square().mean() / 4
        if scored.log_prob is not None:
            gap = self.per_nat * (flow.log_prob - scored.log_prob).cpu()
            spread = (gap.var() - probe_variance).clamp_min(0).sqrt() if len(gap) > 1 else math.nan
            self.gap = NLLGap(float(gap.mean()), float(spread), self.level, standard_error(gap))
        probe_error, kl = float((probe_variance / len(scored.z)).sqrt()), self.per_nat * flow.start_kl_bound
        steps = options.steps_from(self.model, self.level)
        self.notes.append(
            f"flow: error of its mean {self._step_error(scored.z, options, steps)} from the steps ({steps}) and "
            f"{probe_error:.4f} from the probes; KL of its start density at most {kl:.1g}"
        )

    def _step_error(self, z: Tensor, options: FlowOptions, steps: int) -> str:
        """By halving the steps on the first samples: of second order, so half the steps have four times the error."""
        if steps < 2:
            return "unknown"
        first = slice(0, HALVED_SAMPLES)
        labels = labels_of(self.y, first, z.device)
        gap = probability_flow(
            self.model, z[first], labels, self.level, steps, options.probes, self.seed, True, self.batch_size
        ).step_gap
        return f"{abs(float(self.per_nat * gap.mean())) / 3:.4f}"

    def add_elbo(self) -> None:
        """elbo, over all levels above the scored one, with variances that the model's own samples have."""
        bound = elbo(self.model, self.x, self.y, self.level, None, self._calibrated(), self.seed, self.batch_size)
        self.likelihoods["elbo"] = bound.likelihood
        terms = ((name, float(self.per_nat * getattr(bound, name).mean())) for name in
                 ("prior", "diffusion", "reconstruction"))  # fmt: skip
        self.notes.append("elbo: " + ", ".join(f"{name} {value:+.4f}" for name, value in terms))

    def add_log_z(self, options: LogZOptions, flow: FlowOptions, progress: bool) -> None:
        """log Z by sequential Monte Carlo, and a second opinion from the flow."""
        self.log_z, self.second = log_z_estimates(
            self.model, self._calibrated(), self.level, options, flow, self.seed, self.batch_size, progress
        )
        second = self.second
        bits = 1 / (self.log_z.dim * math.log(2))
        self.notes.append(
            f"log2 Z / d, second estimator: {bits * second.value:+.4f}, 95% [{bits * second.low:+.4f}, "
            f"{bits * second.high:+.4f}], ess {second.ess:.1f}, {second.estimator}; its mean log weight, a lower "
            f"bound, {bits * second.mean_log_weight:+.4f}"
        )

    def _calibrated(self) -> ReverseChain:
        if self.chain is None:
            self.chain = ReverseChain.calibrated(self.model, self.y, seed=self.seed, batch_size=self.batch_size)
        return self.chain

    def _over_elbo(self) -> tuple[float, float] | None:
        """NLL by one-pass-level less that by the ELBO on the same samples: mean and standard error."""
        pair = [self.likelihoods.get(name) for name in ("one-pass-level", "elbo")]
        if None in pair:
            return None
        difference = pair[0].values() - pair[1].values()
        return float(difference.mean()), standard_error(difference)

    def finish(self, name: str, split: str) -> NLLReport:
        """The report."""
        transform = require_transform(self.model)
        rows = {}
        for key, likelihood in self.likelihoods.items():
            if len(likelihood.nats) != len(self.x):
                raise RuntimeError(f"{key}: {len(likelihood.nats)} of {len(self.x)} samples were scored")
            value, error = likelihood.mean_and_error()
            rows[key] = Row(key, value, error, likelihood.nfe, likelihood.level)
        if isinstance(self.model, ClassificationDiffusion):
            evidence = Evidence(
                self.per_nat, rows.get("one-pass-level"), self._over_elbo(), self.gap, self.log_z, self.second,
                self.y is not None, self.level,
            )  # fmt: skip
            verdict = judge(evidence)
            rows["one-pass-normalized"] = verdict.headline
            believe, why, notes = verdict.believe, verdict.why, verdict.notes
        else:
            believe, why, notes = True, BY_CONSTRUCTION, ()
        ordered = tuple(rows[key] for key in ROWS if key in rows)
        unit = "nats" if transform.bin is None else "bits/dim"
        return NLLReport(
            name, split, len(self.x), transform.dim, unit, ordered, self.log_z, self.gap, believe, why,
            (*self.notes, *notes),
        )  # fmt: skip


def _progress(stages: list[str], show: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(stages, desc="likelihood", unit="stage", disable=not show)
