"""Probabilities of rare events against their known values, and the evaluations that they take.

    python -m studies.benchmarks.rare_events --repeats 100 --json studies/results/rare_events.json

Mixtures of four round Gaussians in 2 and 16 dimensions, exact at every level; the event is that the sum of the
coordinates lies beyond a threshold. 95 % intervals should cover 90 to 99 % of the time, and the coefficient of
variation be at most 0.15. Plain Monte Carlo needs (1 - P) / (P cv²) samples for the same coefficient of variation.
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

from studies.benchmarks.exact_targets import RoundMixture
from studies.benchmarks.files import write_rows
from torchcdm.annealing.kernels import Kernels
from torchcdm.compose.rare import climb
from torchcdm.diffusion.schedules import LogSNRSchedule
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
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = []
    for d in options.dims:
        for p in options.probabilities:
            rows.append(measure(d, p, options.repeats, options.particles, options.moves))
            print(json.dumps(rows[-1]), flush=True)
            write_rows(rows, options.json)


if __name__ == "__main__":
    main()
