"""Classical density models of scikit-learn on the same dequantised data: what a likelihood is measured against."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchcdm.data import DataSource
from torchcdm.gaussian import GaussianMarginals
from torchcdm.schedules import UniformSigmaSchedule
from torchcdm.units import DataTransform, LogLikelihood

LARGEST_DIM = 256
LARGEST_COUNT = 5000
"""More dimensions or training samples would take longer than the network."""

COMPONENTS = {"full": (2, 5, 10, 15), "diag": (10, 20, 40, 80)}
BANDWIDTHS = np.geomspace(0.02, 0.6, 12)
"""Model units: grey levels fill [-1, 1], continuous columns have unit deviation."""

Density = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Baseline:
    """One density model on the test split.

    Attributes:
        name: What it is, with what validation chose.
        value: Mean NLL on the test split.
        se: Its standard error.
        unit: ``bits/dim`` or ``nats``.
    """

    name: str
    value: float
    se: float
    unit: str


def baselines(source: DataSource, test: Tensor, seed: int = 0) -> list[Baseline]:
    """Full-covariance Gaussian, kernel density and Gaussian mixture, chosen on the validation split.

    Args:
        source: The data.
        test: Test samples, dequantised, data units, (N, *shape).
        seed: Seed of the dequantisation of the other splits and of the mixtures.
    """
    transform = source.transform
    train, validation = (
        _prepare(split.tensors(LARGEST_COUNT)[0], transform, seed + i)
        for i, split in enumerate((source.train, source.validation))
    )
    points = transform(test.double()).flatten(1).numpy()
    found = []
    for candidates in (_gaussian(train, transform), _kernels(train), _mixtures(train, transform, seed)):
        scored = [(density(validation).mean(), name, density) for name, density in candidates]
        _, name, density = max(scored, key=lambda item: item[0])
        nats = torch.from_numpy(density(points)) + transform.log_det
        result = LogLikelihood(nats, transform.dim, 0, "dequantised", transform.log_bin, 0)
        found.append(Baseline(name, *result.mean_and_error(), result.unit))
    return found


def _prepare(x: Tensor, transform: DataTransform, seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return transform.encode(x.double(), generator).flatten(1).numpy()


def _floor(transform: DataTransform) -> float:
    """Smallest variance: that of a grey level's cell."""
    return 1e-6 if transform.model_bin is None else float(transform.model_bin.min()) ** 2 / 12


def _gaussian(train: np.ndarray, transform: DataTransform) -> Iterator[tuple[str, Density]]:
    fitted = GaussianMarginals.fit(torch.from_numpy(train), UniformSigmaSchedule(1), _floor(transform), "full")
    yield "Gaussian, full covariance", lambda x: fitted.log_prob_levels(torch.from_numpy(x))[:, 0].numpy()


def _kernels(train: np.ndarray) -> Iterator[tuple[str, Density]]:
    from sklearn.neighbors import KernelDensity

    for bandwidth in BANDWIDTHS:
        model = KernelDensity(bandwidth=float(bandwidth)).fit(train)
        yield f"kernel density, bandwidth {bandwidth:.3f}", model.score_samples


def _mixtures(train: np.ndarray, transform: DataTransform, seed: int) -> Iterator[tuple[str, Density]]:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    for form, counts in COMPONENTS.items():
        for count in counts:
            if count >= len(train) // 2:
                continue
            model = GaussianMixture(count, covariance_type=form, reg_covar=_floor(transform), random_state=seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(train)
            yield f"Gaussian mixture, {count} {form}", model.score_samples
