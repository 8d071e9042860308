"""Samples of a model or a composed density: proposals of any sampler, corrected at every level.

``corrector``: after each step, Langevin moves with accept-reject leave the level's own density as it is, whatever the
sampler's error was. An evaluation proposes, accepts, and serves the next step: a move costs one. ``particles``:
sequential Monte Carlo, whose weights also mend how the levels' densities differ from a noised one. ``sweeps``: replica
exchange between the levels, started from such particles.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from torchcdm.annealing.kernels import Kernels, denoised
from torchcdm.annealing.moves import FIRST_STEP, States, adapted, langevin
from torchcdm.annealing.particles import effective, smc, systematic
from torchcdm.annealing.replicas import exchange, ladder
from torchcdm.annealing.target import Evaluated, ModelTarget, Target, reference_gaussian
from torchcdm.compose.tilted import Tilted
from torchcdm.diffusion.prediction import Prediction
from torchcdm.diffusion.schedules import Level
from torchcdm.errors import UserError
from torchcdm.likelihood.log_z import LogZ
from torchcdm.models.denoiser import Denoiser, evaluation_mode, guided, working_dtype
from torchcdm.models.density import DensityModel, require_density
from torchcdm.models.inputs import as_labels, check_count
from torchcdm.random import derive, stream
from torchcdm.runtime.processes import alone, share, sharers
from torchcdm.samplers import DEFAULT_SAMPLER, make_sampler, sample_noise
from torchcdm.samplers import sample as plain_sample
from torchcdm.samplers.sampling import as_rows, finished

STEPS = 50
"""Of a sampler without moves; half as many with a move after each, the default where there is a density."""

PILOTS = 16
"""Draws that go first, on whose acceptance the step sizes of moves adapt; they are frozen then."""

ISLANDS, ISLAND_SIZE = 8, 32
"""Independent populations of particles at most, and particles in each at least."""

COLLAPSE = 0.2
"""Share of the particles that effectively counts, below which the weights are said to have collapsed."""


@dataclass(frozen=True)
class Draws:
    """Samples and what is known of them.

    Attributes:
        x: Equally weighted samples, (n, *shape), data units on the CPU.
        ess: Effective number of independent particles that they were drawn from.
        log_z: log Z of the density at level 1, model units, against the start density; of particles and sweeps.
        particles: All particles, (N, *shape), as ``x``; None without particles.
        log_weights: Their weights, normalised, (N,).
        acceptance: Share of the moves accepted.
        evaluations: Of the denoiser, for each sample; 0 for particles, which visit all levels.
    """

    x: Tensor
    ess: float
    log_z: LogZ | None = None
    particles: Tensor | None = None
    log_weights: Tensor | None = None
    acceptance: float | None = None
    evaluations: int = 0

    def summary(self) -> str:
        """One line for a reader; empty where nothing was corrected."""
        if self.particles is None:
            return "" if self.acceptance is None else f"{self.acceptance:.0%} of moves accepted"
        z = self.log_z
        return (
            f"effective sample size {self.ess:.0f} of {len(self.particles)} particles; log Z {z.value:+.2f} "
            f"[{z.low:+.2f}, {z.high:+.2f}]"
        )


def sample(
    model: Denoiser,
    n: int,
    sampler: Any = None,
    steps: int | None = None,
    y: Tensor | int | None = None,
    guidance: float = 0.0,
    seed: int = 0,
    batch_size: int | None = None,
    units: str = "data",
    corrector: int | None = None,
    particles: int = 0,
    sweeps: int = 0,
    details: bool = False,
    progress: bool = False,
    **options: Any,
) -> Any:
    """Draws samples of a model or of a composed density.

    By default 25 steps of the reverse chain (``ddpm``), with a move that is accepted or rejected after each: 49
    evaluations. Without a density, 50 such steps.

    Args:
        model: Any denoiser; corrections need a density.
        n: Number of samples.
        sampler: As in :func:`torchcdm.samplers.sample`. Particles are proposed by the reverse kernels, whose density
            is known, and take no other.
        steps: Levels visited, 50 when None, 25 with moves; particles visit all.
        y: Class of each sample, or one for all; particles take one for all.
        guidance: Weight of classifier-free guidance; moves then leave the guided density as it is. Not for particles.
        seed: Seed, not negative.
        batch_size: Samples at a time.
        units: ``data`` or ``model``.
        corrector: Accepted Langevin moves after each step, one evaluation each. When None, 1 unless a sampler is
            named, and 1 for particles.
        particles: Particles of sequential Monte Carlo, at least n.
        sweeps: Sweeps of replica exchange after it, at least 4; particles are its columns.
        details: Gives :class:`Draws`, with effective sample size, weights and log Z.
        progress: Shows a progress bar.
        **options: Of :func:`torchcdm.samplers.sample`.

    Returns:
        Samples ``(n, *shape)`` on the CPU, or :class:`Draws`. A collapse of the weights is a warning.

    Raises:
        UserError: As :func:`torchcdm.samplers.sample`; a model without a density; weights that vanish everywhere.
    """
    particles = check_count("particles", particles, 0, 10**7)
    if corrector is None:
        corrector = int(bool(particles)) or (0 if model.density is None else default_moves(sampler))
    corrector = check_count("corrector", corrector, 0, 10**4)
    if sweeps and not particles:
        raise UserError("sweeps is for particles: give particles too, which are its columns")
    if particles:
        if sampler is not None or steps is not None or guidance or options:
            raise UserError("particles come down by the reverse kernels: leave sampler, steps and others out")
        found = _by_particles(model, n, y, seed, batch_size, units, corrector or 1, particles, sweeps, progress)
        return found if details else found.x
    rule = make_sampler(DEFAULT_SAMPLER if sampler is None else sampler)
    steps = min(STEPS // 2 if corrector else STEPS, model.schedule.T) if steps is None else steps
    shared = options | {
        "sampler": rule, "steps": steps, "units": units, "guidance": guidance, "seed": seed,
        "batch_size": batch_size, "progress": progress,
    }  # fmt: skip
    acceptance = None
    if not corrector:
        x = plain_sample(model, n, y=y, **shared)
    else:
        n = check_count("n", n)
        labels = as_labels(y, model, n, one_for_all=True)
        moves = _Moves(model, labels, guidance, corrector, seed)
        with alone():
            # Whatever n is: a sample depends on the seed and its number alone.
            pilots = shared | {"batch_size": None, "progress": False}
            plain_sample(model, PILOTS, y=moves.pilots(), moved=moves, **pilots)
        moves.freeze(labels)
        x = plain_sample(model, n, y=labels, moved=moves, **shared)
        acceptance = moves.acceptance(n)
    visited = len(options["levels"]) - 1 if options.get("levels") is not None else steps
    cost = rule.cost(visited) + corrector * (visited - 1)
    return Draws(x, float(n), acceptance=acceptance, evaluations=cost) if details else x


def default_moves(sampler: Any, corrector: int | None = None) -> int:
    """Moves after a step of a model with a density, where ``corrector`` does not say: 1 unless a sampler is named."""
    return int(sampler is None) if corrector is None else corrector


def annealed(model: Denoiser, y: Any, what: str, batch_size: int | None = None) -> Target:
    """What particles anneal: a composed density's own target, or that of a model and a class, for ``what``."""
    if not isinstance(model, Tilted):
        return ModelTarget(require_density(model, what), y, batch_size)
    if y is not None:
        raise UserError(f"{what}: y is for models with classes; compose the class before it is tilted")
    return model.target


def target_of(model: Denoiser, y: Tensor | None = None, guidance: float = 0.0) -> Target:
    """What the engine anneals: a tilted density, or a model's, whose labels ``y`` are those of the rows."""
    return model.target if isinstance(model, Tilted) else _Rows(require_density(model, "a corrector"), y, guidance)


@final
class _Rows(Target):
    """The density of a model, guided or not, for rows of one batch with a label each."""

    def __init__(self, model: DensityModel, y: Tensor | None, guidance: float) -> None:
        reference = reference_gaussian(model)
        super().__init__(model.schedule, tuple(reference.mean.shape), reference)
        self.model, self.y, self.guidance = model, y, guidance

    def evaluate(self, x_t: Tensor, t: Level) -> Evaluated:
        x, w = x_t.to(working_dtype(self.model, torch.float64)), self.guidance
        at = torch.as_tensor(t, device=x.device).expand(len(x))
        found = self.model.evaluate(x, at, self.y, w if self.model.joint else 0.0)
        log_p, eps, other = found.log_prob_levels, found.eps.double(), found.unconditional
        if w and not self.model.joint:
            plain = self.model.evaluate(x, at)
            eps, other = guided(eps, plain.eps, w), plain.log_prob_levels
        log_p = guided(log_p, other, w) if w else log_p
        return Evaluated(log_p.gather(1, at[:, None])[:, 0], eps, log_p)


class _Moves:
    """Langevin moves between the steps of a sampler; a sample's noise depends on the seed and its index alone."""

    def __init__(self, model: Denoiser, y: Tensor | None, guidance: float, count: int, seed: int) -> None:
        self.model, self.y, self.guidance, self.count, self.seed = model, y, guidance, count, seed
        self.kernels = Kernels(target_of(model).reference)
        self.steps: dict[int, float] = {}
        self.step, self.frozen, self.accepted, self.tried = FIRST_STEP, False, 0, 0

    def pilots(self) -> Tensor | None:
        """The labels of the draws that go first, which are all that are asked for in turn."""
        if self.y is not None:
            known = self.y.unique(dim=0)
            self.y = known[torch.arange(PILOTS, device=known.device) % len(known)]
        return self.y

    def freeze(self, y: Tensor | None) -> None:
        """Ends the adaptation; ``y`` are the labels of the samples."""
        self.y, self.frozen, self.accepted, self.tried = y, True, 0, 0

    def acceptance(self, n: int) -> float:
        """Share of the moves of ``n`` samples that were accepted, in all processes that shared them."""
        counts, processes = [(self.accepted, self.tried)], sharers()
        if processes is not None and len(share(n)) < n:
            counts = processes.gather(counts[0])
        accepted, tried = (sum(parts) for parts in zip(*counts, strict=True))
        return accepted / max(tried, 1)

    def __call__(self, x: Tensor, t: int, rows: slice) -> Prediction:
        target = target_of(self.model, None if self.y is None else self.y[rows], self.guidance)
        indices = range(rows.start, rows.stop)
        noise = sample_noise(derive(self.seed, "corrector", t), indices, target.shape, 2 * self.count, torch.float64)
        states = States.of(target, x.double(), t)
        step = self.steps.get(t, self.step) if self.frozen else self.step
        for _ in range(self.count):
            z, u = next(noise).flatten(1).to(x.device), next(noise).flatten(1)[:, 0].to(x.device)
            taken = langevin(target, self.kernels, states, step, None, (z, torch.special.ndtr(u)))
            self.accepted, self.tried = self.accepted + int(taken.sum()), self.tried + len(taken)
            if not self.frozen:
                step = adapted(step, float(taken.double().mean()))
        if not self.frozen:
            self.steps[t] = self.step = step
        return Prediction(states.x.to(x.dtype), *target.schedule.at(t, x), states.at.eps.to(x.dtype))


@torch.no_grad()
def _by_particles(
    model: Denoiser, n: int, y: Any, seed: int, batch_size: int | None, units: str, moves: int,
    particles: int, sweeps: int, progress: bool,
) -> Draws:  # fmt: skip
    """Samples by sequential Monte Carlo, and by replica exchange started from it."""
    n = check_count("n", n)
    if particles * max(sweeps, 1) < n:
        raise UserError(f"{n} samples of {particles} particles: give at least as many particles as samples")
    target = annealed(model, y, "particles", batch_size)
    generator = stream(seed, "particles")
    with evaluation_mode(model):
        kernels = Kernels.of_target(target, seed)
        islands = max(2, min(ISLANDS, particles // ISLAND_SIZE))
        size = -(-particles // islands)
        if sweeps:
            rungs = ladder(target, kernels, 1, max(particles, 2), generator)
            trace = exchange(
                target, kernels, rungs.levels, rungs.x, check_count("sweeps", sweeps, 4), -(-sweeps // 4), generator,
                rungs.step, moves, progress,
            )  # fmt: skip
            x, log_w = trace.x.flatten(0, 1), None
            log_z, ess = LogZ.of_replicas(trace, ["particles"]), trace.ess()
        else:
            found = smc(target, kernels, 1, islands, size, generator, moves, progress=progress)
            x, estimates = found.states.x, found.log_estimates
            if not bool(estimates.isfinite().any()):
                raise UserError("no particle has any weight: the composition contradicts itself")
            log_w = (estimates[:, None] + found.log_weights.log_softmax(1)).flatten().log_softmax(0)
            name = f"smc, {islands} x {size} particles, {moves} moves"
            log_z = LogZ.of_weights(estimates, name, 1, x[0].numel())
            ess = min(float(effective(log_w[None])), float(found.least.sum()))
        if ess < COLLAPSE * particles:
            warnings.warn(
                f"the weights have collapsed: {ess:.1f} of {particles} particles count; use more particles, moves "
                "(corrector) or sweeps; or the composition asks for what the model hardly has", stacklevel=3,
            )  # fmt: skip
        x_0 = denoised(target.schedule, x, 1, target.evaluate(x, 1).eps)
        x_0 = finished(model, x_0, units).to(working_dtype(model, torch.get_default_dtype()))
    if log_w is None:
        chosen = torch.randperm(len(x), generator=generator)[:n]
        log_w = torch.full((len(x),), -math.log(len(x)), dtype=torch.float64)
    else:
        offset = torch.rand(1, generator=generator, dtype=torch.float64)
        spread = systematic(log_w.exp().cpu()[None].expand(1, -1), offset)[0]
        chosen = spread[torch.randperm(len(spread), generator=generator)[:n]]
    return Draws(as_rows(model, x_0[chosen], units), ess, log_z, x_0, log_w.cpu())


