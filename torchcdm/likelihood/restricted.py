r"""Bounds that hold for every input: a density of one pass that is known to integrate to one, and few passes below it.

.. math:: p(x) = (1 - \delta) \sum_y \pi_y p_t(x|y) 1[x \in A_y] / Z_y + \delta N(x)

at one level t. A_y is the :class:`torchcdm.annealing.target.Fence` of a class, Z_y what p_t(.|y) integrates to over
it, and N a Gaussian, which covers what fences leave out. Below the level, a chain of few steps, or none,

.. math:: -\log P(k) \le E[\log q(x_l|k) - \log q(x_l|x_0) - \log P(k|x_l) + \sum KL(q(x_s|x_t, x_0) \| r(x_s|x_t))
    + \log q(x_t|x_0) - \log p(x_t)]

with variances of r, and tables of the decoder P(k|x_l), by the denoised value of a number: the background of an image
is known exactly, which one variance for all cannot say. Any that were fixed beforehand leave the bound valid.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchcdm.annealing.kernels import kl_of_step
from torchcdm.annealing.target import Fence, in_batches
from torchcdm.diffusion.gaussian import CosineRotation
from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import NoiseSchedule
from torchcdm.likelihood.cells import grey_levels, noisy_cells
from torchcdm.likelihood.scoring import ScoredBatch, Scoring, as_data, scoring_level
from torchcdm.models.denoiser import working_dtype
from torchcdm.models.density import DensityModel, require_density
from torchcdm.random import derive
from torchcdm.units import DataTransform, LogLikelihood, log_normal

COVER = 1e-3  # share of the Gaussian: it costs as many nats of a sample
PASSES = 9  # of a chain
DECODING = 5.0  # its least noise in that of the scoring level: best on training images of clothes
BINS = 64  # of the denoised value, of equally many numbers
PSEUDO, MOST_VALUES = 0.3, 4096  # what a table counts from, and the most grey levels of one


@dataclass(frozen=True)
class MeasuredStep:
    """What data have shown of the numbers x_0 given those denoised at a level."""

    level: int
    edges: Tensor | None = None  # between bins of the denoised value, model units, (bins - 1,)
    variances: Tensor | None = None  # mean squared errors in each bin, (bins,)
    table: Tensor | None = None  # log P(k) of grey levels in each, (bins, values); None for the tilted decoder

    @classmethod
    def of(cls, level: int, x: Tensor, x_0: Tensor, denoised: Tensor, transform: DataTransform) -> "MeasuredStep":
        """From data (N, *shape), those in model units, and what was denoised at the level."""
        flat, (low, high) = denoised.flatten(), (transform.low, transform.high)
        counted = transform.bin is not None and low is not None and high is not None
        values = round((high - low) / transform.bin) + 1 if counted else 0
        some = flat[:: -(-len(flat) // 2**20)]
        edges = torch.quantile(some, torch.linspace(0, 1, BINS + 1).to(flat)[1:-1])
        bins, table = torch.bucketize(flat, edges), None
        totals = flat.new_zeros(BINS).index_add(0, bins, (x_0 - denoised).flatten().square())
        if 0 < values <= MOST_VALUES:
            numbers = bins * values + grey_levels(transform, x)[0].flatten()
            counts = torch.bincount(numbers, minlength=BINS * values).view(BINS, values) + PSEUDO
            table = (counts / counts.sum(1, keepdim=True)).log().float()
        return cls(level, edges, totals / torch.bincount(bins, minlength=BINS).clamp_min(1), table)

    def code_length(self, batch: ScoredBatch, z: Tensor, denoised: Tensor) -> Tensor:
        """log q(z|k) - log P(k|z), nats (B,), for data on a grid."""
        cells, transform = noisy_cells(batch.transform, batch.schedule, self.level), batch.transform
        if self.table is None:
            log_p = cells.log_decoder(z, batch.x, denoised)
        else:
            index, off_grid = grey_levels(transform, batch.x)
            log_p = self.table.double()[torch.bucketize(denoised, self.edges), index].masked_fill(off_grid, -math.inf)
        return (cells.log_q(z, batch.x) - log_p).flatten(1).sum(1)

    def divergence(self, schedule: NoiseSchedule, x_0: Tensor, denoised: Tensor, lower: int) -> Tensor:
        """KL(q(x_s | x_t, x_0) || r(x_s | x_t)) from this level t to a ``lower`` one s, nats (B,)."""
        variances = self.variances[torch.bucketize(denoised, self.edges)]
        return kl_of_step(schedule, self.level, lower, x_0 - denoised, variances).flatten(1).sum(1)


@dataclass(frozen=True)
class Restricted:
    """A normalised density at the level of the last of its steps, and a chain below it."""

    steps: Sequence[MeasuredStep]  # they rise; the last decodes alone in one pass
    fence: Fence  # of each class, or of all
    log_z: Tensor  # of each class, or an upper end of it, nats, (classes,)
    mean: Tensor  # of the Gaussian, (*shape)
    variances: Tensor  # of the Gaussian in the cosine basis, (d,)

    @property
    def level(self) -> int:
        """Level of the density."""
        return self.steps[-1].level

    def log_prob(self, model: DensityModel, z: Tensor, log_p: Tensor) -> Tensor:
        """log density, nats (B,), at points ``z`` of the level whose log p_t(x|y) are (B, classes, T+2)."""
        parts = [self.fence.restricted(log_p[:, y], y)[:, self.level] for y in range(log_p.shape[1])]
        found = (torch.stack(parts, 1) + prior_of(model) - self.log_z.to(z)).logsumexp(1)
        off = CosineRotation(self.mean.shape).to(z.device)(z - self.mean.to(z))
        covered = log_normal(off, self.variances.to(z)).sum(1)
        return torch.logaddexp(found + math.log1p(-COVER), covered + math.log(COVER))


def prior_of(model: DensityModel) -> Tensor:
    """log pi_y of the classes of a joint model; 0 of any other."""
    return model.log_class_prior.double() if model.joint else model.schedule.alpha.new_zeros(1)


def evaluated(model: DensityModel, z: Tensor, level: int) -> tuple[Tensor, Tensor]:
    """E[x_0 | z] (B, *shape), and log p(z|y) of every class, or of none, and level, (B, classes, T+2): one pass."""
    with torch.enable_grad():
        x = z.to(working_dtype(model, torch.float64)).detach().requires_grad_()
        log_p = model.class_log_prob_levels(x) if model.joint else model.log_prob_levels(x)[:, None]
        (score,) = torch.autograd.grad((log_p[:, :, level] + prior_of(model)).logsumexp(1).sum(), x)
    return Prediction.of_score(z, *model.schedule.at(level, z), score.double()).x0, log_p.detach()


def restricted_pass(
    model: DensityModel, x: Tensor, density: Restricted, scoring: Scoring = Scoring(), chain: bool = False
) -> LogLikelihood:
    """log-likelihood of data, a lower bound for any input where Z is at most what the ``density`` takes it for.

    By one pass, or by as many as its ``chain`` has steps. Of ``scoring`` seed and batch size are used.
    """
    model, (x, _) = require_density(model, "one pass"), as_data(model, x, None, scoring)
    steps, transform, schedule = density.steps[0 if chain else -1 :], model.transform, model.schedule

    def one(rows: slice) -> Tensor:
        batch, below = ScoredBatch(model, x, None, rows, scoring.seed), None
        x_0, nats = batch.clean()
        for step in steps:
            noise = batch.noise("chain", step.level) if below else batch.noise("noise")
            z = schedule.perturb(x_0, step.level, noise)
            denoised, log_p = evaluated(model, z, step.level)
            if below:
                nats = nats - step.divergence(schedule, x_0, denoised, below.level)
            elif transform.bin is None:
                nats = nats + transform.dim * float(schedule.alpha[step.level].log())
            else:
                nats = nats - step.code_length(batch, z, denoised) + log_q(schedule, noise, step.level)
            below = step
        nats = nats - log_q(schedule, noise, density.level) if transform.bin is not None else nats
        return (nats + density.log_prob(model, z, log_p)).cpu()

    nats = in_batches(model, x, one, scoring.batch_size)
    return LogLikelihood(nats, transform.dim, steps[0].level, transform.log_bin, len(steps))


def log_q(schedule: NoiseSchedule, noise: Tensor, level: int) -> Tensor:
    """log q(x_t | x_0), nats (B,), by the ``noise`` of x_t."""
    return log_normal(noise.flatten(1)).sum(1) - noise[0].numel() * schedule.sigma[level].log()


def measured_steps(model: DensityModel, x: Tensor, level: int, scoring: Scoring = Scoring()) -> list[MeasuredStep]:
    """Steps of a chain from a level that decodes up to ``level``, at about equal ratios of the levels.

    From samples ``x``, on a grid, data units (N, *shape): the last fourth chooses decoders, the others make them.
    """
    schedule, n = model.schedule, len(x) - len(x) // 4
    ends = math.log(min(scoring_level(model, DECODING), level)), math.log(level)
    seed = derive(scoring.seed, "decoders")  # of no noise that a test sample has
    batch, held = (ScoredBatch(model, part, None, slice(0, len(part)), seed) for part in (x, x[n:]))
    (x_0, _), steps = batch.clean(), []
    levels = sorted({round(math.exp(at)) for at in torch.linspace(*ends, PASSES).tolist()})
    for t in levels:
        z = schedule.perturb(x_0, t, batch.noise("chain", t))
        denoised = in_batches(model, z, lambda rows, z=z, t=t: evaluated(model, z[rows], t)[0], scoring.batch_size)
        step = MeasuredStep.of(t, batch.x[:n], x_0[:n], denoised[:n], model.transform)
        best = replace(step, table=None)
        if t in (levels[0], levels[-1]):  # no other one decodes
            best = min(best, step, key=lambda way, z=z, x=denoised: float(way.code_length(held, z[n:], x[n:]).mean()))
        steps.append(best)
    return steps
