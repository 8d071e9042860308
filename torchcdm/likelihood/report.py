"""The likelihood report: every row of one model on one data set, and whether the headline is to be believed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torchcdm.cdm import ClassificationDiffusion
from torchcdm.denoisers import evaluation_mode
from torchcdm.errors import UserError, nearest
from torchcdm.likelihood.common import batches, labels_of, require_transform
from torchcdm.likelihood.flow import probability_flow
from torchcdm.likelihood.single_pass import combine, published_convention, score_noisy, single_draws
from torchcdm.likelihood.summary import Gap, NLLReport, Row
from torchcdm.units import LogLikelihood

METHODS = ("single", "elbo", "flow", "logz")
"""Groups of rows that can be asked for."""

LEVEL = 1
"""The level of the headline, of log Z and of the comparison with the flow: the first noisy one."""


@dataclass(frozen=True)
class FlowOptions:
    """How finely the flow is integrated in a report.

    Attributes:
        steps: Heun steps, two evaluations each; all levels when there are fewer.
        probes: Random probes of the divergence at every evaluation.
    """

    steps: int = 100
    probes: int = 2


def report(
    model: ClassificationDiffusion,
    x: Tensor,
    methods: Sequence[str] = METHODS,
    y: Tensor | None = None,
    limit: int | None = None,
    draws: int = 1,
    seed: int = 0,
    name: str = "",
    split: str = "",
    flow: FlowOptions | None = None,
    batch_size: int = 500,
    progress: bool = False,
) -> NLLReport:
    """Scores data by every method asked for, on the same samples and the same noisy inputs.

    Args:
        model: The model, with a transform; put into evaluation mode meanwhile.
        x: Data units, (N, *shape); every sample is scored, in order.
        methods: Of :data:`METHODS`.
        y: Classes, long (N,), for the conditional density; None for the unconditional one.
        limit: Score only the first so many samples.
        draws: Noise draws of the one-pass rows; more than one adds the importance-weighted bound.
        seed: Seed of all noise.
        name: Of the data, for the report.
        split: Of the data, for the report.
        flow: How finely the flow is integrated.
        batch_size: Samples at a time; without influence on the numbers.
        progress: Shows a progress bar.

    Raises:
        UserError: An unknown method, or a model without transform.
    """
    for method in methods:
        if method not in METHODS:
            raise UserError(f"unknown likelihood method '{method}'; {nearest(method, METHODS)}")
    require_transform(model)
    x, y = x[:limit], None if y is None else y[:limit]
    table = _Table(model, x, y, draws, seed, batch_size)
    stages = [stage for stage in ("single", "elbo", "flow", "logz") if stage in methods]
    for stage in _progress(stages, progress):
        if stage == "single":
            table.add_single()
        elif stage == "flow":
            table.add_flow(flow or FlowOptions())
    return table.finish(name, split)


@dataclass
class _Table:
    """A report in the making."""

    model: ClassificationDiffusion
    x: Tensor
    y: Tensor | None
    draws: int
    seed: int
    batch_size: int
    likelihoods: dict[str, LogLikelihood] = field(default_factory=dict)
    gap: Gap | None = None
    notes: list[str] = field(default_factory=list)

    def add_single(self) -> None:
        """published-convention, one-pass, one-pass-level."""
        arguments = self.model, self.x, self.y
        self.likelihoods["published-convention"] = published_convention(*arguments, self.batch_size)
        for name, level in (("one-pass", 0), ("one-pass-level", LEVEL)):
            values = single_draws(*arguments, level, self.draws, self.seed, self.batch_size)
            self.likelihoods[name] = combine(self.model, values, level, importance=False)
            if level == 0 and self.draws > 1:
                self.likelihoods["one-pass-importance"] = combine(self.model, values, level, importance=True)

    def add_flow(self, options: FlowOptions) -> None:
        """flow, and its gap to one pass on the first draw of the noisy inputs."""
        model, transform = self.model, require_transform(self.model)
        with evaluation_mode(model):
            scored = [
                score_noisy(model, self.x, self.y, rows, LEVEL, self.seed)
                for rows in batches(len(self.x), self.batch_size)
            ]
        z, log_p, offset = (torch.cat([getattr(part, key) for part in scored]) for key in ("z", "log_prob", "offset"))
        steps = min(options.steps, model.schedule.T - LEVEL)
        y = labels_of(self.y, slice(None), z.device)
        result = probability_flow(
            model, z, y, LEVEL, steps, options.probes, self.seed, halve=steps > 1, batch_size=self.batch_size
        )
        nats = (result.log_prob + offset).cpu()
        convention = f"probability flow from level {LEVEL}"
        self.likelihoods["flow"] = LogLikelihood(
            nats, transform.dim, LEVEL, convention, transform.log_bin, result.nfe
        )
        unit = 1.0 if transform.bin is None else 1 / (transform.dim * math.log(2))
        gap = unit * (result.log_prob - log_p).cpu()
        # The mean of two independent halves has a quarter of the variance of their difference.
        probe_variance = (unit * result.probe_gap.cpu()).square().mean() / 4
        spread = (gap.var() - probe_variance).clamp_min(0).sqrt()
        self.gap = Gap(float(gap.mean()), float(spread), LEVEL, float(gap.std() / math.sqrt(len(gap))))
        # Heun is of second order: half the steps have four times the error.
        step_error = 0.0 if result.step_gap is None else float(unit * result.step_gap.mean() / 3)
        probe_error = float((probe_variance / len(gap)).sqrt())
        kl = unit * result.start_kl_bound
        self.notes.append(
            f"flow: error of the mean {abs(step_error):.4f} from {steps} steps and {probe_error:.4f} from the probes; "
            f"KL of its start density at most {kl:.1g}"
        )

    def finish(self, name: str, split: str) -> NLLReport:
        """The report."""
        transform = require_transform(self.model)
        rows = []
        for key, likelihood in self.likelihoods.items():
            if len(likelihood.nats) != len(self.x):
                raise RuntimeError(f"{key}: {len(likelihood.nats)} of {len(self.x)} samples were scored")
            value, error = likelihood.mean_and_error()
            rows.append(Row(key, value, error, likelihood.nfe, likelihood.level))
        rows.append(Row("one-pass-normalized", None, None, 1, LEVEL))
        why = "No normalised number can be given: log Z was not estimated."
        unit = "nats" if transform.bin is None else "bits/dim"
        return NLLReport(
            name, split, len(self.x), transform.dim, unit, tuple(rows), None, self.gap, False, why, tuple(self.notes)
        )


def _progress(stages: list[str], show: bool) -> Any:
    from tqdm.auto import tqdm

    return tqdm(stages, desc="likelihood", unit="stage", disable=not show)
