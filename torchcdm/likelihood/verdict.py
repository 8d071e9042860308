"""Whether a normalised one-pass likelihood can be given, and whether it is to be believed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchcdm.likelihood.log_z import SMALLEST_ESS, LogZ
from torchcdm.likelihood.summary import NLLGap, Row

CONSISTENT = 0.02
"""Largest difference to the flow, and largest excess over the ELBO, of a number that is to be believed; bits/dim."""


@dataclass(frozen=True)
class Verdict:
    """The headline and what to think of it."""

    headline: Row
    believe: bool
    why: str
    notes: tuple[str, ...] = ()


def judge(
    per_nat: float,
    level: int,
    one_pass: Row | None,
    log_z: LogZ | None,
    second: LogZ | None = None,
    gap: NLLGap | None = None,
    over_elbo: tuple[float, float] | None = None,
    conditional: bool = False,
) -> Verdict:
    """Gives the headline where that can be done, and compares it with the flow and the ELBO.

    Args:
        per_nat: Units of the rows in a nat of a sample: 1, or 1 / (d log 2) for bits/dim.
        level: Level of the headline.
        one_pass: The row at the level of log Z, not normalised; None where it was not asked for, as below.
        log_z: The estimate that normalises.
        second: An independent estimate.
        gap: NLL by one pass minus NLL by the flow.
        over_elbo: NLL by one pass minus NLL by the ELBO, mean over the samples and its standard error.
        conditional: Whether the rows are given a class.
    """
    why = cannot_be_given(one_pass, log_z, second, conditional)
    if why is not None:
        empty = Row("one-pass-normalized", None, None, 1, level)
        return Verdict(empty, False, f"No normalised number can be given: {why}.")
    z_error, value = per_nat * log_z.se, one_pass.value + per_nat * log_z.value
    headline = Row("one-pass-normalized", value, math.hypot(one_pass.se, z_error), 1, log_z.level)
    tolerance = CONSISTENT * per_nat * log_z.dim * math.log(2)
    against, notes = [], []
    if gap is not None:
        difference = gap.mean + per_nat * log_z.value
        side = "above" if difference > 0 else "below"
        against.append((abs(difference), f"is {abs(difference):.4f} {side} the flow"))
    if over_elbo is not None:
        excess, error = over_elbo[0] + per_nat * log_z.value, over_elbo[1]
        side = "above" if excess > 0 else "below"
        notes.append(f"The headline is {abs(excess):.4f} +- {error:.4f} {side} the ELBO.")
        # The bound is an estimate, each level with noise of its own.
        against.append((excess - 2 * error, f"is {excess:+.4f} from the ELBO, a bound"))
    failed = [text for size, text in against if size > tolerance]
    if not against:
        why = "The headline was compared with nothing: ask for the flow or the ELBO too."
    elif failed:
        why = f"The headline {' and '.join(failed)}: more than the {tolerance:.3g} of a consistent model."
    elif 1.96 * z_error > tolerance:
        why = f"log Z is known to {1.96 * z_error:.4f} only, more than {tolerance:.3g}."
    else:
        agreement = " and ".join(text for _, text in against)
        why = f"log Z has an effective sample size of {log_z.ess:.0f} and the headline {agreement}."
        return Verdict(headline, True, why, tuple(notes))
    return Verdict(headline, False, why, tuple(notes))


def cannot_be_given(
    one_pass: Row | None, log_z: LogZ | None, second: LogZ | None = None, conditional: bool = False
) -> str | None:
    """Why there is no headline; None where there is one."""
    if conditional:
        return "log Z of a class-conditional density is not estimated here"
    if log_z is None:
        return "log Z was not estimated"
    if one_pass is None:
        return "one pass was not asked for"
    if not log_z.usable:
        return f"the effective sample size of log Z is {log_z.ess:.1f}, below {SMALLEST_ESS}"
    if second is not None and disagree(log_z, second):
        one, other = log_z.to_json(), second.to_json()
        return (
            f"two estimators of log2 Z / d disagree, {one['value']:+.4f} ({one['estimator']}) and "
            f"{other['value']:+.4f} ({other['estimator']})"
        )
    return None


def disagree(z: LogZ, second: LogZ) -> bool:
    """Whether the intervals are apart, or the second's lower bound lies above the first's interval.

    An estimate of few effective samples errs low without limit: only its lower bound then says something.
    """
    if second.mean_log_weight > z.high + 3 * second.mean_log_weight_se:
        return True
    return second.usable and (second.low > z.high or second.high < z.low)
