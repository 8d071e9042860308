"""The loop around a sampler, from noise at level T to samples, and where its few steps go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from torchcdm.diffusion.prediction import Prediction
from torchcdm.errors import UserError
from torchcdm.models.denoiser import Denoiser, GuidedDenoiser, evaluation_mode, working_dtype
from torchcdm.models.inputs import as_labels, as_numbers, check_count, check_real
from torchcdm.random import stream
from torchcdm.runtime.batching import map_rows
from torchcdm.runtime.processes import share
from torchcdm.samplers.rules import DEFAULT_SAMPLER, DEIS, Sampler, Step, make_sampler

Callback = Callable[[int, Tensor, Prediction], None]
"""Called after each step of each batch with the level reached, x at that level, and the step's first prediction."""


def sample(
    denoiser: Denoiser,
    n: int,
    sampler: str | Sampler = DEFAULT_SAMPLER,
    steps: int = 50,
    y: Tensor | int | None = None,
    guidance: float = 0.0,
    seed: int = 0,
    batch_size: int | None = None,
    levels: Sequence[int] | None = None,
    shape: Sequence[int] | None = None,
    units: str = "data",
    start: Tensor | None = None,
    progress: bool = False,
    callback: Callback | None = None,
    spacing: str = "even",
    moved: Callable[[Tensor, int, slice], Prediction] | None = None,
) -> Any:
    """Draws samples: exactly ``steps`` levels visited, level T first, level 0 reached last.

    The noise of sample i depends on ``seed`` and i alone, so batch size and device leave the samples the same.

    Args:
        denoiser: Any denoiser; put in eval mode while sampling.
        n: Number of samples.
        sampler: A name in :data:`SAMPLERS`, or a sampler with settings of its own.
        steps: Number of steps, 1 ... T.
        y: Class of each sample, long (n,), or one class for all; None for the unconditional density. A model with a
            context takes the contexts (n, context), or one for all.
        guidance: Weight w of classifier-free guidance (identity 8); diffusers' ``guidance_scale`` is 1 + w.
        seed: Seed, not negative.
        batch_size: Samples at a time; by their size, and what memory holds, when None.
        levels: Strictly decreasing levels to visit instead of ``steps``, the last where sampling stops.
        shape: Event shape; the denoiser's own when None.
        units: ``data``: images not rounded to grey levels, columns rounded where they have few values, a table as a
            data frame. ``codes``: the numbers of a table, not rounded. ``model``: model units.
        start: x at the first level, model units (n, *shape). When None, a draw from the model's base density at
            level T: its fitted Gaussian's, or standard normal noise.
        progress: Shows a progress bar.
        callback: Called after each step; of several processes, in each with its own samples. A batch
            that memory did not hold begins anew with half as many.
        spacing: Where the steps are: ``even`` over the levels, or ``adaptive`` to the model's own trajectories, see
            :func:`torchcdm.samplers.adaptive_levels`.
        moved: Gives where to go on from after a step to a level above 0, and the denoiser there, from x, the level
            and the rows of the batch among the samples; see :func:`torchcdm.compose.sample`.

    Returns:
        (n, *shape) on the CPU; of a model of a table a data frame.

    Raises:
        UserError: A request that makes no sense, such as more steps than T, labels of an unconditional model, or no
            known shape.
    """
    from tqdm.auto import tqdm

    n = check_count("n", n)
    seed = check_count("seed", seed, 0, 2**63 - 1)
    batch_size = None if batch_size is None else check_count("batch_size", batch_size)
    if units not in ("data", "codes", "model"):
        raise UserError(f"units is '{units}'; choose data, codes or model")
    if spacing not in ("even", "adaptive"):
        raise UserError(f"spacing is '{spacing}'; choose even or adaptive")
    start = None if start is None else as_numbers(start, torch.device("cpu"))
    rule = make_sampler(sampler)
    path = _path(denoiser, steps, levels)
    if start is None and path[0] != denoiser.schedule.T:
        raise UserError(f"levels start at {path[0]}; below T = {denoiser.schedule.T} x is no pure noise: give start")
    shape = _event_shape(denoiser, shape, start, n)
    labels = as_labels(y, denoiser, n, one_for_all=True)
    check_real("guidance", guidance, -math.inf, math.inf)
    if guidance:
        if labels is None:
            raise UserError("guidance needs a class-conditional model and labels; give y, or set guidance to 0")
        denoiser = GuidedDenoiser(denoiser, guidance)
    if spacing == "adaptive" and levels is None:
        path = adaptive_levels(denoiser, steps, labels, shape)
    device = denoiser.schedule.alpha.device
    dtype = working_dtype(denoiser, torch.get_default_dtype())
    total = len(share(n)) * (len(path) - 1)
    bar = tqdm(total=total, desc="sampling", unit="sample step", unit_scale=True, disable=not progress)

    def draw(rows: slice) -> Tensor:
        draws = sample_noise(seed, range(n)[rows], shape, len(path) if rule.stochastic else 1, dtype)
        first = next(draws).to(device)
        x = denoiser.start(first) if start is None else start[rows].to(device, dtype)
        label = None if labels is None else labels[rows]
        previous, known = (), None
        for t, s in pairwise(path):
            noise = next(draws).to(device) if rule.stochastic else None
            x, previous = rule.step(Step(denoiser, x, t, s, label, noise, previous, known))
            if moved is not None and s > 0:
                known = moved(x, s, rows)
                x = known.x_t
            if callback is not None:
                callback(s, x, previous[0][1])
            bar.update(len(x))
        return finished(denoiser, x, units)

    with evaluation_mode(denoiser), torch.no_grad(), bar:
        x = map_rows(draw, n, batch_size, dim=math.prod(shape), device=device)
    return as_rows(denoiser, x, units)


def finished(denoiser: Denoiser, x: Tensor, units: str) -> Tensor:
    """Samples in model units in the ``units`` of :func:`sample`, on the CPU; a table's as numbers."""
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


def _path(denoiser: Denoiser, steps: int, levels: Sequence[int] | None) -> list[int]:
    """The levels to visit and the one to stop at."""
    T = denoiser.schedule.T
    if levels is None:
        return [*denoiser.schedule.time_grid(check_count("steps", steps)), 0]
    path = [check_count("a level", level, 0, T) for level in levels]
    if len(path) < 2 or not all(t > s for t, s in pairwise(path)):
        raise UserError(f"levels must be at least two, strictly decreasing, between {T} and 0; got {path}")
    return path


def _event_shape(denoiser: Denoiser, shape: Sequence[int] | None, start: Tensor | None, n: int) -> tuple[int, ...]:
    if start is not None and len(start) != n:
        raise UserError(f"start holds {len(start)} samples and n is {n}; they must agree")
    given = shape if start is None else start.shape[1:]
    given = denoiser.shape if given is None else tuple(check_count("a side of shape", side) for side in given)
    if not given:
        raise UserError("this model doesn't know the shape of its samples; give shape, without the batch dimension")
    if denoiser.shape not in (None, given):
        raise UserError(f"the shape is {given}; this model's samples are {denoiser.shape}")
    return given


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
