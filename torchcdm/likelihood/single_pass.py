"""Likelihoods from one network pass (identity 1), as bounds on code lengths where the data lie on a grid."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from torchcdm.diffusion.prediction import Prediction
from torchcdm.errors import UserError
from torchcdm.likelihood.cells import noisy_cells
from torchcdm.likelihood.common import (
    CELL,
    NOISE,
    dithered,
    draw_normal,
    draw_rows,
    labels_of,
    require_transform,
)
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.models.denoiser import Denoiser, evaluation_mode, working_dtype
from torchcdm.runtime.batching import map_rows
from torchcdm.units import LogLikelihood


@torch.no_grad()
def single_pass(
    model: ClassificationDiffusion,
    x: Tensor,
    y: Tensor | None = None,
    level: int = 0,
    draws: int = 1,
    importance: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
) -> LogLikelihood:
    """log-likelihood of data by the classifier's logits, one network evaluation a draw.

    On a grid: the dequantisation bound at level 0, the bound through a noisy level above. Continuous data: the
    density at the level; above 0 that of the data plus noise r_t. Valid for a density that integrates to one:
    see :func:`torchcdm.likelihood.log_normalizer`.

    Args:
        model: The model; put into evaluation mode meanwhile.
        x: Data units, (N, *shape).
        y: Classes, long (N,), or None.
        level: Level whose density is used.
        draws: Noise draws for each sample.
        importance: Average the draws inside the logarithm (the importance-weighted bound) instead of outside.
        seed: Seed of the noise; independent of ``batch_size``.
        batch_size: Samples at a time; by their size, and what memory holds, when None.

    Returns:
        Nats in data units, (N,).
    """
    if draws < 1:
        raise UserError(f"draws is {draws}; at least one is needed")
    return combine(model, single_draws(model, x, y, level, draws, seed, batch_size), level, importance)


@torch.no_grad()
def single_draws(
    model: ClassificationDiffusion,
    x: Tensor,
    y: Tensor | None,
    level: int,
    draws: int,
    seed: int,
    batch_size: int | None = None,
) -> Tensor:
    """The log-likelihood under each noise draw, nats in data units, float64 (draws, N) on the CPU."""
    transform, device = require_transform(model), model.schedule.alpha.device

    def one(rows: slice, seed: int) -> Tensor:
        if level:
            scored = score_noisy(model, x, y, rows, level, seed)
            return (scored.log_prob + scored.offset).cpu()
        noisy = dithered(transform, x, rows, seed).to(device)
        z = transform(noisy)
        dtype, labels = working_dtype(model, torch.float64), labels_of(y, rows, z.device)
        log_p = model.log_prob_levels(z.to(dtype), labels)[:, 0]
        return log_p.cpu() + transform.log_det(noisy).cpu()

    with evaluation_mode(model):
        seeds = range(seed, seed + draws)
        values = [
            map_rows(partial(one, seed=seed), len(x), batch_size, dim=x.shape[1:].numel(), device=device)
            for seed in seeds
        ]
    return torch.stack(values).double()


def combine(model: ClassificationDiffusion, values: Tensor, level: int, importance: bool) -> LogLikelihood:
    """Draws (K, N) to one likelihood: the mean of their logarithms, or with ``importance`` the log of their mean."""
    transform, draws = require_transform(model), len(values)
    kind = "importance-weighted over" if importance and draws > 1 else "mean of"
    nats = values.logsumexp(0) - math.log(draws) if importance else values.mean(0)
    convention = f"level {level}, {'dequantised, ' if transform.dequantize else ''}{kind} {draws} draw(s)"
    return LogLikelihood(nats, transform.dim, level, convention, transform.log_bin, draws)


@dataclass(frozen=True)
class ScoredNoise:
    """Noisy inputs of a batch, and what any density at their level needs to become a likelihood of the data.

    Attributes:
        z: x_t, model units, float64 (B, *shape).
        log_prob: The classifier's log p_t(z), (B,); None for a denoiser without density.
        offset: ``log p_t(z) + offset`` is the log-likelihood in data units: log P(k|z) - log q(z|k) on a grid (and
            the log bin, so that it is a density), the change of units for continuous data; (B,).
    """

    z: Tensor
    log_prob: Tensor | None
    offset: Tensor


@torch.no_grad()
def score_noisy(model: Denoiser, x: Tensor, y: Tensor | None, rows: slice, level: int, seed: int) -> ScoredNoise:
    """The samples ``rows`` at a level above 0, scored by one network evaluation."""
    transform, schedule = require_transform(model), model.schedule
    z = noised(model, x, rows, level, seed)
    x_t, labels = z.to(working_dtype(model, torch.float64)), labels_of(y, rows, z.device)
    log_prob = None
    if isinstance(model, ClassificationDiffusion):
        result = model.evaluate(x_t, level, labels)
        eps, log_prob = result.eps, result.log_prob_levels[:, level]
    else:
        eps = model.denoise(x_t, level, labels).eps
    if transform.bin is None:
        log_alpha = transform.dim * float(schedule.alpha[level].log())
        clean = dithered(transform, x, rows, seed).to(z.device)
        return ScoredNoise(z, log_prob, log_alpha + transform.log_det(clean))
    cells, levels = noisy_cells(transform, schedule, level), x[rows].to(z.device)
    decoded = cells.log_decoder(z, levels, Prediction(z, *schedule.at(level, z), eps).x0)
    return ScoredNoise(z, log_prob, decoded - cells.log_q(z, levels) - transform.dim * transform.log_bin)


def noised(model: Denoiser, x: Tensor, rows: slice, level: int, seed: int) -> Tensor:
    """The samples ``rows`` at a level above 0: dequantised where they are discrete, model units, float64 (B, *shape).

    A function of (seed, index) alone, so that several likelihoods can score the very same noisy inputs.
    """
    transform, schedule = require_transform(model), model.schedule
    device = schedule.alpha.device
    clean = x[rows].to(device).double()
    eps = draw_normal(seed, NOISE, rows, clean)
    if transform.bin is None:
        return schedule.perturb(transform(dithered(transform, x, rows, seed).to(device)), level, eps)
    cell = draw_rows(seed, CELL, rows, lambda i, g: torch.rand(transform.shape, generator=g, dtype=torch.float64))
    return noisy_cells(transform, schedule, level).noised(clean, cell.to(device), eps)


@torch.no_grad()
def published_convention(
    model: ClassificationDiffusion, x: Tensor, y: Tensor | None = None, batch_size: int | None = None
) -> LogLikelihood:
    """The published number: grey levels scored without dequantisation at level 0. No bound on a code length.

    Arguments as in :func:`single_pass`.
    """
    transform, device = require_transform(model), model.schedule.alpha.device
    dtype = working_dtype(model, torch.float64)

    def log_prob(rows: slice) -> Tensor:
        return model.log_prob(x[rows].to(device, dtype), y=labels_of(y, rows, device)).cpu()

    with evaluation_mode(model):
        values = map_rows(log_prob, len(x), batch_size, dim=x.shape[1:].numel(), device=device)
    name = "level 0, undithered: a density on a lattice, no bound"
    return LogLikelihood(values, transform.dim, 0, name, transform.log_bin, 1)
