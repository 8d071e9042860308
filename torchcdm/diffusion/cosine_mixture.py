"""A mixture of Gaussians for images: smooth and busy ones have variances of their own in the cosine basis.

Patches of photographs differ in contrast far more than any one Gaussian allows (Portilla et al. 2003). A handful of
components with one variance a cosine costs seconds to fit and next to nothing a pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor, nn

from torchcdm.diffusion.base import BaseDensity
from torchcdm.diffusion.gaussian import CosineRotation, GaussianMarginals
from torchcdm.diffusion.mixture import FIT_ROWS, VARIANCE_FLOOR, maximised
from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.errors import UserError

ITERATIONS = 50
"""Of expectation maximisation, at most: later ones move next to nothing."""


@final
class CosineMixture(BaseDensity):
    """Sum over k of w_k N(alpha_t mu_k, alpha_t² Sigma_k + sigma_t² I) at every level, Sigma_k diagonal in cosines.

    The ``weights`` w_k, (K,), are normalised here; ``common`` is the one Gaussian of all data, which sampling starts
    from at level T.
    """

    log_weights: Tensor

    def __init__(
        self, schedule: NoiseSchedule, weights: Tensor, parts: Sequence[GaussianMarginals], common: GaussianMarginals
    ) -> None:
        super().__init__(schedule)
        self.parts, self.common = nn.ModuleList(parts), common
        self.register_buffer("log_weights", (weights.double() / weights.double().sum()).log())

    @classmethod
    def blank(cls, schedule: NoiseSchedule, shape: Sequence[int], components: int) -> CosineMixture:
        """Standard normals, to load a saved state into."""
        parts = [GaussianMarginals.blank(schedule, shape, "cosine") for _ in range(components + 1)]
        return cls(schedule, torch.ones(components), parts[1:], parts[0])

    @classmethod
    def fit(
        cls, samples: Tensor, schedule: NoiseSchedule, components: int, floor: float = 0.0, shrinkage: float = 0.0
    ) -> CosineMixture:
        """By expectation maximisation; arguments as in :meth:`torchcdm.diffusion.mixture.MixtureMarginals.fit`."""
        weights, means, variances = fit_cosines(samples, components, floor)
        variances = torch.lerp(variances, variances.mean(1, keepdim=True), shrinkage)
        basis = CosineRotation(samples.shape[1:])
        parts = [
            GaussianMarginals.of_spread(schedule, basis.inverse(mean[None])[0], spread, floor, form="cosine")
            for mean, spread in zip(means, variances, strict=True)
        ]
        return cls(schedule, weights, parts, GaussianMarginals.fit(samples, schedule, floor, "cosine", shrinkage))

    @property
    def gaussian(self) -> GaussianMarginals:
        return self.common

    def log_prob_levels(self, x: Tensor) -> Tensor:
        return self._weighted(x).logsumexp(1)

    def eps(self, x_t: Tensor, t: Level) -> Tensor:
        return sum(share * part.eps(x_t, t) for share, part in zip(self._shares(x_t, t), self.parts, strict=True))

    def log_prob_change(self, x_t: Tensor, t: Tensor) -> Tensor:
        mean, energy = torch.zeros_like(x_t, dtype=torch.float64), torch.zeros(len(x_t)).to(x_t).double()
        for share, part in zip(self._shares(x_t.double(), t), self.parts, strict=True):
            eps = part.eps(x_t.double(), t)
            mean = mean + share * eps
            energy = energy + share.flatten() * (eps.square().flatten(1).sum(1) + part.noise_spread(t))
        return self.schedule.log_prob_change(x_t, t, mean, energy)

    def start(self, eps: Tensor) -> Tensor:
        return self.common.start(eps)

    def draw(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        chosen = torch.multinomial(self.log_weights.exp().cpu(), shape[0], True, generator=generator)
        noise, drawn = self._noise(shape, generator), []
        for k, part in enumerate(self.parts):
            drawn.append(part.sample(noise[chosen == k], 0))
        return torch.cat(drawn)[chosen.argsort(stable=True).argsort()]

    def _weighted(self, x: Tensor) -> Tensor:
        """log w_k + log density of each component, float64 (B, K, T+2)."""
        return torch.stack([part.log_prob_levels(x) for part in self.parts], 1) + self.log_weights[:, None]

    def _shares(self, x_t: Tensor, t: Level) -> Tensor:
        """p(k | x_t) for each component k, (K, B, 1, ...), which broadcasts to ``x_t``."""
        levels = torch.as_tensor(t, device=x_t.device).expand(len(x_t))
        shares = self._weighted(x_t)[torch.arange(len(x_t), device=x_t.device), :, levels].softmax(1)
        return shares.T.reshape(len(self.parts), -1, *[1] * (x_t.ndim - 1)).to(x_t.dtype)


def fit_cosines(samples: Tensor, components: int, floor: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Weights (K,), means and variances (K, d) in the cosine basis of images (N, *shape), by EM; float64.

    It starts from groups of equal size by contrast.

    Raises:
        UserError: Fewer images than components.
    """
    if components > len(samples):
        raise UserError(f"model.components is {components}, but there are {len(samples)} samples; use fewer")
    z = CosineRotation(samples.shape[1:])(samples[:: math.ceil(len(samples) / FIT_ROWS)].double().cpu()).numpy()
    floor = max(floor, VARIANCE_FLOOR)
    contrast = ((z - z.mean(0)) ** 2 / (z.var(0) + floor)).mean(1)
    groups = np.argsort(np.argsort(contrast)) * components // len(z)
    start = {
        "weights_init": np.bincount(groups) / len(z),
        "means_init": np.stack([z[groups == k].mean(0) for k in range(components)]),
        "precisions_init": np.stack([1 / (z[groups == k].var(0) + floor) for k in range(components)]),
    }
    fitted = maximised(z, components, covariance_type="diag", reg_covar=floor, max_iter=ITERATIONS, **start)
    return tuple(map(torch.from_numpy, (fitted.weights_, fitted.means_, fitted.covariances_)))
