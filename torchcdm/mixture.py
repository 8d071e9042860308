"""A fitted mixture of Gaussians as the base density: what is left for the network is what no mixture holds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import final

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from torchcdm.errors import UserError
from torchcdm.gaussian import BaseDensity, GaussianMarginals, shrunk
from torchcdm.schedules import Level, NoiseSchedule
from torchcdm.toy import GaussianMixture

FIT_ROWS = 10_000
"""A mixture is fitted to at most so many samples."""

VARIANCE_FLOOR = 1e-5
"""Least variance of a component along any direction, model units: no component shrinks onto one sample."""

SHRINKAGES = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.4, 0.7)
"""Shares that are tried of moving covariances towards a round one."""


@final
class MixtureMarginals(BaseDensity):
    """A mixture of Gaussians at every level; vectors.

    Args:
        schedule: The noise schedule.
        mixture: The mixture at level 0, in model units.
        common: The one Gaussian of all data: what sampling starts from at level T, where the mixture is as good as it.
    """

    def __init__(self, schedule: NoiseSchedule, mixture: GaussianMixture, common: GaussianMarginals) -> None:
        super().__init__()
        self.schedule = schedule
        self.mixture, self.common = mixture, common

    @classmethod
    def blank(cls, schedule: NoiseSchedule, shape: Sequence[int], components: int) -> MixtureMarginals:
        """Standard normals, to load a saved state into."""
        means = torch.zeros(components, *shape, dtype=torch.float64)
        mixture = GaussianMixture(torch.ones(components), means, torch.ones(components, dtype=torch.float64))
        return cls(schedule, mixture, GaussianMarginals.blank(schedule, shape))

    @classmethod
    def fit(
        cls, samples: Tensor, schedule: NoiseSchedule, components: int, floor: float = 0.0, shrinkage: float = 0.0
    ) -> MixtureMarginals:
        """By expectation maximisation.

        Args:
            samples: Training data (N, d), model units, dequantised.
            schedule: The noise schedule.
            components: Number of Gaussians.
            floor: Least variance, model units squared; :data:`VARIANCE_FLOOR` where that is more.
            shrinkage: Share by which each covariance is moved towards a round one of the variance of all samples.

        Raises:
            UserError: Images, or fewer samples than components.
        """
        if samples.ndim != 2:
            raise UserError(f"model.components is {components}; mixtures are for vectors, leave it at 1 for images")
        weights, means, covariances = _fit(samples, components, floor)
        mixture = GaussianMixture(weights, means, shrunk(covariances, _variance(samples), shrinkage))
        return cls(schedule, mixture, GaussianMarginals.fit(samples, schedule, floor, shrinkage=shrinkage))

    def log_prob_levels(self, x: Tensor) -> Tensor:
        return self.mixture.log_prob_levels(x, self.schedule)

    def eps(self, x_t: Tensor, t: Level) -> Tensor:
        return self.mixture.eps(x_t, t, self.schedule)

    def log_prob_change(self, x_t: Tensor, t: Tensor) -> Tensor:
        mixture, schedule = self.mixture, self.schedule
        share = (mixture.component_log_prob(x_t, t, schedule) + mixture.log_weights).softmax(1)
        alpha, sigma = (values[t, None, None] for values in (schedule.alpha, schedule.sigma))
        eps = -sigma * mixture.component_scores(x_t, t, schedule)
        # Of each component as in GaussianMarginals: the covariance of eps beside its mean.
        spread = (1 - sigma**2 / (alpha**2 * mixture.variances + sigma**2)).sum(2)
        energy = (share * (eps.square().sum(2) + spread)).sum(1)
        return schedule.log_prob_change(x_t, t, (share[..., None] * eps).sum(1), energy)

    def sample(self, eps: Tensor, t: int) -> Tensor:
        return self.common.sample(eps, t)


def best_mixture(
    train: Tensor, validation: Tensor, counts: Iterable[int], shares: Iterable[float] = SHRINKAGES
) -> tuple[int, float]:
    """The number of components and the shrinkage, by the likelihood of validation data.

    More components need more shrinkage, so the two are chosen together. Fewer components win where they are within one
    standard error of the best: few validation samples would choose among many settings by luck. Stops after two
    numbers that are worse.

    Args:
        train: (N, d), model units.
        validation: Likewise, without copies of the same sample.
        counts: Increasing; the first is tried however few the samples.
        shares: Shrinkages.
    """
    variance, watched = _variance(train), validation[:FIT_ROWS].double()
    found: list[tuple[int, float, Tensor]] = []
    best, worse = -math.inf, 0
    for number, count in enumerate(counts):
        if (number and 2 * count > len(train)) or worse == 2:
            break
        weights, means, covariances = _fit(train, count)
        trials = []
        for share in shares:
            parts = MultivariateNormal(means, shrunk(covariances, variance, share)).log_prob(watched[:, None])
            trials.append((count, share, (parts + weights.log()).logsumexp(1)))
        found.append(max(trials, key=lambda trial: float(trial[2].mean())))
        value = float(found[-1][2].mean())
        best, worse = max(best, value), 0 if value > best else worse + 1
    highest = max(found, key=lambda trial: float(trial[2].mean()))[2]
    return next((count, share) for count, share, values in found if _within_error(highest - values))


def _within_error(deficit: Tensor) -> bool:
    """Whether the mean of paired differences is at most its standard error."""
    return float(deficit.mean()) <= float(deficit.std(correction=0)) / math.sqrt(len(deficit))


def _variance(samples: Tensor) -> float:
    """Mean over the numbers of their variance."""
    return float(samples.double().var(0, correction=0).mean())


def _fit(samples: Tensor, components: int, floor: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, means and full covariances by scikit-learn, of evenly spaced samples; float64."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture as Fitter

    if components > len(samples):
        raise UserError(f"model.components is {components}, but there are {len(samples)} samples; use fewer")
    rows = samples[:: math.ceil(len(samples) / FIT_ROWS)].double().cpu().numpy()
    fitter = Fitter(components, reg_covar=max(floor, VARIANCE_FLOOR), random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = fitter.fit(rows)
    weights, means, covariances = map(torch.from_numpy, (fitted.weights_, fitted.means_, fitted.covariances_))
    return weights, means, covariances
