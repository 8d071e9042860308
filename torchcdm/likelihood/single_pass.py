"""Likelihoods from one network pass (identity 1), as bounds on code lengths where the data lie on a grid."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchcdm.cdm import ClassificationDiffusion
from torchcdm.denoisers import Denoiser
from torchcdm.errors import UserError
from torchcdm.likelihood.cells import NoisyCells
from torchcdm.likelihood.common import batches, draw_rows, evaluation_mode, require_transform, working_dtype
from torchcdm.units import LogLikelihood

BATCH_SIZE = 500


@torch.no_grad()
def single_pass(
    model: ClassificationDiffusion,
    x: Tensor,
    y: Tensor | None = None,
    level: int = 0,
    draws: int = 1,
    importance: bool = False,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> LogLikelihood:
    """log-likelihood of data by the classifier's logits, one network evaluation a draw.

    On a grid: the dequantisation bound at level 0, the bound through a noisy level above. Continuous data: the
    density at the level; above 0 that of the data plus noise r_t. Valid for a density that integrates to one:
    see ``log_normalizer``.

    Args:
        model: The model; put into evaluation mode meanwhile.
        x: Data units, (N, *shape).
        y: Classes, long (N,), or None.
        level: Level whose density is used.
        draws: Noise draws for each sample.
        importance: Average the draws inside the logarithm (the importance-weighted bound) instead of outside.
        seed: Seed of the noise; independent of ``batch_size``.
        batch_size: Samples evaluated at once.

    Returns:
        Nats in data units, (N,).
    """
    transform = require_transform(model)
    if draws < 1:
        raise UserError(f"draws is {draws}; at least one is needed")
    values = torch.empty(draws, len(x), dtype=torch.float64)
    with evaluation_mode(model):
        for draw in range(draws):
            for rows in batches(len(x), batch_size):
                values[draw, rows] = _one_draw(model, x, y, rows, level, seed + draw).cpu()
    kind = "importance-weighted over" if importance and draws > 1 else "mean of"
    nats = values.logsumexp(0) - math.log(draws) if importance else values.mean(0)
    convention = f"level {level}, {'dequantised, ' if transform.dequantize else ''}{kind} {draws} draw(s)"
    return LogLikelihood(nats, transform.dim, level, convention, transform.log_bin, draws)


def _one_draw(
    model: ClassificationDiffusion, x: Tensor, y: Tensor | None, rows: slice, level: int, seed: int
) -> Tensor:
    """log-likelihood of the samples ``rows`` with one draw of noise, nats in data units."""
    transform, schedule = require_transform(model), model.schedule
    device, dtype = schedule.alpha.device, working_dtype(model)
    labels = None if y is None else y[rows].to(device)
    if level == 0:
        noisy = draw_rows(seed, rows, lambda i, g: transform.add_noise(x[i].cpu().double(), g))
        log_p = model.log_prob_levels(transform(noisy.to(device)).to(dtype), labels)[:, 0]
        return log_p + transform.log_det
    z = noised(model, x, rows, level, seed)
    if transform.bin is None:
        log_p = model.log_prob_levels(z.to(dtype), labels)[:, level]
        return log_p + transform.dim * float(schedule.alpha[level].log()) + transform.log_det
    result = model.evaluate(z.to(dtype), level, labels)
    alpha_t, sigma_t = schedule.at(level, z)
    x0 = (z - sigma_t * result.eps) / alpha_t
    cells = NoisyCells(transform, schedule, level)
    return code_length(cells, z, x[rows].to(device), x0, result.log_prob_levels[:, level])


def noised(model: Denoiser, x: Tensor, rows: slice, level: int, seed: int) -> Tensor:
    """The samples ``rows`` at a level above 0: dequantised on a grid, model units, float64 (B, *shape).

    A function of (seed, index) alone, so that several likelihoods can score the very same noisy inputs.
    """
    transform, schedule = require_transform(model), model.schedule
    device = schedule.alpha.device
    clean = x[rows].to(device)
    eps = draw_rows(seed, rows, lambda i, g: torch.randn(transform.shape, generator=g, dtype=torch.float64)).to(device)
    if transform.bin is None:
        return schedule.perturb(transform(clean.double()), level, eps)
    # Another stream than eps: the same seed would tie the two together.
    cell = draw_rows(~seed, rows, lambda i, g: torch.rand(transform.shape, generator=g, dtype=torch.float64))
    return NoisyCells(transform, schedule, level).noised(clean, cell.to(device), eps)


def code_length(cells: NoisyCells, z: Tensor, x: Tensor, x0: Tensor, log_p: Tensor) -> Tensor:
    """log P(k) bound through z, as a log density in data units (a code length less d log bin), (B,)."""
    transform = cells.transform
    log_mass = log_p + cells.log_decoder(z, x, x0) - cells.log_q(z, x)
    return log_mass - transform.dim * transform.log_bin


@torch.no_grad()
def published_convention(
    model: ClassificationDiffusion, x: Tensor, y: Tensor | None = None, batch_size: int = BATCH_SIZE
) -> LogLikelihood:
    """The published number: grey levels scored without dequantisation at level 0. No bound on a code length.

    Arguments as in :func:`single_pass`.
    """
    transform, device = require_transform(model), model.schedule.alpha.device
    with evaluation_mode(model):
        values = [
            model.log_prob(x[rows].to(device, working_dtype(model)), y=None if y is None else y[rows].to(device)).cpu()
            for rows in batches(len(x), batch_size)
        ]
    name = "level 0, undithered: a density on a lattice, no bound"
    return LogLikelihood(torch.cat(values), transform.dim, 0, name, transform.log_bin, 1)
