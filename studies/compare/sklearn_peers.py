"""Classical density models of scikit-learn as peers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, final

import numpy as np
import torch
from sklearn.neighbors import KernelDensity
from torch import Tensor

from studies.budget import Budget
from studies.compare.peer import FittedDensity, Peer, Samples, Task, Training
from torchcdm.apps.baselines import (
    LARGEST_DIM,
    Candidates,
    gaussians,
    kernels,
    mixtures,
    smallest_variance,
    training_arrays,
)


class Choice(NamedTuple):
    """What validation chose among candidates.

    Attributes:
        name: The best, with its setting.
        model: The fitted model of scikit-learn.
        validation: Its mean log density of the validation samples, nats.
        number: Its place among the candidates, from 1.
        fitted: Candidates that were fitted.
    """

    name: str
    model: Any
    validation: float
    number: int
    fitted: int


def choose(candidates: Candidates, validation: np.ndarray, budget: Budget) -> Choice:
    """The candidate of the best validation likelihood.

    Args:
        candidates: At least one, small ones first: fitted in turn until the budget is spent; a fit that has begun is
            finished.
        validation: Model units, (N, d).
        budget: Runs already.
    """
    best, value, number, count = ("", None), -np.inf, 0, 0
    for candidate in candidates:
        count += 1
        mean = float(candidate[1].score_samples(validation).mean())
        if best[1] is None or mean > value:
            best, value, number = candidate, mean, count
        if budget.spent:
            break
    return Choice(*best, value, number, count)


def parameters(model: Any, dim: int) -> int:
    """Numbers that a fitted model of ``dim`` columns has learned."""
    if isinstance(model, KernelDensity):
        return np.asarray(model.tree_.data).size
    each = dim + (dim * (dim + 1) // 2 if model.covariance_type == "full" else dim)
    return model.n_components * (1 + each) - 1


def draw(model: Any, n: int, seed: int) -> np.ndarray:
    """Draws (n, d) from a fitted model."""
    if isinstance(model, KernelDensity):
        return model.sample(n, random_state=seed)
    return model.set_params(random_state=seed).sample(n)[0]


@final
class ClassicalPeer(Peer):
    """A family of density models of which validation chooses one.

    The candidates are fitted in turn until the budget is spent. At most 5000 training samples are taken.

    Args:
        name: On the command line.
        title: In the table.
        candidates: Fits them.
    """

    def __init__(self, name: str, title: str, candidates: Callable[[np.ndarray, float, int], Candidates]) -> None:
        self.name, self.title, self.candidates = name, title, candidates

    def unsuited(self, shape: Sequence[int]) -> str | None:
        dim = torch.Size(shape).numel()
        return f"{dim} dimensions; it is fitted up to {LARGEST_DIM}" if dim > LARGEST_DIM else None

    def fit(self, task: Task, budget: Budget, rate: float = 1.0) -> FittedCandidate:
        train, validation = training_arrays(task.source, task.seed)
        candidates = self.candidates(train, smallest_variance(task.source.transform), task.seed)
        choice = choose(candidates, validation, budget)
        setting = f"{choice.name}, the best of {choice.fitted} on validation; {len(train)} training samples"
        training = Training(choice.fitted, budget.elapsed, -choice.validation, choice.number, setting)
        return FittedCandidate(task, training, choice.model)


@final
class FittedCandidate(FittedDensity):
    """The candidate that validation chose."""

    def __init__(self, task: Task, training: Training, model: Any) -> None:
        super().__init__(task, training, parameters(model, task.source.transform.dim))
        self.model = model

    @property
    def nfe(self) -> int:
        return 0

    def log_prob(self, z: Tensor) -> Tensor:
        return torch.from_numpy(self.model.score_samples(z.flatten(1).numpy()))

    def sample(self, n: int, seed: int) -> Samples:
        z = torch.from_numpy(draw(self.model, n, seed % 2**32))
        return Samples(self.transform.inverse(z.reshape(n, *self.transform.shape)), None)


CLASSICAL = (
    ClassicalPeer("gaussian", "Gaussian, full covariance", gaussians),
    ClassicalPeer("kde", "kernel density", kernels),
    ClassicalPeer("gmm", "Gaussian mixture", mixtures),
)
