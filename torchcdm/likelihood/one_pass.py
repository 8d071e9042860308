"""Likelihoods from one network pass (identity 1), as bounds on code lengths where the data lie on a grid."""

import math
from functools import partial

import torch
from torch import Tensor

from torchcdm.annealing.target import in_batches
from torchcdm.diffusion.prediction import Prediction
from torchcdm.likelihood.restricted import MeasuredStep
from torchcdm.likelihood.scoring import ScoredBatch, Scoring, as_data, dithered
from torchcdm.models.denoiser import Denoiser, working_dtype
from torchcdm.models.density import DensityModel, require_density
from torchcdm.random import derive
from torchcdm.units import LogLikelihood


def single_pass(
    model: DensityModel, x: Tensor, y: Tensor | None = None, scoring: Scoring = Scoring(), dither: bool = True
) -> LogLikelihood:
    """log-likelihood of data by the classifier's logits, one network evaluation a draw.

    On a grid: the dequantisation bound at level 0, the bound through a noisy level above. Continuous data: the density
    at the level; above 0 that of data plus noise r_t. Valid if it integrates to one: see :func:`log_normalizer`.

    Of ``scoring`` level 0 ... T, draws, seed and batch size are used. Without ``dither`` grey levels are scored as
    they are at level 0, as in the paper: no bound on a code length.
    """
    model, (x, y) = require_density(model, "one pass"), as_data(model, x, y, scoring)
    level, transform = scoring.level_of(model, 0, model.schedule.T), model.transform

    def one(rows: slice, seed: int) -> Tensor:
        batch = ScoredBatch(model, x, y, rows, seed)
        if level == 0:
            precision = working_dtype(model, torch.float64)
            x_0 = dithered(transform, batch.x, seed, rows.start) if dither else batch.x.to(precision)
            return model.log_prob(x_0, y=batch.y).cpu()
        _, log_prob, offset = score_noisy(model, batch, level)
        return (log_prob[:, level] + offset).cpu()

    # The first draw is the flow's too: both score the same noisy inputs.
    seeds = [scoring.seed, *(derive(scoring.seed, "draw", k) for k in range(1, scoring.draws))]
    draws = [in_batches(model, x, partial(one, seed=seed), scoring.batch_size) for seed in seeds]
    return LogLikelihood(torch.stack(draws).mean(0), transform.dim, level, transform.log_bin, scoring.draws)


def score_noisy(model: Denoiser, batch: ScoredBatch, level: int) -> tuple[Tensor, Tensor, Tensor]:
    """The samples at a level above 0, scored by one network evaluation.

    Gives x_t, model units, float64 (B, *shape); the classifier's log p there at every level, (B, T+2), nan for a
    denoiser without density; what, added to any log p_t, makes it the log-likelihood in data units, (B,): on a grid
    log P(k|x_t) - log q(x_t|k) less the log bin, a density; for continuous data the change of units.
    """
    transform, schedule, (x_0, change) = batch.transform, batch.schedule, batch.clean()
    z = schedule.perturb(x_0, level, batch.noise("noise"))
    x_t = z.to(working_dtype(model, torch.float64))
    if model.density is None:
        eps, log_prob = model.denoise(x_t, level, batch.y).eps, z.new_full((len(z), schedule.T + 2), math.nan)
    else:
        found = model.density.evaluate(x_t, level, batch.y)
        eps, log_prob = found.eps, found.log_prob_levels
    if transform.bin is None:
        return z, log_prob, transform.dim * float(schedule.alpha[level].log()) + change
    x_0 = Prediction(z, *schedule.at(level, z), eps).x0
    return z, log_prob, change - MeasuredStep(level).code_length(batch, z, x_0)
