"""A fitted mixture of Gaussians as the base density: what is left for the network is what no mixture holds.

Patches of photographs differ in contrast far more than any one Gaussian allows (Portilla et al. 2003). A handful of
components with one variance a cosine costs seconds to fit and next to nothing a pass.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from torchcdm.diffusion.base import BaseDensity
from torchcdm.diffusion.gaussian import DIAGONAL, SHRINKAGES, GaussianMarginals, MatrixRotation, shrunk, within_error
from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.errors import UserError
from torchcdm.random import evenly_spaced, normal

FIT_ROWS = 10_000  # samples that a mixture is fitted to, unless more are asked for
# Of a component along any direction, model units: none shrinks onto one sample. Less where data are thin everywhere,
# as columns are that nearly add up, or tight groups: a share of the variance in groups along its thinnest direction.
VARIANCE_FLOOR, THIN = 1e-5, 0.1
PIECES = 3  # EM starts from so many pieces for each component
PIECE_ROWS = 5  # rows that a piece needs; so many for each number for a covariance of its own
TOLERANCE, ROUGH = 1e-5, 1e-3  # nats a sample: EM ends where it gains less, of what is kept, and of what is tried
# Numbers (components times samples times levels) that are handled at once: in a CPU's cache, and half a gigabyte.
CPU_NUMBERS, GPU_NUMBERS = 2**20, 2**26


@final
class MixtureMarginals(BaseDensity):
    """Sum over k of w_k N(alpha_t mu_k, alpha_t² Sigma_k + sigma_t² I) at every level.

    Of the ``weights`` w_k, (K,), normalised here, the ``means`` mu_k, (K, d) in model units, and the ``spreads``
    Sigma_k, (K, d, d); of images in the cosine basis, where spreads are diagonals, (K, d). Sampling starts from the
    ``common`` Gaussian of all data at level T, where the mixture is as good as it.

    Each class may have weights of its own: no gradient and no smooth function sees those of modes far from each other.
    """

    class_log_weights: Tensor | None

    def __init__(
        self, schedule: NoiseSchedule, weights: Tensor, means: Tensor, spreads: Tensor, common: GaussianMarginals
    ) -> None:
        super().__init__(schedule)
        self.common = common
        shape, variances, basis = common.mean.shape, spreads.double(), DIAGONAL["diagonal"](means.shape[1:])
        if spreads.ndim == 3:
            variances, vectors = torch.linalg.eigh(variances)
            basis = MatrixRotation(basis.shape, vectors)
        variances = variances.clamp_min(1e-9 * variances.amax(1, keepdim=True))
        # Images are rotated once for all components.
        self.rotation = DIAGONAL["cosine" if len(shape) > 1 else "diagonal"](shape).to(means.device)
        self.parts = GaussianMarginals(schedule, means[:, None], variances[:, None], basis)
        self.log_weights = nn.Buffer((weights / weights.sum()).double().log())
        self.register_buffer("class_log_weights", None)

    @classmethod
    def blank(cls, schedule: NoiseSchedule, shape: Sequence[int], components: int, classes: int) -> MixtureMarginals:
        """Standard normals, to load a saved state into."""
        ones = torch.ones(components, math.prod(shape))
        common = GaussianMarginals.blank(schedule, shape, "cosine" if len(shape) > 1 else None)
        spreads = ones if len(shape) > 1 else torch.diag_embed(ones)
        found = cls(schedule, torch.ones(components), torch.zeros_like(ones), spreads, common)
        found.class_log_weights = torch.zeros(classes, components).double() if classes else None
        return found

    @classmethod
    def fit(
        cls, samples: Tensor, schedule: NoiseSchedule, components: int, floor: float = 0.0, shrinkage: float = 0.0
    ) -> MixtureMarginals:
        """Fitted to samples (N, *shape) in model units, dequantised, by :func:`fit_gaussians` or, for images,
        :func:`fit_cosines`; UserError for fewer samples than components."""
        if samples.ndim == 2:
            fitted, form = fit_gaussians(samples, components, floor, shrinkage), None
        else:
            weights, means, variances = fit_cosines(samples, components, floor)
            moved = torch.lerp(variances, variances.mean(1, keepdim=True), shrinkage).clamp_min(floor)
            fitted, form = (weights, means, moved), "cosine"
        return cls(schedule, *fitted, GaussianMarginals.fit(samples, schedule, floor, form, shrinkage))

    @property
    def gaussian(self) -> GaussianMarginals:
        return self.common

    def log_prob_levels(self, x: Tensor) -> Tensor:
        return self._of_parts(x, lambda parts: (parts + self.log_weights[:, None, None]).logsumexp(0))

    def eps(self, x_t: Tensor, t: Level) -> Tensor:
        z = self.rotation(x_t.double())
        eps = torch.einsum("bk,kbd->bd", self._shares(z, t), self.parts.eps(z, t))
        return self.rotation.inverse(eps).to(x_t.dtype)

    def log_prob_change(self, x_t: Tensor, t: Tensor) -> Tensor:
        z = self.rotation(x_t.double())
        shares, (eps, energy) = self._shares(z, t), self.parts.noise(z, t)
        eps = torch.einsum("bk,kbd->bd", shares, eps)
        return self.schedule.log_prob_change(z, t, eps, (shares * energy.T).sum(1))

    def left(self, x_t: Tensor, t: Level, eps: Tensor) -> Tensor:
        own = self._shares(self.rotation(x_t.double()), t).argmax(1)  # what components differ by is left out
        return self.rotation.inverse(self.parts.left(x_t, t, eps)[own, torch.arange(len(own))])

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        chosen = torch.multinomial(self.log_weights.cpu().exp(), shape[0], True, generator=generator)
        noise = normal(shape, generator, self.log_weights.device)
        rows = zip(noise.split(1000), chosen.split(1000), strict=True)
        return self.rotation.inverse(torch.cat([self.parts.sample(z, 0)[k, torch.arange(len(k))] for z, k in rows]))

    def with_classes(self, samples: Tensor, labels: Tensor, classes: int) -> MixtureMarginals:
        """The same, with weights for each class: the mean responsibilities of its samples.

        ``samples`` (N, d) are training data, model units, dequantised, of so many ``classes``, ``labels`` long (N,).
        """
        # Half a sample in all for each class, spread as the components are: no weight is 0.
        counts = 0.5 * self.log_weights.exp().repeat(classes, 1)
        for part in torch.arange(len(samples)).split(1000):
            counts.index_add_(0, labels[part], self._shares(self.rotation(samples[part].double()), 0))
        found = copy.deepcopy(self)
        found.class_log_weights = (counts / counts.sum(1, keepdim=True)).log()
        return found

    def class_effects(self, x: Tensor) -> Tensor | None:
        if self.class_log_weights is None:
            return None

        def effects(parts: Tensor) -> Tensor:
            weights = (*self.class_log_weights, self.log_weights)
            *by_class, common = [(parts + own[:, None, None]).logsumexp(0) for own in weights]
            return torch.stack([values - common for values in by_class], 1)

        return self._of_parts(x, effects)

    def _of_parts(self, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
        """``function`` of log p of the components at every level, (K, rows, T+2), of a few rows of ``x`` at a time."""
        z, numbers = self.rotation(x.double()), CPU_NUMBERS if x.device.type == "cpu" else GPU_NUMBERS
        rows = max(1, numbers // (len(self.log_weights) * (self.schedule.T + 2)))
        # Compiled and exported for any number of rows, which a loop over them would fix.
        some = [z] if torch.compiler.is_compiling() else z.split(rows)
        return torch.cat([function(self.parts.log_prob_levels(part)) for part in some])

    def _shares(self, z: Tensor, t: Level) -> Tensor:
        """p(k | x_t), (B, K), of ``z`` (B, d), x_t in the basis of the components."""
        return (self.parts.log_prob(z, t).T + self.log_weights).softmax(1)


def best_mixture(
    train: Tensor, validation: Tensor, counts: Iterable[int], shares: Iterable[float] = SHRINKAGES, **options: Any
) -> tuple[int, float, Tensor]:
    """The number of components and the shrinkage, by the likelihood of validation data, and log p of these (N,).

    The two are chosen together. Fewer components win where they are within one standard error of the best: few
    validation samples would choose among many settings by luck. Stops after two that are no better.

    Samples are (N, d) in model units, those of ``validation`` without copies. The ``counts`` rise, and the first is
    tried however few the samples. The ``options`` are of :func:`fit_gaussians`, whose tolerance is ``ROUGH``.
    """
    variance, worse = float(train.double().var(0, correction=0).mean()), 0
    found: list[tuple[int, float, Tensor]] = []
    for number, count in enumerate(counts):
        if (number and 2 * count > len(train)) or worse == 2:
            break
        weights, means, covariances = fit_gaussians(train, count, **{"tolerance": ROUGH} | options)
        trials = []
        for share in shares:
            moved = _shrunk(weights, covariances, variance, share)
            trials.append((count, share, mixture_log_prob(validation.double(), weights, means, moved)))
        found.append(max(trials, key=lambda trial: float(trial[2].mean())))
        worse = 0 if all(not within_error(found[-1][2] - trial[2]) for trial in found[:-1]) else worse + 1
    highest = max(found, key=lambda trial: float(trial[2].mean()))[2]
    return next(trial for trial in found if within_error(highest - trial[2]))


def fit_gaussians(
    samples: Tensor, components: int, floor: float = 0.0, shrinkage: float = 0.0, rows: int = FIT_ROWS,
    tolerance: float = TOLERANCE,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Weights (K,), means (K, d) and covariances (K, d, d) of samples (N, d) by expectation maximisation; float64.

    Of at most so many ``rows``, evenly spaced, until an iteration gains less than the ``tolerance``, nats a sample.
    No variance is below ``floor``, nor ``VARIANCE_FLOOR``, less where the data are thin. The share ``shrinkage`` moves
    each covariance towards their mean, and its square that one towards a round one of the variance of all samples, as
    it does one alone.
    """
    x = _some(samples, components, rows).numpy()
    groups = _groups(x, components)
    floor = max(floor, _least_variance(x, groups))
    options = {"reg_covar": floor, "random_state": 0, "tol": tolerance}
    trials = [maximised(x, components, **options, **start) for start in _starts(x, components, floor, groups)]
    fitted = max(trials, key=lambda trial: trial.lower_bound_)
    weights, means, covariances = map(torch.from_numpy, (fitted.weights_, fitted.means_, fitted.covariances_))
    variance = float(samples.double().var(0, correction=0).mean())
    return weights, means, _shrunk(weights, covariances, variance, shrinkage)


def mixture_log_prob(x: Tensor, weights: Tensor, means: Tensor, covariances: Tensor) -> Tensor:
    """log p of rows (N, d) under what :func:`fit_gaussians` gives, (N,), some at a time; nan if numbers overflow."""
    gaussians = MultivariateNormal(means, covariances, validate_args=False)
    parts = torch.cat([gaussians.log_prob(some[:, None]) for some in x.split(FIT_ROWS)])
    return (parts + weights.log()).logsumexp(1)


def _some(samples: Tensor, components: int, rows: int) -> Tensor:
    """At most so many rows to fit to, float64 on the CPU; UserError for fewer samples than components."""
    if components > len(samples):
        raise UserError(f"model.components is {components}, but there are {len(samples)} samples; use fewer")
    return samples[evenly_spaced(len(samples), rows)].double().cpu()


def _shrunk(weights: Tensor, covariances: Tensor, variance: float, share: float) -> Tensor:
    """Covariances (K, d, d) as :func:`fit_gaussians` shrinks them."""
    if len(weights) == 1:
        return shrunk(covariances, share, variance)
    mean = torch.einsum("k,kij->ij", weights, covariances)
    return torch.lerp(covariances, shrunk(mean, share**2, variance).expand_as(covariances), share)


def maximised(x: np.ndarray, components: int, **options: Any) -> Any:
    """scikit-learn's mixture of Gaussians by expectation maximisation on ``x`` (N, d), converged or not."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture as Fitter
    from threadpoolctl import threadpool_limits

    # Threads would wait for each other most of the time, as each product is small.
    with warnings.catch_warnings(), threadpool_limits(1, "blas"):
        warnings.simplefilter("ignore", ConvergenceWarning)
        return Fitter(components, **options).fit(x)


def _groups(x: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Which of so many groups each row (N, d) is in, and the middle of its piece: thrice as many pieces by k-means,
    grouped, as as many pieces as modes would leave out some. None where pieces would have few rows."""
    from sklearn.cluster import AgglomerativeClustering, KMeans

    pieces = PIECES * components
    if components == 1 or len(x) < PIECE_ROWS * pieces:
        return None
    found = KMeans(pieces, n_init=1, max_iter=30, random_state=0).fit(x)
    groups = AgglomerativeClustering(components, linkage="ward").fit_predict(found.cluster_centers_)[found.labels_]
    return (groups, found.cluster_centers_[found.labels_]) if len(np.unique(groups)) == components else None


def _least_variance(x: np.ndarray, groups: tuple[np.ndarray, np.ndarray] | None) -> float:
    """Within groups of rows (N, d), ``THIN`` of that along its thinnest direction; at most ``VARIANCE_FLOOR``."""
    labels = np.zeros(len(x), int) if groups is None else groups[0]
    apart = x - np.stack([x[labels == k].mean(0) for k in range(labels.max() + 1)])[labels]
    if len(x) < PIECE_ROWS * (x.shape[1] + labels.max()):
        return VARIANCE_FLOOR
    thinnest = np.linalg.eigvalsh(apart.T @ apart / len(x))[0]
    return float(np.clip(THIN * thinnest, 1e-8, VARIANCE_FLOOR))


def _starts(
    x: np.ndarray, components: int, floor: float, grouped: tuple[np.ndarray, np.ndarray] | None
) -> list[dict[str, Any]]:
    """Where EM starts: from the groups of :func:`_groups`; where their pieces have few rows scikit-learn's own start,
    the empty one, is tried too."""
    if grouped is None:
        return [{}]
    groups, middles = grouped
    few, identity = len(x) < PIECE_ROWS * PIECES * components * x.shape[1], np.eye(x.shape[1])
    if few:
        covariances = [((x - middles).var() + floor) * identity] * components
    else:
        covariances = [np.cov(x[groups == k].T, bias=True) + floor * identity for k in range(components)]
    start = _start(x, groups, np.linalg.pinv(np.stack(covariances), hermitian=True))
    return [{}, start] if few else [start]


def _start(x: np.ndarray, groups: np.ndarray, precisions: np.ndarray) -> dict[str, Any]:
    """Options of :func:`maximised` to begin with the groups 0, 1, ... of rows (N,), none empty."""
    means = np.stack([x[groups == k].mean(0) for k in range(len(precisions))])
    return {"weights_init": np.bincount(groups) / len(x), "means_init": means, "precisions_init": precisions}


def fit_cosines(samples: Tensor, components: int, floor: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (K,), means and variances (K, d) in the cosine basis of images (N, *shape), float64.

    By expectation maximisation from groups of equal size by contrast.
    """
    z = DIAGONAL["cosine"](samples.shape[1:])(_some(samples, components, FIT_ROWS)).numpy()
    floor = max(floor, VARIANCE_FLOOR)
    contrast = ((z - z.mean(0)) ** 2 / (z.var(0) + floor)).mean(1)
    groups = np.argsort(np.argsort(contrast)) * components // len(z)
    start = _start(z, groups, np.stack([1 / (z[groups == k].var(0) + floor) for k in range(components)]))
    # Later iterations move next to nothing.
    fitted = maximised(z, components, covariance_type="diag", reg_covar=floor, max_iter=50, **start)
    return tuple(map(torch.from_numpy, (fitted.weights_, fitted.means_, fitted.covariances_)))
