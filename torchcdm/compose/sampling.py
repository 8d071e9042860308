"""Samples of a model or a composed density: proposals of any sampler, corrected at every level.

``corrector``: after each step, Langevin moves with accept-reject leave the level's own density as it is, whatever the
sampler's error was. An evaluation proposes, accepts, and serves the next step: a move costs one. ``particles``:
sequential Monte Carlo, whose weights also mend how the levels' densities differ from a noised one. ``sweeps``: replica
exchange between the levels, started from such particles.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, final

import numpy as np
import torch
from torch import Tensor

from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.particles import FIRST_STEP, States, adapted, effective, langevin, smc, systematic
from torchcdm.annealing.replicas import Replicas, ladder
from torchcdm.annealing.target import ModelTarget
from torchcdm.diffusion.prediction import Prediction
from torchcdm.errors import UserError, warn
from torchcdm.likelihood.log_z import LogZ
from torchcdm.models.denoiser import Denoiser, GuidedDenoiser, digest_of, evaluation_mode, working_dtype
from torchcdm.models.density import LevelReader
from torchcdm.models.inputs import as_labels
from torchcdm.random import derive, stream
from torchcdm.runtime.processes import alone, gathered, labels_of, map_rows, memory_kept, progress_bar, share
from torchcdm.runtime.validation import Count, CountOrZero, Float, Seed, Share, checked, shown
from torchcdm.samplers import PILOTS, Curvature, Sampler, Step, make_sampler, pilot_labels

STEPS = 25  # by default
MOST_KEPT = 16  # requests whose curvature a model keeps
SAMPLER, OF_VECTORS = "sa2", "dpm++"  # of images, and of vectors, whose columns may differ much in their deviations
WITH_MOVES = "ddpm"  # of steps with a move after each, after which a multistep rule has no history
ISLANDS = 8  # populations at most
SMALL, LARGE = 32, 256  # particles in each at least: the latter of what is tilted, or all soon descend from one
WORKS = 0.5  # largest deviation of the works of one step of particles whose spacing is adaptive, nats
COLLAPSE = 0.2  # share of the particles that effectively counts, below which the weights are said to have collapsed


@dataclass(frozen=True)
class Draws:
    """Samples and what is known of them.

    Attributes:
        x: Equally weighted samples, (n, *shape), data units on the CPU; a data frame of a model of a table.
        ess: Effective number of independent particles that they were drawn from.
        log_z: log Z of the density at level 1, model units, against the start density; of particles and sweeps.
        particles: All particles, (N, *shape), as ``x``; None without particles.
        log_weights: Their weights, normalised, (N,).
        acceptance: Share of the moves accepted.
        evaluations: Evaluations of the denoiser, for each sample; 0 for particles, which visit all levels.
        y: Classes or contexts of the samples, asked for or drawn; None for none, and of particles.
    """

    x: Tensor
    ess: float
    log_z: LogZ | None = None
    particles: Tensor | None = None
    log_weights: Tensor | None = None
    acceptance: float | None = None
    evaluations: int = 0
    y: Tensor | None = None

    def mean(self) -> Tensor:
        """Mean of the weighted particles, or of the samples where there are none, (*shape), not rounded."""
        if self.particles is None:
            return self._numbers().mean(0).float()
        return torch.tensordot(self.log_weights.exp(), self.particles.double(), 1).float()

    @checked
    def interval(self, mass: Share = 0.9) -> tuple[Tensor, Tensor]:
        """Lower and upper ends, (*shape) each, number by number, between two samples in their order.

        Another draw lies within as often as ``mass`` says: the k-th of n has k / (n + 1) of the mass below it.
        """
        shares = (1 - mass) / 2, (1 + mass) / 2
        low, high = torch.from_numpy(np.quantile(self._numbers().numpy(), shares, axis=0, method="weibull")).float()
        return low, high

    def _numbers(self) -> Tensor:
        if not isinstance(self.x, Tensor):
            raise UserError("the samples are a table, whose cells need not be numbers; draw them with units='codes'")
        return self.x.double()

    def summary(self) -> str:
        """One line for a reader; empty where nothing was corrected."""
        if self.particles is None:
            return "" if self.acceptance is None else f"{self.acceptance:.0%} of moves accepted"
        z = self.log_z
        size = f"effective sample size {self.ess:.0f} of {len(self.particles)} particles"
        return f"{size}; log Z {z.value:+.2f} [{z.low:+.2f}, {z.high:+.2f}]"


@checked
@memory_kept()
def sample(
    model: Denoiser, n: Count, sampler: str | Sampler | None = None, steps: Count | None = None,
    y: Tensor | int | str | None = None, guidance: Float = 0.0, seed: Seed = 0, batch_size: Count | None = None,
    spacing: Literal["even", "adaptive"] | None = None, shape: tuple[Count, ...] | None = None,
    units: Literal["data", "codes", "model"] = "data", corrector: CountOrZero | None = None,
    particles: CountOrZero = 0, sweeps: CountOrZero = 0, details: bool = False, progress: bool = False,
) -> Any:  # fmt: skip
    """Draws samples of a model or of a composed density: (n, *shape) on the CPU, a data frame of a model of a table.

    By default 25 steps: of images a stochastic Adams solver (``sa2``), of vectors DPM-Solver++ (``dpm++``), of a
    composed density the reverse chain (``ddpm``) with a move that is accepted or rejected after each. So
    many levels as ``steps`` are visited, level T first; where steps are placed and the model keeps coarse data a lower
    one, and all below it where more are asked for, with a warning. Level 0 is reached last. Sample i depends on
    ``seed`` and i, not on batch size or device; placed steps and moves also on which classes are asked for. UserError
    for a request that makes no sense, such as more steps than T, labels of an unconditional model, or no known shape;
    for a model without a density; for weights that vanish everywhere.

    Args:
        model: Any denoiser, put in eval mode meanwhile; corrections need a density.
        n: Number of samples.
        sampler: A name in :data:`torchcdm.samplers.SAMPLERS`, or a sampler with settings of its own. Particles are
            proposed by the reverse kernels, whose density is known, and take no other.
        steps: Number of steps, 1 ... T; 25 when None. Particles visit all levels.
        y: Class of each sample, long (n,) or a name that the model knows, or context (n, context); or one for all, as
            particles take. None for the unconditional density, for which a joint model draws a class first, unless
            there are particles.
        guidance: Weight w of classifier-free guidance (identity 8); diffusers' ``guidance_scale`` is 1 + w. Moves then
            leave the guided density as it is. Not for particles.
        seed: Seed, not negative.
        batch_size: Samples at a time; by their size, and what memory holds, when None.
        spacing: Where the steps are: ``even`` over the levels, or ``adaptive`` to the model's own trajectories, see
            :class:`torchcdm.samplers.Curvature`, where deterministic samplers of images read the level off x
            (:class:`torchcdm.models.density.LevelReader`). When None, what suits the sampler. Steps of particles that
            are ``adaptive`` are as long as their weights allow, often a tenth of the levels.
        shape: Event shape, for a model that does not know its own; not for particles.
        units: ``data``: images not rounded to grey levels, columns rounded where they have few values, a table as a
            data frame. ``codes``: the numbers of a table, not rounded. ``model``: model units.
        corrector: Accepted Langevin moves after each step, an evaluation each. When None, 1 of particles and, unless a
            sampler is named, of a composed density.
        particles: Particles of sequential Monte Carlo, at least n; a collapse of their weights is a warning.
        sweeps: Sweeps of replica exchange after it, 4 where fewer are given; particles are its independent columns.
        details: Gives :class:`Draws`, with effective sample size, weights and log Z.
        progress: Shows a progress bar.
    """
    if not isinstance(model, Denoiser):
        raise UserError(f"sample: {shown(model)} is no model; torchcdm.load gives one")
    if corrector is None:
        corrector = int(bool(particles or (model.composed and sampler is None)))
    if shape and model.shape not in (None, shape):
        raise UserError(f"the shape is {shape}; this model's samples are {model.shape}")
    if sweeps and not particles:
        raise UserError("sweeps is for particles: give particles too, which are its columns")
    if particles:
        if sampler is not None or steps is not None or guidance or spacing == "even":
            raise UserError("particles come down by reverse kernels: leave sampler, steps, guidance and spacing out")
        target = ModelTarget(model, y, batch_size)
        found = _by_particles(target, n, seed, units, corrector, particles, sweeps, spacing and WORKS, progress)
        return found if details else found.x
    shape = shape or model.shape
    if not shape:
        raise UserError("this model doesn't know the shape of its samples; give shape, without the batch dimension")
    rule = make_sampler(sampler or (WITH_MOVES if corrector else OF_VECTORS if len(shape) == 1 else SAMPLER))
    asked_steps, steps = steps is not None, min(STEPS, model.schedule.T) if steps is None else steps
    labels = asked = model.draw_classes(n, seed) if y is None else as_labels(y, model, n, one_for_all=True)
    if y is None and labels is not None:
        asked = torch.arange(model.classes, device=labels.device)  # which are drawn depends on n
    denoiser: Denoiser = GuidedDenoiser(model, guidance) if guidance else model
    moves = _Moves(model, guidance, corrector, seed) if corrector else None
    path = [*model.schedule.time_grid(steps), 0]
    if (spacing or rule.spacing) == "adaptive":
        curvature = _curvature(model, guidance, denoiser, shape, asked)
        path = curvature.levels(steps, model.schedule, rule.weight)
        if asked_steps and len(path) <= steps:
            warn(f"{len(path) - 1} steps, not {steps}: no more levels lie below {path[0]}, where placed steps begin; "
                 "spacing 'even' begins at level T")  # fmt: skip
        steps = len(path) - 1
        rule = rule.suited(curvature.variance)
        if moves is None and not rule.stochastic and model.density is not None and model.coarse is not None:
            denoiser = LevelReader(model.density, guidance)
    if moves is not None:
        with alone():
            # Whatever n is: a sample depends on the seed and its number alone.
            trajectories(denoiser, PILOTS, rule, path, shape, pilot_labels(asked), seed, moved=moves)
        moves.adapts, moves.accepted, moves.tried = False, 0, 0
    x = trajectories(denoiser, n, rule, path, shape, labels, seed, batch_size, units, progress, moves)
    x = as_rows(model, x, units)
    if not details:
        return x
    acceptance = None if moves is None else moves.acceptance(n)
    known = {"evaluations": rule.cost(steps) + corrector * (steps - 1), "acceptance": acceptance}
    return Draws(x, float(n), y=None if labels is None else labels.cpu(), **known)


def _curvature(
    model: Denoiser, guidance: float, denoiser: Denoiser, shape: tuple[int, ...], y: Tensor | None
) -> Curvature:
    """How the ``denoiser`` of a model bends, kept with that: found anew for other weights, or another request."""
    if model.composed or isinstance(model, GuidedDenoiser):  # of what no tensor says
        return Curvature.of(denoiser, shape, y)
    asked = repr((guidance, shape, None if y is None else pilot_labels(y).flatten().tolist()))
    key = digest_of((*model.named_parameters(), *model.named_buffers()), asked.encode())
    if key not in model.curvatures:
        model.curvatures = dict(list(model.curvatures.items())[1 - MOST_KEPT :])
        model.curvatures[key] = Curvature.of(denoiser, shape, y)
    return model.curvatures[key]


Moved = Callable[[Tensor, int, slice, Tensor | None], Prediction | None]
"""Called after a step to a level above 0 with x, the level, the rows of the batch among the samples and their labels:
where to go on from and what the denoiser says there, or None for no change."""


def trajectories(
    denoiser: Denoiser, n: int, sampler: Sampler, path: Sequence[int], shape: Sequence[int], y: Tensor | None = None,
    seed: int = 0, batch_size: int | None = None, units: str = "data", progress: bool = False,
    moved: Moved | None = None,
) -> Tensor:  # fmt: skip
    """Samples (n, *shape) on the CPU that come down from noise by a sampler's steps.

    Arguments are those of :func:`torchcdm.sample`, checked before: ``path`` are strictly decreasing levels, from T on,
    or from a lower one for a ``denoiser`` with coarse data; at the last samples end. ``y`` is one label each. A batch
    that memory did not hold begins anew with half as many, for ``moved`` too.
    """
    device = denoiser.schedule.alpha.device
    dtype = working_dtype(denoiser, torch.get_default_dtype())
    look = {"total": len(share(n)) * (len(path) - 1), "unit": "sample step", "unit_scale": True, "leave": True}
    bar = progress_bar(None, "sampling", progress, **look)

    def draw(rows: slice) -> Tensor:
        draws = sample_noise(seed, range(n)[rows], shape, len(path) if sampler.stochastic else 1, dtype)
        label, previous, known = labels_of(y, rows, device), (), None
        noise, coarse = next(draws).to(device), denoiser.coarse
        if coarse is None or path[0] == denoiser.schedule.T:
            x = denoiser.start(noise)
        else:
            choice = next(sample_noise(derive(seed, "coarse"), range(n)[rows], (1,), 1, dtype)).to(device)
            x = coarse.start(noise, choice[:, 0], path[0], denoiser.schedule, label)
        for t, s in pairwise(path):
            before = x
            noise = next(draws).to(device) if sampler.stochastic else None
            x, previous = sampler.step(Step(denoiser, x, t, s, label, noise, previous, known))
            known = moved(x, s, rows, label) if moved is not None and s > 0 else None
            if known is not None:
                x, previous = known.x_t, ()  # what was said before is of a trajectory that x has left
            bar.update(len(x))
        if denoiser.base is not None and len(shape) == 1:
            draws = sample_noise(derive(seed, "left"), range(n)[rows], shape, 1, dtype)
            x = x + denoiser.base.left(before, path[-2], next(draws).to(device)).to(x)
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
    """``draws`` standard normal batches (len(samples), *shape) on the CPU, one random stream for each sample. Row k
    depends on ``seed``, ``samples[k]`` and ``draws`` alone, whatever else is in the batch."""
    generators = [stream(seed, "sample", i) for i in samples]
    # A block of draws at once: for small events a call for each draw would take longer than the network.
    block = min(draws, max(1, 2**12 // math.prod(shape)))
    for first in range(0, draws, block):
        rows = [torch.randn(block, *shape, generator=generator, dtype=dtype) for generator in generators]
        yield from torch.stack(rows, 1)[: draws - first]


@final
class _Moves:
    """Langevin moves between the steps of a sampler; a sample's noise depends on the seed and its index alone. While
    it ``adapts``, the size of moves at each level follows from what is accepted."""

    def __init__(self, model: Denoiser, guidance: float, count: int, seed: int) -> None:
        self.target, self.count, self.seed = ModelTarget(model, guidance=guidance), count, seed
        self.kernels = Kernels(self.target.reference)
        self.adapts, self.steps, self.step = True, dict[int, float](), FIRST_STEP
        self.accepted = self.tried = 0

    def acceptance(self, n: int) -> float:
        """Share of the moves of ``n`` samples that were accepted, in all processes that shared them."""
        accepted, tried = (sum(parts) for parts in zip(*gathered((self.accepted, self.tried), n), strict=True))
        return accepted / max(tried, 1)

    def __call__(self, x: Tensor, t: int, rows: slice, y: Tensor | None) -> Prediction:
        target, indices = self.target, range(rows.start, rows.stop)
        target.y = y
        noise = sample_noise(derive(self.seed, "corrector", t), indices, target.shape, 2 * self.count, torch.float64)
        states = States.of(target, x.double(), t)
        step = self.step if self.adapts else self.steps[t]
        for _ in range(self.count):
            z, u = next(noise).flatten(1).to(x.device), next(noise).flatten(1)[:, 0].to(x.device)
            taken = langevin(target, self.kernels, states, step, None, (z, torch.special.ndtr(u)))
            self.accepted, self.tried = self.accepted + int(taken.sum()), self.tried + len(taken)
            if self.adapts:
                step = adapted(step, float(taken.double().mean()))
        if self.adapts:
            self.steps[t] = self.step = step
        return Prediction(states.x.to(x.dtype), *target.schedule.at(t, x), states.at.eps.to(x.dtype))


@torch.no_grad()
def _by_particles(
    target: ModelTarget, n: int, seed: int, units: str, moves: int, particles: int, sweeps: int, works: float | None,
    progress: bool,
) -> Draws:  # fmt: skip
    """Samples by sequential Monte Carlo, and by replica exchange started from it."""
    sweeps = max(sweeps, 4) if sweeps else 0
    if particles * max(sweeps, 1) < n:
        raise UserError(f"{n} samples of {particles} particles: give at least as many particles as samples")
    model, generator = target.model, stream(seed, "particles")
    tilted = model.density is None  # what it takes has log gamma at least
    with evaluation_mode(model):
        kernels = Kernels(target.reference) if tilted else Kernels.of_target(target, seed)
        islands = max(2, min(ISLANDS, particles // (LARGE if tilted else SMALL)))
        size = -(-particles // islands)
        if sweeps:
            rungs = ladder(target, kernels, 1, max(particles, 2), generator)
            # Columns that end beyond a bound would stay there, on all rungs: others take their place.
            ended = target.evaluate(rungs.x[0], 1).log_gamma.isfinite()
            if within := ended.nonzero()[:, 0].tolist():
                columns = [k if inside else within[k % len(within)] for k, inside in enumerate(ended.tolist())]
                rungs = rungs._replace(x=rungs.x[:, columns])
            trace = Replicas(target, kernels, rungs, generator, moves).go_on(sweeps, -(-sweeps // 4), progress)
            x = trace.x.flatten(0, 1)
            if len(x) < n:
                raise UserError(f"replica exchange of so many numbers keeps {len(x)} samples; ask for no more")
            # What started beyond a bound may be there still.
            log_w = (trace.log_gamma[:: trace.every].flatten() > -math.inf).double().log().log_softmax(0)
            log_z, ess = LogZ.of_replicas(trace, ["particles"]), trace.ess()
        else:
            found = smc(target, kernels, 1, islands, size, generator, moves, spacing=works, progress=progress)
            x, estimates = found.states.x, found.log_estimates
            log_w = (estimates[:, None] + found.log_weights.log_softmax(1)).flatten().log_softmax(0)
            log_z = LogZ.of_weights(estimates, f"smc, {islands} x {size} particles, {moves} moves", 1, x[0].numel())
            ess = min(float(effective(log_w[None])), float(found.least.sum()))
        if not ess >= COLLAPSE * particles:  # which nan is not
            what = f"the weights have collapsed: {ess:.1f} of {particles} particles count"
            mend = "use more particles, moves (corrector) or sweeps"
            or_else = "or the composition asks for what the model hardly has"
            warn(f"{what}; {mend}; {or_else}")
        x_0 = kernels.x0(x, target.eps(x, 1), 1)
        x_0 = finished(model, x_0, units).to(working_dtype(model, torch.get_default_dtype()))
    spread = systematic(log_w.exp().cpu()[None], torch.rand(1, generator=generator, dtype=torch.float64))[0]
    chosen = spread[torch.randperm(len(spread), generator=generator)[:n]]
    return Draws(as_rows(model, x_0[chosen], units), ess, log_z, x_0, log_w.cpu())
