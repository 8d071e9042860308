"""log Z of larger images by replica exchange, in pieces: rungs between levels, kernels that see brightness.

    python -m studies.benchmarks.log_z_images zoo:fashion-mnist-conditional --level 8 --minutes 60 \\
        --state runs/chains.safetensors --name fashion-mnist-conditional --json studies/results/log_z_images.json

What ``cdm nll --methods logz`` does takes too long on 28x28 images, whose neighbouring levels differ by many nats at
little noise. Here

- there are rungs between the levels, whose log p is interpolated;
- the variance of the kernel r is one for each pixel, by its denoised brightness: the background is known exactly;
- rungs are placed by the deviation of the works between held-out images of neighbouring rungs;
- replicas start from held-out images and from samples of the model, half of the columns each.

Works and states are written to ``--state`` every few sweeps, so that a run can be stopped and taken up again. Sweeps
before the trend over the quarters of the rest is below its bound are left out.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from studies.benchmarks.files import write_named
from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.particles import FIRST_STEP, States, adapted, langevin, resampled
from torchcdm.annealing.replicas import Ladder, Replicas
from torchcdm.annealing.target import Evaluated, Target, in_batches, reference_gaussian
from torchcdm.data.source import DataSource
from torchcdm.diffusion.gaussian import GaussianMarginals
from torchcdm.diffusion.schedules import Level, NoiseSchedule
from torchcdm.likelihood import Scoring, elbo, probability_flow, single_pass
from torchcdm.likelihood.log_z import AGREEMENT, REACH, LogZ
from torchcdm.likelihood.one_pass import restricted_pass
from torchcdm.likelihood.scoring import Batch
from torchcdm.models.density import DensityModel
from torchcdm.random import stream
from torchcdm.training.build import load_source
from torchcdm.training.checkpoint import load, read_info
from torchcdm.units import standard_error

EDGES = torch.tensor([-0.99, -0.98, -0.96, -0.93, -0.9, -0.8, -0.6, -0.4, -0.2, 0, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95])
"""Edges of brightness, model units, between which the variance of r is constant."""

SPACING, BATCH, PIECE, ADAPTING = 1.4, 32, 5, 20
"""Deviation of the works of neighbouring rungs, nats; images a pass; sweeps between two writes; first sweeps between
which step sizes adapt."""

PARTICLES, MOVES = 32, 1
"""Particles of an island from which a column starts, and their moves at each rung."""


class Rungs(NoiseSchedule):
    """The levels of a schedule at real numbers, where a precision 1 / sigma² between two is interpolated."""

    def __init__(self, schedule: NoiseSchedule, at: Tensor) -> None:
        self.lower = at.floor().long().clamp_max(schedule.T - 1)
        self.share = at - self.lower
        precision = schedule.sigma**-2.0
        self._sigma = torch.lerp(precision[self.lower], precision[self.lower + 1], self.share) ** -0.5
        super().__init__(len(at))

    def between(self, levels: Tensor) -> Tensor:
        """log p at the rungs, (B, rungs), from that at the levels, (B, T+2)."""
        return torch.lerp(levels[:, self.lower], levels[:, self.lower + 1], self.share)

    def inner_levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return (1 - self._sigma**2).sqrt(), self._sigma


class Interpolated(Target):
    """A model at levels of real numbers: log p is interpolated, and is the log density of what is between two."""

    def __init__(self, model: DensityModel, at: Tensor, images: Tensor) -> None:
        schedule = Rungs(model.schedule, at)
        super().__init__(schedule, model.shape, GaussianMarginals.fit(images, schedule, 1e-4, "cosine"))
        self.model, self.evaluations = model, 0

    def evaluate(self, x_t: Tensor, t: Level) -> Evaluated:
        rung = torch.as_tensor(t).expand(len(x_t))
        self.evaluations += len(x_t)

        def part(rows: slice) -> tuple[Tensor, ...]:
            schedule, own = self.schedule, rung[rows, None]
            with torch.enable_grad():
                x = x_t[rows].float().requires_grad_()
                levels = schedule.between(self.model.conditional_and_marginal(x)[1])
                log_gamma = levels.gather(1, own - 1)[:, 0]
                (score,) = torch.autograd.grad(log_gamma.sum(), x)
            ends = torch.nn.functional.pad(levels.detach(), (1, 1), value=torch.nan)
            return log_gamma.detach(), -schedule.at(own[:, 0], score)[1].double() * score, ends

        return Evaluated(*in_batches(self.model, x_t, part, BATCH))


class ByBrightness(Kernels):
    """r with a variance of each pixel that depends on its denoised brightness; measured on images.

    ``variances`` in the cosine basis, for moves, are of the same errors.
    """

    def __init__(self, target: Target, images: Tensor, generator: torch.Generator) -> None:
        super().__init__(target.reference)
        blank = GaussianMarginals.blank(target.schedule, target.shape, "diagonal")
        rotation, T, self.table = target.reference.rotation, target.schedule.T, []
        for t in range(1, T + 1):
            noise = torch.randn(images.shape, generator=generator, dtype=torch.float64)
            x_t = target.schedule.perturb(images, t, noise)
            x_0 = self.x0(x_t, target.eps(x_t, t), t)
            squares, where = (images - x_0).square(), torch.bucketize(x_0, EDGES.double()).flatten()
            total = torch.zeros(len(EDGES) + 1, dtype=torch.float64).index_add(0, where, squares.flatten())
            count = torch.bincount(where, minlength=len(EDGES) + 1)
            # A brightness that hardly occurs has the variance of all pixels.
            self.table.append((total + 100 * squares.mean()) / (count + 100))
            self.variances[t - 1] = rotation(images - x_0).square().mean(0)
        self.table, self.reference = torch.stack(self.table), blank

    def _reverse(self, x_t: Tensor, eps: Tensor, t: Level, s: Level) -> tuple[Tensor, Tensor]:
        a, b, c = self.schedule.reverse_kernel(t, s, x_t)
        x_0 = self.x0(x_t, eps, t)
        rung = torch.as_tensor(t).expand(len(x_t)).reshape(-1, *[1] * (x_t.ndim - 1))
        spread = self.table[rung - 1, torch.bucketize(x_0, EDGES.double())]
        return a * x_t + b * x_0, (c**2 + b**2 * spread).flatten(1)


def deviations(target: Target, kernels: Kernels, images: Tensor, generator: torch.Generator) -> Tensor:
    """Deviation of the works upwards from noised images between neighbouring rungs, nats, (T-1,)."""
    found = []
    for s in range(1, target.schedule.T):
        noise = torch.randn(2, *images.shape, generator=generator, dtype=torch.float64)
        x_s = target.schedule.perturb(images, s, noise[0])
        x_t = kernels.up(x_s, s, s + 1, noise[1])
        at_s, at_t = target.evaluate(x_s, s), target.evaluate(x_t, s + 1)
        found.append(float(kernels.work(x_s, x_t, at_s, at_t, s, s + 1).std()))
    return torch.tensor(found, dtype=torch.float64)


def placed(at: Tensor, deviation: Tensor, spacing: float) -> Tensor:
    """Real levels at about equal deviations, from those measured between the levels ``at``."""
    way = torch.cat([deviation.new_zeros(1), deviation.cumsum(0)])
    wanted = torch.linspace(0, float(way[-1]), int(way[-1] / spacing) + 2, dtype=torch.float64)
    upper = torch.searchsorted(way, wanted).clamp(1, len(way) - 1)
    share = (wanted - way[upper - 1]) / (way[upper] - way[upper - 1])
    return torch.lerp(at[upper - 1], at[upper], share.clamp(0, 1))


@torch.no_grad()
def descend(
    target: Target, kernels: Kernels, islands: int, size: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Particles from the start down all rungs, resampled on the way: one a rung and island, (T, islands, *shape).

    And step sizes of moves, (T,), and logarithms of unbiased estimates of Z, (islands,).
    """
    T, n, d = target.schedule.T, islands * size, len(kernels.variances[0])
    x, log_start = target.start(n, generator)
    states, step = States.of(target, x, T), torch.tensor(FIRST_STEP, dtype=torch.float64)
    log_w, log_z = (states.at.log_gamma - log_start).view(islands, size), torch.zeros(islands, dtype=torch.float64)
    visited, steps = [], []
    for t in range(T, 0, -1):
        if t < T:
            noise = torch.randn(n, d, generator=generator, dtype=torch.float64)
            lower = States.of(target, kernels.down(states.x, states.at.eps, t + 1, t, noise), t)
            works = kernels.work(lower.x, states.x, lower.at, states.at, t, t + 1)
            states, log_w = lower, log_w + works.view(islands, size)
        states, log_w, log_z = resampled(states, log_w, log_z, 0.7, generator)
        for _ in range(MOVES):
            step = adapted(step, float(langevin(target, kernels, states, step, generator).double().mean()))
        one = torch.multinomial(log_w.softmax(1), 1, generator=generator)[:, 0] + size * torch.arange(islands)
        visited.append(states.x[one])
        steps.append(step)
    return torch.stack(visited[::-1]), torch.stack(steps[::-1]), log_z + log_w.logsumexp(1) - math.log(size)


class Chains:
    """Replica exchange that is written to a file, and taken up from it.

    Attributes:
        run: The replicas. The first half of the columns starts from samples, the other from held-out images.
        kept: What the file has: ``down`` and ``up``, works of all sweeps, (sweeps, rungs, columns); ``profiles``, log
            p of all rungs, and of the start, at the replicas of the lowest one, (sweeps, columns, rungs + 1);
            ``estimates``, log Z by the particles that gave the samples, nats; and what is needed to go on.
    """

    def __init__(
        self, model: DensityModel, source: DataSource, level: int, columns: int, seed: int, path: Path,
        at: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.path, self.columns = path, columns
        before, generator = time.process_time(), stream(seed, "replicas")

        def clean(split: str, rows: slice) -> Tensor:
            x = source.split(split).tensors(None)[0][rows]
            return Batch(model, x, None, slice(0, len(x)), seed).clean()[0]

        fit, test = clean("train", slice(0, 2000)), clean("test", slice(-64, None))
        kept = load_file(path) if path.exists() else None
        at = kept["at"] if kept else at
        if at is None:
            T, levels = model.schedule.T, [float(level)]
            while levels[-1] < T:
                levels.append(min(T, max(levels[-1] + 1, round(levels[-1] * 1.15))))
            at = torch.tensor(levels, dtype=torch.float64)
            for spacing in (2 * SPACING, SPACING):
                target = Interpolated(model, at, fit)
                found = deviations(target, ByBrightness(target, fit[:64], generator), test, generator)
                print(f"{len(at)} rungs, deviations of works {found.min():.2f} to {found.max():.2f}", flush=True)
                at = placed(at, found, spacing)
        target, K = Interpolated(model, at, fit), len(at)
        kernels, empty = ByBrightness(target, fit[:64], generator), torch.empty(0, dtype=torch.float64)
        if kept is None:
            own, step, estimates = descend(target, kernels, columns // 2, PARTICLES, generator)
            print(f"{K} rungs; log Z by particles {estimates.tolist()}", flush=True)
            noise = torch.randn(K, columns // 2, *model.shape, generator=generator, dtype=torch.float64)
            data = [target.schedule.perturb(test[: columns // 2], t + 1, eps) for t, eps in enumerate(noise)]
            kept = {
                "at": at, "x": torch.cat([own, torch.stack(data)], 1), "step": step, "estimates": estimates,
                "down": empty.view(0, K, columns), "up": empty.view(0, K, columns),
                "profiles": empty.view(0, columns, K + 1), "seconds": torch.zeros((), dtype=torch.float64),
                "fresh": torch.zeros(K * columns), "arrivals": torch.zeros(columns),
                "generator": generator.get_state(),
            }  # fmt: skip
        generator.set_state(kept["generator"])
        ladder = Ladder(list(range(1, K + 1)), kept["step"], kept["x"])
        self.run, self.kept = Replicas(target, kernels, ladder, generator), kept
        self.run.fresh = kept["fresh"].bool()
        kept["seconds"] += time.process_time() - before

    def go_on(self, minutes: float) -> None:
        """Sweeps for so long, at least a piece; step sizes adapt in the first of all pieces."""
        end, run, kept = time.monotonic() + 60 * minutes, self.run, self.kept
        first = True
        while first or time.monotonic() < end:
            first, before, done = False, time.process_time(), len(kept["down"])
            run.go_on(PIECE, PIECE if done < ADAPTING else 0)
            profiles = torch.stack([one[: self.columns] for one in run.densities])
            for name, new in {"down": run.down, "up": run.up, "profiles": profiles}.items():
                kept[name] = torch.cat([kept[name], new])
            kept["arrivals"] = kept["arrivals"] + run.arrivals
            kept["seconds"] += time.process_time() - before
            kept["x"] = run.states.x.view(kept["x"].shape).clone()
            kept |= {"step": run.step, "fresh": run.fresh.double(), "generator": run.generator.get_state()}
            save_file(kept, self.path.with_suffix(".new"))
            self.path.with_suffix(".new").rename(self.path)
            z = [run.log_z(columns).total for columns in torch.arange(self.columns).view(2, -1)]
            swaps = f"swaps {run.swapped.mean():.2f} least {run.swapped.min():.2f}"
            print(
                f"{done + PIECE} sweeps, {float(kept['seconds']):.0f} s, {swaps}, log Z {z[0]:.1f} {z[1]:.1f}",
                flush=True,
            )


class Fence:
    """A density without mass where log p of the rungs is not what is usual at points of the lowest one."""

    def __init__(self, schedule: Rungs, profiles: Tensor) -> None:
        self.schedule, self.middle, self.reach = schedule, profiles.mean(0), REACH * profiles.std(0)

    def inside(self, profiles: Tensor) -> Tensor:
        """Whether log p of all rungs, (B, rungs), is usual; boolean (B,)."""
        return ((profiles - self.middle).abs() <= self.reach).all(1)

    def restricted(self, levels: Tensor) -> Tensor:
        """log p at every level (B, T+2) where there is mass, -inf elsewhere."""
        return levels.masked_fill(~self.inside(self.schedule.between(levels))[:, None], -math.inf)


def settled(run: Replicas, down: Tensor, up: Tensor) -> int:
    """Sweeps that are left out: as few eighths as leave no trend in the rest, at most six; ``run`` keeps the rest."""
    for eighths in range(7):
        first = len(down) * eighths // 8
        run.down, run.up = down[first:], up[first:]
        if abs(run.trend()[1]) <= AGREEMENT:
            break
    return first


def at_levels(kernels: Kernels, rungs: Rungs, model: DensityModel) -> Kernels:
    """Kernels of the model's levels, for the ELBO: variances of the errors in the cosine basis, from the rungs'."""
    at, levels = rungs.lower + rungs.share, torch.arange(1, model.schedule.T + 1, dtype=torch.float64)
    upper = torch.searchsorted(at, levels).clamp(1, len(at) - 1)
    share = ((levels - at[upper - 1]) / (at[upper] - at[upper - 1])).clamp(0, 1)[:, None]
    relative = kernels.variances / rungs.ratio[1:-1, None] ** 2
    relative = torch.lerp(relative[upper - 1], relative[upper], share)
    return Kernels(reference_gaussian(model), relative * model.schedule.ratio[1:-1, None] ** 2)


@torch.no_grad()
def measured(chains: Chains, model: DensityModel, source: DataSource, level: int, images: int) -> dict[str, Any]:
    """log Z, whether it can be believed, and the likelihoods of test images by one pass, the ELBO and the flow.

    ``minus`` has what one pass, not normalised, is above the others: mean, standard error, deviation.
    """
    run, kept, scoring = chains.run, chains.kept, Scoring(level, batch_size=BATCH)
    first = settled(run, kept["down"], kept["up"])
    run.swapped = (run.down - run.up).exp().clamp_max(1).mean((0, 2))
    run.arrivals, run.densities, run.x = kept["arrivals"], [], run.states.x[: chains.columns][None]
    z = replace(LogZ.of_replicas(run, ["samples", "data"]), level=level)
    profiles = kept["profiles"][first:, :, :-1].flatten(0, 1)
    z = replace(z, fence=Fence(run.target.schedule, profiles))
    bits, x = z.to_json(), source.split("test").tensors(None)[0][:images]
    outside = 1 - float(z.fence.inside(profiles).double().mean())
    kernels = at_levels(run.kernels, run.target.schedule, model)
    found = {
        "one-pass-level": single_pass(model, x, None, scoring),
        "one-pass-restricted": restricted_pass(model, x, z, scoring),
        "elbo": elbo(model, x, None, scoring, kernels), "flow": probability_flow(model, x, None, scoring),
    }  # fmt: skip
    base = found["one-pass-level"].values()
    against = {name: base - found[name].values() for name in ("elbo", "flow")}
    shift = bits["value"]
    return {
        "data": source.name, "dim": z.dim, "level": level, "rungs": kept["at"].tolist(),
        "replicas": chains.columns // 2, "sweeps": len(run.down), "left_out": first,
        "cpu_seconds": round(float(kept["seconds"]), 1), "se": z.se * shift / z.value, "doubt": z.doubt,
        "particles": (kept["estimates"] * shift / z.value).tolist(), "outside": outside,
        "columns": [run.log_z(one).total * shift / z.value for one in torch.arange(chains.columns)[:, None]],
        "log2_z_per_dim": bits, "log2_z_per_dim_check": None,
        "rows": {name: one.mean_and_error() for name, one in found.items()},
        "minus": {name: [float(d.mean()), standard_error(d), float(d.std())] for name, d in against.items()},
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, goes on, and writes what is known so far."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.benchmarks.log_z_images", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--name", required=True, help="key of the result in the file")
    parser.add_argument("--level", type=int, default=8)
    parser.add_argument("--columns", type=int, default=8, help="an even number")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--images", type=int, default=32, help="test images that are scored")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, required=True, help="file of the chains")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, source = load(options.run), load_source(read_info(options.run).data)
    with torch.no_grad():
        chains = Chains(model, source, options.level, options.columns, options.seed, options.state)
    chains.go_on(options.minutes)
    found = measured(chains, model, source, options.level, options.images)
    print(json.dumps(found, indent=1))
    write_named(options.name, found, options.json)


if __name__ == "__main__":
    main()
