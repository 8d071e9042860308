"""How usual the increments of log p over the levels are, beside those of normal data."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from torchcdm.diffusion.mixture import ROUGH, best_mixture, fit_gaussians

COUNTS = (1, 2, 4, 8, 16)
"""Numbers of Gaussians that are tried."""

HELD_OUT = 4
"""One profile in so many chooses among them."""

MOST_INCREMENTS = 512
"""Finer schedules have increments over two or more levels each."""

DISTANCES = ("distance", "rarity")
"""Names of :func:`log_distances`."""


def best_kind(profile: Tensor) -> tuple[int, float]:
    """Number of Gaussians and their shrinkage, by the likelihood of every fourth of the profiles (N, T+2)."""
    white = _white(profile, _whitening(profile))
    held_out = torch.arange(len(white)) % HELD_OUT == HELD_OUT - 1
    return best_mixture(white[~held_out], white[held_out], COUNTS)[:2]


def fit_increments(profile: Tensor, components: int, shrinkage: float) -> dict[str, Tensor]:
    """What :func:`log_distances` needs of profiles of normal data (N, T+2); as :func:`best_kind` says."""
    fitted = _whitening(profile)
    white = _white(profile, fitted)
    weights, means, covariances = fit_gaussians(white, components, shrinkage=shrinkage, tolerance=ROUGH)
    fitted |= {"weights": weights, "means": means, "covariances": covariances}
    return fitted | {"peak": _log_density(means, fitted).max()}


def log_distances(profile: Tensor, fitted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Two logarithms of squared distances from normal increments, (N,) each, by the names of :data:`DISTANCES`.

    The first is Mahalanobis' under Ledoit and Wolf's covariance, which shrinks most where increments hardly vary: it
    sees what they do together. The second is twice how far the log density of a mixture of Gaussians lies below its
    peak: it sees details and groups, and in many dimensions takes what lies near the centre for usual, whatever it is.
    """
    white = _white(profile, fitted)
    squares = white.square().sum(1), 2 * (fitted["peak"] - _log_density(white, fitted))
    return {name: square.clamp_min(1e-12).log() for name, square in zip(DISTANCES, squares, strict=True)}


def _whitening(profile: Tensor) -> dict[str, Tensor]:
    """To increments that are about uncorrelated, as far as the reference tells (Ledoit and Wolf)."""
    from sklearn.covariance import LedoitWolf

    steps = _increments(profile)
    centre, scale = steps.mean(0), deviation(steps, 0)
    precision = torch.from_numpy(LedoitWolf().fit(((steps - centre) / scale).numpy()).precision_)
    # By eigenvectors, as a reference of equal samples has no precision.
    values, vectors = torch.linalg.eigh(precision)
    return {"centre": centre, "scale": scale, "whitening": vectors * values.clamp_min(0).sqrt()}


def _white(profile: Tensor, fitted: Mapping[str, Tensor]) -> Tensor:
    return (_increments(profile) - fitted["centre"]) / fitted["scale"] @ fitted["whitening"]


def _log_density(white: Tensor, fitted: Mapping[str, Tensor]) -> Tensor:
    pairs = zip(fitted["means"], fitted["covariances"], strict=True)
    # Not validated: where numbers overflowed, the density is nan.
    parts = [MultivariateNormal(*pair, validate_args=False).log_prob(white) for pair in pairs]
    return (torch.stack(parts, 1) + fitted["weights"].log()).logsumexp(1)


def _increments(profile: Tensor) -> Tensor:
    """log p_t(x) - log p_{t+1}(x), and the last log p(x): they add up to log p_0(x); (N, T+2), or fewer."""
    profile = profile[:, :: math.ceil(profile.shape[1] / MOST_INCREMENTS)]
    return torch.cat([-profile.diff(dim=1), profile[:, -1:]], 1)


def deviation(values: Tensor, dim: int) -> Tensor:
    """Standard deviations along ``dim``; never 0, also where all values are the same."""
    found = values.std(dim, correction=0)
    return found.clamp_min(1e-6 * float(found.max()) + 1e-12)
