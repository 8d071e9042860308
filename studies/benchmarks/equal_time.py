"""Denoising error after equal time: the default network of a preset against the best plain diffusion model.

    python -m studies.benchmarks.equal_time --seconds 300 --seeds 0 1 2 --out runs/equal --json equal_time.json

Seconds are of processor time, so that other jobs on the machine take nothing from anybody. All contenders have the
same data, schedule, batch, optimiser, learning-rate decay and average of the weights; each is kept at its best on the
validation split.

Settings are chosen before anything is compared, by the least validation error over a grid of trainings
(``--grid-seconds`` each, seed 0): the learning rate for the CDM, learning rate and width for the DDM, whose U-Net has
time embeddings and the preset's multipliers. Both stand twice: with a fitted Gaussian as a linear residual, as in
the grids, and without, as the preset has it; ``ratio_to_ddm`` divides by the better DDM of those that are finished.

The error is that of eps over the levels 1 ... T with equal weight, on ``--images`` test images with the same noise for
all. ``--out`` keeps every model and every result; what is there is not made again, and refused where its settings
are others.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from studies import cache
from studies.compare.own import UNLIMITED
from torchcdm.data import DataSource
from torchcdm.runtime.files import write_json
from torchcdm.runtime.validation import encode
from torchcdm.training.build import load_source, plain_model
from torchcdm.training.checkpoint import load
from torchcdm.training.config_files import make_config, preset_fields
from torchcdm.training.evaluation import evaluate
from torchcdm.training.loop import train
from torchcdm.training.settings import Config

WIDTHS = (24, 32)
RATES = (1e-2, 2e-2)
"""Twice as much is best after a minute, but in five minutes the DDM does not survive it."""
CALIBRATION = 5000
"""Noisy copies by which the constants of a CDM's levels are set: 12 s of 28x28, on top of the time of the training."""
RESULT = "equal_time.json"


def on_plain_grey_levels(preset: str, gaussianize: bool = False) -> Config:
    """The preset's configuration with its data in grey levels, or Gaussianised."""
    config = make_config(preset_fields(preset))
    return replace(config, data=replace(config.data, gaussianize=gaussianize))


def at_rate(config: Config, rate: float) -> Config:
    """The same with another learning rate."""
    return replace(config, train=replace(config.train, lr=rate))


def ddm(config: Config, width: int) -> Config:
    """The DDM for a preset."""
    model = plain_model(config.model)
    return replace(config, model=replace(model, backbone=replace(model.backbone, channels=width)))


def on_gaussian(config: Config, gaussian: bool) -> Config:
    """The same with the fitted Gaussian as linear residual, or on the standard normal."""
    return replace(config, model=replace(config.model, gaussian=gaussian))


def measured(
    config: Config, source: DataSource, seconds: float, seed: int, folder: Path, images: int
) -> dict[str, Any]:
    """Trains, evaluates, and keeps the numbers beside the run.

    Raises:
        UserError: The folder has numbers of other settings.
    """
    limits = replace(
        config.train, steps=UNLIMITED, max_seconds=seconds, seed=seed, save_every=UNLIMITED, calibration=CALIBRATION
    )
    config = replace(config, train=limits)

    def make() -> dict[str, Any]:
        result = train(config, folder, source, resume=True, clock=time.process_time)
        model = load(folder, "cpu")
        validation = evaluate(model, source.split("validation"), images)["mean"]["mse"]
        test = evaluate(model, source.split("test"), images)
        return {
            "steps": result.step,
            "parameters": sum(p.numel() for p in model.parameters()),
            "validation_mse": validation,
            "mse": test["mean"]["mse"],
            "mse_per_level": test["per_level"]["mse"],
        }

    return cache.numbers(folder / RESULT, {"config": encode(config), "images": images}, make)


def best(cells: Mapping[str, Config], options: argparse.Namespace, source: DataSource) -> str:
    """The cell of a grid with the least validation error."""
    errors: dict[str, float] = {}
    for name, config in cells.items():
        folder = options.out / f"grid-{name}"
        numbers = measured(config, source, options.grid_seconds, 0, folder, options.images)
        errors[name] = numbers["validation_mse"]
        print(f"grid: {name}: validation MSE {errors[name]:.4f}, {numbers['steps']} steps", flush=True)
    return min(errors, key=lambda name: errors[name])


def contenders(options: argparse.Namespace, config: Config, source: DataSource) -> dict[str, Config]:
    """The rows, each at the setting that its grid has chosen."""
    config = on_gaussian(config, True)
    ours = {f"cdm-lr-{rate:g}": at_rate(config, rate) for rate in RATES}
    plain_cells = {(width, rate): f"ddm-width-{width}-lr-{rate:g}" for width in WIDTHS for rate in RATES}
    theirs = {name: at_rate(ddm(config, width), rate) for (width, rate), name in plain_cells.items()}
    chosen = theirs[best(theirs, options, source)]
    own = ours[best(ours, options, source)]
    return {
        "cdm-residual": own,
        "cdm": on_gaussian(own, False),
        "ddm-residual": chosen,
        "ddm": on_gaussian(chosen, False),
    }


def summary(name: str, seconds: float, config: Config, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row: the mean over the seeds and their deviation; None for levels that a seed did not meet."""
    errors = [run["mse"] for run in runs]
    levels = zip(*(run["mse_per_level"] for run in runs), strict=True)
    return {
        "name": name,
        "seconds": seconds,
        "lr": config.train.lr,
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
    parser.add_argument("--grid-seconds", type=float, default=60, help="the same for each cell of the grids")
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
    rows = contenders(options, config, source)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for seed in options.seeds:
        for name, contender in rows.items():
            folder = options.out / f"{name}-{seed}"
            runs[name].append(measured(contender, source, options.seconds, seed, folder, options.images))
            print(f"{name}, seed {seed}: MSE {runs[name][-1]['mse']:.4f}, {runs[name][-1]['steps']} steps", flush=True)
            finished = [summary(name, options.seconds, rows[name], runs[name]) for name in rows if runs[name]]
            report(finished, options.json)
    for row in finished:
        spread = "" if row["mse_sd"] is None else f" ± {row['mse_sd']:.4f}"
        print(f"{row['name']:16}MSE {row['mse']:.4f}{spread}  {row['ratio_to_ddm']:.3f} x the better DDM")


def report(rows: Sequence[dict[str, Any]], path: Path | None) -> None:
    """Sets ``ratio_to_ddm``, None before there is a DDM, and writes what is finished."""
    baselines = [row["mse"] for row in rows if row["name"].startswith("ddm")]
    for row in rows:
        row["ratio_to_ddm"] = row["mse"] / min(baselines) if baselines else None
    if path is not None:
        write_json(path, {"rows": list(rows)})


if __name__ == "__main__":
    main()
