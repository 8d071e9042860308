"""Classical density models of scikit-learn on the same dequantised data: what a likelihood is measured against."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchcdm.apps.budget import Budget
from torchcdm.data import DataSource
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.schedules import UniformSigmaSchedule
from torchcdm.units import DataTransform, LogLikelihood

LARGEST_DIM = 256
LARGEST_COUNT = 5000
"""More dimensions or training samples would take longer than the network."""

COMPONENTS = {"full": (2, 5, 10, 15), "diag": (10, 20, 40, 80)}
BANDWIDTHS = np.geomspace(0.02, 2.0, 16)
"""Model units: grey levels fill [-1, 1], continuous columns have unit deviation."""


@dataclass(frozen=True)
class Candidate:
    """One fitted density model of flattened samples in model units.

    Attributes:
        name: What it is, with its setting.
        log_prob: log density (N,) of samples (N, d).
        sample: Draws (n, d) from how many and a seed.
        parameters: Numbers that were learned.
    """

    name: str
    log_prob: Callable[[np.ndarray], np.ndarray]
    sample: Callable[[int, int], np.ndarray]
    parameters: int


@dataclass(frozen=True)
class Choice:
    """What validation chose among candidates.

    Attributes:
        candidate: The best.
        validation: Its mean log density of the validation samples, nats.
        number: Its place among the candidates, from 1.
        count: Candidates that were fitted.
    """

    candidate: Candidate
    validation: float
    number: int
    count: int


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
    train, validation = training_arrays(source, seed)
    points = transform(test.double()).flatten(1).numpy()
    found = []
    for candidates in (gaussians, kernels, mixtures):
        best = choose(candidates(train, smallest_variance(transform), seed), validation).candidate
        nats = torch.from_numpy(best.log_prob(points)) + transform.log_det(test.double())
        result = LogLikelihood(nats, transform.dim, 0, "dequantised", transform.log_bin, 0)
        found.append(Baseline(best.name, *result.mean_and_error(), result.unit))
    return found


def training_arrays(source: DataSource, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Training and validation samples, at most :data:`LARGEST_COUNT` each: dequantised, model units, (N, d)."""
    train, validation = (
        _prepare(split.tensors(LARGEST_COUNT)[0], source.transform, seed + i)
        for i, split in enumerate((source.train, source.validation))
    )
    return train, validation


def _prepare(x: Tensor, transform: DataTransform, seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    return transform.encode(x.double(), generator).flatten(1).numpy()


def choose(candidates: Iterable[Candidate], validation: np.ndarray, budget: Budget | None = None) -> Choice:
    """The candidate of the best validation likelihood.

    Args:
        candidates: At least one, small ones first: fitted in turn until the budget is spent; a fit that has begun is
            finished.
        validation: Model units, (N, d).
        budget: Runs already; None for all candidates.
    """
    best, value, number, count = None, -np.inf, 0, 0
    for candidate in candidates:
        count += 1
        mean = float(candidate.log_prob(validation).mean())
        if best is None or mean > value:
            best, value, number = candidate, mean, count
        if budget is not None and budget.spent:
            break
    return Choice(best, value, number, count)


def smallest_variance(transform: DataTransform) -> float:
    """That of a grey level's cell, model units."""
    return 1e-6 if transform.model_bin is None else float(transform.model_bin.min()) ** 2 / 12


def gaussians(train: np.ndarray, floor: float, seed: int) -> Iterator[Candidate]:
    """The Gaussian of the data's mean and covariance.

    Args:
        train: Model units, (N, d).
        floor: The smallest variance.
        seed: Of what is random; nothing here.
    """
    fitted = GaussianMarginals.fit(torch.from_numpy(train), UniformSigmaSchedule(2), floor, "full")

    def sample(n: int, seed: int) -> np.ndarray:
        return fitted.draw((n, train.shape[1]), torch.Generator().manual_seed(seed)).numpy()

    dim = train.shape[1]
    yield Candidate(
        "Gaussian, full covariance",
        lambda x: fitted.log_prob_levels(torch.from_numpy(x))[:, 0].numpy(),
        sample,
        dim + dim * (dim + 1) // 2,
    )


def kernels(train: np.ndarray, floor: float, seed: int) -> Iterator[Candidate]:
    """Kernel density estimates of several bandwidths. Arguments as in :func:`gaussians`."""
    from sklearn.neighbors import KernelDensity

    for bandwidth in BANDWIDTHS:
        model = KernelDensity(bandwidth=float(bandwidth)).fit(train)
        yield Candidate(
            f"kernel density, bandwidth {bandwidth:.3f}",
            model.score_samples,
            lambda n, seed, model=model: model.sample(n, random_state=seed),
            train.size,
        )


def mixtures(
    train: np.ndarray, floor: float, seed: int, components: Mapping[str, Sequence[int]] = COMPONENTS
) -> Iterator[Candidate]:
    """Gaussian mixtures of several sizes, by expectation maximisation. Arguments as in :func:`gaussians`.

    Args:
        train: Model units, (N, d).
        floor: Added to all variances.
        seed: Of where the components begin.
        components: How many for each form of covariance; those that have fewer than two samples each are left out.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    dim = train.shape[1]
    for form, counts in components.items():
        for count in counts:
            if count >= len(train) // 2:
                continue
            model = GaussianMixture(count, covariance_type=form, reg_covar=floor, random_state=seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ConvergenceWarning)
                model.fit(train)
            spread = dim * (dim + 1) // 2 if form == "full" else dim
            yield Candidate(
                f"Gaussian mixture, {count} {form}",
                model.score_samples,
                lambda n, seed, model=model: model.set_params(random_state=seed).sample(n)[0],
                count * (1 + dim + spread) - 1,
            )
