"""What log ratios are worth, by checks that need no known ratio."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Integral

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit

from torchcdm.apps.ratio.importance import checked, effective_sample_size, importance_weights
from torchcdm.errors import UserError

SCALES = tuple(k / 100 for k in range(5, 101))
"""Scales of a log ratio that :func:`tempering` tries."""

SEPARATE = 0.1
"""Log loss, nats, below which the sources hardly overlap."""


def tempering(numerator: np.ndarray, denominator: np.ndarray) -> tuple[float, float]:
    """Scale and offset that held-out samples bear out for a log ratio: from few training samples it is too certain.

    They are those of a logistic regression of the source on the log ratio (Platt 1999), the scale at most 1; 1 and 0
    where that gains less than two parameters have to (Schwarz 1978), or where the sources hardly overlap: there only
    a few samples would decide for all.

    Args:
        numerator: Log ratios of held-out samples of the numerator, (N,).
        denominator: Log ratios of held-out samples of the denominator, (M,).
    """
    if not (np.isfinite(numerator).all() and np.isfinite(denominator).all()):
        return 1.0, 0.0
    count = len(numerator) + len(denominator)

    def loss(scale: float, offset: float) -> float:
        up, down = scale * numerator + offset, scale * denominator + offset
        return 0.5 * float(np.logaddexp(0, -up).mean() + np.logaddexp(0, down).mean())

    plain = loss(1.0, 0.0)
    candidates = [(scale, _offset(scale * numerator, scale * denominator)) for scale in SCALES]
    best = min(candidates, key=lambda pair: loss(*pair))
    gained = count * (plain - loss(*best)) > np.log(count)
    return best if gained and plain > SEPARATE else (1.0, 0.0)


def _offset(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """The b at which sigmoid(log ratio + b) is one half in the mean over both sources."""
    most = 1.0 + max(float(np.abs(numerator).max()), float(np.abs(denominator).max()))
    return float(brentq(lambda b: expit(numerator + b).mean() + expit(denominator + b).mean() - 1, -most, most))


@dataclass(frozen=True)
class Bin:
    """One line of the reliability table, numerator and denominator counted as equally frequent.

    Attributes:
        low: Lower end of the predicted probability of the numerator.
        high: Upper end.
        predicted: Mean of the prediction.
        observed: Share of the numerator among the samples.
        count: Samples.
        mass: Their share, the shares of all bins adding up to 1.
    """

    low: float
    high: float
    predicted: float
    observed: float
    count: int
    mass: float


@dataclass(frozen=True)
class Calibration:
    """Checks of a ratio on held-out samples.

    Attributes:
        mean_ratio: Mean of p/q over the denominator; 1 for the true ratio, and noisy where few samples carry it.
        mean_ratio_error: Its standard error.
        mean_inverse: Mean of q/p over the numerator; 1 for the true ratio.
        mean_inverse_error: Its standard error.
        effective_sample_size: Effective sample size of the weights p/q on the denominator's samples.
        denominator: Number of the denominator's samples.
        log_loss: Nats of the classifier sigmoid(log ratio) that tells the sources apart; log 2 = 0.693 is chance.
        calibration_error: Mean distance of predicted and observed share over the bins.
        bins: The reliability table; empty bins are left out.
    """

    mean_ratio: float
    mean_ratio_error: float
    mean_inverse: float
    mean_inverse_error: float
    effective_sample_size: float
    denominator: int
    log_loss: float
    calibration_error: float
    bins: tuple[Bin, ...]

    @classmethod
    def of(cls, numerator: np.ndarray, denominator: np.ndarray, bins: int = 10) -> Calibration:
        """From log ratios at held-out samples.

        Args:
            numerator: Log ratios at samples of the numerator, finite, (N,).
            denominator: Log ratios at samples of the denominator, finite, (M,).
            bins: Number of lines of the reliability table.

        Raises:
            UserError: Fewer than two samples of one of them, or log ratios that are no finite numbers.
        """
        numerator, denominator = checked(numerator, "the numerator's"), checked(denominator, "the denominator's")
        if isinstance(bins, bool) or not isinstance(bins, Integral) or bins < 1:
            raise UserError(f"bins is {bins!r}; a whole number of at least 1 is needed")
        if len(numerator) < 2 or len(denominator) < 2:
            raise UserError("calibration needs at least two held-out samples of numerator and denominator")
        log_loss = 0.5 * (np.logaddexp(0, -numerator).mean() + np.logaddexp(0, denominator).mean())
        table = _reliability(numerator, denominator, bins)
        error = sum(line.mass * abs(line.predicted - line.observed) for line in table)
        return cls(
            *_mean_exp(denominator),
            *_mean_exp(-numerator),
            effective_sample_size(importance_weights(denominator)),
            len(denominator),
            float(log_loss),
            float(error),
            tuple(table),
        )

    def table(self) -> str:
        """All of it in lines to read."""
        share = 100 * self.effective_sample_size / self.denominator
        lines = [
            f"mean of p/q over the denominator  {self.mean_ratio:.4g} +- {self.mean_ratio_error:.2g} (1 if right)",
            f"mean of q/p over the numerator    {self.mean_inverse:.4g} +- {self.mean_inverse_error:.2g} (1 if right)",
            f"effective sample size             {self.effective_sample_size:.0f} ({share:.0f} % of the denominator)",
            f"log loss of the sources           {self.log_loss:.3f} nats (chance 0.693)",
            f"calibration error                 {self.calibration_error:.3f}",
            "P(numerator)  predicted  observed  samples",
        ]
        lines += [
            f"{line.low:.1f} ... {line.high:.1f}   {line.predicted:9.3f} {line.observed:9.3f} {line.count:8}"
            for line in self.bins
        ]
        return "\n".join(lines)


def _mean_exp(values: np.ndarray) -> tuple[float, float]:
    """Mean of exp(values) and its standard error; infinite where float64 does not hold them."""
    with np.errstate(over="ignore", invalid="ignore"):
        exp = np.exp(values)
        return float(exp.mean()), float(exp.std(ddof=1) / len(exp) ** 0.5)


def _reliability(numerator: np.ndarray, denominator: np.ndarray, bins: int) -> list[Bin]:
    counts = [len(numerator), len(denominator)]
    is_numerator, weights = np.repeat([1.0, 0.0], counts), np.repeat(0.5 / np.array(counts), counts)
    predicted = expit(np.concatenate([numerator, denominator]))
    index = np.minimum((predicted * bins).astype(int), bins - 1)
    parts = (None, weights, weights * predicted, weights * is_numerator)
    rows = zip(*(np.bincount(index, part, bins).tolist() for part in parts), strict=True)
    return [
        Bin(k / bins, (k + 1) / bins, up / mass, hits / mass, count, mass)
        for k, (count, mass, up, hits) in enumerate(rows)
        if count
    ]
