"""The likelihood report: every row of one model on one data set, and whether the headline is to be believed."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple, get_args

import torch
from annotated_types import Len
from torch import Tensor, nn

from torchcdm.annealing.kernels import CALIBRATION_SAMPLES, MEASURED, Kernels
from torchcdm.annealing.target import ModelTarget
from torchcdm.errors import UserError
from torchcdm.likelihood.elbo import elbo
from torchcdm.likelihood.flow import FlowLikelihood, FlowSolver, probability_flow
from torchcdm.likelihood.log_z import SWEEPS, LogZ, Sweeps, log_normalizer
from torchcdm.likelihood.one_pass import single_pass
from torchcdm.likelihood.restricted import restricted_pass
from torchcdm.likelihood.scoring import Scoring, as_data
from torchcdm.models.denoiser import Denoiser
from torchcdm.models.density import DensityModel
from torchcdm.random import evenly_spaced
from torchcdm.runtime.files import without_nan
from torchcdm.runtime.processes import progress_bar, share
from torchcdm.runtime.validation import checked
from torchcdm.units import LogLikelihood, standard_error

Method = Literal["single", "elbo", "flow", "logz"]
METHODS = get_args(Method)
"""Groups of rows that can be asked for; the first and the last need a density in one pass."""

HALVED_SAMPLES = 64  # that show what the flow's steps cost in accuracy
CONSISTENT = 0.02  # bits/dim to the flow, and over the ELBO, up to which a number is to be believed
NOT_ESTIMATED = "log Z was not estimated"  # why there is no headline where nobody asked for one

REMARKS = {
    "published-convention": "undithered at level 0: for comparison with published numbers, no bound",
    "one-pass": "uniform dequantisation at level 0; a bound if exp(log p) integrates to one",
    "one-pass-level": "through a noisy level, decoder from the denoiser's mean; a bound if normalised",
    "one-pass-normalized": "one-pass-level + log2 Z / d: the headline",
    "one-pass-restricted": "log p within what is usual, covered elsewhere, upper end of log Z: a bound for any input",
    "few-pass-restricted": "a chain of so many passes below that, a bound for any input: the headline",
    "elbo": "reverse chain of the same network down to that level, discretised decoder; a bound",
    "flow": "probability flow of the same network through the same noisy inputs; a bound up to its own error",
}
"""The rows, in the order of the table, and what they are for data on a grid."""

OF_CONTINUOUS = {
    "published-convention": "density at level 0",
    "one-pass": "density at level 0",
    "one-pass-level": "density of the data with the level's noise",
    "one-pass-normalized": "one-pass-level + log Z: the headline",
    "one-pass-restricted": "the same within what is usual, covered elsewhere, upper end of log Z, for any input",
    "elbo": "reverse chain of the same network; a bound for the density of the data",
    "flow": "probability flow of the same network at the same noisy inputs",
}
"""What they are for continuous data."""


class Row(NamedTuple):
    """One number of the table; ``value`` None where it cannot be given."""

    name: str
    value: float | None
    se: float | None
    nfe: int
    level: int


class NLLGap(NamedTuple):
    """NLL by one pass less that by the flow on the same noisy inputs, in the report's unit; above 0 it is worse."""

    mean: float
    sd: float  # over samples, without the variance of the flow's probes, which ``se`` includes
    level: int
    se: float


@dataclass(frozen=True)
class NLLReport:
    """The likelihood of a model on a data set, with what is needed to judge it.

    Of ``count`` samples of ``dim`` dimensions, in the ``unit`` bits/dim, or nats for continuous data.

    Attributes:
        log_z: Estimate of log Z at the level of the headline; None where not asked for.
        gap: One pass and the flow; None where not asked for; ``gaps`` are the same by level, nats.
        believe: Whether the headline is to be believed, and ``why``, one sentence.
        notes: Further sentences: errors of the estimators, terms of the ELBO.
    """

    name: str
    split: str
    count: int
    dim: int
    unit: str
    rows: tuple[Row, ...]
    log_z: LogZ | None
    gap: NLLGap | None
    gaps: dict[str, list[float]] | None
    believe: bool
    why: str
    notes: list[str]

    def row(self, name: str) -> Row | None:
        """The row of that name, where there is one."""
        return next((row for row in self.rows if row.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Plain values under the keys of the NLL contract; None for what was not asked for or cannot be given."""
        return {
            "data": {"name": self.name, "split": self.split, "count": self.count, "dim": self.dim}, "unit": self.unit,
            "rows": [without_nan(row._asdict()) for row in self.rows],
            "log2_z_per_dim": self.log_z and self.log_z.to_json(),
            "log2_z_per_dim_check": self.log_z and self.log_z.check and self.log_z.check.to_json(),
            "gap_to_flow": self.gap and without_nan({key: getattr(self.gap, key) for key in ("mean", "sd", "level")}),
            "believe": self.believe, "why": self.why,
        }  # fmt: skip

    def table(self) -> str:
        """The report as text, without rows that have no value."""
        what = "negative log-likelihood, lower is better"
        title = f"{self.name} {self.split}".strip() or "data"
        lines = [f"{title}: {self.count} samples of {self.dim} dimensions; {what}, {self.unit}", ""]
        lines.append(f"{'row':22}{'value':>10}{'s.e.':>9}{'NFE':>7}{'level':>7}")
        normalised = "one-pass-restricted" if self.row("one-pass-restricted") else "one-pass-normalized"
        for row in self.rows:
            if row.name == normalised and self.log_z is not None:
                value = self.log_z.to_json()["value"]
                lines.append(f"{'log2 Z / d':22}{value:>+10.4f}{'':23}  {self.log_z.reliability()}")
            if row.value is None:
                continue
            remark = (OF_CONTINUOUS if self.unit == "nats" else REMARKS)[row.name]
            error = "-" if without_nan(row.se) is None else f"{row.se:.4f}"
            lines.append(f"{row.name:22}{row.value:>10.4f}{error:>9}{row.nfe:>7}{row.level:>7}  {remark}")
        lines.append("")
        if self.gap is not None:
            mean = f"{self.gap.mean:+.4f} +- {self.gap.se:.4f} in the mean"
            spread = f"spread over samples {self.gap.sd:.4f} (probe variance removed)"
            lines.append(f"one pass - flow at level {self.gap.level}, same noisy inputs: {mean}, {spread}")
        verdict = f"To be believed: {'yes' if self.believe else 'no'}. {self.why}"
        if NOT_ESTIMATED in self.why:
            normalized = "".join(f"; {n}, which is normalised" for n in ("elbo", "flow") if self.row(n) is not None)
            how = "For a normalised one pass: cdm nll RUN --methods single,elbo,flow,logz"
            verdict = f"Measured: one pass, which may be off by log Z{normalized}. {how}"
        return "\n".join([*lines, *self.notes, verdict])


def methods_of(model: Denoiser) -> tuple[str, ...]:
    """Those of :data:`METHODS` that a model has: a plain diffusion model none that need a density in one pass."""
    return METHODS[1:3] if getattr(model, "density", None) is None else METHODS


@checked
def report(
    model: Denoiser, x: Tensor, y: Tensor | None = None, scoring: Scoring = Scoring(),
    methods: Annotated[Sequence[Method], Len(1)] | None = None, sweeps: Sweeps = SWEEPS, name: str = "",
    split: str = "", progress: bool = False, training: Tensor | None = None, log_z: LogZ | None = None,
) -> NLLReport:  # fmt: skip
    """Scores data by every method asked for, on the same samples and the same noisy inputs.

    UserError for an unknown method, or one that the model does not have; data, a level, or numbers out of range.

    Args:
        model: The model, with a transform; put into evaluation mode meanwhile.
        x: Data units, (N, *shape).
        y: Classes, long (N,), for the conditional density, whose log Z is not estimated; None for the unconditional.
        scoring: Level of the headline, of log Z, and of all that is compared with them; the rest for all methods.
        methods: Some of :data:`METHODS`; all that the model has when None. A plain diffusion model has ELBO and flow.
        sweeps: Sweeps of the replica exchange that estimates log Z, at least 4.
        name: Name of the data.
        split: Name of their split.
        progress: Shows a progress bar.
        training: Other data, which say what is usual where log Z is restricted; ``x`` when None.
        log_z: What is known of it, where it is not estimated.
    """
    methods = methods_of(model) if methods is None else methods
    lacking = [method for method in methods if method not in methods_of(model)]
    if lacking:
        raise UserError(f"{' and '.join(lacking)}: a ddm has no density in one pass; its methods are elbo and flow")
    x, y = as_data(model, x, y, scoring)
    usual = x if training is None else as_data(model, training, None, scoring)[0]
    if "logz" in methods and y is None and model.joint and len(usual) < 2:
        raise UserError("log Z of a model with classes takes two samples at least, which say what is usual; give more")
    level, transform, asked = scoring.level_of(model), model.transform, scoring
    scoring, at_zero = replace(scoring, level=level), replace(scoring, level=0)
    if log_z is not None and (y is not None or (log_z.restricted is None and log_z.level != level)):
        log_z = None
    stages = [stage for stage in METHODS if stage in methods and (stage != "logz" or y is None)]
    # From nats of a sample to the unit of the report.
    per_nat = 1.0 if transform.bin is None else 1 / (transform.dim * math.log(2))
    found: dict[str, LogLikelihood] = {}
    kernels = gap = gaps = over_elbo = None
    notes: list[str] = []
    passes = {stage: _rows_seen(model, stage, len(share(len(x))), scoring) for stage in stages}
    for stage in _with_bars(model, passes, progress):
        if stage in ("elbo", "logz") and kernels is None:
            # With the variances that the model's own samples have, of all classes that are given.
            target, n = ModelTarget(model, batch_size=scoring.batch_size, density=False), CALIBRATION_SAMPLES
            target.y = None if y is None else y[torch.arange(n) * len(y) // n]
            kernels = Kernels.of_target(target, scoring.seed)
        if stage == "single":
            found["published-convention"] = single_pass(model, x, y, replace(at_zero, draws=1), dither=False)
            found["one-pass"] = single_pass(model, x, y, at_zero)
            found["one-pass-level"] = single_pass(model, x, y, scoring)
        elif stage == "elbo":
            found["elbo"] = bound = elbo(model, x, y, scoring, kernels)
            terms = {"prior": bound.prior, "diffusion": bound.diffusion, "reconstruction": bound.reconstruction}
            parts = (f"{name} {float(per_nat * term.mean()):+.4f}" for name, term in terms.items())
            notes.append(f"elbo: {', '.join(parts)}")
        elif stage == "flow":
            found["flow"] = flow = probability_flow(model, x, y, scoring)
            gap, note = _errors(model, y, scoring, flow, per_nat)
            gaps = None if gap is None else flow.flow.gaps()
            notes.append(note)
        else:
            how = {"sweeps": sweeps, "kernels": kernels, "progress": progress}
            log_z, said = _measured_log_z(model, x, scoring, asked, training, **how)
            notes += said
    if {"single", "logz"} & set(methods) and log_z is not None and log_z.restricted is not None and not log_z.lacking:
        found["one-pass-restricted"] = restricted_pass(model, x, log_z.restricted, scoring)
        if len(log_z.restricted.steps) > 1:
            found["few-pass-restricted"] = restricted_pass(model, x, log_z.restricted, scoring, chain=True)
    if {"one-pass-level", "elbo"} <= found.keys():
        difference = found["one-pass-level"].values() - found["elbo"].values()
        over_elbo = float(difference.mean()), standard_error(difference)
    rows = {key: Row(key, *one.mean_and_error(), one.nfe, one.level) for key, one in found.items()}
    believe, why = True, "ELBO and flow integrate to one by construction; the flow up to its errors."
    if model.density is not None:
        verdict = judge(per_nat, level, rows.get("one-pass-level"), log_z, gap, over_elbo, y is not None)
        rows["one-pass-normalized"], believe, why = verdict
    unit, ordered = "nats" if transform.bin is None else "bits/dim", tuple(rows[key] for key in REMARKS if key in rows)
    return NLLReport(name, split, len(x), transform.dim, unit, ordered, log_z, gap, gaps, believe, why, notes)


def _measured_log_z(
    model: DensityModel, x: Tensor, scoring: Scoring, asked: Scoring, training: Tensor | None, **how: Any
) -> tuple[LogZ, list[str]]:
    """log Z over all inputs, or of the restricted density where that is lacking or classes come one by one; and notes.

    The restricted density is at the level that is ``asked`` for, if one is.
    """
    found, notes = None, []
    if not model.joint:
        found = log_normalizer(model, x, None, scoring, **how)
        notes = found.notes()
    if found is None or found.lacking:
        # Mass that data never showed: without it there may be a normaliser.
        fenced = log_normalizer(model, x, None, asked, restricted=True, training=training, **how)
        notes += [f"restricted: {note}" for note in fenced.notes()]
        found = fenced if found is None or not fenced.lacking else found
    return found, notes


def _rows_seen(model: Denoiser, stage: str, n: int, scoring: Scoring) -> int:
    """Rows that the network sees in a stage, for ``n`` samples."""
    T, steps = model.schedule.T, min(scoring.steps, model.schedule.T - scoring.level)
    halved = 2 * ((steps + 1) // 2) + 1
    rows = {"single": (1 + 2 * scoring.draws) * n, "flow": 2 * (steps + 1) * n + halved * min(n, HALVED_SAMPLES)}
    calibration = (T + min(T, MEASURED)) * CALIBRATION_SAMPLES
    rows |= {"elbo": (T - scoring.level + 1) * n + calibration, "logz": 0}
    return rows[stage]


def _with_bars(model: Denoiser, rows: Mapping[str, int], progress: bool) -> Iterator[str]:
    """The stages, each with a bar of the rows that the network has seen; log Z has one of its own."""
    form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    for stage, total in rows.items():
        bar = progress_bar(None, f"likelihood, {stage}", progress and total > 0, True, total=total, bar_format=form)

        def count(network: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, bar: Any = bar) -> None:
            bar.update(len(inputs[0]))

        with bar, (getattr(model, "backbone", None) or model).register_forward_hook(count):
            yield stage


def _errors(
    model: Denoiser, y: Tensor | None, scoring: Scoring, found: FlowLikelihood, per_nat: float
) -> tuple[NLLGap | None, str]:
    """How far one pass reads above the flow on the same noisy inputs, and a sentence on the flow's own errors."""
    flow, z, gap = found.flow, found.z, None
    # The mean of two independent halves has a quarter of the variance of their difference.
    probe_variance = (per_nat * flow.probe_gap.cpu()).square().mean() / 4
    if model.density is not None:
        gaps = per_nat * (flow.log_prob - flow.one_pass[0]).cpu()
        spread = (gaps.var() - probe_variance).clamp_min(0).sqrt() if len(gaps) > 1 else math.nan
        gap = NLLGap(float(gaps.mean()), float(spread), found.level, standard_error(gaps))
    # By halving the steps on some samples: of second order, so half the steps have four times the error.
    some, steps, step_error = evenly_spaced(len(z), HALVED_SAMPLES), found.nfe // 2, "unknown"
    if steps > 1:
        coarse = FlowSolver(model, replace(scoring, steps=(steps + 1) // 2))
        # By the same probes, whose noise would be taken for an error of the steps.
        halved = coarse.log_prob(z[some], None if y is None else y[some], some.tolist()).log_prob
        step_error = f"{abs(float(per_nat * (flow.log_prob[some] - halved).mean())) / 3:.4f}"
    probe_error, kl = float((probe_variance / len(z)).sqrt()), per_nat * flow.start_kl_bound
    said = f"error of its mean {step_error} from the steps ({steps}) and {probe_error:.4f} from the probes"
    return gap, f"flow: {said}; KL of its start density at most {kl:.1g}"


class Verdict(NamedTuple):
    """The headline, a row without a value where there is none, and what to think of it."""

    headline: Row
    believe: bool
    why: str


def judge(
    per_nat: float, level: int, one_pass: Row | None, log_z: LogZ | None, gap: NLLGap | None = None,
    over_elbo: tuple[float, float] | None = None, conditional: bool = False,
) -> Verdict:  # fmt: skip
    """Gives the headline where that can be done, and compares it with the flow and the ELBO.

    The rows have ``per_nat`` units in a nat of a sample: 1, or 1 / (d log 2) for bits/dim. ``one_pass`` is the row at
    the ``level`` of ``log_z``, not normalised; None where it was not asked for. It is compared with the flow by the
    ``gap``, and with the ELBO by ``over_elbo``, mean and standard error. ``conditional`` rows are given a class.
    """
    if conditional:
        lacking = "log Z of a class-conditional density is not estimated here"
    elif log_z is None:
        lacking = NOT_ESTIMATED
    else:
        unasked = one_pass is None and log_z.restricted is None
        lacking = "one pass was not asked for" if unasked else log_z.lacking
    without = Row("one-pass-normalized", None, None, 1, level)
    if lacking:
        return Verdict(without, False, f"No normalised number can be given: {lacking}.")
    shift, z_error, widest = per_nat * log_z.value, per_nat * log_z.se, per_nat * log_z.width * log_z.se
    if log_z.restricted is not None:
        why = f"The restricted rows are bounds for any input: their log Z, at level {log_z.level}, passed its tests"
        return Verdict(without, True, f"{why}, and is known to {widest:.4f}.")
    headline = Row("one-pass-normalized", one_pass.value + shift, math.hypot(one_pass.se, z_error), 1, log_z.level)
    tolerance = CONSISTENT * per_nat * log_z.dim * math.log(2)
    against = []
    if gap is not None:
        difference = gap.mean + shift
        side = "above" if difference > 0 else "below"
        against.append((abs(difference), f"is {abs(difference):.4f} {side} the flow"))
    if over_elbo is not None:
        excess, error = over_elbo[0] + shift, over_elbo[1]
        # The bound is an estimate, each level with noise of its own.
        against.append((excess - 2 * error, f"is {excess:+.4f} +- {error:.4f} from the ELBO, a bound"))
    failed = [text for size, text in against if not size <= tolerance]  # nor is what is not known good
    believe = bool(against) and not failed and widest <= tolerance
    if believe:
        agreement = " and ".join(text for _, text in against)
        why = f"log Z has an effective sample size of {log_z.ess:.0f} and the headline {agreement}."
    elif not against:
        why = "The headline was compared with nothing: ask for the flow or the ELBO too."
    elif failed:
        why = f"The headline {' and '.join(failed)}: more than the {tolerance:.3g} of a consistent model."
    else:
        why = f"log Z is known to {widest:.4f} only, more than {tolerance:.3g}."
    return Verdict(headline, believe, why)
