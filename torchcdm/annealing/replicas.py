"""Replica exchange: points at every rung of a ladder of levels, moved, and swapped by the kernels between the rungs.

A sweep moves every replica by an accepted Langevin step, then swaps neighbouring rungs, even pairs and then odd ones:
x_t' ~ q(. | x_s) and x_s' ~ r(. | x_t) take the places of x_t and x_s with probability min{1, exp[w(x_s', x_t) -
w(x_s, x_t')]} (accelerated parallel tempering, arXiv 2502.10328). Above the highest rung, level T, lies the start
density: a fresh draw takes the place of x_T in the same way. Every attempt, accepted or not, yields a work of either
direction. Swaps are between replicas of one column, so that columns are independent of each other.
"""

import math
from typing import NamedTuple, final

import torch
from torch import Generator, Tensor

from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.particles import States, adapted, chance, langevin, smc
from torchcdm.annealing.ratios import Ratios, autocorrelation_time, bar, mbar
from torchcdm.annealing.target import Target
from torchcdm.random import normal
from torchcdm.runtime.processes import alone, progress_bar

# Largest deviation of the work between rungs, nats: as half of all swaps are accepted, replicas cross N rungs in the
# fewest evaluations (Syed et al. 2022), about N² sweeps.
SPACING = 1.3
FAMILY = 8  # particles that come down for each column: columns that start in one population would not be independent
KEPT_VALUES = 2**23  # numbers kept for MBAR at most: states are thinned to so many


class Ladder(NamedTuple):
    """At least two levels that follow each other at about equal works, rising to T, and where replicas start."""

    levels: list[int]
    step: Tensor  # step sizes of moves that suited, (rungs,)
    x: Tensor  # equally weighted points, (rungs, n, *shape)


def ladder(target: Target, kernels: Kernels, level: int, columns: int, generator: Generator) -> Ladder:
    """Rungs from ``level`` to T where particles came down in steps of works that deviate by ``SPACING``.

    Each of the ``columns`` has one point a rung, from ``FAMILY`` particles that are resampled among themselves.
    """
    chosen = FAMILY * torch.arange(columns) + torch.randint(FAMILY, (columns,), generator=generator)
    rungs: list[tuple[int, float, Tensor]] = []
    # No more than what is chosen: of images all states together would be gigabytes.
    options = {"seen": lambda states, step: rungs.append((states.t, float(step), states.x[chosen]))}
    smc(target, kernels, level, columns, FAMILY, generator, 2, math.inf, SPACING, **options)
    levels, steps, x = zip(*reversed(rungs), strict=True)
    return Ladder(list(levels), torch.tensor(steps, dtype=torch.float64), torch.stack(x))


@final
class Replicas:
    """Replicas of all rungs in one batch, and what the sweeps that count, 0, 1, ..., have shown of them.

    The replica of rung l in column k is row l * columns + k of the batch. Each point of a rung of the ladder starts in
    a column of its own, at least two of them. A sweep has ``moves`` of each replica, and takes two evaluations more.
    The ``levels`` of the rungs rise; above the last one is the start density.
    """

    @torch.no_grad()
    def __init__(self, target: Target, kernels: Kernels, rungs: Ladder, generator: Generator, moves: int = 1) -> None:
        x = rungs.x.flatten(0, 1).clone()
        self.target, self.kernels, self.generator, self.moves = target, kernels, generator, moves
        self.levels, self.step, (self.count, self.columns) = rungs.levels, rungs.step, rungs.x.shape[:2]
        self.states = States.of(target, x, torch.tensor(rungs.levels).to(x.device).repeat_interleave(self.columns))
        self.fresh = torch.zeros(len(x), dtype=torch.bool, device=x.device)  # those from the start density

    @torch.no_grad()
    def go_on(self, sweeps: int, burn_in: int = 0, progress: bool = False) -> "Replicas":
        """So many ``sweeps``, at least 4, take the place of all that counted; returns itself.

        Step sizes adapt in those of the ``burn_in`` before them, and stay as they are.
        """
        shape, x = (sweeps, self.count, self.columns), self.states.x
        self.arrivals = torch.zeros(self.columns, dtype=torch.long)  # from the start density to the lowest rung
        self.down, self.up = torch.empty(2, *shape, dtype=torch.float64)  # w of attempted swaps with the next, nats
        self.log_gamma = torch.empty(sweeps, self.columns, dtype=torch.float64)  # at the lowest rung
        self.swapped = torch.zeros(self.count, dtype=torch.float64)  # share accepted, the last of fresh draws
        # For MBAR, thinned: log density of all rungs and the start at all replicas and fresh draws of the start,
        # (n, rungs + 1) each; empty where a pass tells one level.
        self.densities: list[Tensor] = []
        self.every = math.ceil(sweeps * (len(x) + self.columns) * (self.count + 1) / KEPT_VALUES)
        self.x = x.new_empty(-(-sweeps // self.every), self.columns, *x.shape[1:])  # of the lowest rung, thinned
        with alone():
            for sweep in progress_bar(range(-burn_in, sweeps), "replicas", progress, unit="sweep"):
                for _ in range(self.moves):
                    each = self.step.repeat_interleave(self.columns)
                    accepted = langevin(self.target, self.kernels, self.states, each, self.generator)
                    if sweep < 0:
                        self.step = adapted(self.step, accepted.view(self.count, -1).double().mean(1).cpu())
                self.swap(sweep, 0)
                self.swap(sweep, 1)
                self.record(sweep)
        return self

    def log_z(self, columns: Tensor | slice = slice(None), sweeps: slice = slice(None)) -> Ratios:
        """log Z of each rung less that of the next, by BAR; the start density is normalised."""
        return bar(self.down[sweeps, :, columns], self.up[sweeps, :, columns])

    def mbar(self, columns: Tensor | slice = slice(None)) -> Ratios:
        """The same from densities at the same states, by MBAR: a check of the works, not of convergence.

        Without the kernels neighbouring rungs overlap less, so that it is the noisier one of the two.
        """
        densities = [one.view(self.count + 1, self.columns, -1)[:, columns] for one in self.densities]
        n = densities[0].shape[1]
        rung = torch.arange(self.count + 1).repeat_interleave(n).repeat(len(densities))
        values = torch.cat([one.flatten(0, 1) for one in densities])
        return mbar(values, rung, torch.arange(n).repeat(len(rung) // n))

    def ess(self) -> float:
        """Independent draws with mass at the lowest rung, by the autocorrelation in columns never without it."""
        inside = self.log_gamma.isfinite()
        whole = self.log_gamma[:, inside.all(0)]
        return int(inside.sum()) / (autocorrelation_time(whole) if whole.numel() else len(inside))

    def swap(self, sweep: int, parity: int) -> None:
        """Tries every other pair of neighbouring rungs, and the start density where it is the upper one of a pair."""
        K, states, kernels, device = self.columns, self.states, self.kernels, self.states.x.device
        pairs = slice(parity, self.count - 1, 2)
        lower = torch.arange(self.count, device=device)[pairs]
        rows = (lower[:, None] * K + torch.arange(K, device=device)).flatten()
        down, up, n = states.take(rows), states.take(rows + K), len(rows)
        raised = kernels.up(down.x, down.t, up.t, normal(down.x.shape, self.generator, device))
        noise = normal((n, math.prod(self.target.shape)), self.generator, device)
        x = [kernels.down(up.x, up.at.eps, up.t, down.t, noise), raised]
        t, last = [down.t, up.t], slice(len(states.x) - K, None)
        top = (self.count - 1) % 2 == parity
        if top:
            x_T, log_start = self.target.start(K, self.generator)
            x, t = [*x, x_T], [*t, states.t[last]]
        found = States.of(self.target, torch.cat(x), torch.cat(t))
        below, above = found.take(slice(0, n)), found.take(slice(n, 2 * n))
        works = [kernels.work(s.x, t.x, s.at, t.at, down.t, up.t) for s, t in ((below, up), (down, above))]
        accepted = chance(works[0] - works[1], self.generator)
        self._swapped(sweep, pairs, works, accepted)
        taken = rows[accepted]
        states.put(taken, below.take(accepted))
        states.put(taken + K, above.take(accepted))
        self.fresh[taken], self.fresh[taken + K] = self.fresh[taken + K], self.fresh[taken]
        if top:
            self.drawn, at_T = found.take(slice(2 * n, None)), states.take(last)
            works = [self.drawn.at.log_gamma - log_start, at_T.at.log_gamma - self.target.log_start(at_T.x)]
            accepted = chance(works[0] - works[1], self.generator)
            self._swapped(sweep, slice(-1, None), works, accepted)
            taken = torch.arange(len(states.x), device=device)[last][accepted]
            states.put(taken, self.drawn.take(accepted))
            self.fresh[taken] = True

    def _swapped(self, sweep: int, rungs: slice, works: list[Tensor], accepted: Tensor) -> None:
        """Keeps the works, and counts what was accepted."""
        if sweep >= 0:
            self.down[sweep, rungs], self.up[sweep, rungs] = (work.view(-1, self.columns).cpu() for work in works)
            self.swapped[rungs] += accepted.view(-1, self.columns).double().mean(1).cpu() / len(self.down)

    def record(self, sweep: int) -> None:
        """What the sweep that ends here has shown of the states."""
        K, at = self.columns, self.states.at
        if sweep >= 0:
            self.arrivals += self.fresh[:K].cpu()
            self.log_gamma[sweep] = at.log_gamma[:K].cpu()
        self.fresh[:K] = False
        if sweep >= 0 and sweep % self.every == 0:
            self.x[sweep // self.every] = self.states.x[:K]
            if at.levels is not None:
                points = torch.cat([self.states.x, self.drawn.x])
                values = torch.cat([at.levels, self.drawn.at.levels])[:, self.levels]
                self.densities.append(torch.cat([values, self.target.log_start(points)[:, None]], 1).cpu())
