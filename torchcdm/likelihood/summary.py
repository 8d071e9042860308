"""What a likelihood report says: rows, the gap between one pass and flow, and whether to believe it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torchcdm.likelihood.log_z import SMALLEST_ESS, LogZ

REMARKS = {
    "published-convention": "undithered at level 0: for comparison with published numbers, no bound",
    "one-pass": "uniform dequantisation at level 0; a bound if exp(log p) integrates to one",
    "one-pass-importance": "the same draws, averaged inside the logarithm",
    "one-pass-level": "through a noisy level, decoder from the denoiser's mean; a bound if normalised",
    "one-pass-normalized": "one-pass-level + log2 Z / d: the headline",
    "elbo": "reverse chain of the same network down to that level, discretised decoder; a bound",
    "flow": "probability flow of the same network through the same noisy inputs; a bound up to its own error",
}
"""The rows, in the order of the table; ``one-pass-importance`` is there when there are several draws."""

CONTINUOUS_REMARKS = REMARKS | {
    "published-convention": "density at level 0",
    "one-pass": "density at level 0",
    "one-pass-level": "density of the data with the level's noise",
    "one-pass-normalized": "one-pass-level + log Z: the headline",
    "elbo": "reverse chain of the same network; a bound for the density of the data",
    "flow": "probability flow of the same network at the same noisy inputs",
}


class Row(NamedTuple):
    """One number of the table; ``value`` None where it cannot be given."""

    name: str
    value: float | None
    se: float | None
    nfe: int
    level: int


@dataclass(frozen=True)
class NLLGap:
    """NLL by one pass minus NLL by the flow on the same noisy inputs, in the report's unit.

    Above 0 one pass finds the data less likely.

    Attributes:
        mean: Mean over the samples.
        sd: Standard deviation over the samples, with the variance of the flow's random probes removed.
        level: The level of the inputs.
        se: Standard error of the mean, probes included.
    """

    mean: float
    sd: float
    level: int
    se: float


NOT_ESTIMATED = "No normalised number can be given: log Z was not estimated."
"""Why there is no headline where nobody asked for one."""


@dataclass(frozen=True)
class NLLReport:
    """The likelihood of a model on a data set, with what is needed to judge it.

    Attributes:
        name: Name of the data.
        split: Name of their split.
        count: Samples scored.
        dim: Dimensions of a sample.
        unit: ``bits/dim``, or ``nats`` for continuous data.
        rows: The table.
        log_z: Estimate of log Z at the level of the headline; None where not asked for.
        gap: NLL by one pass minus NLL by the flow; None where not asked for.
        believe: Whether the headline is to be believed.
        why: The reason, one sentence.
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
    believe: bool
    why: str
    notes: tuple[str, ...] = ()

    def row(self, name: str) -> Row | None:
        """The row of that name, where there is one."""
        return next((row for row in self.rows if row.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Plain values under the keys of the NLL contract; None for what was not asked for or cannot be given."""
        return {
            "data": {"name": self.name, "split": self.split, "count": self.count, "dim": self.dim},
            "unit": self.unit,
            "rows": [row._asdict() | {"se": finite(row.se)} for row in self.rows],
            "log2_z_per_dim": self.log_z and self.log_z.to_json(),
            "log2_z_per_dim_check": self.log_z and self.log_z.check and self.log_z.check.to_json(),
            "gap_to_flow": self.gap and {"mean": self.gap.mean, "sd": self.gap.sd, "level": self.gap.level},
            "believe": self.believe,
            "why": self.why,
        }

    def table(self) -> str:
        """The report as text."""
        what = "negative log-likelihood, lower is better"
        title = f"{self.name} {self.split}".strip() or "data"
        lines = [f"{title}: {self.count} samples of {self.dim} dimensions; {what}, {self.unit}", ""]
        lines.append(f"{'row':22}{'value':>10}{'s.e.':>9}{'NFE':>7}{'level':>7}")
        for row in self.rows:
            if row.name == "one-pass-normalized" and self.log_z is not None:
                value = self.log_z.to_json()["value"]
                lines.append(f"{'log2 Z / d':22}{value:>+10.4f}{'':23}  {self.log_z.reliability()}")
            remark = (CONTINUOUS_REMARKS if self.unit == "nats" else REMARKS)[row.name]
            value = "-" if row.value is None else f"{row.value:.4f}"
            error = "-" if finite(row.se) is None else f"{row.se:.4f}"
            lines.append(f"{row.name:22}{value:>10}{error:>9}{row.nfe:>7}{row.level:>7}  {remark}")
        lines.append("")
        if self.gap is not None:
            lines.append(
                f"one pass - flow at level {self.gap.level}, same noisy inputs: {self.gap.mean:+.4f} +- "
                f"{self.gap.se:.4f} in the mean, spread over samples {self.gap.sd:.4f} (probe variance removed)"
            )
        lines += [*self.notes, self._verdict()]
        return "\n".join(lines)

    def _verdict(self) -> str:
        """Whether to believe the headline; where log Z was not asked for, what was measured instead."""
        if self.why != NOT_ESTIMATED:
            return f"To be believed: {'yes' if self.believe else 'no'}. {self.why}"
        normalized = [row.name for row in self.rows if row.name in ("elbo", "flow")]
        said = "one pass, which may be off by log Z" + "".join(f"; {name}, which is normalised" for name in normalized)
        return f"Measured: {said}. For a normalised one pass: cdm nll RUN --methods single,elbo,flow,logz"


def finite(value: float | None) -> float | None:
    """None for what JSON does not know."""
    return value if value is not None and math.isfinite(value) else None


CONSISTENT = 0.02
"""Largest difference to the flow, and largest excess over the ELBO, of a number that is to be believed; bits/dim."""


class Verdict(NamedTuple):
    """The headline and what to think of it."""

    headline: Row | None
    believe: bool
    why: str
    notes: tuple[str, ...] = ()


def judge(
    per_nat: float,
    level: int,
    one_pass: Row | None,
    log_z: LogZ | None,
    gap: NLLGap | None = None,
    over_elbo: tuple[float, float] | None = None,
    conditional: bool = False,
) -> Verdict:
    """Gives the headline where that can be done, and compares it with the flow and the ELBO.

    The rows have ``per_nat`` units in a nat of a sample: 1, or 1 / (d log 2) for bits/dim. ``one_pass`` is the row at
    the ``level`` of ``log_z``, not normalised; None where it was not asked for. NLL by one pass is compared with the
    flow's by ``gap``, and with the ELBO's by ``over_elbo``, the mean difference and its standard error.
    ``conditional`` rows are given a class.
    """
    lacking = _lacking(one_pass, log_z, conditional)
    if lacking is not None:
        empty = Row("one-pass-normalized", None, None, 1, level)
        return Verdict(empty, False, lacking)
    shift, z_error = per_nat * log_z.value, per_nat * log_z.se
    headline = Row("one-pass-normalized", one_pass.value + shift, math.hypot(one_pass.se, z_error), 1, log_z.level)
    tolerance = CONSISTENT * per_nat * log_z.dim * math.log(2)
    against, notes = [], ()
    if gap is not None:
        difference = gap.mean + shift
        against.append((abs(difference), f"is {abs(difference):.4f} {_side(difference)} the flow"))
    if over_elbo is not None:
        excess, error = over_elbo[0] + shift, over_elbo[1]
        notes = (f"The headline is {abs(excess):.4f} +- {error:.4f} {_side(excess)} the ELBO.",)
        # The bound is an estimate, each level with noise of its own.
        against.append((excess - 2 * error, f"is {excess:+.4f} from the ELBO, a bound"))
    failed = [text for size, text in against if size > tolerance]
    believe = bool(against) and not failed and 1.96 * z_error <= tolerance
    if believe:
        agreement = " and ".join(text for _, text in against)
        why = f"log Z has an effective sample size of {log_z.ess:.0f} and the headline {agreement}."
    elif not against:
        why = "The headline was compared with nothing: ask for the flow or the ELBO too."
    elif failed:
        why = f"The headline {' and '.join(failed)}: more than the {tolerance:.3g} of a consistent model."
    else:
        why = f"log Z is known to {1.96 * z_error:.4f} only, more than {tolerance:.3g}."
    return Verdict(headline, believe, why, notes)


def _side(difference: float) -> str:
    return "above" if difference > 0 else "below"


def _lacking(one_pass: Row | None, log_z: LogZ | None, conditional: bool) -> str | None:
    """Why there is no headline; None where there is one."""
    if not conditional and log_z is None:
        return NOT_ESTIMATED
    if conditional:
        lacking = "log Z of a class-conditional density is not estimated here"
    elif one_pass is None:
        lacking = "one pass was not asked for"
    elif log_z.doubt:
        lacking = log_z.doubt
    elif not log_z.usable:
        lacking = f"the effective sample size of log Z is {log_z.ess:.1f}, below {SMALLEST_ESS}"
    elif log_z.check is not None and log_z.contradicts(log_z.check):
        said = (f"{z['value']:+.4f} ({z['estimator']})" for z in (log_z.to_json(), log_z.check.to_json()))
        lacking = f"two estimators of log2 Z / d disagree, {' and '.join(said)}"
    else:
        return None
    return f"No normalised number can be given: {lacking}."
