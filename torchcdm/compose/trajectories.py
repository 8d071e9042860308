"""The loop around a sampler, from noise at level T to samples, and where its few steps go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from torchcdm.diffusion.prediction import Prediction
from torchcdm.models.denoiser import Denoiser, evaluation_mode, working_dtype
from torchcdm.random import stream
from torchcdm.runtime.processes import labels_of, map_rows, share
from torchcdm.samplers import DEIS, Sampler, Step

Moved = Callable[[Tensor, int, slice, Tensor | None], Prediction | None]
"""Called after a step to a level above 0 with x, the level, the rows of the batch among the samples and their labels:
where to go on from and what the denoiser says there, or None for no change."""

PILOTS = 16
"""Trajectories that go first, to place steps or to adapt moves."""

FINE = 64
"""Levels at most on which they are solved to place steps, and among which the steps are chosen."""


def trajectories(
    denoiser: Denoiser,
    n: int,
    sampler: Sampler,
    path: Sequence[int],
    shape: Sequence[int],
    y: Tensor | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    units: str = "data",
    progress: bool = False,
    moved: Moved | None = None,
) -> Tensor:
    """Samples (n, *shape) on the CPU that come down from noise by a sampler's steps.

    The noise of sample i depends on ``seed`` and i alone, so batch size and device leave samples the same. Arguments
    are those of :func:`torchcdm.sample`, checked before: ``path`` are strictly decreasing levels, from T on, at the
    last of which samples end; ``y`` is one label each, (n,) or (n, context). A batch that memory did not hold begins
    anew with half as many, for ``moved`` too.
    """
    from tqdm.auto import tqdm

    device = denoiser.schedule.alpha.device
    dtype = working_dtype(denoiser, torch.get_default_dtype())
    bar = tqdm(total=len(share(n)) * (len(path) - 1), desc="sampling", unit="sample step", unit_scale=True,
               disable=not progress)  # fmt: skip

    def draw(rows: slice) -> Tensor:
        draws = sample_noise(seed, range(n)[rows], shape, len(path) if sampler.stochastic else 1, dtype)
        x, label, previous, known = denoiser.start(next(draws).to(device)), labels_of(y, rows, device), (), None
        for t, s in pairwise(path):
            noise = next(draws).to(device) if sampler.stochastic else None
            x, previous = sampler.step(Step(denoiser, x, t, s, label, noise, previous, known))
            known = moved(x, s, rows, label) if moved is not None and s > 0 else None
            x = x if known is None else known.x_t
            bar.update(len(x))
        return finished(denoiser, x, units)

    with evaluation_mode(denoiser), torch.no_grad(), bar:
        return map_rows(draw, n, batch_size, dim=math.prod(shape), device=device)


def finished(denoiser: Denoiser, x: Tensor, units: str) -> Tensor:
    """Samples in model units in the ``units`` of :func:`torchcdm.sample`, on the CPU; a table's as numbers."""
    if units != "model" and denoiser.transform is not None:
        x = denoiser.transform.inverse(x)
        x = denoiser.transform.quantize(x) if units == "data" and denoiser.transform.bin is None else x
    return x.cpu()


def as_rows(denoiser: Denoiser, x: Tensor, units: str) -> Any:
    """What :func:`finished` gives, as a data frame where the model is one of a table and ``units`` are the data's."""
    table = None if denoiser.transform is None or units != "data" else denoiser.transform.table
    return x if table is None else table.decode(x)


def sample_noise(
    seed: int, samples: Sequence[int], shape: Sequence[int], draws: int, dtype: torch.dtype = torch.float32
) -> Iterator[Tensor]:
    """``draws`` standard normal batches (len(samples), *shape) on the CPU, one random stream for each sample.

    Row k depends on ``seed`` and ``samples[k]`` alone, whatever else is in the batch.
    """
    generators = [stream(seed, "sample", i) for i in samples]
    # A block of draws at once: for small events a call for each draw would take longer than the network.
    block = min(draws, max(1, 2**12 // math.prod(shape)))
    for first in range(0, draws, block):
        rows = [torch.randn(block, *shape, generator=generator, dtype=dtype) for generator in generators]
        yield from torch.stack(rows, 1)[: draws - first]


def pilot_labels(y: Tensor | None) -> Tensor | None:
    """Labels of :data:`PILOTS` trajectories that go first, spread over all different ones of ``y``; None for none."""
    if y is None:
        return None
    known = y.unique(dim=0)
    return known[torch.arange(PILOTS, device=y.device) * max(1, len(known) // PILOTS) % len(known)]


def adaptive_levels(denoiser: Denoiser, steps: int, shape: Sequence[int], y: Tensor | None = None) -> list[int]:
    """The levels of ``steps`` steps that leave the curved parts of trajectories short (GITS, arXiv 2405.11326).

    A few trajectories are solved finely. The cost of a step is the error of one DDIM step between two of their points,
    in units of the spread of x at its end; dynamic programming finds the steps of least total cost. It takes
    :data:`FINE` evaluations of :data:`PILOTS` samples of event ``shape``. The same model, steps and classes give the
    same levels: ``steps`` + 1 of them, decreasing from T to 0; evenly spaced ones from :data:`FINE` steps on. ``y``
    are classes, long (n,), or contexts (n, context), that samples are asked for; None for none.

    Raises:
        UserError: More steps than T.
    """
    schedule = denoiser.schedule
    fine = schedule.time_grid(min(FINE, schedule.T))
    if steps >= len(fine):
        return [*schedule.time_grid(steps), 0]
    noise = torch.randn(PILOTS, *shape, generator=stream(0, "pilots"), dtype=working_dtype(denoiser, torch.float32))
    rule, y, previous, points, noises = DEIS(3), pilot_labels(y), (), [], []
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
