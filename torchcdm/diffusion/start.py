"""What a training starts from: the closed-form density of the data that held-out samples find the most probable.

A covariance fitted to few samples of many numbers gives new samples next to no probability. So the form of the
density, its number of Gaussians and its shrinkage are chosen by the likelihood of samples that it was not fitted to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchcdm.diffusion.gaussian import DIAGONAL, mean_and_spread
from torchcdm.diffusion.mixture import SHRINKAGES, scored_mixture, within_error
from torchcdm.units.normal import log_normal

COMPONENTS = (1, 2, 3, 5, 8, 12, 20)
"""Numbers of Gaussians that are tried for vectors that are not wide: a covariance takes half the square of these."""

WIDE, WIDEST = 100, 2000
"""Numbers of a vector up to which mixtures, and up to which covariances are tried."""

FULL_IMAGES = 4096
"""Numbers of an image up to which covariances are tried, where there are as many images as numbers."""


class Start(NamedTuple):
    """A base density: fields of :class:`torchcdm.training.settings.ModelConfig`, and how probable it finds data.

    Attributes:
        fields: ``gaussian``, ``components``, ``shrinkage`` and ``form``.
        log_prob: Of each held-out sample, nats in model units, (N,).
    """

    fields: dict[str, Any]
    log_prob: Tensor

    @property
    def value(self) -> float:
        """Mean of ``log_prob``."""
        return float(self.log_prob.mean())


def best_start(train: Tensor, held_out: Tensor, floor: float = 0.0, given: dict[str, Any] | None = None) -> Start:
    """The base density under which held-out samples are most probable.

    Vectors: mixtures of Gaussians, Gaussians without correlations. Images: Gaussians with variances in the cosine
    basis, or with a covariance where there are as many images as numbers. Nothing, the standard normal, for both.
    Mixtures give way to the others where those are better by more than the standard error of the difference.

    Args:
        train: Samples (N, *shape), model units, dequantised.
        held_out: Others, without copies of the same sample.
        floor: Smallest variance, model units squared.
        given: Fields that are not chosen: their values; None for those that are.
    """
    given = {key: value for key, value in (given or {}).items() if value is not None}
    dim, vectors = train[0].numel(), train.ndim == 2
    shares: Sequence[float] = (given["shrinkage"],) if "shrinkage" in given else SHRINKAGES
    nothing = Start(
        {"gaussian": False, "components": 1, "shrinkage": 0.0, "form": None},
        log_normal(held_out.flatten(1).double()).sum(1),
    )
    if given.get("gaussian") is False:
        return nothing
    counts: Sequence[int] = (given["components"],) if "components" in given else COMPONENTS
    found = [] if given else [nothing]
    if "form" in given:
        forms = [given["form"]]
    elif vectors:
        forms = [*(["full"] if dim <= WIDEST else []), "diagonal"]
    else:
        forms = [*(["full"] if dim <= min(FULL_IMAGES, len(train)) else []), "cosine"]
    for form in forms:
        if form == "full" and vectors and (dim <= WIDE or "components" in given):
            components, shrinkage, log_prob = scored_mixture(train, held_out, counts, shares)
            fields = {"gaussian": True, "components": components, "shrinkage": shrinkage, "form": form}
            found.append(Start(fields, log_prob.to(nothing.log_prob)))
        elif 1 in counts:
            found.append(best_gaussian(train, held_out, form, floor, shares))
    best = max(found, key=lambda start: start.value)
    preferred = [start for start in found if start.fields["form"] == "full"]
    return next((one for one in preferred if within_error(best.log_prob - one.log_prob)), best)


def best_gaussian(
    train: Tensor, held_out: Tensor, form: str, floor: float = 0.0, shares: Sequence[float] = SHRINKAGES
) -> Start:
    """The shrinkage of one Gaussian of a form; arguments as in :func:`best_start`."""
    mean, spread = mean_and_spread(train, form)
    centred = held_out.double() - mean
    if form == "full":
        # A round covariance has every basis: that of the samples serves all shares.
        variances, basis = torch.linalg.eigh(spread)
        squares = (centred.flatten(1) @ basis).square()
    else:
        variances, squares = spread, DIAGONAL[form](mean.shape).to(mean.device)(centred).square()
    trials = []
    for share in shares:
        moved = torch.lerp(variances, variances.mean(), share)
        moved = moved.clamp_min(max(floor, 1e-9 * float(moved.max())))
        log_prob = -0.5 * (squares @ moved.reciprocal() + moved.log().sum() + len(moved) * math.log(2 * math.pi))
        trials.append(Start({"gaussian": True, "components": 1, "shrinkage": share, "form": form}, log_prob))
    return max(trials, key=lambda trial: trial.value)
