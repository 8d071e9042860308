"""A fitted mixture of Gaussians as the base density: what is left for the network is what no mixture holds."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.gaussian import BaseDensity, GaussianMarginals
from torchcdm.schedules import Level, NoiseSchedule
from torchcdm.toy import GaussianMixture

FIT_ROWS = 10_000
"""A mixture is fitted to at most so many samples."""

VARIANCE_FLOOR = 1e-5
"""Least variance of a component along any direction, model units: no component shrinks onto one sample."""


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
        cls, samples: Tensor, schedule: NoiseSchedule, components: int, floor: float = 0.0
    ) -> MixtureMarginals:
        """By expectation maximisation.

        Args:
            samples: Training data (N, d), model units, dequantised.
            schedule: The noise schedule.
            components: Number of Gaussians.
            floor: Least variance, model units squared; :data:`VARIANCE_FLOOR` where that is more.

        Raises:
            UserError: Images, or fewer samples than components.
        """
        if samples.ndim != 2:
            raise UserError(f"model.components is {components}; mixtures are for vectors, leave it at 1 for images")
        fitted = _fit(samples, components, floor)
        parameters = (fitted.weights_, fitted.means_, fitted.covariances_)
        mixture = GaussianMixture(*(torch.from_numpy(values) for values in parameters))
        return cls(schedule, mixture, GaussianMarginals.fit(samples, schedule, floor))

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


def best_component_count(train: Tensor, validation: Tensor, counts: Iterable[int]) -> int:
    """The number of components under which validation data are most probable; stops after two that are worse.

    Args:
        train: (N, d), model units.
        validation: Likewise.
        counts: Increasing.
    """
    best, best_value, worse = 1, -math.inf, 0
    for count in counts:
        if 2 * count > len(train) or worse == 2:
            break
        value = float(_fit(train, count).score(validation[:FIT_ROWS].double().numpy()))
        worse = 0 if value > best_value else worse + 1
        if value > best_value:
            best, best_value = count, value
    return best


def _fit(samples: Tensor, components: int, floor: float = 0.0) -> Any:
    """scikit-learn's mixture of full covariances on evenly spaced samples, the same for the same samples."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture as Fitter

    if components > len(samples):
        raise UserError(f"model.components is {components}, but there are {len(samples)} samples; use fewer")
    rows = samples[:: math.ceil(len(samples) / FIT_ROWS)].double().cpu().numpy()
    fitter = Fitter(components, reg_covar=max(floor, VARIANCE_FLOOR), random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return fitter.fit(rows)
