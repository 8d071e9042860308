"""Where a sampler's few steps go: the levels that follow the model's own trajectories best, without training."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser, evaluation_mode, working_dtype
from torchcdm.random import stream
from torchcdm.samplers.rules import DEIS, Step

PILOTS = 16
"""Trajectories that are looked at."""

FINE = 64
"""Levels at most on which they are solved, and among which the steps are chosen."""


def adaptive_levels(
    denoiser: Denoiser, steps: int, y: Tensor | None = None, shape: Sequence[int] | None = None
) -> list[int]:
    """The levels of ``steps`` steps that leave the curved parts of trajectories short (GITS, arXiv 2405.11326).

    A few trajectories are solved finely. The cost of a step is the error of one DDIM step between two of their points,
    in units of the spread of x at its end; dynamic programming finds the steps of least total cost. It takes
    :data:`FINE` evaluations of :data:`PILOTS` samples. The same model, steps and classes give the same levels:
    ``steps`` + 1 of them, decreasing from T to 0; evenly spaced ones from :data:`FINE` steps on.

    ``y`` are classes, long (n,), or contexts (n, context), that samples are asked for; None for none.

    Raises:
        UserError: More steps than T, or no known shape.
    """
    schedule, shape = denoiser.schedule, denoiser.shape if shape is None else shape
    if shape is None:
        raise UserError("this model doesn't know the shape of its samples; give shape, without the batch dimension")
    fine = schedule.time_grid(min(FINE, schedule.T))
    if steps >= len(fine):
        return [*schedule.time_grid(steps), 0]
    noise = torch.randn(PILOTS, *shape, generator=stream(0, "pilots"), dtype=working_dtype(denoiser, torch.float32))
    if y is not None:
        y = y.unique(dim=0)
        y = y[torch.arange(PILOTS, device=y.device) * max(1, len(y) // PILOTS) % len(y)]
    rule, previous, points, noises = DEIS(3), (), [], []
    with evaluation_mode(denoiser), torch.no_grad():
        x = denoiser.start(noise.to(schedule.alpha.device))
        for t, s in pairwise([*fine, 0]):
            points.append(x / schedule.at(t, x)[0])
            x, previous = rule.step(Step(denoiser, x, t, s, y, previous=previous))
            noises.append(previous[0][1].eps)
    u, eps = torch.stack([*points, x]).flatten(2), torch.stack(noises).flatten(2)
    r, count = schedule.ratio[[*fine, 0]].to(u), len(fine) + 1
    spread = u.std(1).square().mean(1).sqrt()
    cost = torch.full((count, count), torch.inf)
    for i in range(count - 1):
        reached = u[i] - (r[i] - r[i + 1 :, None, None]) * eps[i]
        cost[i, i + 1 :] = ((reached - u[i + 1 :]).square().mean((1, 2)).sqrt() / spread[i + 1 :]).cpu()
    best, choices = cost[0], []
    for _ in range(steps - 1):
        best, choice = (best[:, None] + cost).min(0)
        choices.append(choice)
    path = [count - 1]
    for choice in reversed(choices):
        path.append(int(choice[path[-1]]))
    return [[*fine, 0][k] for k in (0, *reversed(path))]
