"""The mutual-information benchmark `benchmark-mi` (arXiv 2306.11078): 40 tasks whose information is known.

    pip install benchmark-mi 'jax<0.4.34' 'jaxlib<0.4.34' 'numpy<2'        # in an environment of its own
    python -m studies.benchmarks.mi_tasks draw tasks.npz                   # there: 10 000 pairs a task and seed
    python -m studies.benchmarks.mi_tasks draw development.npz --development
    python -m studies.benchmarks.mi_tasks estimate tasks.npz --json studies/results/mi_tasks.json
    python -m studies.benchmarks.mi_tasks estimate tasks.npz --estimators InfoNCE --seeds 0 --json FILE
    python -m studies.benchmarks.mi_tasks estimate tasks.npz --estimators MINE --seeds 0 --json FILE           # there
    pip install diffusion-mi                                               # in another environment
    python -m studies.benchmarks.mi_tasks estimate tasks.npz --estimators MINDE MMG --seeds 0 --json FILE      # there

One protocol for every task: ``torchcdm.mutual_information(x, y, random_state=seed)`` with its defaults. These were
settled on the development tasks alone: other seeds and other parameters of the same families. Beside it, on the same
pairs, canonical correlations (the information of a Gaussian) and Kraskov's estimator with 5 neighbours
on standardised columns; MINE (arXiv 1801.04062) of benchmark-mi with its defaults, until it stops of itself; and, with
the same critic, optimizer and batches, InfoNCE (1807.03748) for as many seconds of a core as ours takes on the mean.
The diffusion models of diffusion-mi, MINDE (2310.09031) and MMG (2509.20609), train as long, with two changes that
three development tasks asked for: a rate of 1e-3, and no average of weights, which 700 steps do not fill.

A mark is given if the mean of the seeds, rounded to a tenth of a nat, is within 0.1 of the truth or within two
standard errors of it; ``close`` is the same without the second way.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

PAIRS = 10_000
SEEDS, DEVELOPMENT_SEEDS = (0, 1, 2), (1000,)


@dataclass(frozen=True)
class Estimate:
    """One task, seed and estimator; nats, and processor seconds. ``se`` is the estimator's own, if it has one."""

    task: str
    truth: float
    seed: int
    estimator: str
    value: float
    se: float | None
    seconds: float


def draw(path: Path, development: bool) -> None:
    """Pairs of all tasks to a file; needs benchmark-mi."""
    from bmi.benchmark import BENCHMARK_TASKS, tasks
    from bmi.benchmark.tasks.asinh import transform_asinh_task
    from bmi.benchmark.tasks.student import task_student_identity

    chosen = list(BENCHMARK_TASKS.values())
    if development:
        normal, pairs = tasks.task_bivariate_normal(0.6), tasks.task_multinormal_2pair(4, 4, strength=1.5)
        wide = tasks.task_multinormal_2pair(15, 15, strength=1.5)
        flat = tasks.transform_normal_cdf_task
        chosen = [
            normal, tasks.task_additive_noise(0.25), tasks.task_bimodal_gaussians(0.6),
            tasks.transform_wiggly_task(normal), tasks.transform_half_cube_task(normal),
            task_student_identity(dim_x=1, dim_y=1, df=2),
            tasks.transform_swissroll_task(flat(normal), task_name="swissroll"),
            tasks.task_multinormal_dense(10, 10), pairs, task_student_identity(dim_x=4, dim_y=4, df=2),
            task_student_identity(dim_x=2, dim_y=2, df=1), transform_asinh_task(task_student_identity(4, 4, df=1)),
            flat(pairs), flat(wide), tasks.transform_half_cube_task(wide), tasks.transform_spiral_task(pairs),
            tasks.transform_spiral_task(wide), tasks.transform_spiral_task(flat(pairs)),
            tasks.transform_spiral_task(flat(wide)),
        ]  # fmt: skip
    arrays = {}
    for task in chosen:
        for seed in DEVELOPMENT_SEEDS if development else SEEDS:
            x, y = task.sample(PAIRS, seed)
            for name, side in (("x", x), ("y", y)):
                arrays[f"{task.id}|{float(task.mutual_information)!r}|{seed}|{name}"] = np.asarray(side, np.float64)
    np.savez(path, **arrays)


def ours(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[float, float | None]:
    """``torchcdm.mutual_information`` with its defaults."""
    import torchcdm

    found = torchcdm.mutual_information(x, y, random_state=seed)
    return found.value, found.se


def canonical(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[float, float | None]:
    """-1/2 sum log(1 - rho²) over the canonical correlations."""
    bases = [np.linalg.qr(side - side.mean(0))[0] for side in (x, y)]
    rho = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)
    return float(-0.5 * np.log1p(-(np.minimum(rho, 1 - 1e-9) ** 2)).sum()), None


def kraskov(x: np.ndarray, y: np.ndarray, seed: int, neighbours: int = 5) -> tuple[float, float | None]:
    """Kraskov, Stögbauer and Grassberger's first estimator, largest-coordinate distances within x and within y."""
    from scipy.spatial import cKDTree
    from scipy.special import digamma

    x, y = ((side - side.mean(0)) / side.std(0) for side in (x, y))
    radius = cKDTree(np.hstack([x, y])).query(np.hstack([x, y]), neighbours + 1, p=np.inf)[0][:, -1]
    within = [
        cKDTree(side).query_ball_point(side, np.nextafter(radius, 0), p=np.inf, return_length=True) for side in (x, y)
    ]
    both = sum(digamma(count).mean() for count in within)
    return float(digamma(neighbours) + digamma(len(x)) - both), None


def mine(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[float, float | None]:
    """Of benchmark-mi: half of the pairs train a critic until its value on the other half stops rising."""
    from bmi import estimators

    return float(estimators.MINEEstimator(verbose=False, seed=seed).estimate(x, y)), None


def infonce(x: np.ndarray, y: np.ndarray, seed: int, seconds: float = 8.0) -> tuple[float, float | None]:
    """Half of the pairs train a critic for so many seconds of a core; its largest value on the other half."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    x, y = (torch.as_tensor((side - side.mean(0)) / side.std(0), dtype=torch.float32) for side in (x, y))
    train, held = torch.randperm(len(x)).chunk(2)
    # The first layer of all pairs of a batch is a sum of two parts.
    of_x, of_y = (nn.Linear(side.shape[1], 16) for side in (x, y))
    rest = nn.Sequential(nn.ReLU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 1))

    def value(rows: torch.Tensor) -> torch.Tensor:
        scores = rest(of_x(x[rows])[:, None] + of_y(y[rows])).squeeze(-1)
        return (scores.diagonal() - scores.logsumexp(1)).mean() + np.log(len(rows))

    optimizer = torch.optim.Adam(nn.ModuleList([of_x, of_y, rest]).parameters(), lr=0.1)
    best, step, began = -np.inf, 0, time.process_time()
    while time.process_time() - began < seconds:
        optimizer.zero_grad()
        (-value(train[torch.randperm(len(train))[:256]])).backward()
        optimizer.step()
        step += 1
        if step % 50 == 0:
            with torch.no_grad():
                best = max(best, float(np.mean([value(rows) for rows in held.split(256) if len(rows) == 256])))
    return best, None


def diffusion(name: str, x: np.ndarray, y: np.ndarray, seed: int, seconds: float = 8.0) -> tuple[float, float | None]:
    """Of diffusion-mi: half of the pairs train a denoiser for so many seconds of a core; its value on the other."""
    import pytorch_lightning
    import torch
    from dmi import estimators

    class Timed(getattr(estimators, f"{name}Estimator")):
        def on_train_batch_start(self, batch: Any, index: int) -> int | None:
            self.trainer.should_stop = time.process_time() - began > seconds
            return -1 if self.trainer.should_stop else None

    torch.manual_seed(seed)
    np.random.seed(seed)  # the order of its loss's parts
    trainer, began = pytorch_lightning.Trainer, time.process_time()
    x, y = ((side - side.mean(0)) / side.std(0) for side in (x, y))
    train, held = np.array_split(np.random.default_rng(seed).permutation(len(x)), 2)
    model = Timed(learning_rate=1e-3, batch_size=256, max_epochs=10**6, use_ema=False, mi_estimation_interval=10**9)
    model.args = model.hparams  # version 0.1.0 reads the one and sets the other
    # Drawing a bar and a table takes a third of the time of a step.
    pytorch_lightning.Trainer = partial(trainer, enable_progress_bar=False, enable_model_summary=False)
    try:
        model.fit(x[train], y[train], x[held[:100]], y[held[:100]])
    finally:
        pytorch_lightning.Trainer = trainer
    return float(model.estimate(x[held], y[held])), None


ESTIMATORS: dict[str, Callable[[np.ndarray, np.ndarray, int], tuple[float, float | None]]] = {
    "cdm": ours, "canonical correlations": canonical, "Kraskov": kraskov, "MINE": mine, "InfoNCE": infonce,
    "MINDE": partial(diffusion, "MINDE"), "MMG": partial(diffusion, "MMG"),
}  # fmt: skip


def estimate(path: Path, estimators: list[str], seeds: list[int], only: list[str], out: Path | None) -> list[Estimate]:
    """Every estimator on the tasks of a file, seed by seed, in the order of the words that their names begin with.

    What ``out`` holds already is not computed again.
    """
    rows = [Estimate(**row) for row in json.loads(out.read_text("utf-8"))["rows"]] if out and out.exists() else []
    done = {(row.task, row.seed, row.estimator) for row in rows}
    # Their last digits differ from machine to machine.
    truths = {row.task: row.truth for row in rows}
    with np.load(path) as arrays:
        keys = [key[:-2].split("|") for key in arrays if key.endswith("|x")]
        wanted = ((seed, word) for seed in seeds for word in only)
        chosen = (key for seed, word in wanted for key in keys if key[0].startswith(word) and key[2] == str(seed))
        for task, truth, seed in chosen:
            key = f"{task}|{truth}|{seed}"
            x, y = arrays[f"{key}|x"], arrays[f"{key}|y"]
            for name in estimators:
                if (task, int(seed), name) in done:
                    continue
                start = time.process_time()
                done.add((task, int(seed), name))
                value, se = ESTIMATORS[name](x, y, int(seed))
                seconds = round(time.process_time() - start, 2)
                rows.append(Estimate(task, truths.setdefault(task, float(truth)), int(seed), name, value, se, seconds))
                print(f"{task:42} {seed:4} {name:24} {float(truth):6.3f} {value:7.3f} {se or 0:6.3f} {seconds:6.1f} s")
                write(rows, out)
    write(rows, out)
    return rows


def write(rows: list[Estimate], out: Path | None) -> None:
    """Estimates and marks to a file, if one is asked for."""
    if out is not None:
        content = {"rows": [asdict(row) for row in rows], "marks": marks(rows)}
        out.write_text(json.dumps(content, indent=1) + "\n", "utf-8")


def marks(rows: list[Estimate]) -> list[dict[str, Any]]:
    """Of each task and estimator: mean of the seeds, its standard error, whether it earns the mark, and ``close``."""
    found = []
    for task, name in dict.fromkeys((row.task, row.estimator) for row in rows):
        own = [row for row in rows if (row.task, row.estimator) == (task, name)]
        mean, truth = float(np.mean([row.value for row in own])), own[0].truth
        within = sum((row.se or 0.0) ** 2 for row in own) ** 0.5 / len(own)
        spread = float(np.std([row.value for row in own], ddof=1)) / len(own) ** 0.5 if len(own) > 1 else 0.0
        error, close = max(spread, within), abs(round(mean, 1) - truth) <= 0.1
        mark = close or abs(mean - truth) <= 2 * error
        found.append({"task": task, "truth": truth, "estimator": name, "seeds": len(own), "mean": mean,
                      "error": error, "close": close, "mark": mark})  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("draw", "estimate"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--development", action="store_true")
    parser.add_argument("--estimators", nargs="+", default=list(ESTIMATORS)[:3], choices=ESTIMATORS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[*SEEDS, *DEVELOPMENT_SEEDS])
    parser.add_argument("--only", nargs="+", default=[""], help="tasks whose names begin with these words")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.what == "draw":
        draw(options.file, options.development)
    else:
        found = marks(estimate(options.file, options.estimators, options.seeds, options.only, options.json))
        for name in dict.fromkeys(row["estimator"] for row in found):
            own = [row for row in found if row["estimator"] == name]
            print(f"{name}: {sum(row['mark'] for row in own)} marks of {len(own)}")


if __name__ == "__main__":
    main()
