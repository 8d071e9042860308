"""What log ratios tell of two data sets as a whole: divergences, mutual information, whether these differ."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from scipy.spatial.distance import pdist
from scipy.special import ndtri
from scipy.stats import rankdata
from torch import Tensor

from torchcdm.apps.plots import panels
from torchcdm.apps.ratio.blending import blend
from torchcdm.apps.ratio.checks import both_sides, donsker_varadhan, effective_sample_size, importance_weights
from torchcdm.apps.ratio.dependence import STEPS, estimates
from torchcdm.data import DataOptions
from torchcdm.data.pairs import MIN_ROWS, read_pair, read_side
from torchcdm.errors import UserError, nearest
from torchcdm.random import permutation, stream
from torchcdm.runtime.processes import chosen_device
from torchcdm.runtime.validation import Count, Positive, Seed, checked
from torchcdm.units import TableEncoding
from torchcdm.units.lattice import spread

KINDS = ("kl", "reverse_kl", "js", "chi2")

# Below these a divergence is not to be trusted.
FEW = 30  # effective samples of the weights p/q
ERRORS = 2.0  # standard errors by which mutual information has to be told from its first estimate, and from none
ROWS_EACH = 10  # rows for each column, or kind, of mutual information
MOST_KINDS = 30  # that have a Gaussian each
COVERED = 0.9  # share of the numerator with a log ratio that the denominator reaches too

# Of the two-sample test.
ROWS, NUMBERS = 10_000, 5_000_000  # samples of a source that it looks at, and numbers in them, at most
LANDMARKS = 300  # samples that its features compare with
RIDGE = 0.1  # added to the variances of these features, over the largest
WAVES = (1, 2, 3, 4)  # cosines of a column's ranks
SHOWN = 10  # rows and columns that are named


@dataclass(frozen=True)
class Estimate:
    """A divergence or a mutual information, nats (chi2: a pure number).

    Attributes:
        value: The estimate; ``float(estimate)`` is this.
        se: Standard error over the held-out samples. It does not know of errors in the ratio itself. That of mutual
            information is at least 4 over the number of rows.
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
    """A divergence of p from q, of a kind of :meth:`torchcdm.DensityRatio.divergence`, by finite log ratios at two or
    more samples of p, (N,), and of q, (M,), that were not fitted; UserError for others."""
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
    size = effective_sample_size(importance_weights(down))
    coverage = float((up <= down.max()).mean())
    notes = []
    if coverage < COVERED:
        what = "of the numerator's samples have larger ratios than any of the denominator's"
        mend = "their size rests on the form of the fit; give samples from in between"
        notes.append(f"coverage: {100 * (1 - coverage):.0f} % {what}: {mend}")
    if size < FEW:
        notes.append(f"effective_sample_size: {size:.0f} samples carry the weights p/q; give more of the denominator")
    if bound is not None and abs(value - bound) > max(3 * variance**0.5, 0.1 * abs(value)):
        notes.append(f"bound: the ratio is not normalised, Donsker and Varadhan's value is {bound:.3g} nats")
    if kind == "chi2" and not variance**0.5 <= 0.2 * abs(value):
        notes.append("chi2: a few samples carry the mean, which may be infinite; take js, which is bounded")
    return Estimate(float(value), float(variance**0.5), bound, size, coverage, tuple(notes))


@checked
def mutual_information(
    x: Any, y: Any, random_state: Seed = 0, steps: Count = STEPS, max_seconds: Positive | None = None,
    device: str | None = None, progress: bool = False,
) -> Estimate:  # fmt: skip
    """I(X; Y) = KL(p(x, y), p(x) p(y)) of paired rows, nats: the mean log ratio of pairs over strangers.

    Log ratios are the :func:`torchcdm.apps.ratio.blending.blend` of several estimates, see
    :mod:`torchcdm.apps.ratio.dependence`; each row has that of models which did not see it. Copies count once.
    UserError for tables of different length, images, a table whose columns are all constant, too few rows.

    Args:
        x: (N,) or (N, d): array, tensor, data frame, the path of a table or a SPEC; at least 20 rows.
        y: Of the same kinds, row by row.
        random_state: Seed of folds, strangers and training.
        steps: Most training steps of the networks.
        max_seconds: Training stops after so much time.
        device: ``cpu``, ``cuda``, ``cuda:1``; the CPU when None, as the networks are small.
        progress: Shows a progress bar.

    Example:
        >>> information = mutual_information(x, y)
        >>> print(information.value, information.se, *information.notes)
    """
    until = np.inf if max_seconds is None else time.monotonic() + max_seconds
    sides = [read_side(part, name, DataOptions())[0] for part, name in ((x, "x"), (y, "y"))]
    rows = len(sides[0])
    if len(sides[1]) != rows:
        raise UserError(f"x has {rows} rows and y {len(sides[1])}; mutual information is of pairs, row by row")
    order, noise, codes, kinds = permutation(rows, random_state), stream(random_state, "dequantise"), [], {}
    for side, name in zip(sides, ("x", "y"), strict=True):
        if isinstance(side, Tensor):
            raise UserError(f"{name}: holds images; mutual information takes rows of a table")
        table, _ = TableEncoding.fit(side, name)
        code = table.encode(side, name).x[order]
        values = spread(code, torch.rand(code.shape, generator=noise, dtype=code.dtype), table.cells).numpy()
        # Below the least number missing cells bend the ranks. At the median they do not; a column tells of them.
        for k, column in enumerate(table.kept):
            if column.missing and (empty := code[:, k].numpy() == column.codes[0]).any():
                values[empty, k] = np.median(values[~empty, k])
                values = np.column_stack([values, empty])
        codes.append(values)
        if len(table.cells) == len(code[0]) and not any(cells.mixed for cells in table.cells.values()):
            kinds[name] = np.unique(code.numpy(), axis=0, return_inverse=True)[1].reshape(-1)
    # A copy in another fold would have been seen. Repeated values of few are spread, and no copies.
    kept = np.sort(np.unique(np.hstack(codes), axis=0, return_index=True)[1])
    if len(kept) < MIN_ROWS:
        raise UserError(f"x and y: too few samples without copies, {len(kept)}; at least {MIN_ROWS} are needed")
    left = [code[kept] for code in codes]
    # Frequencies tell more of categories than their order does, where each pair of kinds is met; so do Gaussians of
    # the numbers of the other side, one for each of a few kinds.
    counts, most = [kind.max() + 1.0 for kind in kinds.values()], min(MOST_KINDS, len(kept) / ROWS_EACH)
    few = np.prod(counts) <= (len(kept) if len(counts) == 2 else most)
    device = chosen_device(device or "cpu")
    left = left[::-1] if list(kinds) == ["y"] else left  # those of a side alone are of the first
    kinds = [kind[kept] for kind in kinds.values()] if few else ()
    found = estimates(*left, steps, random_state, until, device, progress, kinds)

    def blended(errors: float) -> Estimate:
        weights = np.array(blend(*found, errors))
        return divergence("kl", *(side @ weights[:-1] + weights[-1] for side in found))

    # The first estimate of independent sides is 0, a sum of several hardly ever.
    result, columns = blended(ERRORS), sum(side.shape[1] for side in left)
    # Which has no error: that of the sum tells what it could not prove. And a log ratio of a mean of I nats has a
    # variance of 2 I, if it is small: up to 2 ERRORS² / rows it is not told from none.
    se, notes = max(result.se or blended(0.0).se, ERRORS**2 / len(kept)), list(result.notes)
    if result.value <= ERRORS * se:
        notes.append(f"unproven: no dependence shows; {len(kept)} rows of {columns} columns cannot show a small one")
    if columns > len(kept) / ROWS_EACH:
        mend = "a part of the dependence does not show; give more rows, or fewer columns"
        notes.append(f"rows: {len(kept)} are few for {columns} columns: {mend}")
    return replace(result, se=se, notes=tuple(notes))


@dataclass(frozen=True)
class TwoSampleTest:
    """A permutation test of p = q.

    Attributes:
        p_value: Share of permutations whose statistic is at least as large, the data's own counted as one.
        statistic: The largest of several, in standard deviations above its mean over permutations.
        seen_in: What sees most: ``columns`` one by one, ``pairs``, ``regions`` of similar samples, ``small regions``.
        log_ratios: By that, at the tested samples of numerator and denominator, nats; to first order, fitted to them.
        numerator_rows: Those most unlike the denominator: their places in the data and log ratios.
        denominator_rows: Those most unlike the numerator.
        columns: Each, and how much less tanh(log ratio / 2) differs between the sources where it is shuffled, the
            largest first; empty for images.
    """

    p_value: float
    statistic: float
    seen_in: str
    log_ratios: tuple[np.ndarray, np.ndarray]
    numerator_rows: tuple[tuple[str, float], ...]
    denominator_rows: tuple[tuple[str, float], ...]
    columns: tuple[tuple[str, float], ...]

    def text(self) -> str:
        """Lines to read."""
        counts = " and ".join(str(len(part)) for part in self.log_ratios)
        lines = [f"two-sample test on {counts} samples: p = {self.p_value:.4g}, seen most in: {self.seen_in}"]
        for what in ("numerator_rows", "denominator_rows", "columns"):
            if found := ", ".join(f"{name} ({value:+.3g})" for name, value in getattr(self, what)[:5]):
                lines.append(f"{what.replace('_', ', ')} that differ most: {found}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> Path:
        """Log ratios of both sources, and the columns that differ most, as a figure."""
        with panels(Path(path), 2 if self.columns else 1) as axes:
            for values, label in zip(self.log_ratios, ("numerator", "denominator"), strict=True):
                axes[0].hist(values, 50, alpha=0.6, density=True, label=label)
            axes[0].set(xlabel="log p/q, nats", ylabel="density")
            axes[0].legend()
            if self.columns:
                names, falls = zip(*self.columns[:SHOWN], strict=True)
                axes[1].barh(names, falls)
                axes[1].invert_yaxis()
                axes[1].set(xlabel="smaller difference without the column")
        return Path(path)


@checked
def two_sample_test(
    numerator: Any, denominator: Any, permutations: Annotated[Count, Ge(19)] = 999, random_state: Seed = 0,
    options: DataOptions | None = None,
) -> TwoSampleTest:  # fmt: skip
    """Whether two data sets come from one distribution, by permutations of their sources; seconds, without training.

    Of nearby p and q the log ratio is linear in features of a sample. Ridge regression of the source gives it at once,
    so that each permutation has a fit of its own and all samples fit and test: maximum mean discrepancy by a
    spectrally regularised kernel (Hagrass, Sriperumbudur and Li, 2024), by that kernel of several which tells most.
    UserError for data that do not go together, cells that cannot be read, too few samples or permutations.

    Args:
        numerator: At least 20 samples of p, as :meth:`torchcdm.DensityRatio.fit` takes them.
        denominator: At least 20 samples of q. Of more than 10 000 a random part is tested.
        permutations: Random permutations, at least 19, which tell p-values of 0.05.
        random_state: Seed of permutations and features.
        options: ``size`` and ``channels`` of files of images, and ``skip_bad``.
    """
    values, table, _, _, rows = read_pair(numerator, denominator, options or DataOptions())
    most = max(LANDMARKS, min(ROWS, NUMBERS // values[0][0].numel()))
    draw = np.random.RandomState(random_state % 2**32)
    places = [np.sort(draw.permutation(len(side))[:most]) for side in values[::-1]]
    x = torch.cat([side[place] for side, place in zip(values[::-1], places, strict=True)])
    places = [side[place].tolist() for side, place in zip(rows[::-1], places, strict=True)]
    ranks = (rankdata(x.flatten(1).numpy(), axis=0) - 0.5) / len(x)
    order, counts = draw.permutation(len(x)), [len(place) for place in places]
    own = np.repeat([1 / counts[0], -1 / counts[1]], counts)
    sources = np.stack([own, *(draw.permutation(own) for _ in range(permutations))])
    statistics, log_ratios = {}, {}
    for name, features in _features(ranks, ranks[order[:LANDMARKS]]).items():
        differences = sources @ features(ranks)
        statistics[name] = np.sqrt(np.square(differences).sum(1))
        log_ratios[name] = lambda ranks, of=features, weights=differences[0]: of(ranks) @ weights
    # All permutations alike, the data's own among them: so the p-value is exact.
    deviations = {name: (one - one.mean()) / max(one.std(), 1e-300) for name, one in statistics.items()}
    seen_in = max(deviations, key=lambda name: deviations[name][0])
    statistic = np.max(list(deviations.values()), axis=0)
    found, part, falls = log_ratios[seen_in](ranks), order[:1000], []
    for k, name in enumerate(table.names if table else ()):
        # A column shuffled over both sources tells them apart no longer.
        shuffled = ranks[part]
        shuffled[:, k] = shuffled[draw.permutation(len(part)), k]
        fall = np.tanh(found[part] / 2) - np.tanh(log_ratios[seen_in](shuffled) / 2)
        falls.append((name, float(fall[own[part] > 0].mean() - fall[own[part] < 0].mean())))
    sides = found[: counts[0]], found[counts[0] :]
    rows = [tuple((str(place[i]), float(side[i])) for i in np.argsort(sign * side)[:SHOWN])
            for place, side, sign in zip(places, sides, (-1, 1), strict=True)]  # fmt: skip
    p_value, columns = float((statistic >= statistic[0] - 1e-9).mean()), sorted(falls, key=lambda fall: -fall[1])
    return TwoSampleTest(p_value, float(statistic[0]), seen_in, sides, *rows, tuple(columns))


def _features(ranks: np.ndarray, landmarks: np.ndarray) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """From ranks, 0 to 1, (N, d) to features (N, m) of kernels, of about unit variance, uncorrelated; by name."""
    from sklearn.kernel_approximation import Nystroem

    distances = pdist(ndtri(landmarks), "sqeuclidean")
    near = 1 / np.median(distances[distances > 0]) if distances.any() else 1.0
    kinds = {
        # Neyman's smooth test of each column (1937).
        "columns": (lambda ranks: np.hstack([np.cos(k * np.pi * ranks) for k in WAVES]), {"kernel": "linear"}),
        "pairs": (ndtri, {"kernel": "polynomial", "degree": 2, "gamma": 1, "coef0": 0}),
        "regions": (ndtri, {"kernel": "rbf", "gamma": near}),
        "small regions": (ndtri, {"kernel": "rbf", "gamma": 4 * near}),
    }
    found = {}
    for name, (of, kernel) in kinds.items():
        plain = Nystroem(**kernel, n_components=len(landmarks), random_state=0).fit(of(landmarks))
        values = plain.transform(of(ranks))
        variances, directions = np.linalg.eigh(np.cov(values.T, bias=True))
        varies = variances[-1] > 1e-12 * np.square(values).mean()  # else by rounding, which follows the rows' order
        # Small variances count less: they are noise sooner than signal.
        scaled = varies * directions / np.sqrt(variances.clip(0) + RIDGE * max(variances[-1], 1e-100))
        found[name] = lambda ranks, of=of, plain=plain, scaled=scaled: plain.transform(of(ranks)) @ scaled
    return found
