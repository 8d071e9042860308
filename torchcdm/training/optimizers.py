"""Optimisers by name with their learning rate, and Muon for the hidden layers of a network."""

import copy
import math
from typing import final

import torch
from torch import Tensor, nn

from torchcdm.networks.heads import Head
from torchcdm.training.settings import TrainConfig

# The quintic that drives singular values to 0.7 ... 1.2, and its applications (K. Jordan et al., Muon, 2024).
COEFFICIENTS, ITERATIONS, MOMENTUM = (3.4445, -4.7750, 2.0315), 5, 0.95


def share_done(config: TrainConfig, step: int, seconds: float = 0.0) -> float:
    """Share of the training, 0 ... 1, that is done before a step: of its steps or its time, whichever is more."""
    spent = 0.0 if config.max_seconds is None else seconds / config.max_seconds
    return min(1.0, max(step / config.steps, spent))


def learning_rate(config: TrainConfig, step: int, seconds: float = 0.0) -> float:
    """Learning rate of a step, counted from 0, after so many seconds of training."""
    warm = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    factor = 1.0
    if config.decay == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * share_done(config, step, seconds)))
    elif config.decay == "step":
        factor = config.decay_factor ** (step // config.decay_every)
    return config.lr * warm * factor


def build_optimizer(config: TrainConfig, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, which is Adam with a weight decay of 0, or :class:`MuonAdamW`."""
    if config.optimizer == "muon":
        return MuonAdamW(model, config)
    return torch.optim.AdamW(model.parameters(), config.lr, config.betas, weight_decay=config.weight_decay, fused=True)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the convolutions and linear layers inside a network: neither at its ends nor in its head."""
    heads = {id(module) for head in model.modules() if isinstance(head, Head) for module in head.modules()}
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    # Weights with fewer than 8 inputs or outputs, such as those that read or write the pixels, are no hidden layer's.
    found = (m.weight for m in layers if id(m) not in heads and min(m.weight.shape[:2]) >= 8)
    return list(dict.fromkeys(found))  # layers may share one


def orthogonalized(matrix: Tensor) -> Tensor:
    """A matrix (M, N) with the singular vectors of ``matrix`` and singular values near 1, by Newton-Schulz steps."""
    (a, b, c), wide = COEFFICIENTS, matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.T


@final
class MuonAdamW(torch.optim.AdamW):
    """AdamW, but for the hidden matrices, which move by their orthogonalised momentum, ahead (Muon, Nesterov).

    An update has the root mean square of one of AdamW's at the same rate (arXiv 2502.16982), so that both share a
    learning rate. A convolution is the matrix (outputs, inputs x kernel); torch.optim.Muon takes matrices alone.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        hidden = hidden_matrices(model)
        known = {id(weight) for weight in hidden}
        others = [weight for weight in model.parameters() if id(weight) not in known]
        groups = [{"params": weights, "muon": muon} for weights, muon in ((hidden, True), (others, False)) if weights]
        super().__init__(groups, config.lr, config.betas, weight_decay=config.weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step of all parameters with a gradient."""
        groups = [group for group in self.param_groups if group["muon"]]
        moved = [(group, w, w.grad) for group in groups for w in group["params"] if w.grad is not None]
        for _, weight, _ in moved:
            weight.grad = None  # AdamW passes it by
        super().step()
        for group, weight, gradient in moved:
            weight.grad, state = gradient, self.state[weight]
            if not state:
                # AdamW looks for a count in every state that it loads.
                state["step"], state["momentum"] = torch.zeros(()), torch.zeros_like(gradient)
            state["step"] += 1
            average = state["momentum"].lerp_(gradient, 1 - MOMENTUM)
            direction = gradient.lerp(average, MOMENTUM).flatten(1)
            scale = 0.2 * max(direction.shape) ** 0.5
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(orthogonalized(direction).view_as(weight), alpha=-group["lr"] * scale)


@final
class EMA:
    """A copy of ``model``, in eval mode, whose weights trail those of the model. Buffers of the network are the same.

    The decay is ramped, min(decay, (1 + n) / (10 + n)) after n ``updates``: with a fixed decay of 0.9999 the average
    would be made of the initial noise for the first ten thousand steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay, self.updates = decay, 0

    def update(self, model: nn.Module) -> None:
        """One step towards the weights of ``model``."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        with torch.no_grad():
            torch._foreach_lerp_(list(self.model.parameters()), list(model.parameters()), 1 - decay)
            networks = (getattr(one, "backbone", None) or one for one in (self.model, model))
            for mine, theirs in zip(*(network.buffers() for network in networks), strict=True):
                mine.copy_(theirs)
