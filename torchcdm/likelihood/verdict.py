"""Whether a normalised one-pass likelihood can be given, and whether it is to be believed."""

from __future__ import annotations

import math
from typing import NamedTuple

from torchcdm.likelihood.log_z import SMALLEST_ESS, LogZ
from torchcdm.likelihood.summary import NOT_ESTIMATED, NLLGap, Row

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

    Args:
        per_nat: Units of the rows in a nat of a sample: 1, or 1 / (d log 2) for bits/dim.
        level: Level of the headline.
        one_pass: The row at the level of log Z, not normalised; None where it was not asked for, as below.
        log_z: The estimate that normalises, and its check.
        gap: NLL by one pass minus NLL by the flow.
        over_elbo: NLL by one pass minus NLL by the ELBO, mean over the samples and its standard error.
        conditional: Whether the rows are given a class.
    """
    lacking = _lacking(one_pass, log_z, conditional)
    if lacking is not None:
        empty = Row("one-pass-normalized", None, None, 1, level)
        return Verdict(empty, False, f"No normalised number can be given: {lacking}.")
    shift, z_error = per_nat * log_z.value, per_nat * log_z.se
    headline = Row(
        "one-pass-normalized", one_pass.value + shift, math.hypot(one_pass.se, z_error), 1, log_z.level
    )
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
    if conditional:
        return "log Z of a class-conditional density is not estimated here"
    if log_z is None:
        return NOT_ESTIMATED
    if one_pass is None:
        return "one pass was not asked for"
    if log_z.doubt:
        return log_z.doubt
    if not log_z.usable:
        return f"the effective sample size of log Z is {log_z.ess:.1f}, below {SMALLEST_ESS}"
    if log_z.check is not None and log_z.contradicts(log_z.check):
        said = (f"{z['value']:+.4f} ({z['estimator']})" for z in (log_z.to_json(), log_z.check.to_json()))
        return f"two estimators of log2 Z / d disagree, {' and '.join(said)}"
    return None
