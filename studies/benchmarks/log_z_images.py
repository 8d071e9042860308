"""log Z of larger images, class by class, in pieces: replica exchange on rungs between levels.

    python -m studies.benchmarks.log_z_images zoo:fashion-mnist-conditional --level 64 --minutes 10 \\
        --state runs/chains --name fashion-mnist-conditional --json studies/results/log_z_images.json

What ``cdm nll --methods logz`` does takes too long on 28x28 images, whose neighbouring levels differ by many nats at
little noise. Here

- each class of a joint model has replicas, rungs and a constant Z_y of its own, so that none has to leave its class,
  and sum_y pi_y p_t(x|y) / Z_y, from one pass, integrates to one;
- there are rungs between the levels, whose log p is interpolated;
- the variance of the kernel r is one for each pixel, by its denoised brightness: the background is known exactly;
- a density has no mass where the profile of log p over the rungs is far from that of training images of the class;
- rungs are placed by the deviation of the works between held-out images of neighbouring rungs;
- replicas start from held-out images of the class and from samples of it, half of the columns each.

Works and states are written to the folder ``--state`` every few sweeps, a file a class, so that a run can be stopped
and taken up again. The first half of the sweeps is left out.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from studies.benchmarks.files import write_named
from studies.benchmarks.image_bounds import Mixture, bound
from studies.benchmarks.image_rungs import BATCH, ByBrightness, Fence, Interpolated, deviations, placed
from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.particles import FIRST_STEP, States, adapted, langevin, resampled
from torchcdm.annealing.ratios import Ratios, bar
from torchcdm.annealing.replicas import Ladder, Replicas
from torchcdm.annealing.target import Target
from torchcdm.data.source import DataSource
from torchcdm.likelihood import Scoring, probability_flow
from torchcdm.likelihood.log_z import AGREEMENT
from torchcdm.likelihood.scoring import Batch
from torchcdm.models.density import DensityModel
from torchcdm.random import stream
from torchcdm.training.build import load_source
from torchcdm.training.checkpoint import load, read_info
from torchcdm.units import standard_error

SPACING, PIECE, ADAPTING = 1.4, 5, 20
"""Deviation of the works of neighbouring rungs, nats; sweeps between two writes; first sweeps between which step sizes
adapt."""

LEFT_OUT = 0.5
"""Share of the sweeps that is left out, whatever they read."""

HELD_OUT, FENCING = 48, 200
"""Images on which rungs are placed and the variances of r are measured; and of which a fence is made."""

HEIGHTS = (24, 32, 48, 64, 80, 100)
"""Levels at whose nearest rungs log Z is told by start too."""

PASSES, COUNT = (2, 3, 5, 9, 17), 1000
"""Passes of the bounds through a chain below the level, from the one that decodes; test images of the shortest two."""

PARTICLES, MOVES = 16, 1
"""Particles of an island from which a column starts, and their moves at each rung."""


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
    """Replica exchange of one class, or of all, that is written to a file, and taken up from it.

    Attributes:
        run: The replicas. The first half of the columns starts from samples, the other from held-out images.
        kept: What the file has: ``down`` and ``up``, works of all sweeps, (sweeps, rungs, columns); ``estimates``,
            log Z by the particles that gave the samples, nats; and what is needed to go on.
    """

    def __init__(
        self, model: DensityModel, source: DataSource, level: int, columns: int, seed: int, path: Path, y: int | None
    ) -> None:
        self.path, self.columns = path, columns
        before, generator = time.process_time(), stream(seed, "replicas", *([] if y is None else [y]))

        def clean(split: str, rows: slice) -> Tensor:
            x, labels = source.split(split).tensors(None)
            x = (x if y is None else x[labels == y])[rows]
            return Batch(model, x, None, slice(0, len(x)), seed).clean()[0]

        fit, test = clean("train", slice(0, 2000)), clean("test", slice(-HELD_OUT, None))
        kept = load_file(path) if path.exists() else None
        if kept:
            at = kept["at"]
        else:
            T, levels = model.schedule.T, [float(level)]
            while levels[-1] < T:
                levels.append(min(T, max(levels[-1] + 1, round(levels[-1] * 1.15))))
            at = torch.tensor(levels, dtype=torch.float64)
            for spacing in (2 * SPACING, SPACING):
                target = Interpolated(model, at, fit, y)
                found = deviations(target, ByBrightness(target, fit[:HELD_OUT], generator), test, generator)
                print(f"{y}: {len(at)} rungs, deviations of works {found.min():.2f} to {found.max():.2f}", flush=True)
                at = placed(at, found, spacing)
        target, K = Interpolated(model, at, fit, y), len(at)
        kernels, empty = ByBrightness(target, fit[:HELD_OUT], generator), torch.empty(0, dtype=torch.float64)
        fence = Fence(kept["middle"], kept["whiten"]) if kept else Fence.of(target, fit[-FENCING:], generator)
        target.fence = fence
        if kept is None:
            own, step, estimates = descend(target, kernels, columns // 2, PARTICLES, generator)
            print(f"{y}: {K} rungs; log Z by particles {estimates.tolist()}", flush=True)
            noise = torch.randn(K, columns // 2, *model.shape, generator=generator, dtype=torch.float64)
            data = [target.schedule.perturb(test[: columns // 2], t + 1, eps) for t, eps in enumerate(noise)]
            kept = {
                "at": at, "x": torch.cat([own, torch.stack(data)], 1), "step": step, "estimates": estimates,
                "down": empty.view(0, K, columns), "up": empty.view(0, K, columns),
                "middle": fence.middle, "whiten": fence.whiten,
                "seconds": torch.zeros((), dtype=torch.float64), "fresh": torch.zeros(K * columns),
                "arrivals": torch.zeros(columns), "generator": generator.get_state(),
            }  # fmt: skip
        generator.set_state(kept["generator"])
        ladder = Ladder(list(range(1, K + 1)), kept["step"], kept["x"])
        self.run, self.kept, self.y = Replicas(target, kernels, ladder, generator), kept, y
        self.run.fresh = kept["fresh"].bool()
        kept["seconds"] += time.process_time() - before

    def go_on(self) -> None:
        """A piece of sweeps; step sizes adapt in the first of all pieces."""
        run, kept, before, done = self.run, self.kept, time.process_time(), len(self.kept["down"])
        run.go_on(PIECE, PIECE if done < ADAPTING else 0)
        for name, new in {"down": run.down, "up": run.up}.items():
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
            f"{self.y}: {done + PIECE} sweeps, {float(kept['seconds']):.0f} s, {swaps}, arrivals "
            f"{int(kept['arrivals'].sum())}, log Z {z[0]:.1f} {z[1]:.1f}",
            flush=True,
        )


def stepped(low: int, high: int, n: int) -> list[int]:
    """``n`` rising levels from ``low`` to ``high``, at about equal ratios."""
    return sorted({round(low * (high / low) ** (k / (n - 1))) for k in range(n)}) if n > 1 else [high]


def combined(parts: Sequence[Ratios]) -> tuple[float, float]:
    """Mean over the classes of log Z, nats, and its standard error: classes and columns are independent."""
    errors = math.sqrt(sum(part.se**2 for part in parts)) / len(parts)
    return sum(part.total for part in parts) / len(parts), errors


def trend_of(quarters: Sequence[Sequence[Ratios]]) -> float:
    """Slope of the mean over the classes of log Z in quarters of the run, in its own standard errors."""
    weights = (-3, -1, 1, 3)
    slope = sum(w * part.total for w, parts in zip(weights, quarters, strict=True) for part in parts)
    errors = [
        sum(w * part.errors() for w, part in zip(weights, parts, strict=True)) for parts in zip(*quarters, strict=True)
    ]
    return slope / math.sqrt(sum(float(error.square().sum()) for error in errors))


@torch.no_grad()
def measured(
    chains: Sequence[Chains], model: DensityModel, source: DataSource, levels: Sequence[int], images: int
) -> dict[str, Any]:
    """log Z of the classes at the last of the ``levels``, whether it can be believed, and likelihoods of test images.

    All in bits/dim. ``log2_z_per_dim`` is the mean over the classes, ``unconditional`` that of their mixture. The
    first of the levels decodes, and ``chains`` between the two take as many passes as their name says; 1 is that of
    the last level alone. Of :data:`COUNT` test images there are the two shortest, of ``images`` the flow.
    ``minus`` has what each is above the flow: mean, standard error, deviation. ``gaps`` are those of one pass over the
    flow by level, nats: mean and deviation over images. ``by_height`` has log Z of higher rungs, by start.
    """
    dim, level, scoring = math.prod(model.shape), levels[-1], Scoring(levels[0], batch_size=BATCH)
    bit, columns = 1 / (dim * math.log(2)), torch.arange(chains[0].columns)

    def ratios(one: Chains, part: tuple[float, float] = (LEFT_OUT, 1), of: Tensor = columns) -> Ratios:
        n = len(one.kept["down"])
        rows = slice(*(round(n * end) for end in part))
        return bar(one.kept["down"][rows][:, :, of], one.kept["up"][rows][:, :, of])

    parts, halves = [ratios(one) for one in chains], columns.view(2, -1)
    starts = [combined([ratios(one, of=half) for one in chains]) for half in halves]
    edges = [LEFT_OUT + (1 - LEFT_OUT) * k / 4 for k in range(5)]
    quarters = [[ratios(one, ends) for one in chains] for ends in pairwise(edges)]
    apart = abs(starts[0][0] - starts[1][0]) / math.hypot(starts[0][1], starts[1][1])
    log_z, errors = torch.tensor([[part.total, part.se] for part in parts], dtype=torch.float64).T
    prior = model.log_class_prior.double() if model.joint else torch.zeros(1, dtype=torch.float64)
    share = (prior + log_z).softmax(0)
    x, fit = source.split("test").tensors(None)[0][:COUNT], source.split("train").tensors(None)[0][:5000]
    fit = Batch(model, fit, None, slice(0, len(fit)), scoring.seed).clean()[0]
    top = Mixture(model, [one.run.target for one in chains], log_z, fit, level)
    between = {1: [level]} | {n: stepped(levels[0], level, n) for n in PASSES if n <= level - levels[0] + 1}
    every, outside = {}, 0.0
    for n, steps in list(between.items())[:2]:
        every[f"{n}"], out = bound(model, x, steps, top, fit, scoring)
        outside = max(outside, float(out.double().mean()))
    some = {f"{n}": bound(model, x[:images], steps, top, fit, scoring)[0] for n, steps in between.items()}
    some["flow"] = flow = probability_flow(model, x[:images], None, scoring)
    gaps = list(zip(flow.flow.levels, *(moment.tolist() for moment in flow.flow.gaps()[1:]), strict=True))
    against = {name: one.values() - some["flow"].values() for name, one in some.items() if name != "flow"}
    rows = []
    for one, part, now in zip(chains, parts, zip(*quarters, strict=True), strict=True):
        down, up = one.kept["down"], one.kept["up"]
        swapped = (down - up).exp().clamp_max(1).mean((0, 2))
        rows.append({
            "name": "all" if one.y is None else source.class_names[one.y],
            "value": part.total * bit, "se": part.se * bit, "trend": trend_of([[each] for each in now]),
            "starts": [[bit * ratios(one, of=half).total, bit * ratios(one, of=half).se] for half in halves],
            "columns": [ratios(one, of=column).total * bit for column in columns[:, None]],
            "rungs": one.kept["at"].tolist(), "sweeps": len(down), "arrivals": int(one.kept["arrivals"].sum()),
            "swapped": [float(swapped.mean()), float(swapped.min())],
            "particles": (one.kept["estimates"] * bit).tolist(),
        })  # fmt: skip
    seconds = sum(float(one.kept["seconds"]) for one in chains)
    evaluations = 3 * len(columns) * sum(one.kept["down"].shape[0] * len(one.kept["at"]) for one in chains)
    mean, se = (value * bit for value in combined(parts))

    def above(one: Chains, low: int, half: Tensor) -> Ratios:
        found, first = ratios(one, of=half), int((one.kept["at"] - low).abs().argmin())
        return Ratios(found.log_ratio[first:], found.without[:, first:])

    heights = {
        low: [[value * bit for value in combined([above(one, low, half) for one in chains])] for half in halves]
        for low in HEIGHTS if low >= level
    }  # fmt: skip
    return {
        "data": source.name, "count": len(x), "dim": dim, "level": level,
        "columns": len(columns), "left_out": LEFT_OUT,
        "cpu_seconds": round(seconds, 1), "evaluations": evaluations,
        "log2_z_per_dim": {"value": mean, "se": se},
        "unconditional": {
            "value": float((prior + log_z).logsumexp(0)) * bit, "se": float((share * errors).norm()) * bit,
        },
        "starts": {
            name: [value * bit for value in pair] for name, pair in zip(("samples", "data"), starts, strict=True)
        },
        "apart": apart, "quarters": [combined(now)[0] * bit for now in quarters], "trend": trend_of(quarters),
        "believe": apart <= AGREEMENT and abs(trend_of(quarters)) <= AGREEMENT,
        "by_height": heights, "gaps": gaps, "outside": outside, "classes": rows, "between": between,
        "rows": {name: one.mean_and_error() for name, one in every.items()},
        "images": images, "rows_of_images": {name: one.mean_and_error() for name, one in some.items()},
        "minus": {name: [float(d.mean()), standard_error(d), float(d.std())] for name, d in against.items()},
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, goes on, and writes what is known so far."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.benchmarks.log_z_images", description=__doc__.splitlines()[0]
    )
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--name", required=True, help="key of the result in the file")
    parser.add_argument("--level", type=int, default=64, help="whose density is integrated")
    parser.add_argument("--decode", type=int, default=8, help="level that decodes, at most the other")
    parser.add_argument("--columns", type=int, default=4, help="of each class, an even number")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--images", type=int, default=32, help="test images of the flow")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, required=True, help="folder of the chains")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, source = load(options.run), load_source(read_info(options.run).data)
    options.state.mkdir(parents=True, exist_ok=True)
    end, classes = time.monotonic() + 60 * options.minutes, range(model.classes) if model.classes else [None]
    with torch.no_grad():
        chains = [
            Chains(model, source, options.level, options.columns, options.seed, options.state / f"{y}.safetensors", y)
            for y in classes
        ]
    while time.monotonic() < end:
        for one in chains:
            one.go_on()
    found = measured(chains, model, source, [options.decode, options.level], options.images)
    print(json.dumps(found, indent=1))
    write_named(options.name, found, options.json)


if __name__ == "__main__":
    main()
