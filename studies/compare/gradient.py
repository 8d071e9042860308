"""One training loop for every peer that is a PyTorch module: same batches, same noise, same early stopping."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from studies.budget import Budget
from studies.compare.peer import Diverged, Task, Training, dequantised
from torchcdm.random import derive, stream
from torchcdm.training.batches import shown_at
from torchcdm.training.optimizers import EMA

MAX_BAD_STEPS = 10
"""So many steps in a row without a finite loss and gradient are a divergence, as in our own training."""

VALIDATION_SAMPLES = 2000
VALIDATION_SEED = 1

VALIDATE_EVERY = 0.02
"""Share of the budget between validations ..."""

PATIENCE, LOWERED = 6, 0.3
"""After so many validations without a better one training goes on from the best weights at a rate so much lower: a
peer that overfits early still gets a decay of its rate, and one that does not never notices."""

VALIDATION_COST = 10
"""... or so many times what a validation took, whichever is longer: validating takes a tenth of the time at most."""


class Trainable(nn.Module, ABC):
    """A model of samples in model units that gradients can train."""

    @abstractmethod
    def loss(self, z: Tensor) -> Tensor:
        """What a step lowers, a scalar, for a batch (B, *shape)."""

    @abstractmethod
    def validation_loss(self, z: Tensor) -> float:
        """What chooses the best weights, lower is better; called with a fixed seed."""

    def after_step(self) -> None:
        """What the library asks for after each step."""


@dataclass(frozen=True)
class Recipe:
    """How a library's documentation trains the model.

    Attributes:
        lr: Peak learning rate; a cosine takes it to zero at the end of the budget, a plateau lowers it before.
        batch_size: Samples a step.
        weight_decay: Of the optimiser.
        optimizer: ``Adam`` (decay in the gradient) or ``AdamW`` (decay beside it).
        ema_decay: Decay of averaged weights, which are then what is kept; None for none.
    """

    lr: float
    batch_size: int
    weight_decay: float = 0.0
    optimizer: type[torch.optim.Optimizer] = torch.optim.Adam
    ema_decay: float | None = None

    def text(self, rate: float) -> str:
        """In a few words."""
        decay = f", weight decay {self.weight_decay:g}" if self.weight_decay else ""
        average = f", EMA {self.ema_decay:g}" if self.ema_decay else ""
        return f"{self.optimizer.__name__}, lr {self.lr * rate:g} cosine, batch {self.batch_size}{decay}{average}"


def train(
    model: Trainable, task: Task, recipe: Recipe, budget: Budget, rate: float, name: str, architecture: str
) -> tuple[Trainable, Training]:
    """Trains until the budget is spent.

    Args:
        model: Newly made; trained in place.
        task: The data.
        recipe: How.
        budget: Runs already.
        rate: Factor of the learning rate.
        name: Beside the progress bar.
        architecture: What the model is, for :attr:`Training.setting`.

    Returns:
        The model of the best validation, in eval mode, and how it went.

    Raises:
        Diverged: Ten steps in a row were not finite, or no validation was.
    """
    loop = _Loop(model.to(task.device), task, recipe, budget, rate)
    with _progress(name, budget, task.progress) as bar:
        while not budget.spent:
            loop.step()
            if loop.validation_due():
                loop.validate()
            bar(budget.elapsed, loop.best)
        loop.validate()
    setting = f"{architecture}; {recipe.text(rate)}"
    return loop.best_model(), Training(loop.steps, budget.elapsed, loop.best, loop.best_step, setting)


class _Loop:
    """The state of a training."""

    def __init__(self, model: Trainable, task: Task, recipe: Recipe, budget: Budget, rate: float) -> None:
        self.model, self.task, self.recipe, self.budget = model, task, recipe, budget
        self.rate = recipe.lr * rate
        self.transform, self.split = task.source.transform, task.source.split("train")
        self.optimizer = recipe.optimizer(model.parameters(), lr=self.rate, weight_decay=recipe.weight_decay)
        self.ema = None if recipe.ema_decay is None else EMA(model, recipe.ema_decay)
        x, _ = task.source.split("validation").tensors(VALIDATION_SAMPLES)
        self.validation = dequantised(self.transform, x, VALIDATION_SEED).float().to(task.device)
        self.steps, self.bad_in_a_row, self.stale, self.lowered = 0, 0, 0, 1.0
        self.best: float | None = None
        self.best_step = 0
        self.weights: dict[str, Any] = {}
        self.next_validation = VALIDATE_EVERY * budget.seconds

    @property
    def chosen(self) -> Trainable:
        """What is validated and kept."""
        return self.model if self.ema is None else self.ema.model

    def step(self) -> None:
        """One optimiser step; left out where it is not finite."""
        x, _ = self.split.batch(shown_at(self.steps, len(self.split), self.recipe.batch_size, self.task.seed))
        z = self.transform.encode(x, stream(self.task.seed, "dequantise", self.steps)).to(self.task.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lowered * self.rate * 0.5 * (1 + math.cos(math.pi * self.budget.share))
        self.model.train()
        loss = self.model.loss(z)
        self.optimizer.zero_grad(set_to_none=True)
        if loss.isfinite():
            loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), math.inf)
        finite = bool(loss.isfinite() and norm.isfinite())
        if finite:
            self.optimizer.step()
            self.model.after_step()
            if self.ema is not None:
                self.ema.update(self.model)
        self.steps += 1
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1
        if self.bad_in_a_row == MAX_BAD_STEPS:
            raise Diverged(f"{MAX_BAD_STEPS} steps in a row up to step {self.steps} had no finite loss and gradient")

    def validation_due(self) -> bool:
        """Whether it is time again."""
        return self.budget.elapsed >= self.next_validation

    def validate(self) -> None:
        """Keeps the weights where they are the best so far, and goes back to them on a plateau."""
        began = self.budget.elapsed
        model = self.chosen.eval()
        with seeded(VALIDATION_SEED):
            value = model.validation_loss(self.validation)
        if math.isfinite(value) and (self.best is None or value < self.best):
            self.best, self.best_step, self.stale = value, self.steps, 0
            self.weights = copy.deepcopy(model.state_dict())
        else:
            self.stale += 1
        if self.stale == PATIENCE and self.weights:
            for module in {self.model, model}:
                module.load_state_dict(self.weights)
            self.lowered, self.stale = LOWERED * self.lowered, 0
        took = self.budget.elapsed - began
        wait = max(VALIDATE_EVERY * self.budget.seconds, VALIDATION_COST * took)
        self.next_validation = self.budget.elapsed + wait

    def best_model(self) -> Trainable:
        """The model with its best weights, in eval mode."""
        if self.best is None:
            raise Diverged(f"no validation in {self.steps} steps gave a finite value")
        self.chosen.load_state_dict(self.weights)
        return self.chosen.eval().requires_grad_(False)


@contextmanager
def seeded(seed: int, purpose: str = "peer") -> Iterator[None]:
    """torch's and numpy's own generators, which libraries draw from, seeded meanwhile and as before afterwards."""
    value, before = derive(seed, purpose), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(value)
        np.random.seed(value % 2**32)
        try:
            yield
        finally:
            np.random.set_state(before)


@contextmanager
def _progress(name: str, budget: Budget, show: bool) -> Iterator[Any]:
    from tqdm.auto import tqdm

    total = round(budget.seconds)
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} s{postfix}"
    with tqdm(total=total, desc=name, disable=not show, mininterval=0.5, bar_format=form) as bar:

        def move(elapsed: float, best: float | None) -> None:
            if best is not None:
                bar.set_postfix_str(f"best validation {best:.4f}", refresh=False)
            bar.update(max(0.0, min(elapsed, total) - bar.n))

        yield move
