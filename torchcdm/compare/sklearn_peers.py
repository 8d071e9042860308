"""Classical density models of scikit-learn as peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from torchcdm.compare.baselines import LARGEST_DIM, Candidate, gaussians, kernels, mixtures, training_arrays
from torchcdm.compare.budget import Budget
from torchcdm.compare.peer import FittedDensity, Peer, Samples, Task, Training
from torchcdm.units import DataTransform

Candidates = Callable[[np.ndarray, DataTransform, int], Iterator[Candidate]]


@final
class ClassicalPeer(Peer):
    """A family of density models of which validation chooses one.

    The candidates are fitted one after the other, the small ones first, until the budget is spent; a fit that has
    begun is finished. At most 5000 training samples are taken.

    Args:
        name: On the command line.
        title: In the table.
        candidates: Fits them.
    """

    def __init__(self, name: str, title: str, candidates: Candidates) -> None:
        self.name, self.title, self.candidates = name, title, candidates

    def unsuited(self, shape: Sequence[int]) -> str | None:
        dim = torch.Size(shape).numel()
        return f"{dim} dimensions; it is fitted up to {LARGEST_DIM}" if dim > LARGEST_DIM else None

    def fit(self, task: Task, budget: Budget, rate: float = 1.0) -> FittedCandidate:
        train, validation = training_arrays(task.source, task.seed)
        best, best_count, value, count = None, 0, -np.inf, 0
        for candidate in self.candidates(train, task.source.transform, task.seed):
            count += 1
            mean = candidate.log_prob(validation).mean()
            if best is None or mean > value:
                best, best_count, value = candidate, count, mean
            if budget.spent:
                break
        setting = f"{best.name}, the best of {count} on validation; {len(train)} training samples"
        training = Training(count, budget.elapsed, -float(value), best_count, setting)
        return FittedCandidate(task, training, best)


@final
class FittedCandidate(FittedDensity):
    """The candidate that validation chose."""

    def __init__(self, task: Task, training: Training, candidate: Candidate) -> None:
        super().__init__(task, training, candidate.parameters)
        self.candidate = candidate

    @property
    def nfe(self) -> int:
        return 0

    def log_prob(self, z: Tensor) -> Tensor:
        return torch.from_numpy(self.candidate.log_prob(z.flatten(1).numpy()))

    def sample(self, n: int, seed: int) -> Samples:
        z = torch.from_numpy(self.candidate.sample(n, seed)).reshape(n, *self.transform.shape)
        return Samples(self.transform.inverse(z), None)


CLASSICAL = (
    ClassicalPeer("gaussian", "Gaussian, full covariance", gaussians),
    ClassicalPeer("kde", "kernel density", kernels),
    ClassicalPeer("gmm", "Gaussian mixture", mixtures),
)
