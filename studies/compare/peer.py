"""What a comparison asks of a system: to train within a budget, and then to score and to sample."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from studies.budget import Budget
from torchcdm.data import DataOptions, DataSource
from torchcdm.likelihood.scoring import dithered
from torchcdm.units import DataTransform, LogLikelihood

SCORING_SEED = 0
"""Of all noise in scoring: every system and every training seed is scored on the same noisy test samples."""


IMPORTANCE_DRAWS = 16
"""Dequantisations of each sample in the tighter bound."""


class Diverged(Exception):
    """Training or scoring gave values that are not finite; the message says where."""


@dataclass(frozen=True)
class Task:
    """What every system of a comparison is given.

    Attributes:
        source: The data: splits, units, grey levels.
        data: What they were loaded from, for systems that keep it with their models.
        device: Where to compute.
        seed: Of weights, batches and dequantisation in training.
        folder: Where a system may keep files of its own.
        progress: Shows progress bars.
        log_z: Sweeps of the estimates of log Z of classification diffusion models; None for no estimate.
    """

    source: DataSource
    data: DataOptions
    device: torch.device
    seed: int
    folder: Path
    progress: bool = False
    log_z: int | None = None


@dataclass(frozen=True)
class Training:
    """How a training went.

    Attributes:
        steps: Optimiser steps, or candidates that were fitted.
        seconds: Of the budget's clock.
        validation: The value that chose the model, lower is better; its unit is the system's own.
        best_step: The step whose weights were kept.
        setting: What was trained and how, in one line.
    """

    steps: int
    seconds: float
    validation: float | None
    best_step: int
    setting: str


@dataclass(frozen=True)
class Score:
    """One likelihood of the test samples.

    Attributes:
        name: ``density``, ``importance``, or as the rows of a likelihood report.
        likelihood: Of each sample.
        normalised: Whether the density integrates to one, by construction or by an estimate of log Z. Values of a
            row where it is not cannot be ranked with the others.
        seconds: That the scoring took.
        shared_se: Standard error that all samples share, in the unit of the row: that of an estimate of log Z.
    """

    name: str
    likelihood: LogLikelihood
    normalised: bool
    seconds: float
    shared_se: float = 0.0


@dataclass(frozen=True)
class Samples:
    """Draws of a system, and what they cost.

    Attributes:
        x: Data units, (n, *shape).
        nfe: Network evaluations for each sample; None where there is no network.
    """

    x: Tensor
    nfe: int | None


class Fitted(ABC):
    """A trained system.

    Attributes:
        training: How it was trained.
        parameters: Numbers that were learned.
        note: What else is to be known of the last :meth:`scores`.
    """

    training: Training
    parameters: int
    note: str = ""

    @abstractmethod
    def scores(self, x: Tensor, budget: Budget) -> list[Score]:
        """Every likelihood that the system has, of the same samples with the noise of :data:`SCORING_SEED`.

        Args:
            x: Data units, not dequantised, (N, *shape).
            budget: Whose clock measures.
        """

    @abstractmethod
    def sample(self, n: int, seed: int) -> Samples:
        """Draws.

        Args:
            n: How many.
            seed: Of the noise.
        """


class Peer(ABC):
    """A recipe for a system.

    Attributes:
        name: On the command line.
        title: In the table.
        library: The module it comes from; None for this package and its own dependencies.
        retry: Factor of the learning rate of a second attempt, after a first that diverged.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    library: ClassVar[str | None] = None
    retry: ClassVar[float] = 0.2

    def unsuited(self, shape: Sequence[int]) -> str | None:
        """Why it cannot model events of this shape; None where it can."""
        return None

    @abstractmethod
    def fit(self, task: Task, budget: Budget, rate: float = 1.0) -> Fitted:
        """Trains within the budget and keeps the best on the validation split.

        Args:
            task: The data and the seed.
            budget: Runs already.
            rate: Factor of the learning rate.

        Raises:
            Diverged: It did.
        """


class FittedDensity(Fitted):
    """A system that knows the density of clean, dequantised data."""

    def __init__(self, task: Task, training: Training, parameters: int) -> None:
        self.transform = task.source.transform
        self.device = task.device
        self.training, self.parameters = training, parameters

    @property
    @abstractmethod
    def nfe(self) -> int:
        """Network evaluations of the last :meth:`log_prob`, for each sample."""

    @abstractmethod
    def log_prob(self, z: Tensor) -> Tensor:
        """log density in model units, float64 (N,) on the CPU.

        Args:
            z: Model units, float64 (N, *shape), on the CPU.
        """

    def scores(self, x: Tensor, budget: Budget) -> list[Score]:
        """The density; of dequantised data also the bound from the mean density over several draws.

        Uniform dequantisation costs a density that cannot draw the edges of the cells; averaging inside the logarithm
        gives part of it back, at as many times the evaluations.
        """
        draws = range(IMPORTANCE_DRAWS if self.transform.dequantize else 1)
        nats, seconds, nfe = [], [], 0
        for draw in draws:
            z = dequantised(self.transform, x, SCORING_SEED + draw)
            clock = budget.restarted()
            nats.append(self.log_prob(z) + self.transform.log_det(self.transform.inverse(z)))
            seconds.append(clock.elapsed)
            nfe += self.nfe
        scores = [self._score("density", nats[0], nfe // len(draws), seconds[0])]
        if len(draws) > 1:
            mean = torch.stack(nats).logsumexp(0) - math.log(len(draws))
            scores.append(self._score("importance", mean, nfe, sum(seconds)))
        return scores

    def _score(self, name: str, nats: Tensor, nfe: int, seconds: float) -> Score:
        transform = self.transform
        return Score(name, LogLikelihood(nats, transform.dim, 0, transform.log_bin, nfe), True, seconds)


def dequantised(transform: DataTransform, x: Tensor, seed: int = SCORING_SEED) -> Tensor:
    """Samples with the dequantisation that one pass of our own models is scored on; model units, float64."""
    return transform(dithered(transform, x, seed))
