"""Classical density models of scikit-learn as peers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import final

import numpy as np
import torch
from torch import Tensor

from studies.compare.peer import FittedDensity, Peer, Samples, Task, Training
from torchcdm.apps.baselines import (
    LARGEST_DIM,
    Candidate,
    choose,
    gaussians,
    kernels,
    mixtures,
    smallest_variance,
    training_arrays,
)
from torchcdm.apps.budget import Budget

Candidates = Callable[[np.ndarray, float, int], Iterator[Candidate]]


@final
class ClassicalPeer(Peer):
    """A family of density models of which validation chooses one.

    The candidates are fitted in turn until the budget is spent. At most 5000 training samples are taken.

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
        candidates = self.candidates(train, smallest_variance(task.source.transform), task.seed)
        choice = choose(candidates, validation, budget)
        setting = f"{choice.candidate.name}, the best of {choice.count} on validation; {len(train)} training samples"
        training = Training(choice.count, budget.elapsed, -choice.validation, choice.number, setting)
        return FittedCandidate(task, training, choice.candidate)


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
        z = torch.from_numpy(self.candidate.sample(n, seed % 2**32)).reshape(n, *self.transform.shape)
        return Samples(self.transform.inverse(z), None)


CLASSICAL = (
    ClassicalPeer("gaussian", "Gaussian, full covariance", gaussians),
    ClassicalPeer("kde", "kernel density", kernels),
    ClassicalPeer("gmm", "Gaussian mixture", mixtures),
)
