"""A Gaussian for each class beside that of all data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchcdm.diffusion.gaussian import GaussianMarginals, mean_and_spread
from torchcdm.diffusion.schedules import NoiseSchedule

SHARES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0)
"""Shares of the common covariance that :func:`fit_class_gaussians` tries."""

HELD_OUT = 5
"""Every fifth sample is held out to choose between them."""

HELD_OUT_LIMIT = 4000
"""Most held-out samples of a class."""


def fit_class_gaussians(
    samples: Tensor,
    labels: Tensor,
    schedule: NoiseSchedule,
    floor: float = 0.0,
    held_out: tuple[Tensor, Tensor] | None = None,
) -> GaussianMarginals:
    """The Gaussian of all data, with one for each class: its own mean, and a covariance partly common to all.

    A covariance has d²/2 numbers, and the log ratio of two classes sees the error of both. Where the classes
    differ in the mean alone it is best taken from all of them; the share is the one under which held-out samples
    are most probable (regularised discriminant analysis, Friedman 1989).

    Args:
        samples: Training data (N, *shape), model units, dequantised.
        labels: Classes 0, 1, ..., long (N,); at least two samples of each.
        schedule: The noise schedule.
        floor: Smallest eigenvalue, model units squared.
        held_out: Samples and classes that choose the share; every fifth of the training data when None. Training
            data that repeat the samples of a small class need some: a copy of a sample would choose its own fit.
    """
    classes = range(int(labels.max()) + 1)
    if held_out is None:
        chosen = torch.arange(len(samples), device=labels.device) % HELD_OUT == 0
        held_out, fitted = (samples[chosen], labels[chosen]), (samples[~chosen], labels[~chosen])
    else:
        fitted = samples, labels
    share = 1.0
    if all(int((y == label).sum()) > 1 for _, y in (held_out, fitted) for label in classes):
        trial = [mean_and_spread(fitted[0][fitted[1] == y]) for y in classes]
        parts = [held_out[0][held_out[1] == y][:HELD_OUT_LIMIT] for y in classes]

        def held_out_log_prob(share: float) -> float:
            gaussians = _blended(trial, share, schedule, floor)
            return sum(float(g.log_prob_levels(x)[:, 0].mean()) for g, x in zip(gaussians, parts, strict=True))

        share = max(SHARES, key=held_out_log_prob)
    own = _blended([mean_and_spread(samples[labels == y]) for y in classes], share, schedule, floor)
    return GaussianMarginals.of_spread(schedule, *mean_and_spread(samples), floor, own)


def _blended(
    classes: Sequence[tuple[Tensor, Tensor]], share: float, schedule: NoiseSchedule, floor: float
) -> list[GaussianMarginals]:
    """A Gaussian for each class, its spread moved by ``share`` towards the mean spread."""
    common = torch.stack([spread for _, spread in classes]).mean(0)
    return [
        GaussianMarginals.of_spread(schedule, mean, (1 - share) * spread + share * common, floor)
        for mean, spread in classes
    ]
