"""Ratios of normalisers from works (BAR) and from densities of every level (MBAR), and errors that know of time."""

import math
from typing import NamedTuple

import torch
from scipy.special import stdtrit
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

BISECTIONS, NEWTON_STEPS = 60, 30  # steps of the two solvers
CONVERGED = 1e-9  # nats: Newton's method ends where a step gains less


class Ratios(NamedTuple):
    """``log_ratio`` is log Z of a rung less that of the next one above, (pairs,), and ``without`` what leaving out one
    column changes in it, (columns, pairs): the jackknife."""

    log_ratio: Tensor
    without: Tensor

    @property
    def total(self) -> float:
        """log Z of the lowest rung less that of the highest."""
        return float(self.log_ratio.sum())

    def errors(self) -> Tensor:
        """What the columns contribute to the total, (columns,): squares sum to its variance.

        Columns are independent of each other, whatever the autocorrelation within them.
        """
        count, shifts = len(self.without), self.without.sum(1)
        return math.sqrt((count - 1) / count) * (shifts - shifts.mean())

    @property
    def se(self) -> float:
        """Standard error of the total."""
        return float(self.errors().square().sum().sqrt())


def half_width(errors: Tensor) -> float:
    """Half of a 95 % interval, in standard errors: 1.96 of many columns, more of few, by Student's t.

    Groups of columns have variances of their own and the ``errors`` of :meth:`Ratios.errors`, (groups, columns): with
    degrees of freedom by Satterthwaite (1946), without their bias for few columns.
    """
    variances, most = errors.square().sum(1), errors.shape[1] + 1
    freedom = most * variances.sum() ** 2 / variances.square().sum() - 2
    return float(stdtrit(float(freedom), 0.975)) if freedom > 0 else 1.96


def bar(down: Tensor, up: Tensor) -> Ratios:
    """Bennett's acceptance ratio (Bennett 1976) for equally many works of both directions.

    They are (sweeps, pairs, columns), nats: ``down`` of x_t from the upper rung's density and x_s from r, ``up`` of
    x_s from the lower rung's density and x_t from q; infinite where x_t has no density.
    """
    reach = math.log(down[:, 0].numel()) + 10
    works = torch.cat([down, up]).movedim(1, 0).flatten(1)
    finite = works.isfinite()
    low = works.where(finite, math.inf).amin(1)[:, None] - reach
    high = works.where(finite, -math.inf).amax(1)[:, None] + reach

    def parts(delta: Tensor) -> tuple[Tensor, Tensor]:
        return (down - delta).sigmoid(), (delta - up).sigmoid()

    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        forth, back = parts(middle)
        rising = (forth.sum((0, 2)) > back.sum((0, 2)))[:, None]
        low, high = torch.where(rising, middle, low), torch.where(rising, high, middle)
    delta = (low + high) / 2
    forth, back = parts(delta)
    balance = (forth - back).sum(0).T
    slope = (forth * (1 - forth) + back * (1 - back)).sum(0).T
    return Ratios(delta[:, 0], -balance / (slope.sum(0) - slope))


def mbar(log_gamma: Tensor, rung: Tensor, column: Tensor) -> Ratios:
    """The multistate acceptance ratio (Shirts and Chodera 2008), from points of every rung.

    The constants that make the rung of a point most probable given the point: a logistic regression. Of each point
    ``log_gamma`` has the log density of every rung, nats, (n, rungs), ``rung`` and ``column`` where it is from, long
    (n,). Each column has the same share of its points in every rung.
    """
    counts = torch.bincount(rung, minlength=log_gamma.shape[1]).to(log_gamma)
    constants, columns = best_constants(log_gamma, rung), int(column.max()) + 1
    p = (log_gamma + constants).softmax(1)
    surplus = p.new_zeros(columns, len(counts)).index_add(0, column, p - one_hot(rung, len(counts)))
    # One step of Newton's method on what the other columns say; singular along the constant vector.
    hessian = (p.sum(0).diag() - p.T @ p) * (1 - 1 / columns)
    without = surplus @ torch.linalg.pinv(hessian, hermitian=True)
    return Ratios((constants - counts.log()).diff(), without.diff(dim=1))


def best_constants(log_p: Tensor, t: Tensor) -> Tensor:
    """Constants that minimise the cross-entropy of ``log_p`` plus them, by Newton's method, as it is convex in them.

    ``log_p`` are log probabilities of levels up to constants, (N, levels), finite at the true level; true levels ``t``
    are long (N,). A level that is nowhere in ``t`` counts as if half a sample of it had come with all probability on
    that level. The constants are (levels,), the last of them 0.
    """
    count = log_p.shape[1]
    share = torch.bincount(t, minlength=count).to(log_p).clamp_min(0.5) / len(t)
    constants = torch.zeros(count, dtype=log_p.dtype)
    value = cross_entropy(log_p, t)
    for _ in range(NEWTON_STEPS):
        p = (log_p + constants).softmax(1)
        gradient = p.mean(0) - share
        hessian = p.mean(0).diag() - p.T @ p / len(p)
        # Singular along the constant vector, and nearly so where levels cannot be told apart.
        step = torch.linalg.solve(hessian + 1e-9 * torch.eye(count, dtype=p.dtype), -gradient)
        step = step - step[-1]
        found = cross_entropy(log_p + constants + step, t)
        while found > value and step.abs().max() >= CONVERGED:
            step = step / 2
            found = cross_entropy(log_p + constants + step, t)
        constants, gained, value = constants + step, value - found, found
        if gained < CONVERGED:
            break
    return constants


def autocorrelation_time(values: Tensor) -> float:
    """Sweeps that make one independent draw of ``values`` (sweeps, columns): 1 + 2 times the sum of autocorrelations.

    At least 1. The sum ends where it is a fifth of the lags that it covers (Sokal 1997).
    """
    centred = values.double() - values.double().mean()
    spectrum = torch.fft.rfft(centred, 2 * len(centred), dim=0).abs().square()
    covariance = torch.fft.irfft(spectrum, dim=0)[: len(centred)].mean(1)
    if not covariance[0] > 0:
        return 1.0
    times = 2 * (covariance / covariance[0]).cumsum(0) - 1
    enough = torch.arange(len(times)) >= 5 * times
    return max(1.0, float(times[int(enough.int().argmax()) if enough.any() else -1]))
