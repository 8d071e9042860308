"""What one density ratio tells of two data sets as a whole: divergences, mutual information, a two-sample test."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchcdm.apps.ratio.blending import blend
from torchcdm.apps.ratio.checks import both_sides, donsker_varadhan, effective_sample_size, importance_weights
from torchcdm.apps.ratio.dependence import STEPS, estimates
from torchcdm.data import DataOptions
from torchcdm.data.pairs import MIN_ROWS, read_side
from torchcdm.errors import UserError, nearest
from torchcdm.random import derive, permutation, stream
from torchcdm.runtime.processes import chosen_device
from torchcdm.runtime.validation import Count, Positive, Seed, checked, read_as
from torchcdm.units import TableEncoding
from torchcdm.units.lattice import spread

if TYPE_CHECKING:
    from pandas import DataFrame

    from torchcdm.apps.ratio.density_ratio import DensityRatio

KINDS = ("kl", "reverse_kl", "js", "chi2")

FEW = 30
"""Effective samples of the weights p/q below which a divergence is not to be trusted, ..."""

COVERED = 0.9
"""... and share of the numerator that must have a log ratio which the denominator reaches too."""

SHOWN = 10
"""Rows that a test names of either source."""


@dataclass(frozen=True)
class Estimate:
    """A divergence or a mutual information, nats (chi2: a pure number).

    Attributes:
        value: The estimate; ``float(estimate)`` is this.
        se: Standard error over the held-out samples. It does not know of errors in the ratio itself.
        bound: Donsker and Varadhan's value by the same ratio, of the KL divergences: a lower bound but for its noise,
            which is large above 5 nats. It differs from the value where the ratio is not normalised. None for others.
        effective_sample_size: Of the weights p/q on the denominator's held-out samples.
        coverage: Share of the numerator's samples whose log ratio is at most the largest of the denominator's: for the
            others the ratio rests on the form of the fit.
        notes: Why the value cannot be trusted; empty where it can.
    """

    value: float
    se: float
    bound: float | None
    effective_sample_size: float
    coverage: float
    notes: tuple[str, ...]

    def __float__(self) -> float:
        return self.value

    def text(self, name: str, unit: str = " nats") -> str:
        """Lines to read."""
        beside = "" if self.bound is None else f" (Donsker-Varadhan {self.bound:.4g})"
        return "\n".join([f"{name}: {self.value:.4g} +- {self.se:.2g}{unit}{beside}", *self.notes])


def divergence(kind: str, numerator: np.ndarray, denominator: np.ndarray) -> Estimate:
    """A divergence of p from q, by log ratios at samples that were not fitted.

    Args:
        kind: ``kl`` E_p log p/q, ``reverse_kl`` E_q log q/p, ``js`` that of Jensen and Shannon, ``chi2`` E_p p/q - 1.
        numerator: Log ratios at two or more samples of p, (N,).
        denominator: Log ratios at two or more samples of q, (M,).

    Raises:
        UserError: An unknown kind, or log ratios that are no finite numbers.
    """
    if kind not in KINDS:
        raise UserError(f"unknown divergence '{kind}'; {nearest(str(kind), KINDS)}")
    up, down = both_sides(numerator, denominator)
    bound = None
    with np.errstate(over="ignore", invalid="ignore"):
        if kind == "js":
            parts = [np.log(2) - np.logaddexp(0, -up), np.log(2) - np.logaddexp(0, down)]
            value = 0.5 * sum(part.mean() for part in parts)
            variance = 0.25 * sum(part.var(ddof=1) / len(part) for part in parts)
        else:
            terms = {"kl": up, "reverse_kl": -down, "chi2": np.exp(up) - 1}[kind]
            value, variance = terms.mean(), terms.var(ddof=1) / len(terms)
        if kind.endswith("kl"):
            bound = donsker_varadhan(up, down) if kind == "kl" else donsker_varadhan(-down, -up)
            apart = abs(value - bound) > max(3 * variance**0.5, 0.1 * abs(value))
    size = effective_sample_size(importance_weights(down))
    coverage = float((up <= down.max()).mean())
    notes = []
    if coverage < COVERED:
        what = "of the numerator's samples have larger ratios than any of the denominator's"
        mend = "their size rests on the form of the fit; give samples from in between"
        notes.append(f"coverage: {100 * (1 - coverage):.0f} % {what}: {mend}")
    if size < FEW:
        notes.append(f"effective_sample_size: {size:.0f} samples carry the weights p/q; give more of the denominator")
    if bound is not None and apart:
        notes.append(f"bound: the ratio is not normalised, Donsker and Varadhan's value is {bound:.3g} nats")
    if kind == "chi2" and variance**0.5 > 0.2 * abs(value):
        notes.append("chi2: a few samples carry the mean, which may be infinite; take js, which is bounded")
    return Estimate(float(value), float(variance**0.5), bound, size, coverage, tuple(notes))


@checked
def mutual_information(
    x: Any, y: Any, random_state: Seed = 0, steps: Count = STEPS, max_seconds: Positive | None = None,
    device: str | None = None,
) -> Estimate:  # fmt: skip
    """I(X; Y) = KL(p(x, y), p(x) p(y)) of paired rows, nats: the mean log ratio of pairs over strangers.

    Log ratios are the :func:`torchcdm.apps.ratio.blending.blend` of several estimates, see
    :mod:`torchcdm.apps.ratio.dependence`; each row has that of models which did not see it. Copies count once.

    Args:
        x: (N,) or (N, d): array, tensor, data frame, the path of a table or a SPEC; at least 20 rows.
        y: Of the same kinds, row by row.
        random_state: Seed of folds, strangers and training.
        steps: Most training steps of the networks.
        max_seconds: Training stops after so much time.
        device: ``cpu``, ``cuda``, ``cuda:1``; the CPU when None, as the networks are small.

    Raises:
        UserError: Tables of different length, images, a table whose columns are all constant, too few rows.

    Example:
        >>> information = mutual_information(x, y)
        >>> print(information.value, information.se, *information.notes)
    """
    until = math.inf if max_seconds is None else time.monotonic() + max_seconds
    sides = [read_side(part, name, DataOptions())[0] for part, name in ((x, "x"), (y, "y"))]
    rows = len(sides[0])
    if len(sides[1]) != rows:
        raise UserError(f"x has {rows} rows and y {len(sides[1])}; mutual information is of pairs, row by row")
    order, noise, codes = permutation(rows, random_state), stream(random_state, "dequantise"), []
    for side, name in zip(sides, ("x", "y"), strict=True):
        if isinstance(side, Tensor):
            raise UserError(f"{name}: holds images; mutual information takes rows of a table")
        table, _ = TableEncoding.fit(side, name)
        code = table.encode(side, name).x[order]
        codes.append(spread(code, torch.rand(code.shape, generator=noise, dtype=code.dtype), table.cells).numpy())
    # A copy in another fold would have been seen. Repeated values of few are spread, and no copies.
    kept = np.sort(np.unique(np.hstack(codes), axis=0, return_index=True)[1])
    if len(kept) < MIN_ROWS:
        raise UserError(f"x and y: too few samples without copies, {len(kept)}; at least {MIN_ROWS} are needed")
    found = estimates(*(code[kept] for code in codes), steps, random_state, until, chosen_device(device or "cpu"))
    weights = np.array(blend(*found))
    return divergence("kl", *(side @ weights[:-1] + weights[-1] for side in found))


class Differing(NamedTuple):
    """What differs most: a row with its log ratio, or a column and by how much the statistic falls without it."""

    name: str
    value: float


@dataclass(frozen=True)
class TwoSampleTest:
    """A permutation test of p = q.

    Attributes:
        p_value: Share of permutations whose statistic is at least as large, the data's own counted as one.
        statistic: Mean of tanh(log ratio / 2) over the numerator less that over the denominator, 0 ... 2.
        permuted: The statistic of each permutation of the sources, (permutations,).
        log_ratios: At the tested samples of the numerator and of the denominator, nats.
        numerator_rows: Those most unlike the denominator; their names are their places in the data.
        denominator_rows: Those most unlike the numerator.
        columns: How much the statistic falls without each column, the largest first; empty for images.
    """

    p_value: float
    statistic: float
    permuted: np.ndarray
    log_ratios: tuple[np.ndarray, np.ndarray]
    numerator_rows: tuple[Differing, ...]
    denominator_rows: tuple[Differing, ...]
    columns: tuple[Differing, ...]

    def text(self) -> str:
        """Lines to read."""
        counts = " and ".join(str(len(part)) for part in self.log_ratios)
        lines = [f"two-sample test on {counts} samples that were not fitted: p = {self.p_value:.4g}"]
        for what, rows in (("numerator", self.numerator_rows), ("denominator", self.denominator_rows)):
            shown = ", ".join(f"{name} ({value:+.2f})" for name, value in rows[:5])
            lines.append(f"{what}, rows that differ most: {shown}")
        if self.columns:
            shown = ", ".join(f"{name} ({value:.3f})" for name, value in self.columns[:5])
            lines.append(f"columns that differ most: {shown}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> Path:
        """Log ratios of both sources, and the columns that differ most, as a figure."""
        from torchcdm.apps.plots import two_samples

        return two_samples(self.log_ratios, self.columns, Path(path))


def two_sample_test(
    ratio: DensityRatio, numerator: Any, denominator: Any, fitted: bool, permutations: int, seed: int
) -> TwoSampleTest:
    """See :meth:`DensityRatio.two_sample_test`; ``fitted``: on fresh halves of data that the ratio was fitted to."""
    import pandas as pd

    if read_as(Count, permutations, "permutations") < 19:
        raise UserError(f"permutations is {permutations}; it must be at least 19, which tell p-values of 0.05")
    given = {"numerator": numerator, "denominator": denominator}
    values = [read_side(data, name, ratio._options)[0] for name, data in given.items()]
    places = [np.arange(len(part)) for part in values]
    if fitted:
        orders = [permutation(len(part), derive(seed, "halves", k)).numpy() for k, part in enumerate(values)]
        halves = [_rows(x, order[: len(x) // 2]) for x, order in zip(values, orders, strict=True)]
        ratio = ratio.__sklearn_clone__().fit(*halves)
        places = [np.sort(order[len(x) // 2 :]) for x, order in zip(values, orders, strict=True)]
    tested = [_rows(x, place) for x, place in zip(values, places, strict=True)]
    up, down = (ratio.log_ratio(x) for x in tested)
    source, draw = np.repeat([1.0, -1.0], [len(up), len(down)]), np.random.RandomState(seed % 2**32)
    weights = source / np.repeat([len(up), len(down)], [len(up), len(down)])

    def statistic(log_ratios: np.ndarray) -> float:
        return float(weights @ np.tanh(log_ratios / 2))

    together = np.concatenate([up, down])
    own, witness = statistic(together), np.tanh(together / 2)
    permuted = np.array([draw.permutation(weights) @ witness for _ in range(permutations)])
    p_value = (1 + int((permuted >= own - 1e-12).sum())) / (1 + permutations)
    rows = []
    for place, r, sign in zip(places, (up, down), (-1, 1), strict=True):
        rows.append(tuple(Differing(str(place[i]), float(r[i])) for i in np.argsort(sign * r)[:SHOWN]))
    falls = []
    for name in () if isinstance(tested[1], Tensor) else tested[1].columns:
        # A column shuffled over both sources tells them apart no longer.
        frame = pd.concat([tested[0][tested[1].columns], tested[1]], ignore_index=True)
        frame[name] = frame[name].to_numpy()[draw.permutation(len(frame))]
        falls.append(Differing(name, own - statistic(ratio.log_ratio(frame))))
    found = sorted(falls, key=lambda column: -column.value)
    return TwoSampleTest(p_value, own, permuted, (up, down), *rows, tuple(found))


def _rows(data: DataFrame | Tensor, places: np.ndarray) -> Any:
    return data[places] if isinstance(data, Tensor) else data.iloc[places]
