"""The likelihood report: every row of one model on one data set, and whether the headline is to be believed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from torchcdm.annealing.kernels import CALIBRATION_SAMPLES, Kernels
from torchcdm.annealing.target import ModelTarget
from torchcdm.errors import UserError, nearest
from torchcdm.likelihood.elbo import elbo
from torchcdm.likelihood.flow import FlowSolver, probability_flow
from torchcdm.likelihood.log_z import FEWEST_SWEEPS, SWEEPS, LogZ, log_normalizer
from torchcdm.likelihood.one_pass import combine, published_convention, single_draws
from torchcdm.likelihood.scoring import LARGEST_COUNT, Scoring, as_data
from torchcdm.likelihood.summary import REMARKS, NLLGap, NLLReport, Row, Verdict, judge
from torchcdm.models.denoiser import Denoiser
from torchcdm.models.inputs import check_count
from torchcdm.runtime.batching import labels_of
from torchcdm.units import LogLikelihood, standard_error

METHODS = ("single", "elbo", "flow", "logz")
"""Groups of rows that can be asked for."""

OF_DENSITIES = ("single", "logz")
"""Those that need a density in one pass."""

HALVED_SAMPLES = 64
"""So many samples show what the flow's steps cost in accuracy."""

BY_CONSTRUCTION = "ELBO and flow integrate to one by construction; the flow up to its step and probe errors."
"""What is to be said of a plain diffusion model."""


def methods_of(model: Denoiser) -> tuple[str, ...]:
    """Those of :data:`METHODS` that a model has: a plain diffusion model none that need a density in one pass."""
    return tuple(method for method in METHODS if model.density is not None or method not in OF_DENSITIES)


def check_methods(methods: Sequence[str]) -> None:
    """Refuses an empty list, and a name that is none of :data:`METHODS`."""
    if not methods:
        raise UserError(f"no likelihood method is asked for; {nearest('', METHODS)}")
    for method in methods:
        if method not in METHODS:
            raise UserError(f"unknown likelihood method '{method}'; {nearest(str(method), METHODS)}")


def report(
    model: Denoiser,
    x: Tensor,
    y: Tensor | None = None,
    scoring: Scoring = Scoring(),
    methods: Sequence[str] | None = None,
    sweeps: int = SWEEPS,
    name: str = "",
    split: str = "",
    progress: bool = False,
) -> NLLReport:
    """Scores data by every method asked for, on the same samples and the same noisy inputs.

    Args:
        model: The model, with a transform; put into evaluation mode meanwhile.
        x: Data units, (N, *shape).
        y: Classes, long (N,), for the conditional density, whose log Z is not estimated; None for the unconditional.
        scoring: Level of the headline, of log Z, and of all that is compared with them; the rest for all methods.
            Several draws add the importance-weighted bound.
        methods: Some of :data:`METHODS`; all that the model has when None. A plain diffusion model has ELBO and flow.
        sweeps: Sweeps of the replica exchange that estimates log Z, at least 4.
        name: Name of the data.
        split: Name of their split.
        progress: Shows a progress bar.

    Raises:
        UserError: An unknown method or one that the model does not have; data, a level, or numbers out of range.
    """
    methods = methods_of(model) if methods is None else methods
    check_methods(methods)
    lacking = [method for method in methods if method not in methods_of(model)]
    if lacking:
        raise UserError(f"{' and '.join(lacking)}: a ddm has no density in one pass; its methods are elbo and flow")
    x, y = as_data(model, x, y)
    table = _Table(model, x, y, replace(scoring, level=scoring.level_of(model)))
    check_count("sweeps", sweeps, FEWEST_SWEEPS, LARGEST_COUNT)
    from tqdm.auto import tqdm

    stages = [stage for stage in METHODS if stage in methods]
    # Without the time that is left: the stages take from a second to minutes.
    form = "{desc}: stage {n} of {total}, {elapsed}"
    for stage in tqdm(stages, desc="likelihood", bar_format=form, disable=not progress):
        if stage == "single":
            table.add_single()
        elif stage == "elbo":
            table.add_elbo()
        elif stage == "flow":
            table.add_flow()
        elif y is None:
            table.add_log_z(sweeps, progress)
    return table.finish(name, split)


class _Table:
    """A report in the making."""

    def __init__(self, model: Denoiser, x: Tensor, y: Tensor | None, scoring: Scoring) -> None:
        self.model, self.x, self.y, self.scoring = model, x, y, scoring
        self.likelihoods: dict[str, LogLikelihood] = {}
        self.gap: NLLGap | None = None
        self.log_z: LogZ | None = None
        self.notes: list[str] = []
        # From nats of a sample to the unit of the report.
        self.per_nat = 1.0 if model.transform.bin is None else 1 / (model.transform.dim * math.log(2))

    @cached_property
    def kernels(self) -> Kernels:
        """With the variances that the model's own samples have."""
        target, n = ModelTarget(self.model, batch_size=self.scoring.batch_size, density=False), CALIBRATION_SAMPLES
        target.y = None if self.y is None else self.y[torch.arange(n) * len(self.y) // n]
        return Kernels.of_target(target, self.scoring.seed)

    def add_single(self) -> None:
        """published-convention, one-pass, one-pass-level."""
        arguments = self.model, self.x, self.y
        self.likelihoods["published-convention"] = published_convention(*arguments, self.scoring)
        for name, level in (("one-pass", 0), ("one-pass-level", self.scoring.level)):
            values = single_draws(*arguments, replace(self.scoring, level=level))
            self.likelihoods[name] = combine(self.model, values, level, importance=False)
            if level == 0 and self.scoring.draws > 1:
                self.likelihoods["one-pass-importance"] = combine(self.model, values, level, importance=True)

    def add_elbo(self) -> None:
        """elbo, over all levels above the scored one."""
        self.likelihoods["elbo"] = bound = elbo(self.model, self.x, self.y, self.scoring, self.kernels)
        terms = {"prior": bound.prior, "diffusion": bound.diffusion, "reconstruction": bound.reconstruction}
        said = (f"{name} {float(self.per_nat * term.mean()):+.4f}" for name, term in terms.items())
        self.notes.append(f"elbo: {', '.join(said)}")

    def add_flow(self) -> None:
        """flow, and how far one pass reads above it on the first draw of the noisy inputs."""
        self.likelihoods["flow"] = found = probability_flow(self.model, self.x, self.y, self.scoring)
        flow, z = found.flow, found.scored.z
        # The mean of two independent halves has a quarter of the variance of their difference.
        probe_variance = (self.per_nat * flow.probe_gap.cpu()).square().mean() / 4
        if self.model.density is not None:
            gap = self.per_nat * (flow.log_prob - found.scored.log_prob).cpu()
            spread = (gap.var() - probe_variance).clamp_min(0).sqrt() if len(gap) > 1 else math.nan
            self.gap = NLLGap(float(gap.mean()), float(spread), self.scoring.level, standard_error(gap))
        # By halving the steps on the first samples: of second order, so half the steps have four times the error.
        first, steps, step_error = slice(0, HALVED_SAMPLES), found.nfe // 2, "unknown"
        if steps > 1:
            coarse = FlowSolver(self.model, replace(self.scoring, steps=(steps + 1) // 2))
            halved = coarse.log_prob(z[first], labels_of(self.y, first, z.device)).log_prob
            step_error = f"{abs(float(self.per_nat * (flow.log_prob[first] - halved).mean())) / 3:.4f}"
        probe_error, kl = float((probe_variance / len(z)).sqrt()), self.per_nat * flow.start_kl_bound
        self.notes.append(
            f"flow: error of its mean {step_error} from the steps ({steps}) and {probe_error:.4f} from the probes; "
            f"KL of its start density at most {kl:.1g}"
        )

    def add_log_z(self, sweeps: int, progress: bool) -> None:
        """log Z, and what speaks for it."""
        self.log_z = log_normalizer(
            self.model, self.x, None, self.scoring, sweeps, kernels=self.kernels, progress=progress
        )
        self.notes += self.log_z.notes()

    def _over_elbo(self) -> tuple[float, float] | None:
        """NLL by one-pass-level minus NLL by the ELBO on the same samples: mean and standard error."""
        if not {"one-pass-level", "elbo"} <= self.likelihoods.keys():
            return None
        difference = self.likelihoods["one-pass-level"].values() - self.likelihoods["elbo"].values()
        return float(difference.mean()), standard_error(difference)

    def finish(self, name: str, split: str) -> NLLReport:
        """The report."""
        rows = {
            key: Row(key, *likelihood.mean_and_error(), likelihood.nfe, likelihood.level)
            for key, likelihood in self.likelihoods.items()
        }
        verdict = Verdict(None, True, BY_CONSTRUCTION)
        if self.model.density is not None:
            verdict = judge(
                self.per_nat, self.scoring.level, rows.get("one-pass-level"), self.log_z, self.gap,
                self._over_elbo(), self.y is not None,
            )  # fmt: skip
            rows["one-pass-normalized"] = verdict.headline
        transform = self.model.transform
        return NLLReport(
            name, split, len(self.x), transform.dim, "nats" if transform.bin is None else "bits/dim",
            tuple(rows[key] for key in REMARKS if key in rows), self.log_z, self.gap, verdict.believe, verdict.why,
            (*self.notes, *verdict.notes),
        )  # fmt: skip
