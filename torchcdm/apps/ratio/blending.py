"""How far each estimate of a log ratio is followed: as far as held-out samples bear it out."""

import numpy as np
from scipy.optimize import minimize
from scipy.special import betaincinv, expit, logit

from torchcdm.apps.ratio.checks import SEPARATE, donsker_varadhan

# How far each weight, their sum, and an offset in nats are expected to lie from those of the first estimate alone.
WEIGHT, SUM, OFFSET = 0.5, 0.1, 0.05
# Chance of so many samples in a tail under which the log ratio is too large there, and above which it can stay.
UNLIKELY, EASILY = 0.01, 0.2


def blend(numerator: np.ndarray, denominator: np.ndarray, errors: float | None = None) -> list[float]:
    """Weights of C estimates of a log ratio and an offset in nats, C + 1 numbers, from held-out samples.

    The weights are those of a logistic regression of the source on the estimates (stacking, Wolpert 1992; of one
    estimate, Platt 1999), none negative and their sum at most 1: from few training samples a log ratio is too certain.
    A normal prior around the first estimate alone keeps few samples from deciding, most of all on their sum. Where the
    sources hardly overlap that estimate stays unless the bounds of Donsker and Varadhan on KL(p, q) and KL(q, p) rise
    as well: a classifier that tells the sources apart with certainty learns nothing from a log ratio of 5 or of 10.

    Of the estimates at samples of the numerator, (N, C), and of the denominator, (M, C). Given standard ``errors``,
    the blend has to gain so many on the first estimate, in the place of the prior.
    """
    count = numerator.shape[1]
    plain = np.eye(count + 1)[0]
    rows = np.pad(np.concatenate([numerator, denominator]), ((0, 0), (0, 1)), constant_values=1.0)
    if not np.isfinite(rows).all():
        return plain.tolist()
    sizes = [len(numerator), len(denominator)]
    sign, share = np.repeat([1.0, -1.0], sizes), np.repeat(0.5 / np.array(sizes), sizes)
    precision = np.diag([WEIGHT**-2] * count + [OFFSET**-2])
    precision[:count, :count] += SUM**-2
    # Over the effective number of samples, as losses are means.
    precision *= np.square(share).sum() if errors is None else 0.0

    def losses(weights: np.ndarray) -> np.ndarray:
        return np.logaddexp(0, -sign * (rows @ weights))

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        away = weights - plain
        pull = precision @ away
        slope = -(share * sign * expit(-sign * (rows @ weights))) @ rows
        return float(share @ losses(weights) + away @ pull / 2), slope + pull

    def divergence(weights: np.ndarray) -> float:
        up, down = np.split(rows @ weights, sizes[:1])
        return donsker_varadhan(up, down) + donsker_varadhan(-down, -up)

    bounds = [(0, 1)] * count + [(None, None)]
    at_most_one = {"type": "ineq", "fun": lambda weights: 1 - weights[:count].sum()}
    found = minimize(loss, plain, jac=True, method="SLSQP", bounds=bounds, constraints=at_most_one).x.round(3)
    gains = losses(plain) - losses(found)
    gain = float(share @ gains)
    better = gain > (errors or 0.0) * float(np.sqrt(np.square(share) @ np.square(gains - gain)))
    if better and (loss(plain)[0] > SEPARATE or divergence(found) >= divergence(plain)):
        return found.tolist()
    return plain.tolist()


def most(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """The largest log ratio that its values at samples of both sides, (N,) and (M,), bear out; inf where all are.

    Above c there are at least e^c samples of the numerator for one of the denominator, were they as many: a binomial
    test. Where any c fails, log ratios end at the largest that passes easily. Those of two Gaussians go on rising in a
    column with a long tail, until a single sample has all the weight.
    """
    tails, places = np.sort(denominator)[::-1], np.arange(1, len(denominator) + 1)
    above = len(numerator) - np.searchsorted(np.sort(numerator), tails)
    size = np.log(len(denominator) / len(numerator))
    largest, ends = (size - logit(betaincinv(places, above + 1, chance)) for chance in (UNLIKELY, EASILY))
    if (tails <= largest).all():
        return np.inf
    return float(np.minimum(tails, ends)[ends > np.append(tails[1:], -np.inf)].max(initial=0.0))
