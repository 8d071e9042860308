"""Posteriors of the benchmark of simulation-based inference, beside NPE, FMPE and NPSE of sbi at equal processor time.

    pip install sbi && pip install --no-deps sbibm
    python -m studies.benchmarks.posteriors --pairs 1000 10000 --json studies/results/posteriors.json

A task that the file holds already is not run again. :class:`torchcdm.estimators.CDMConditional` has its default
settings and stops by its own rules, or at ``--seconds``; the others, with sbi's defaults (NPE: the flow ``nsf``), may
train as many processor seconds as it took, and keep the weights with the best validation loss. Draws beyond the
support of the prior are drawn again, for all.

C2ST is the five-fold accuracy of the benchmark's network (two layers of ten units a parameter; at most 100 passes)
that tells 1000 draws from as many of the reference posterior, the mean over observations of the benchmark, each seed
its own; 0.5 is best. Coverage is measured on new pairs: the share of true parameters in central intervals of 50 and
90 % of the draws (SBC), and the largest error of the expected coverage by distances to random points (TARP; Lemos et
al. 2023).
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from studies.benchmarks.conditional_density import Posterior, c2st
from studies.benchmarks.files import write_rows
from studies.benchmarks.posterior_tasks import TASKS, Task
from torchcdm.estimators import CDMConditional

DRAWS, COVERED_DRAWS = 1000, 50
"""Draws for C2ST; and for each new pair of coverage: intervals of so few hold 49.0 and 88.2 % of exact draws."""

COVERED = {"cdm": 500, "npe": 500, "fmpe": 100, "npse": 40}
"""New pairs for coverage: draws of the last two take hundreds of steps."""

SCORED = {"cdm": 1000, "npe": 1000, "fmpe": 5, "npse": 5}
"""Rows whose log_prob is timed."""

OBSERVATIONS = 10
"""Of each task."""

PASSES = 100
"""Of the classifier of C2ST, at most."""

LEVELS = (0.5, 0.9)


@dataclass(frozen=True)
class Row:
    """One contender on one task.

    Attributes:
        task: Its name.
        pairs: Simulations.
        seed: Of simulations and training.
        name: The contender.
        c2st: Of each observation.
        coverage: Of the central intervals of 50 and 90 %, mean over parameters.
        covered: New pairs for coverage.
        tarp: Largest distance of the expected coverage from the level.
        outside: Share of draws beyond the support.
        seconds: Processor seconds of fitting.
        scored: log_prob calls a second.
    """

    task: str
    pairs: int
    seed: int
    name: str
    c2st: list[float]
    coverage: list[float]
    covered: int
    tarp: float
    outside: float
    seconds: float
    scored: float


# --- contenders ---------------------------------------------------------------------------------------------------


def own(task: Task, theta: np.ndarray, x: np.ndarray, budget: float | None, seed: int) -> Posterior:
    """CDMConditional; with a ``budget`` at most so many processor seconds."""

    model = CDMConditional(random_state=seed, device="cpu", max_seconds=budget)
    model.clock = time.process_time
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # columns that are constant
        model.fit(theta, x)

    def sample(count: int, rows: np.ndarray) -> np.ndarray:
        return model.sample(count, rows, random_state=0)

    return Posterior(model.log_prob, sample)


def of_sbi(name: str, task: Task, theta: np.ndarray, x: np.ndarray, budget: float | None, seed: int) -> Posterior:
    """NPE, FMPE or NPSE."""
    import torch
    from sbi import inference

    method = {"npe": inference.NPE, "fmpe": inference.FMPE, "npse": inference.NPSE}[name]
    ends = math.inf if budget is None else time.process_time() + budget

    class Timed(method):
        def _converged(self, epoch: int, stop_after_epochs: int) -> bool:
            done = super()._converged(epoch, stop_after_epochs)
            if not done and time.process_time() > ends and self._best_model_state_dict is not None:
                self._neural_net.load_state_dict(self._best_model_state_dict)
                return True
            return done

    torch.manual_seed(seed)
    options = {"density_estimator": "nsf"} if name == "npe" else {}
    prior = torch.distributions.Independent(_like_prior(theta, task), 1)
    trainer = Timed(prior, show_progress_bars=False, tracker=Silent(), **options)
    trainer.append_simulations(*(torch.from_numpy(part).float() for part in (theta, x)))
    estimator = trainer.train()
    posterior = trainer.build_posterior(estimator)

    def log_prob(theta: np.ndarray, x: np.ndarray) -> np.ndarray:
        rows = torch.from_numpy(theta).float(), torch.from_numpy(x).float()
        if name == "npe":
            with torch.no_grad():
                return estimator.log_prob(rows[0][None], rows[1])[0].numpy()
        found = [posterior.log_prob(one[None], x=given[None]) for one, given in zip(*rows, strict=True)]
        return torch.cat(found).detach().numpy()

    def sample(count: int, rows: np.ndarray) -> np.ndarray:
        torch.manual_seed(0)
        given = torch.from_numpy(rows).float()
        with torch.no_grad():
            if name == "npe":
                return estimator.sample((count,), given).transpose(0, 1).double().numpy()
            found = posterior.sample_batched((count,), given, show_progress_bars=False, reject_outside_prior=False)
        return found.transpose(0, 1).double().numpy()

    return Posterior(log_prob, sample)


class Silent:
    """A tracker of sbi that keeps nothing, in place of one that writes files."""

    log_dir = None

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def _like_prior(theta: np.ndarray, task: Task) -> Any:
    """A distribution with the support of the prior, of which sbi takes nothing else here."""
    from torch import distributions, tensor

    centre, scale = tensor(theta.mean(0)).float(), tensor(theta.std(0)).float()
    low, high = task.support
    if math.isinf(low):
        return distributions.Normal(centre, scale)
    if math.isinf(high):
        return distributions.LogNormal(centre.log(), scale)
    return distributions.Uniform(low + 0 * centre, high + 0 * centre)


CONTENDERS = ("cdm", "npe", "fmpe", "npse")


# --- measuring ----------------------------------------------------------------------------------------------------


def inside(task: Task, posterior: Posterior, count: int, x: np.ndarray) -> tuple[np.ndarray, float]:
    """Draws (M, count, p) within the support of the prior, and the share of those that were not."""
    low, high = task.support
    draws = posterior.sample(count, x)
    out = ((draws < low) | (draws > high)).any(-1)
    share = float(out.mean())
    if share:
        more = posterior.sample(math.ceil(4 * count * out.mean(1).max()), x)
        for k in np.flatnonzero(out.any(1)):
            good = more[k][((more[k] >= low) & (more[k] <= high)).all(-1)]
            draws[k][out[k]] = (
                good[: out[k].sum()] if len(good) >= out[k].sum() else np.clip(draws[k][out[k]], low, high)
            )
    return draws, share


def tarp(draws: np.ndarray, theta: np.ndarray, seed: int) -> float:
    """Largest distance of expected coverage from its level, over draws (N, n, p) and true theta (N, p)."""
    scale = theta.std(0)
    points = theta[np.random.RandomState(seed).permutation(len(theta))]
    distance = np.linalg.norm((theta - points) / scale, axis=1)
    nearer = (np.linalg.norm((draws - points[:, None]) / scale, axis=2) < distance[:, None]).mean(1)
    levels = np.linspace(0.05, 0.95, 19)
    return float(max(abs((nearer < level).mean() - level) for level in levels))


def coverage(draws: np.ndarray, theta: np.ndarray) -> list[float]:
    """Share of the true theta (N, p) in the central intervals of draws (N, n, p)."""
    ranks = (draws < theta[:, None]).mean(1)
    return [float((np.abs(ranks - 0.5) <= level / 2).mean()) for level in LEVELS]


def measure(
    name: str, who: str, pairs: int, seed: int, observations: int, budget: float | None, covered: int = 500
) -> Row:  # fmt: skip
    """One contender on one task; coverage on at most so many new pairs as ``covered``."""
    task = TASKS[name]
    theta, x = task.pairs(pairs, seed)
    began = time.process_time()
    posterior = (own if who == "cdm" else partial(of_sbi, who))(task, theta, x, budget, seed)
    seconds = time.process_time() - began
    new, x_new = task.pairs(min(COVERED[who], covered), seed + 1000)
    numbers = [(seed * observations + k) % OBSERVATIONS + 1 for k in range(observations)]
    asked = np.stack([task.observation(number) for number in numbers])
    draws, outside = inside(task, posterior, DRAWS, asked)
    found = [c2st(ours, task.reference(k)[:DRAWS], PASSES) for ours, k in zip(draws, numbers, strict=True)]
    held, _ = inside(task, posterior, COVERED_DRAWS, x_new)
    rows = SCORED[who]
    many, x_many = task.pairs(rows, seed + 2000)
    began = time.process_time()
    posterior.log_prob(many, x_many)
    rate = rows / max(time.process_time() - began, 1e-9)
    shares, largest = coverage(held, new), tarp(held, new, seed)
    return Row(name, pairs, seed, who, found, shares, len(new), largest, outside, seconds, rate)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=["cdm", "npe"], metavar="NAME")
    parser.add_argument("--pairs", type=int, nargs="+", default=[1000], metavar="N", help="simulations")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="K")
    parser.add_argument("--observations", type=int, default=3, metavar="N", help="for C2ST, at most 10")
    parser.add_argument("--covered", type=int, default=500, metavar="N", help="new pairs for coverage at most")
    parser.add_argument("--seconds", type=float, metavar="S", help="processor seconds of each fit at most")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the rows; what it holds is kept")
    options = parser.parse_args(arguments)

    rows: list[dict[str, Any]] = []
    if options.json is not None and options.json.exists():
        rows = json.loads(options.json.read_text(encoding="utf-8"))["rows"]
    for pairs, seed, task in [(n, k, name) for n in options.pairs for k in options.seeds for name in options.tasks]:
        budget = options.seconds
        for who in options.contenders:
            key = {"task": task, "pairs": pairs, "seed": seed, "name": who}
            row = next((row for row in rows if key.items() <= row.items()), None)
            if row is None:
                row = asdict(measure(task, who, pairs, seed, options.observations, budget, options.covered))
                rows.append(row)
                write_rows(rows, options.json)
            print(line(row), flush=True)
            budget = row["seconds"] if who == "cdm" else budget


def line(row: dict[str, Any]) -> str:
    """A row to read."""
    covered = " ".join(f"{100 * value:5.1f}" for value in row["coverage"])
    return (
        f"{row['task']:24} {row['pairs']:6} {row['seed']} {row['name']:5} C2ST {np.mean(row['c2st']):.3f}  "
        f"coverage {covered}  TARP {row['tarp']:.3f}  outside {row['outside']:.3f}  {row['seconds']:6.1f} s  "
        f"{row['scored']:9.0f} log_prob/s"
    )


if __name__ == "__main__":
    main()
