"""Classical density models of scikit-learn on the same dequantised data: what a likelihood is measured against."""

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from torchcdm.data import DataSource
from torchcdm.diffusion.gaussian import SHRINKAGES
from torchcdm.diffusion.mixture import maximised
from torchcdm.random import stream
from torchcdm.units import DataTransform, LogLikelihood

LARGEST_DIM, LARGEST_COUNT = 256, 5000  # more dimensions or training samples would take longer than the network
COMPONENTS = {"full": (2, 5, 10, 15), "diag": (10, 20, 40, 80)}
BANDWIDTHS = np.geomspace(0.02, 2.0, 16)  # model units: grey levels fill [-1, 1], continuous columns deviate by 1

Candidates = Iterator[tuple[str, Any]]
"""Names with settings, and fitted models of scikit-learn; ``score_samples`` gives their log densities."""


class Baseline(NamedTuple):
    """Mean NLL of one density model on the test split and its standard error; the unit is ``bits/dim`` or ``nats``."""

    name: str
    value: float
    se: float
    unit: str


def baselines(source: DataSource, test: Tensor) -> list[Baseline]:
    """Full-covariance Gaussian, kernel density and Gaussian mixture, chosen on the validation split, on samples of the
    ``test`` split (N, *shape) that are dequantised, in data units."""
    transform, seed = source.transform, 0
    train, validation = training_arrays(source, seed)
    points = transform(test.double()).flatten(1).numpy()
    found = []
    for candidates in (gaussians, kernels, mixtures):
        fitted = list(candidates(train, smallest_variance(transform), seed))
        if not fitted:  # too few samples for any mixture
            continue
        name, best = max(fitted, key=lambda candidate: candidate[1].score_samples(validation).mean())
        nats = torch.from_numpy(best.score_samples(points)) + transform.log_det(test.double())
        result = LogLikelihood(nats, transform.dim, 0, transform.log_bin, 0)
        found.append(Baseline(name, *result.mean_and_error(), result.unit))
    return found


def training_arrays(source: DataSource, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation samples, at most ``LARGEST_COUNT`` each: dequantised, model units, (N, d)."""
    parts = (split.tensors(LARGEST_COUNT)[0].double() for split in (source.train, source.validation))
    encoded = (source.transform.encode(x, stream(seed, "dequantise", i)) for i, x in enumerate(parts))
    train, validation = (z.flatten(1).numpy() for z in encoded)
    return train, validation


def smallest_variance(transform: DataTransform) -> float:
    """That of a grey level's cell, model units."""
    return 1e-6 if transform.model_bin is None else float(transform.model_bin.min()) ** 2 / 12


def gaussians(train: np.ndarray, floor: float, seed: int) -> Candidates:
    """The Gaussian of the data, moved by several shares to a round one; arguments as in :func:`mixtures`."""
    fitted = maximised(train, 1, covariance_type="full", reg_covar=floor, random_state=seed)
    covariance, identity = fitted.covariances_[0], np.eye(train.shape[1])
    for share in SHRINKAGES:
        model = deepcopy(fitted)
        moved = (1 - share) * covariance + share * covariance.trace() / len(covariance) * identity
        model.covariances_, model.precisions_cholesky_ = moved[None], np.linalg.inv(np.linalg.cholesky(moved)).T[None]
        yield "Gaussian, full covariance", model


def kernels(train: np.ndarray, floor: float, seed: int) -> Candidates:
    """Kernel density estimates of several bandwidths; arguments as in :func:`mixtures`."""
    from sklearn.neighbors import KernelDensity

    for bandwidth in BANDWIDTHS:
        yield f"kernel density, bandwidth {bandwidth:.3f}", KernelDensity(bandwidth=float(bandwidth)).fit(train)


def mixtures(train: np.ndarray, floor: float, seed: int) -> Candidates:
    """Gaussian mixtures of several sizes, of two samples a component at least, of ``train`` (N, d), model units.

    They begin by ``seed``; the ``floor`` is added to all variances.
    """
    for form, counts in COMPONENTS.items():
        for count in (count for count in counts if count < len(train) // 2):
            model = maximised(train, count, covariance_type=form, reg_covar=floor, random_state=seed)
            yield f"Gaussian mixture, {count} {form}", model
