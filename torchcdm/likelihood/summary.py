"""What a likelihood report says: rows, the gap between one pass and flow, and whether to believe it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torchcdm.likelihood.log_z import LogZ

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


NOT_ESTIMATED = "log Z was not estimated"
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
        if NOT_ESTIMATED not in self.why:
            return f"To be believed: {'yes' if self.believe else 'no'}. {self.why}"
        normalized = [row.name for row in self.rows if row.name in ("elbo", "flow")]
        said = "one pass, which may be off by log Z" + "".join(f"; {name}, which is normalised" for name in normalized)
        return f"Measured: {said}. For a normalised one pass: cdm nll RUN --methods single,elbo,flow,logz"


def finite(value: float | None) -> float | None:
    """None for what JSON does not know."""
    return value if value is not None and math.isfinite(value) else None
