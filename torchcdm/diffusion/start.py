"""What a training starts from: the closed-form density of the data that held-out samples find the most probable.

A covariance fitted to few samples of many numbers gives new samples next to no probability. So the form of the
density, its number of Gaussians and its shrinkage are chosen by the likelihood of samples that it was not fitted to.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchcdm.diffusion.gaussian import DIAGONAL, FULL_COVARIANCE_LIMIT, SHRINKAGES, mean_and_spread, within_error
from torchcdm.diffusion.mixture import FIT_ROWS, best_mixture, fit_cosines
from torchcdm.errors import UserError
from torchcdm.random import evenly_spaced
from torchcdm.units.log_likelihood import log_normal

COMPONENTS = (1, 2, 3, 5, 8, 12, 20, 32, 50, 80)  # numbers of Gaussians that are tried for vectors
WIDE = 100  # numbers of a vector beyond which no mixture is tried: a covariance takes half the square of these
WIDEST = 2000  # numbers of a vector up to which one covariance is tried
CONTRASTS = (1, 2, 4, 8)  # numbers of Gaussians that are tried for images
FIELDS = ("gaussian", "components", "shrinkage", "form")  # what there is to choose


class Start(NamedTuple):
    """``FIELDS`` of :class:`torchcdm.training.settings.ModelConfig`, and log p of held-out samples (N,), nats."""

    fields: dict[str, Any]
    log_prob: Tensor

    @property
    def value(self) -> float:
        """Mean of ``log_prob``."""
        return float(self.log_prob.mean())


def best_start(train: Tensor, held_out: Tensor, floor: float = 0.0, given: dict[str, Any] | None = None) -> Start:
    """The base density under which held-out samples are most probable.

    Vectors: mixtures of Gaussians, Gaussians without correlations. Images: mixtures with variances in the cosine
    basis, or a covariance where there are as many images as numbers. For both the standard normal. One with
    covariances gives way where others are better by more than the standard error of the difference.

    Samples ``train`` and ``held_out``, (N, *shape), are in model units, dequantised; the latter without copies of the
    same sample, and of more than ``FIT_ROWS`` some count. The ``floor`` is the smallest variance. Fields that are
    ``given`` a value are not chosen; other keys, and None, are passed by. UserError where no density has these.
    """
    given = {key: value for key, value in (given or {}).items() if key in FIELDS and value is not None}
    held_out = held_out[evenly_spaced(len(held_out), FIT_ROWS)]
    dim, vectors = train[0].numel(), train.ndim == 2
    shares: Sequence[float] = (given["shrinkage"],) if "shrinkage" in given else SHRINKAGES
    log_prob = log_normal(held_out.flatten(1).double()).sum(1)
    nothing = Start({"gaussian": False, "components": 1, "shrinkage": 0.0, "form": None}, log_prob)
    if given.get("gaussian") is False:
        return nothing
    counts: Sequence[int] = COMPONENTS if vectors else CONTRASTS
    counts = (given["components"],) if "components" in given else counts
    found = [] if given else [nothing]
    widest = WIDEST if vectors else min(FULL_COVARIANCE_LIMIT, len(train))
    cheap = "diagonal" if vectors else "cosine"
    forms = ["full", cheap] if dim <= widest else [cheap]
    for form in [given["form"]] if "form" in given else forms:
        if form == "full" and vectors and (dim <= WIDE or "components" in given):
            components, shrinkage, log_prob = best_mixture(train, held_out, counts, shares)
            fields = {"gaussian": True, "components": components, "shrinkage": shrinkage, "form": form}
            found.append(Start(fields, log_prob.to(nothing.log_prob)))
        elif form == "cosine" and not vectors:
            fewest = [k for k in counts if k == 1 or 8 * k <= len(train)]
            found += [best_shrunk(train, held_out, k, form, floor, shares) for k in fewest]
        elif 1 in counts:
            found.append(best_shrunk(train, held_out, 1, form, floor, shares))
    if not found:
        asked = " and ".join(f"{name} {value}" for name, value in given.items())
        what = f"no base density of {len(train)} samples of shape {tuple(train.shape[1:])} has {asked}"
        raise UserError(f"{what}; leave components and form out, or give more samples")
    best = max(found, key=lambda start: start.value)
    preferred = [start for start in found if start.fields["form"] == "full"]
    return next((one for one in preferred if within_error(best.log_prob - one.log_prob)), best)


def best_shrunk(
    train: Tensor, held_out: Tensor, count: int, form: str, floor: float = 0.0, shares: Sequence[float] = SHRINKAGES
) -> Start:
    """The shrinkage of one Gaussian of a form, or of several of images; other arguments as in :func:`best_start`."""
    if count > 1:
        weights, means, variances = (part.to(held_out.device) for part in fit_cosines(train, count, floor))
        z = DIAGONAL[form](train.shape[1:]).to(held_out.device)(held_out.double())
    else:
        mean, spread = mean_and_spread(train, form)
        centred = held_out.double() - mean
        if form == "full":
            # A round covariance has every basis: that of the samples serves all shares.
            spread, basis = torch.linalg.eigh(spread)
            z = centred.flatten(1) @ basis
        else:
            z = DIAGONAL[form](mean.shape).to(mean.device)(centred)
        weights, means, variances = torch.ones_like(spread[:1]), torch.zeros_like(spread)[None], spread[None]

    def candidate(share: float) -> Start:
        moved = torch.lerp(variances, variances.mean(1, keepdim=True), share)
        moved = moved.clamp_min(max(floor, 1e-9 * float(moved.max())))
        # One Gaussian after the other: differences from all of them at once would be gigabytes.
        parts = [log_normal(z - mean, own).sum(1) for mean, own in zip(means, moved, strict=True)]
        log_prob = (torch.stack(parts, 1) + weights.log()).logsumexp(1)
        return Start({"gaussian": True, "components": count, "form": form, "shrinkage": share}, log_prob)

    return max(map(candidate, shares), key=lambda one: one.value)
