"""Truth that several tests share: every schedule, and distributions that are known at every level."""

from __future__ import annotations

import torch
from torch import Tensor, distributions, nn

from studies.exact import ExactMixture, GaussianMixture
from torchcdm.diffusion.base import BaseDensity, StandardNormal
from torchcdm.diffusion.schedules import (
    CosineSchedule,
    LinearSchedule,
    LogSNRSchedule,
    NoiseSchedule,
    OptimalTransportSchedule,
    UniformSigmaSchedule,
)

SCHEDULES: dict[str, type[NoiseSchedule]] = {
    "linear": LinearSchedule,
    "cosine": CosineSchedule,
    "uniform": UniformSigmaSchedule,
    "ot": OptimalTransportSchedule,
    "log-snr": LogSNRSchedule,
}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(seed), dtype=torch.float64)


def covariance(dim: int, seed: int = 0) -> Tensor:
    """A random positive definite matrix with eigenvalues around one."""
    root = normal(dim, dim, seed=seed) / dim**0.5
    return root @ root.T + 0.1 * torch.eye(dim, dtype=torch.float64)


def labelled_mixture() -> GaussianMixture:
    """Three components in the plane, unequal in weight and form; two of them are class 1."""
    means = torch.tensor([[-1.0, 0.5], [1.0, 1.0], [0.5, -1.5]], dtype=torch.float64)
    covariances = torch.stack([0.3 * covariance(2, seed) for seed in range(3)])
    weights = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    return GaussianMixture(weights, means, covariances, torch.tensor([0, 1, 1]))


def mixture_at_level(
    mixture: GaussianMixture, schedule: NoiseSchedule, t: int
) -> distributions.MixtureSameFamily:
    """The mixture's marginal at level ``t``, by PyTorch's own distributions."""
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    dense = mixture.vectors @ torch.diag_embed(mixture.variances) @ mixture.vectors.mT
    noise = sigma**2 * torch.eye(mixture.means.shape[1], dtype=torch.float64)
    return distributions.MixtureSameFamily(
        distributions.Categorical(logits=mixture.log_weights),
        distributions.MultivariateNormal(alpha * mixture.means, alpha**2 * dense + noise),
    )


class MixtureClassifier(nn.Module):
    """The Bayes classifier of noise levels of a mixture, in the form of a backbone: h_t = log p_t(x) - base_t(x).

    Args:
        mixture: The data.
        schedule: The noise schedule.
        base: The base density of the model that this is the backbone of; the standard normal when None.
        joint: Gives all classes in one pass, (B, classes, T+2), instead of those asked for.
    """

    def __init__(
        self,
        mixture: ExactMixture,
        schedule: NoiseSchedule,
        base: BaseDensity | None = None,
        joint: bool = False,
    ) -> None:
        super().__init__()
        self.mixture, self.schedule = mixture, schedule
        self.base = StandardNormal(schedule) if base is None else base
        self.joint = joint
        self.classes = mixture.classes

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """h, float64 (B, T+2) or (B, classes, T+2); label ``classes`` is the null label."""
        base = self.base.log_prob_levels(x)
        if self.joint:
            return self.mixture.class_log_prob_levels(x, self.schedule) - base[:, None]
        log_p = self.mixture.log_prob_levels(x, self.schedule)
        if y is not None:
            by_class = self.mixture.class_log_prob_levels(x, self.schedule)
            log_p = torch.cat([by_class, log_p[:, None]], 1)[torch.arange(len(x), device=x.device), y]
        return log_p - base


class ZeroBackbone(nn.Module):
    """No correction at all: the model is its base density."""

    def __init__(self, levels: int) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, x: Tensor) -> Tensor:
        return 0 * x.flatten(1).sum(1, keepdim=True).expand(-1, self.levels)
