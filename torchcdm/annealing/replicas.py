"""Replica exchange: points at every rung of a ladder of levels, moved, and swapped by the kernels between the rungs.

A sweep moves every replica by an accepted Langevin step, then swaps neighbouring rungs, even pairs and then odd ones:
x_t' ~ q(. | x_s) and x_s' ~ r(. | x_t) take the places of x_t and x_s with probability min{1, exp[w(x_s', x_t) -
w(x_s, x_t')]} (accelerated parallel tempering, arXiv 2502.10328). Above the highest rung, level T, lies the start
density: a fresh draw takes the place of x_T in the same way. Every attempt, accepted or not, yields a work of either
direction. Swaps are between replicas of one column, so that columns are independent of each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchcdm.annealing.kernels import Kernels, denoised
from torchcdm.annealing.moves import FIRST_STEP, States, adapted, chance, langevin
from torchcdm.annealing.particles import smc
from torchcdm.annealing.ratios import Ratios, autocorrelation_time, bar, mbar
from torchcdm.annealing.target import Target
from torchcdm.runtime.processes import alone

SPACING = 0.9
"""Deviation of the work between neighbouring rungs, nats: swaps are accepted about half of the time."""

KEPT_VALUES = 2**23
"""Numbers kept for MBAR at most: states are thinned to so many."""


@dataclass(frozen=True)
class Ladder:
    """Levels that follow each other at about equal works, and particles that came down by them.

    Attributes:
        levels: Rising, the last one T.
        step: Step sizes of moves that suited, (rungs,).
        x: Particles at each, equally weighted, (rungs, n, *shape).
    """

    levels: list[int]
    step: Tensor
    x: Tensor


def ladder(target: Target, kernels: Kernels, level: int, n: int, generator: torch.Generator) -> Ladder:
    """Rungs from ``level`` to T where ``n`` particles came down in steps of works that deviate by :data:`SPACING`."""
    levels, steps, points = [], [], []

    def seen(states: States, _: Tensor, step: float) -> None:
        for column, value in ((levels, states.t), (steps, step), (points, states.x.clone())):
            column.insert(0, value)

    smc(target, kernels, level, 1, n, generator, moves=2, below=math.inf, spacing=SPACING, seen=seen)
    return Ladder(levels, torch.tensor(steps, dtype=torch.float64), torch.stack(points))


@dataclass(frozen=True)
class Trace:
    """What happened in replica exchange after the burn-in.

    Attributes:
        levels: The rungs, rising; above the last one is the start density.
        down: w of every attempted swap of a rung and the next, downwards, nats, (sweeps, rungs, columns).
        up: The same upwards.
        swapped: Share of swaps accepted, (rungs,); the last one is that of fresh draws of the start density.
        moved: Share of moves accepted, (rungs,).
        step: Step sizes of the moves, frozen after the burn-in, (rungs,).
        log_gamma: log gamma at the lowest rung, (sweeps, columns).
        arrivals: Replicas that came from the start density all the way to the lowest rung, (columns,).
        columns: For MBAR: log density of all rungs and the start, (n, rungs + 1); None where a pass tells one level.
        rung: Which of them each is from, long (n,).
        x: Points of the lowest rung, thinned, (draws, columns, *shape).
    """

    levels: list[int]
    down: Tensor
    up: Tensor
    swapped: Tensor
    moved: Tensor
    step: Tensor
    log_gamma: Tensor
    arrivals: Tensor
    columns: Tensor | None
    rung: Tensor | None
    x: Tensor

    def log_z(self, columns: Tensor | slice = slice(None), sweeps: slice = slice(None)) -> Ratios:
        """log Z of each rung less that of the next, by BAR; the start density is normalised."""
        return bar(self.down[sweeps, :, columns], self.up[sweeps, :, columns])

    def trend(self, columns: Tensor | slice = slice(None)) -> tuple[list[float], float]:
        """log Z in the four quarters of the run, and their slope in its own standard errors."""
        edges = [len(self.down) * k // 4 for k in range(5)]
        parts = [self.log_z(columns, slice(*ends)) for ends in zip(edges[:-1], edges[1:], strict=True)]
        weights = (-3, -1, 1, 3)
        slope = sum(w * part.total for w, part in zip(weights, parts, strict=True))
        error = sum(w * part.errors() for w, part in zip(weights, parts, strict=True)).square().sum().sqrt()
        return [part.total for part in parts], slope / float(error)

    def mbar(self) -> Ratios:
        """The same from densities at the same states, by MBAR: a check of the works, not of convergence.

        Without the kernels neighbouring rungs overlap less, so that it is the noisier one of the two.
        """
        count = self.down.shape[2]
        return mbar(self.columns, self.rung, torch.arange(count).repeat(len(self.rung) // count))

    def ess(self) -> float:
        """Independent draws at the lowest rung, by the autocorrelation of log gamma."""
        return self.log_gamma.numel() / autocorrelation_time(self.log_gamma)


@torch.no_grad()
def exchange(
    target: Target,
    kernels: Kernels,
    levels: Sequence[int],
    x: Tensor,
    sweeps: int,
    burn_in: int,
    generator: torch.Generator,
    step: Tensor | None = None,
    moves: int = 1,
    progress: bool = False,
) -> Trace:
    """Replica exchange over the rungs of a ladder. A sweep takes ``moves`` + 2 evaluations of each replica.

    Args:
        target: The target.
        kernels: The kernels between the rungs.
        levels: The rungs, rising to T, at least two.
        x: Where the replicas start, model units, float64 (rungs, columns, *shape), at least two columns.
        sweeps: Sweeps that count, at least 4.
        burn_in: Sweeps before, in which step sizes adapt.
        generator: A CPU generator.
        step: Step sizes to begin with, (rungs,).
        moves: Langevin moves in a sweep.
        progress: Shows a progress bar.
    """
    from tqdm.auto import tqdm

    count, columns = x.shape[:2]
    step = torch.full((count,), FIRST_STEP, dtype=torch.float64) if step is None else step
    with alone():
        run = _Run(target, kernels, torch.tensor(levels), x.flatten(0, 1), columns, generator)
        for k in tqdm(range(burn_in + sweeps), desc="replicas", unit="sweep", disable=not progress, leave=False):
            if k == burn_in:
                run.forget(thinned_to=sweeps)
            for _ in range(moves):
                accepted = run.move(step)
                step = adapted(step, accepted) if k < burn_in else step
            run.swap(0)
            run.swap(1)
            run.record()
    return run.trace(list(levels), step, sweeps, moves)


class _Run:
    """Replicas of all rungs in one batch: replica of rung l in column k is row l * columns + k."""

    def __init__(
        self, target: Target, kernels: Kernels, levels: Tensor, x: Tensor, columns: int, generator: torch.Generator
    ) -> None:
        self.target, self.kernels, self.generator = target, kernels, generator
        self.levels, self.count, self.columns = levels.to(x.device), len(levels), columns
        self.states = States.of(target, x.clone(), self.levels.repeat_interleave(columns))
        # Whether a replica came from the start density.
        self.fresh = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        self.forget(1)

    def forget(self, thinned_to: int) -> None:
        """Begins the records anew, for so many sweeps."""
        self.down, self.up, self.log_gamma, self.kept, self.x, self.seen = [], [], [], [], [], 0
        self.swapped, self.moved, self.arrivals = 0.0, 0.0, 0
        size = (len(self.states.x) + self.columns) * (self.count + 1)
        self.every = math.ceil(thinned_to * size / KEPT_VALUES)

    def move(self, step: Tensor) -> Tensor:
        """Moves all; the share accepted in each rung."""
        each = step.repeat_interleave(self.columns)
        accepted = langevin(self.target, self.kernels, self.states, each, self.generator)
        share = accepted.view(self.count, -1).double().mean(1).cpu()
        self.moved = self.moved + share
        return share

    def swap(self, parity: int) -> None:
        """Tries every other pair of neighbouring rungs, and the start density where it is the upper one of a pair."""
        K, states, device = self.columns, self.states, self.states.x.device
        if parity == 0:
            shape = self.count, K
            self.works = [torch.empty(shape, dtype=torch.float64, device=device) for _ in range(2)]
        lower = torch.arange(parity, self.count - 1, 2, device=device)
        rows = (lower[:, None] * K + torch.arange(K, device=device)).flatten()
        down, up = states.take(rows), states.take(rows + K)
        shape, dim = down.x.shape, math.prod(self.target.shape)
        noise_up = torch.randn(shape, generator=self.generator, dtype=torch.float64).to(device)
        noise_down = torch.randn(len(rows), dim, generator=self.generator, dtype=torch.float64).to(device)
        x0 = denoised(self.target.schedule, up.x, up.t, up.at.eps)
        kernels, levels = self.kernels, [down.t, up.t]
        proposals = [kernels.down(up.x, x0, up.t, down.t, noise_down), kernels.up(down.x, down.t, up.t, noise_up)]
        top = (self.count - 1) % 2 == parity
        if top:
            x_T, log_start = self.target.start(K, self.generator)
            proposals, levels = [*proposals, x_T], [*levels, self.levels[-1:].expand(K)]
        found, n = States.of(self.target, torch.cat(proposals), torch.cat(levels)), len(rows)
        new = [found.take(torch.arange(a, b, device=device)) for a, b in ((0, n), (n, 2 * n), (2 * n, len(found.x)))]
        works = [kernels.work(s.x, t.x, s.at, t.at, down.t, up.t) for s, t in ((new[0], up), (down, new[1]))]
        accepted = chance(works[0] - works[1], self.generator)
        for side, values in zip(self.works, works, strict=True):
            side[parity : self.count - 1 : 2] = values.view(-1, K)
        taken = rows[accepted]
        states.put(taken, new[0].take(accepted))
        states.put(taken + K, new[1].take(accepted))
        self.fresh[taken], self.fresh[taken + K] = self.fresh[taken + K], self.fresh[taken]
        shares = torch.zeros(self.count, dtype=torch.float64)
        shares[parity : self.count - 1 : 2] = accepted.view(-1, K).double().mean(1).cpu()
        if top:
            last = torch.arange(len(states.x) - K, len(states.x), device=device)
            at_T = states.take(last)
            log_weights = new[2].at.log_gamma - log_start, at_T.at.log_gamma - self.target.log_start(at_T.x)
            accepted = chance(log_weights[0] - log_weights[1], self.generator)
            for side, values in zip(self.works, log_weights, strict=True):
                side[-1] = values
            states.put(last[accepted], new[2].take(accepted))
            self.fresh[last[accepted]] = True
            shares[-1] = accepted.double().mean()
            self.drawn = new[2]
        self.swapped = self.swapped + shares

    def record(self) -> None:
        """What the sweep that ends here has shown."""
        K, at = self.columns, self.states.at
        self.down.append(self.works[0])
        self.up.append(self.works[1])
        self.log_gamma.append(at.log_gamma[:K].clone())
        self.arrivals = self.arrivals + self.fresh[:K].long()
        self.fresh[:K] = False
        if self.seen % self.every == 0:
            self.x.append(self.states.x[:K].clone())
            if at.levels is not None:
                points = torch.cat([self.states.x, self.drawn.x])
                values = torch.cat([at.levels, self.drawn.at.levels])[:, self.levels]
                self.kept.append(torch.cat([values, self.target.log_start(points)[:, None]], 1).cpu())
        self.seen += 1

    def trace(self, levels: list[int], step: Tensor, sweeps: int, moves: int) -> Trace:
        """All records."""
        rung = torch.arange(self.count + 1).repeat_interleave(self.columns).repeat(len(self.kept))
        return Trace(
            levels, torch.stack(self.down).cpu(), torch.stack(self.up).cpu(), self.swapped / sweeps,
            self.moved / (sweeps * moves), step, torch.stack(self.log_gamma).cpu(), self.arrivals.cpu(),
            torch.cat(self.kept) if self.kept else None, rung if self.kept else None, torch.stack(self.x),
        )  # fmt: skip
