"""What log ratios are worth: importance weights, and checks that need no known ratio."""

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
from annotated_types import Gt, Le
from scipy.optimize import minimize
from scipy.special import expit, logsumexp, softmax

from torchcdm.errors import UserError
from torchcdm.runtime.validation import Float, checked

Clip = Annotated[Float, Gt(0), Le(1)]  # a quantile of weights, such as 0.999, that larger ones are set to

SEPARATE = 0.1  # log loss, nats, below which the sources hardly overlap
FEWEST = 10  # effective samples below which a weighted mean is that of a few; half of them where there are few
WITHIN = 3.0  # deviations of the target up to which balanced weights see a column
PRIOR_ROWS = 30  # rows that the prior of balanced weights counts as


def effective_sample_size(weights: Any) -> float:
    """(sum w)² / sum w² of weights (N,): as many equal ones tell as much (Kish, 1965). UserError for negative ones."""
    w = as_floats(weights, "the weights")
    if (w < 0).any() or not w.any():
        raise UserError("the weights must not be negative and not all zero")
    w = w / w.max()
    return float(w.sum() ** 2 / np.square(w).sum())


def donsker_varadhan(log_ratio: np.ndarray, other: np.ndarray) -> float:
    """Lower bound on a KL divergence, nats, by log ratios at samples of the one (N,) and the other (M,)."""
    return float(log_ratio.mean() - logsumexp(other) + np.log(len(other)))


def log_loss(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """Nats of the classifier sigmoid(log ratio), both sources as frequent: log ratios at samples of each."""
    return 0.5 * float(np.logaddexp(0, -numerator).mean() + np.logaddexp(0, denominator).mean())


@checked
def importance_weights(log_ratio: np.ndarray, clip: Clip | None = None) -> np.ndarray:
    """exp(log ratio) over its mean: float64 (N,) with mean 1; ``clip`` as in the method. UserError if infinite."""
    log_ratio = as_floats(log_ratio, "the log ratios")
    limit = log_ratio.max() if clip is None else np.quantile(log_ratio, clip)
    weights = np.exp(np.minimum(log_ratio, limit) - limit)
    return weights / weights.mean()


def balanced(weights: np.ndarray, x: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Weights (N,) times exp(x a), mean 1, whose weighted means of ``x`` (N, d) are those of ``target`` (M, d).

    Entropy balancing (Hainmueller, 2012): of all weights with these means those nearest to the given ones. Columns end
    at ``WITHIN``, so that no row far out is tilted away, and the prior of ``a`` gives way where no weights have
    the means.
    """
    scale = target.std(axis=0)
    scale[scale == 0] = 1
    x, target = (np.clip((part - target.mean(axis=0)) / scale, -WITHIN, WITHIN) for part in (x, target))
    x = x - target.mean(axis=0)
    start = np.log(weights, out=np.full(len(weights), -np.inf), where=weights > 0)

    def loss(a: np.ndarray) -> tuple[float, np.ndarray]:
        tilted = start + x @ a
        return len(x) * logsumexp(tilted) + PRIOR_ROWS / 2 * a @ a, len(x) * softmax(tilted) @ x + PRIOR_ROWS * a

    tilt = minimize(loss, np.zeros(x.shape[1]), jac=True, method="L-BFGS-B").x  # images have many columns
    return softmax(start + x @ tilt) * len(x)


def as_floats(values: Any, name: str) -> np.ndarray:
    """Finite numbers as float64 (N,); UserError of none, of another shape and of other values."""
    values = np.asarray(values)
    if values.dtype.kind not in "buif" or values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise UserError(f"{name} must be finite numbers of shape (N,); got {values.dtype} of shape {values.shape}")
    return values.astype(np.float64)


def both_sides(numerator: Any, denominator: Any) -> tuple[np.ndarray, np.ndarray]:
    """Log ratios at samples of either source, at least two of each."""
    sides = as_floats(numerator, "the numerator's"), as_floats(denominator, "the denominator's")
    if min(map(len, sides)) < 2:
        raise UserError("at least two held-out samples of numerator and of denominator are needed")
    return sides


class Bin(NamedTuple):
    """One line of the reliability table: predicted and observed share of the numerator from ``low`` to ``high``, where
    both sources are as frequent; ``mass`` is the share of the ``count`` samples among all."""

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
        mean_ratio: Mean of p/q over the denominator; 1 for the true ratio, less where p has mass and q none; noisy.
        mean_ratio_error: Its standard error.
        mean_inverse: Mean of q/p over the numerator; 1 for the true ratio, less where q has mass and p none.
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
    def of(cls, numerator: np.ndarray, denominator: np.ndarray) -> "Calibration":
        """From log ratios at held-out samples of numerator (N,) and denominator (M,); UserError for fewer than two."""
        numerator, denominator = both_sides(numerator, denominator)
        table = _reliability(numerator, denominator)
        error = sum(line.mass * abs(line.predicted - line.observed) for line in table)
        size = effective_sample_size(importance_weights(denominator))
        means = (*_mean_exp(denominator), *_mean_exp(-numerator))
        return cls(*means, size, len(denominator), log_loss(numerator, denominator), float(error), tuple(table))

    def warnings(self) -> list[str]:
        """One line for each check that fails, with its name and what to do."""
        if self.log_loss < SEPARATE:
            return [
                f"overlap: log loss {self.log_loss:.2g} nats, the sources hardly overlap: the sign of a log ratio is "
                "to be believed, its size rests on the form of the fitted densities; add samples from in between"
            ]
        found = []
        ratio = ("mean_ratio", self.mean_ratio, self.mean_ratio_error, "p/q", "denominator", "numerator")
        inverse = ("mean_inverse", self.mean_inverse, self.mean_inverse_error, "q/p", "numerator", "denominator")
        for name, mean, error, of, over, other in (ratio, inverse):
            if not abs(mean - 1) <= max(3 * error, 0.2):
                what = f"the mean of {of} over the {over} is {mean:.2g} +- {error:.1g} instead of 1, large ratios are"
                why = f"too small, or the {other} has values that the {over} has not" if mean < 1 else "too large"
                found.append(f"{name}: {what} {why}; give more samples")
        if self.effective_sample_size < min(FEWEST, self.denominator / 2):
            what = f"{self.effective_sample_size:.0f} of {self.denominator} held-out samples carry the weights p/q"
            mend = "clip them (clip=0.99), or take a denominator nearer to the numerator"
            found.append(f"effective_sample_size: {what}: {mend}")
        return found

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
        for low, high, predicted, observed, count, _ in self.bins:
            lines.append(f"{low:.1f} ... {high:.1f}   {predicted:9.3f} {observed:9.3f} {count:8}")
        return "\n".join(lines)


def _mean_exp(values: np.ndarray) -> tuple[float, float]:
    """Mean of exp(values) and its standard error; infinite where float64 does not hold them."""
    with np.errstate(over="ignore", invalid="ignore"):
        exp = np.exp(values)
        return float(exp.mean()), float(exp.std(ddof=1) / len(exp) ** 0.5)


def _reliability(numerator: np.ndarray, denominator: np.ndarray, bins: int = 10) -> list[Bin]:
    counts = [len(numerator), len(denominator)]
    is_numerator, weights = np.repeat([1.0, 0.0], counts), np.repeat(0.5 / np.array(counts), counts)
    predicted = expit(np.concatenate([numerator, denominator]))
    index = np.minimum((predicted * bins).astype(int), bins - 1)
    parts = (None, weights, weights * predicted, weights * is_numerator)
    rows = zip(*(np.bincount(index, part, bins).tolist() for part in parts), strict=True)
    filled = [(k, *row) for k, row in enumerate(rows) if row[0]]
    return [Bin(k / bins, (k + 1) / bins, up / n, hits / n, count, n) for k, count, n, up, hits in filled]
