"""Whether a normalised one-pass likelihood can be given, and whether it is to be believed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchcdm.likelihood.normalizer import LogNormalizer
from torchcdm.likelihood.summary import NLLGap, Row

SMALLEST_ESS = 20
"""Below this effective sample size of log Z no normalised number is given."""

CONSISTENT = 0.02
"""Largest difference to the flow, and largest excess over the ELBO, of a number that is to be believed; bits/dim."""


@dataclass(frozen=True)
class Evidence:
    """What is known about a model's likelihood; None for what was not asked for.

    Attributes:
        per_nat: Units of the rows in a nat of a sample: 1, or 1 / (d log 2) for bits/dim.
        one_pass: The row at the level of log Z, not normalised.
        over_elbo: NLL by one_pass less that by the ELBO, mean over the samples and its standard error.
        gap: NLL by one pass less that by the flow.
        log_z: The estimate that normalises.
        second: An independent one.
        conditional: Whether the rows are given a class.
        level: Of the headline.
    """

    per_nat: float
    one_pass: Row | None
    over_elbo: tuple[float, float] | None
    gap: NLLGap | None
    log_z: LogNormalizer | None
    second: LogNormalizer | None
    conditional: bool = False
    level: int = 1


@dataclass(frozen=True)
class Verdict:
    """The headline and what to think of it."""

    headline: Row
    believe: bool
    why: str
    notes: tuple[str, ...]


def judge(evidence: Evidence) -> Verdict:
    """Gives the headline where that can be done, and compares it with the flow and the ELBO."""
    why = cannot_be_given(evidence)
    if why is not None:
        empty = Row("one-pass-normalized", None, None, 1, evidence.level)
        return Verdict(empty, False, f"No normalised number can be given: {why}.", ())
    one_pass, z, per_nat = evidence.one_pass, evidence.log_z, evidence.per_nat
    # The interval is 1.96 standard errors to either side.
    z_error = per_nat * (z.high - z.low) / 3.92
    value = one_pass.value + per_nat * z.value
    headline = Row("one-pass-normalized", value, math.hypot(one_pass.se, z_error), 1, z.level)
    tolerance = CONSISTENT * per_nat * z.dim * math.log(2)
    against, notes = [], []
    if evidence.gap is not None:
        difference = evidence.gap.mean + per_nat * z.value
        side = "above" if difference > 0 else "below"
        against.append((abs(difference), f"is {abs(difference):.4f} {side} the flow"))
    if evidence.over_elbo is not None:
        excess, error = evidence.over_elbo[0] + per_nat * z.value, evidence.over_elbo[1]
        side = "above" if excess > 0 else "below"
        notes.append(f"The headline is {abs(excess):.4f} +- {error:.4f} {side} the ELBO.")
        # The bound is an estimate, each level with noise of its own.
        against.append((excess - 2 * error, f"is {excess:+.4f} from the ELBO, a bound"))
    if not against:
        why = "The headline was compared with nothing: ask for the flow or the ELBO too."
        return Verdict(headline, False, why, ())
    failed = [text for size, text in against if size > tolerance]
    if failed:
        why = f"The headline {' and '.join(failed)}: more than the {tolerance:.3g} of a consistent model."
        return Verdict(headline, False, why, tuple(notes))
    if 1.96 * z_error > tolerance:
        why = f"log Z is known to {1.96 * z_error:.4f} only, more than {tolerance:.3g}."
        return Verdict(headline, False, why, tuple(notes))
    why = f"log Z has an effective sample size of {z.ess:.0f} and the headline {' and '.join(t for _, t in against)}."
    return Verdict(headline, True, why, tuple(notes))


def cannot_be_given(evidence: Evidence) -> str | None:
    """Why there is no headline; None where there is one."""
    z, second = evidence.log_z, evidence.second
    if evidence.conditional:
        return "log Z of a class-conditional density is not estimated here"
    if z is None:
        return "log Z was not estimated"
    if evidence.one_pass is None:
        return "one pass was not asked for"
    if z.ess < SMALLEST_ESS:
        return f"the effective sample size of log Z is {z.ess:.1f}, below {SMALLEST_ESS}"
    if second is not None and disagree(z, second):
        bits = 1 / (z.dim * math.log(2))
        return (
            f"two estimators of log2 Z / d disagree, {bits * z.value:+.4f} ({z.estimator}) and "
            f"{bits * second.value:+.4f} ({second.estimator})"
        )
    return None


def disagree(z: LogNormalizer, second: LogNormalizer) -> bool:
    """Whether the intervals are apart, or the second's lower bound lies above the first's interval.

    An estimate of few effective samples errs low without limit: only its lower bound then says something.
    """
    if second.mean_log_weight > z.high + 3 * second.mean_log_weight_se:
        return True
    return second.ess >= SMALLEST_ESS and (second.low > z.high or second.high < z.low)
