"""Normalising flows of other libraries: units, precision and counting of evaluations, the same for all of them."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from studies.budget import Budget
from studies.compare.gradient import Recipe, Trainable, seeded, train
from studies.compare.peer import SCORING_SEED, FittedDensity, Peer, Samples, Task, Training, dequantised

BATCH = 500
STANDARDISED_ON = 10_000
"""Training samples that give the mean and the deviation."""


class FlowModule(Trainable):
    """A flow of a library, behind an affine map to zero mean and unit deviation.

    Vectors and flattened images are standardised feature by feature; images that stay images by one mean and one
    deviation, because a convolution sees all pixels with the same weights.

    Args:
        flow: The library's module.
        z: Dequantised training samples, model units (N, *shape).
        flat: Whether the flow takes vectors.

    Attributes:
        flow: The library's module.
        network: The part whose calls count as evaluations of the network.
    """

    mean: Tensor
    deviation: Tensor
    network: nn.Module

    def __init__(self, flow: nn.Module, z: Tensor, flat: bool) -> None:
        super().__init__()
        self.flow, self.flat = flow, flat
        self.shape = tuple(z.shape[1:])
        over = 0 if flat else tuple(range(z.ndim))
        self.register_buffer("mean", z.mean(over).float())
        self.register_buffer("deviation", z.std(over, correction=0).float())

    @abstractmethod
    def density(self, w: Tensor) -> Tensor:
        """log density of standardised samples, (B, d) or (B, *shape), under the library's flow, (B,)."""

    @abstractmethod
    def draw(self, n: int) -> Tensor:
        """Standardised samples of the library's flow."""

    def log_prob(self, z: Tensor) -> Tensor:
        """log density in model units, (B,)."""
        w = (z - self.mean) / self.deviation
        log_scale = self.deviation.log().expand(self.shape).sum()
        return self.density(w.flatten(1) if self.flat else w) - log_scale

    def sample(self, n: int) -> Tensor:
        """Draws in model units, (n, *shape)."""
        w = self.draw(n)
        return w.reshape(n, *self.shape) * self.deviation + self.mean

    def loss(self, z: Tensor) -> Tensor:
        return -self.log_prob(z).mean()

    def validation_loss(self, z: Tensor) -> float:
        with torch.no_grad():
            parts = [self.log_prob(part).double() for part in z.split(BATCH)]
        return -float(torch.cat(parts).mean())


class FlowPeer(Peer):
    """A flow of a library.

    Attributes:
        recipe: How the library's documentation trains it.
        flat: Whether it takes vectors; images are flattened.
    """

    recipe: ClassVar[Recipe]
    flat: ClassVar[bool] = True

    @abstractmethod
    def build(self, z: Tensor) -> FlowModule:
        """The flow, new, for samples like ``z`` (N, *shape), model units."""

    @abstractmethod
    def architecture(self, shape: Sequence[int]) -> str:
        """What is built, in a few words."""

    def unsuited(self, shape: Sequence[int]) -> str | None:
        return "a flow needs at least two dimensions" if torch.Size(shape).numel() < 2 else None

    def fit(self, task: Task, budget: Budget, rate: float = 1.0) -> FittedFlow:
        x, _ = task.source.split("train").tensors(STANDARDISED_ON)
        with seeded(task.seed):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # libraries that call what torch has deprecated
                module = self.build(dequantised(task.source.transform, x, task.seed))
            trained, training = train(
                module, task, self.recipe, budget, rate, self.title, self.architecture(task.source.shape)
            )
        return FittedFlow(task, training, trained)


class FittedFlow(FittedDensity):
    """A trained flow.

    Args:
        task: The data.
        training: How it was trained.
        module: In eval mode.
    """

    def __init__(self, task: Task, training: Training, module: FlowModule) -> None:
        super().__init__(task, training, sum(p.numel() for p in module.parameters()))
        self.module = module
        self._nfe = 0

    @property
    def nfe(self) -> int:
        return self._nfe

    def log_prob(self, z: Tensor) -> Tensor:
        # Seeded for flows whose log-determinant is estimated with random probes.
        with seeded(SCORING_SEED), torch.no_grad():
            parts, calls = [], []
            for part in z.split(BATCH):
                with calls_of(self.module.network) as counted:
                    parts.append(self.module.log_prob(part.float().to(self.device)).double().cpu())
                calls.append(counted[0])
        self._nfe = max(calls)
        return torch.cat(parts)

    def sample(self, n: int, seed: int) -> Samples:
        with seeded(seed), torch.no_grad(), calls_of(self.module.network) as counted:
            z = self.module.sample(n).cpu()
        return Samples(self.transform.inverse(z), counted[0])


@contextmanager
def calls_of(module: nn.Module) -> Iterator[list[int]]:
    """Counts the calls of a module: a list of one number, right when the context is left."""
    count = [0]

    def add(*_: object) -> None:
        count[0] += 1

    handle = module.register_forward_hook(add)
    try:
        yield count
    finally:
        handle.remove()
