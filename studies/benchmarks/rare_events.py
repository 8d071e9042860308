"""Probabilities of rare events against their known values, and the evaluations that they take.

    python -m studies.benchmarks.rare_events --repeats 100 --json studies/results/rare_events.json
    python -m studies.benchmarks.rare_events --model zoo:digits --repeats 20 --parts runs/rare --json rare_digits.json

The first takes mixtures of four round Gaussians in 2 and 16 dimensions, exact at every level; the event is that the
sum of the coordinates lies beyond a threshold. 95 % intervals should cover 90 to 99 % of the time, and the coefficient
of variation be at most 0.15. Plain Monte Carlo needs (1 - P) / (P cv²) samples for the same coefficient of variation.

The second takes the ink of a model's images, the sum of the grey levels, at the level where the engine ends. Instead
of the truth there are weighted particles that no threshold has moved: the threshold is the quantile of theirs, and the
standard error of its probability comes from the islands, which are independent. ``--parts`` keeps what is finished.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchcdm
from studies import cache
from studies.benchmarks.exact_targets import RoundMixture
from studies.benchmarks.files import write_rows
from torchcdm.annealing.kernels import Kernels
from torchcdm.annealing.particles import smc
from torchcdm.annealing.target import ModelTarget
from torchcdm.compose import probability
from torchcdm.compose.rare import climb
from torchcdm.compose.tilted import of_data
from torchcdm.diffusion.schedules import LogSNRSchedule
from torchcdm.models.denoiser import evaluation_mode
from torchcdm.random import stream

SCHEDULE = LogSNRSchedule(30, 0.02, 40.0)


def upper_tail(target: RoundMixture, threshold: float) -> float:
    """P(sum of coordinates / d^½ > threshold) at level 1 in units of the data, where means have length d^½."""
    direction = torch.full((target.means.shape[1],), target.means.shape[1] ** -0.5, dtype=torch.float64)
    deviations = (target.variances + SCHEDULE.ratio[1] ** 2).sqrt()
    z = (threshold - target.means @ direction) / deviations
    return float((target.log_weights.exp() * 0.5 * torch.erfc(z / math.sqrt(2))).sum())


def threshold_of(target: RoundMixture, p: float) -> float:
    """Where the tail has probability ``p``, by bisection."""
    low, high = -50.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if upper_tail(target, middle) > p else (low, middle)
    return low


ISLANDS, ISLAND = 4, 512
"""Populations of particles in one part of what stands for the truth, and particles of each."""


def ink(x: Tensor) -> Tensor:
    """Sum of the grey levels of images (B, C, H, W), (B,)."""
    return x.flatten(1).sum(1)


def weighted_ink(model: torchcdm.DensityModel, seed: int) -> dict[str, Tensor]:
    """Ink of particles at level 1, (:data:`ISLANDS`, :data:`ISLAND`), and their log weights, of unbiased estimates."""
    target, alpha = ModelTarget(model), model.schedule.alpha[1]
    with evaluation_mode(model):
        kernels = Kernels.of_target(target, 0)
        found = smc(target, kernels, 1, ISLANDS, ISLAND, stream(seed, "ink"))
    values = of_data(model, ink)(found.states.x / alpha).view(ISLANDS, ISLAND)
    return {"ink": values, "log_weights": found.log_weights.log_softmax(1) + found.log_estimates[:, None]}


def of_images(name: str, probabilities: Sequence[float], repeats: int, n: int, moves: int, parts: Path, draws: int,
              seconds: float) -> list[dict[str, Any]]:  # fmt: skip
    """Repeated estimates of P(ink > threshold), and that of ``draws`` particles without a threshold."""
    model, began = torchcdm.load(name), time.process_time()

    def part(kind: str, k: int, more: dict[str, Any], make: Any) -> Any:
        """A kept part; None where it is not there and the time is over."""
        path, settings = parts / f"{kind}-{k}.json", {"model": name} | more
        late = time.process_time() - began > seconds
        return cache.read(path, settings) if late else cache.kept(path, settings, make)

    size = {"islands": ISLANDS, "island": ISLAND}
    count = -(-draws // (ISLANDS * ISLAND))
    made = [part("ink", k, size, lambda k=k: ({}, weighted_ink(model, k))) for k in range(count)]
    values, log_weights = (torch.cat([one[1][key] for one in made if one]) for key in ("ink", "log_weights"))
    weights, rows = (log_weights - log_weights.max()).exp(), []
    for p in probabilities:
        order = values.flatten().sort(descending=True)
        above = weights.flatten()[order.indices].cumsum(0) / weights.sum()
        threshold = float(order.values[int((above < p).sum())])
        inside = (weights * (values > threshold)).sum(1)
        truth = float(inside.sum() / weights.sum())
        error = float((inside - truth * weights.sum(1)).norm() / weights.sum())

        def once(k: int, threshold: float = threshold) -> cache.Made:
            found = probability(model, ink, threshold, n, moves, seed=k)
            return {"value": found.value, "low": found.low, "high": found.high, "evaluations": found.evaluations}, {}

        settings = {"threshold": threshold, "particles": n, "moves": moves}
        kept = [part(f"p{p:g}", k, settings, lambda k=k, once=once: once(k)) for k in range(repeats)]
        found = [one[0] for one in kept if one]
        if not found:
            continue
        ratios = torch.tensor([one["value"] / truth for one in found], dtype=torch.float64)
        covered = sum(one["low"] <= truth <= one["high"] for one in found) / len(found)
        cv = float(ratios.std() / ratios.mean())
        rows.append({
            "model": name, "threshold": threshold, "p": truth, "p_se": error, "draws": values.numel(),
            "effective_islands": float(weights.sum(1).sum() ** 2 / weights.sum(1).square().sum()),
            "repeats": len(found), "particles": n, "moves": moves, "values": [one["value"] for one in found],
            "mean_over_truth": float(ratios.mean()), "cv": cv,
            "least_cv": math.sqrt(-math.log(truth) / n), "coverage": covered,
            "evaluations": sum(one["evaluations"] for one in found) / len(found),
            "plain_samples": (1 - truth) / (truth * cv**2),
        })  # fmt: skip
    return rows


def measure(d: int, p: float, repeats: int, n: int, moves: int) -> dict[str, Any]:
    """Estimates of one probability, repeated."""
    target = RoundMixture.random(SCHEDULE, d, 4)
    kernels, threshold = Kernels.of_target(target, 0), threshold_of(target, p)

    def event(x: Tensor) -> Tensor:
        return x.sum(1) / (SCHEDULE.alpha[1] * d**0.5)

    before = time.process_time()
    found = [climb(target, kernels, event, threshold, n, stream(k, "rare"), moves) for k in range(repeats)]
    ratios = torch.tensor([one.value / p for one in found], dtype=torch.float64)
    widths = torch.tensor([math.log(one.value / one.low) for one in found], dtype=torch.float64)
    covered = float((ratios.log().abs() <= widths).double().mean())
    evaluations, cv = sum(one.evaluations for one in found) / repeats, float(ratios.std() / ratios.mean())
    return {
        "d": d, "p": p, "repeats": repeats, "particles": n, "moves": moves, "mean_over_truth": float(ratios.mean()),
        "cv": cv, "least_cv": math.sqrt(-math.log(p) / n), "coverage": covered,
        "evaluations": evaluations, "plain_samples": (1 - p) / (p * cv**2),
        "cpu_seconds_each": (time.process_time() - before) / repeats,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, measures and writes."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.benchmarks.rare_events", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--particles", type=int, default=1000)
    parser.add_argument("--moves", type=int, default=4)
    parser.add_argument("--dims", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--probabilities", type=float, nargs="+", default=[1e-3, 1e-6])
    parser.add_argument("--model", help="a model of images in the place of mixtures; its event is ink")
    parser.add_argument("--draws", type=int, default=40_000, help="particles that stand for the truth of a model")
    parser.add_argument("--parts", type=Path, default=Path("runs/rare"), help="what is finished, of a model")
    parser.add_argument("--seconds", type=float, default=math.inf, help="of processor time; the next call goes on")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.model:
        rows = of_images(options.model, options.probabilities, options.repeats, options.particles, options.moves,
                         options.parts, options.draws, options.seconds)  # fmt: skip
        print("\n".join(map(json.dumps, rows)))
        write_rows(rows, options.json)
        return
    rows = []
    for d in options.dims:
        for p in options.probabilities:
            rows.append(measure(d, p, options.repeats, options.particles, options.moves))
            print(json.dumps(rows[-1]), flush=True)
            write_rows(rows, options.json)


if __name__ == "__main__":
    main()
