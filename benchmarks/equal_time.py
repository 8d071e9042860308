"""Denoising error after equal time: the default network of a preset against the best plain diffusion model.

    python benchmarks/equal_time.py --seconds 300 --seeds 0 1 2 --out runs/equal --json equal_time.json

Seconds are of processor time, so that other jobs on the machine take nothing from anybody. All contenders have the
same data, schedule, batch, optimiser, learning-rate decay and average of the weights; each is kept at its best on the
validation split.

The DDM is chosen before anything is compared: its U-Net has time embeddings and the preset's multipliers, and its
width and learning rate are those with the least validation error over a grid (``--grid-seconds`` each, seed 0). It
stands twice: with the fitted Gaussian as its own linear residual, as the CDM has one, and without.

The error is that of eps over the levels 1 ... T with equal weight, on ``--images`` test images with the same noise for
all. ``--out`` keeps every model and every result; what is there is not made again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from torchcdm.building import load_source
from torchcdm.checkpoint import load
from torchcdm.compare.own import UNLIMITED, plain
from torchcdm.config import Config, make_config, preset_fields
from torchcdm.data import DataSource
from torchcdm.metrics import evaluate
from torchcdm.run_folder import write_json
from torchcdm.trainer import train

WIDTHS = (24, 32)
RATES = (6e-4, 1.2e-3, 2.5e-3)
RESULT = "equal_time.json"


@dataclass(frozen=True)
class Contender:
    """A system of the table."""

    name: str
    config: Config


def on_plain_grey_levels(preset: str, gaussianize: bool = False) -> Config:
    """The preset's configuration with its data in grey levels, or Gaussianised."""
    config = make_config(preset_fields(preset))
    return replace(config, data=replace(config.data, gaussianize=gaussianize))


def ddm(config: Config, width: int, rate: float, residual: bool) -> Config:
    """The DDM for a preset."""
    model = plain(config.model)
    model = replace(model, gaussian=residual, backbone=replace(model.backbone, channels=width))
    return replace(config, model=model, train=replace(config.train, lr=rate))


def measured(
    config: Config, source: DataSource, seconds: float, seed: int, folder: Path, images: int
) -> dict[str, Any]:
    """Trains, evaluates, and keeps the numbers beside the run."""
    kept = folder / RESULT
    if kept.exists():
        return json.loads(kept.read_text(encoding="utf-8"))
    limits = replace(config.train, steps=UNLIMITED, max_seconds=seconds, seed=seed, save_every=UNLIMITED)
    result = train(replace(config, train=limits), folder, source, resume=True, clock=time.process_time)
    model = load(folder, "cpu")
    validation = evaluate(model, source.split("validation"), images)["mean"]["mse"]
    test = evaluate(model, source.split("test"), images)
    numbers = {
        "steps": result.step,
        "parameters": sum(p.numel() for p in model.parameters()),
        "validation_mse": validation,
        "mse": test["mean"]["mse"],
        "mse_per_level": test["per_level"]["mse"],
    }
    write_json(kept, numbers)
    return numbers


def best_ddm(options: argparse.Namespace, config: Config, source: DataSource) -> tuple[int, float]:
    """Width and learning rate of the DDM with the least validation error over the grid."""
    errors: dict[tuple[int, float], float] = {}
    for width in WIDTHS:
        for rate in RATES:
            folder = options.out / f"grid-width-{width}-lr-{rate:g}"
            numbers = measured(
                ddm(config, width, rate, True), source, options.grid_seconds, 0, folder, options.images
            )
            errors[width, rate] = numbers["validation_mse"]
            print(f"grid: width {width}, lr {rate:g}: validation MSE {errors[width, rate]:.4f}", flush=True)
    return min(errors, key=lambda key: errors[key])


def contenders(config: Config, width: int, rate: float) -> Iterator[Contender]:
    """The rows."""
    yield Contender("cdm", config)
    yield Contender("ddm-residual", ddm(config, width, rate, True))
    yield Contender("ddm", ddm(config, width, rate, False))


def summary(name: str, seconds: float, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row: the mean over the seeds and their deviation; None for levels that a seed did not meet."""
    errors = [run["mse"] for run in runs]
    levels = zip(*(run["mse_per_level"] for run in runs), strict=True)
    return {
        "name": name,
        "seconds": seconds,
        "seeds": len(runs),
        "mse": statistics.mean(errors),
        "mse_sd": statistics.stdev(errors) if len(errors) > 1 else None,
        "steps": [run["steps"] for run in runs],
        "parameters": runs[0]["parameters"],
        "mse_per_level": [None if None in level else statistics.mean(level) for level in levels],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="fashion-mnist")
    parser.add_argument("--seconds", type=float, default=300, help="processor time of each training")
    parser.add_argument("--grid-seconds", type=float, default=60, help="the same for each cell of the DDM's grid")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=1000, help="test and validation images, four noise draws each")
    parser.add_argument("--gaussianize", action=argparse.BooleanOptionalAction, default=False, help="grey levels "
                        "Gaussianised by the histogram of each pixel, for all contenders")  # fmt: skip
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--out", type=Path, required=True, help="models and results")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    config = on_plain_grey_levels(options.preset, options.gaussianize)
    source = load_source(config.data)
    width, rate = best_ddm(options, config, source)
    print(f"DDM: width {width}, lr {rate:g}", flush=True)
    rows: list[dict[str, Any]] = []
    for contender in contenders(config, width, rate):
        runs = []
        for seed in options.seeds:
            folder = options.out / f"{contender.name}-{seed}"
            runs.append(measured(contender.config, source, options.seconds, seed, folder, options.images))
            print(f"{contender.name}, seed {seed}: MSE {runs[-1]['mse']:.4f}, {runs[-1]['steps']} steps", flush=True)
            finished = [*rows, summary(contender.name, options.seconds, runs)]
            report(finished, width, rate, options.json)
        rows = finished
    for row in rows:
        spread = "" if row["mse_sd"] is None else f" ± {row['mse_sd']:.4f}"
        print(f"{row['name']:16}MSE {row['mse']:.4f}{spread}  {row['ratio_to_ddm']:.3f} x the better DDM")


def report(rows: Sequence[dict[str, Any]], width: int, rate: float, path: Path | None) -> None:
    """Sets ``ratio_to_ddm``, None before there is a DDM, and writes what is finished."""
    baselines = [row["mse"] for row in rows if row["name"].startswith("ddm")]
    for row in rows:
        row["ratio_to_ddm"] = row["mse"] / min(baselines) if baselines else None
    if path is not None:
        write_json(path, {"ddm": {"width": width, "lr": rate}, "rows": list(rows)})


if __name__ == "__main__":
    main()
