"""Profiles of inputs, log p at every level from one pass, and anomaly scores, a number made of each.

``levels`` is how far a profile is from those of normal data: the one-pass kin of multi-scale score matching analysis
(arXiv 2010.13132), which fits a density to the norms of ten scores. It is the sum of two distances of the increments
log p_t(x) - log p_{t+1}(x) from those of normal data, and of the mean of -log p_t(x) over the fine levels, as what is
odd is more often too unlikely than too likely. All three are counted in deviations among normal data. Of the first
distance and of the mean the softplus counts: nearer or likelier than usual earns nothing. The distances of joint
models are those of profiles and log posteriors of the classes.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from torchcdm.annealing.target import in_batches
from torchcdm.data.inputs import check_range
from torchcdm.diffusion.mixture import ROUGH, VARIANCE_FLOOR, best_mixture, fit_gaussians, mixture_log_prob
from torchcdm.diffusion.schedules import NoiseSchedule
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser, working_dtype
from torchcdm.models.density import DensityModel, require_density
from torchcdm.models.inputs import as_numbers
from torchcdm.random import stream

Fitted = Mapping[str, Tensor]  # what a score learned from the reference, by name

COARSE_NOISE = 0.5  # in model units, leaves the coarse picture: data have a scale of about one
COUNTS = (1, 2, 4, 8, 16)  # numbers of Gaussians that are tried
# How they are fitted: profiles are smooth, and what little there is along some directions is no evidence.
EM = {"tolerance": ROUGH, "floor": VARIANCE_FLOOR}
HELD_OUT = 4  # one profile in so many chooses among them
FOLDS = 5  # parts by which distances of normal data are taken

MOST_INCREMENTS = 512  # of finer schedules they are over two or more levels each
MOST_POSTERIORS = 128  # of many classes they are those of few levels


def level_profile(model: DensityModel, x: Tensor, posteriors: bool = False) -> Tensor:
    """log p_t(x) at every level, the input itself unchanged from level to level: one forward pass.

    Inputs ``x`` (N, *shape) are in data units. Those on a grid are dequantised by one fixed draw of the noise for all,
    so that the profile is a function of the input alone. Nats in data units, as what a transform stretches may differ
    between inputs, float64 (N, T+2) on the CPU. The ``posteriors`` log p(y | x, t) of joint models (identity 10) come
    after it, class by class. Errors as of :func:`as_samples`; UserError for a model without density.
    """
    model = require_density(model, "a profile of log p")

    def levels(x: Tensor) -> Tensor:
        z, stretch = (x, 0.0) if model.transform is None else (model.transform(x), model.transform.log_det(x)[:, None])
        if not (posteriors and model.joint):
            return model.log_prob_levels(z) + stretch
        joint = model.class_log_prob_levels(z) + model.log_class_prior[:, None]
        some = torch.linspace(0, model.schedule.T, MOST_POSTERIORS // joint.shape[1]).long()
        return torch.cat([joint.logsumexp(1) + stretch, joint[:, :, some].log_softmax(1).flatten(1)], 1)

    return by_batches(model, levels, x)


def by_batches(model: Denoiser, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function`` of dequantised batches in data units, on the model's device and in its precision; a CPU tensor."""
    x = as_samples(model, x)
    device, dtype = model.schedule.alpha.device, working_dtype(model, torch.float64)
    places = torch.rand(x.shape[1:], generator=stream(0, "dequantise"), dtype=torch.float64)

    def one(rows: slice) -> Tensor:
        clean = x[rows].double()
        noisy = clean if model.transform is None else model.transform.spread(clean, places)
        return function(noisy.to(device, dtype)).cpu()

    return in_batches(model, x, one)


def as_samples(model: Denoiser, x: Any, smallest: int = 1, what: str = "it") -> Tensor:
    """Samples (N, *shape) for the model, a tensor on the CPU; UserError where they are no finite numbers, have another
    shape or range of grey levels, or are fewer than ``smallest``, as ``what`` needs."""
    x = as_numbers(x, torch.device("cpu"), model.transform).detach()
    model.check_inputs(x, data=True)
    if model.transform is not None:
        check_range([x], ["inputs"], model.transform)
    if len(x) < smallest:
        raise UserError(f"the reference holds {len(x)} samples; {what} takes at least {smallest}: give more")
    return x


def coarse_level(schedule: NoiseSchedule) -> int:
    """The first level whose noise-to-signal ratio is at least ``COARSE_NOISE``; the last where none is."""
    return min(1 + int(torch.searchsorted(schedule.ratio[1:-1], COARSE_NOISE)), schedule.T)


def learn_levels(profile: Tensor, coarse: int) -> dict[str, Tensor]:
    """What :func:`deviation_from_normal` needs of profiles of normal data (N, T+2), nats; at least 10."""
    if len(profile) < HELD_OUT:
        raise UserError(f"{len(profile)} samples are too few for the score 'levels'; give more, or take another score")
    fine = profile[:, : coarse + 1]
    kind = best_kind(profile)
    fitted = {"mean": fine.mean(0), "deviation": deviation(fine)} | fit_increments(profile, *kind)
    # Distances of the very data that gave the densities would be too small: each fold by the others.
    folds = torch.arange(len(profile)) % FOLDS
    parts = [log_distances(profile[folds == k], fit_increments(profile[folds != k], *kind)) for k in range(FOLDS)]
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    values["unlikeliness"] = _unlikeliness(profile, fitted)
    for name, normal in values.items():
        fitted |= {f"{name}_mean": normal.mean(), f"{name}_deviation": deviation(normal)}
    return fitted


def deviation_from_normal(profile: Tensor, coarse: int, fitted: Fitted) -> Tensor:
    """The score of profiles (N, T+2): (N,)."""
    values = log_distances(profile, fitted) | {"unlikeliness": _unlikeliness(profile, fitted)}
    values = {name: (value - fitted[f"{name}_mean"]) / fitted[f"{name}_deviation"] for name, value in values.items()}
    return values["rarity"] + sum(softplus(values[name]) for name in ("distance", "unlikeliness"))


def _unlikeliness(profile: Tensor, fitted: Fitted) -> Tensor:
    return ((fitted["mean"] - profile[:, : len(fitted["mean"])]) / fitted["deviation"]).mean(1)


def best_kind(profile: Tensor) -> tuple[int, float]:
    """Number of Gaussians and their shrinkage, by the likelihood of every fourth of the profiles (N, T+2)."""
    white = _white(profile, _whitening(profile))
    held_out = torch.arange(len(white)) % HELD_OUT == HELD_OUT - 1
    return best_mixture(white[~held_out], white[held_out], COUNTS, **EM)[:2]


def fit_increments(profile: Tensor, components: int, shrinkage: float) -> dict[str, Tensor]:
    """What :func:`log_distances` needs of profiles of normal data (N, T+2); as :func:`best_kind` says."""
    fitted = _whitening(profile)
    white = _white(profile, fitted)
    weights, means, covariances = fit_gaussians(white, components, shrinkage=shrinkage, **EM)
    fitted |= {"weights": weights, "means": means, "covariances": covariances}
    return fitted | {"peak": _log_density(means, fitted).max()}


def log_distances(profile: Tensor, fitted: Fitted) -> dict[str, Tensor]:
    """Two logarithms of squared distances from normal increments, (N,) each.

    ``distance`` is Mahalanobis' under Ledoit and Wolf's covariance: it sees what increments do together. ``rarity`` is
    twice how far the log density of a mixture of Gaussians lies below its peak: it sees details and groups, and in
    many dimensions takes what lies near the centre for usual.
    """
    white = _white(profile, fitted)
    squares = {"distance": white.square().sum(1), "rarity": 2 * (fitted["peak"] - _log_density(white, fitted))}
    return {name: square.clamp_min(1e-12).log() for name, square in squares.items()}


def _whitening(profile: Tensor) -> dict[str, Tensor]:
    """To increments that are about uncorrelated, as far as the reference tells (Ledoit and Wolf)."""
    from sklearn.covariance import LedoitWolf

    steps = _increments(profile)
    centre, scale = steps.mean(0), deviation(steps)
    precision = torch.from_numpy(LedoitWolf().fit(((steps - centre) / scale).numpy()).precision_)
    # By eigenvectors, as a reference of equal samples has no precision.
    values, vectors = torch.linalg.eigh(precision)
    return {"centre": centre, "scale": scale, "whitening": vectors * values.clamp_min(0).sqrt()}


def _white(profile: Tensor, fitted: Fitted) -> Tensor:
    return (_increments(profile) - fitted["centre"]) / fitted["scale"] @ fitted["whitening"]


def _log_density(white: Tensor, fitted: Fitted) -> Tensor:
    return mixture_log_prob(white, fitted["weights"], fitted["means"], fitted["covariances"])


def _increments(profile: Tensor) -> Tensor:
    """Differences of neighbours, log p_t(x) - log p_{t+1}(x), and the last entry; they add up to log p_0(x)."""
    profile = profile[:, :: math.ceil(profile.shape[1] / MOST_INCREMENTS)]
    return torch.cat([-profile.diff(dim=1), profile[:, -1:]], 1)


def deviation(values: Tensor) -> Tensor:
    """Standard deviations over the samples, the first dimension; never 0, also where all values are the same."""
    found = values.std(0, correction=0)
    return found.clamp_min(1e-6 * float(found.max()) + 1e-12)


class Kind(NamedTuple):
    """How a score is made of profiles, log p_t(x) in nats, float64 (N, T+2 or more), and of the coarse level."""

    apply: Callable[[Tensor, int, Fitted], Tensor]
    learn: Callable[[Tensor, int], Fitted] | None = None  # what ``apply`` needs beside, of profiles of the reference
    smallest_reference: int = 1  # at least so many of these


SCORES = {
    # How far the whole profile is from those of normal data.
    "levels": Kind(deviation_from_normal, learn_levels, smallest_reference=10),
    # What is left of the data with noise of half a model unit: what a picture shows and not its pixels.
    "coarse": Kind(lambda log_p, coarse, _: -log_p[:, coarse]),
    # How unlikely the detail is, whatever the coarse picture: complexity + coarse = log_prob.
    "complexity": Kind(lambda log_p, coarse, _: log_p[:, coarse] - log_p[:, 0]),
    # Too likely is as suspicious as too unlikely (arXiv 1906.02994).
    "typicality": Kind(
        lambda log_p, coarse, fitted: (log_p[:, 0] - fitted["mean"]).abs(),
        lambda log_p, coarse: {"mean": log_p[:, 0].mean()},
    ),
    # Raw: misses inputs that are simpler than the normal ones, flat or blurred.
    "log_prob": Kind(lambda log_p, coarse, _: -log_p[:, 0]),
    # Odd beyond being odd for the background (arXiv 1906.02845); of log p_0 of the model and of the background.
    "ratio": Kind(lambda log_p, coarse, _: log_p[:, 1] - log_p[:, 0]),
}
"""Scores by name."""
