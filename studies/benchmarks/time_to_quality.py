"""How far the default network gets in a fraction of the time that the paper's network takes.

    python -m studies.benchmarks.time_to_quality --seconds 1800 --fraction 0.2 --out runs/quality --json quality.json

Both are CDMs on the same data, schedule, batch and average of the weights; each learning rate decays to the end of its
own time. The paper's network is the U-Net of the preset's width and multipliers, without Gaussian residual, positions
and time term; its optimiser and learning rate are the best of ``--rates`` and ``--muon-rates`` on the validation split
after ``--grid-seconds`` with seed 0, as the default network's rate is of ``--default-rates``. Seconds are of processor
time. The error is that of ``equal_time``; the likelihood is that of the probability flow, on the first
``--flow-images`` test images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from studies import cache
from studies.benchmarks.equal_time import at_rate, best, measured, on_plain_grey_levels
from torchcdm.data import DataSource
from torchcdm.likelihood import Scoring, probability_flow
from torchcdm.runtime.files import write_json
from torchcdm.training.build import load_source, plain_model
from torchcdm.training.checkpoint import load
from torchcdm.training.run_folder import RunFolder, read_metrics
from torchcdm.training.settings import Config

FLOW = "flow.json"


def paper(config: Config, optimizer: str, rate: float) -> Config:
    """The paper's network and losses for a preset."""
    model = replace(config.model, backbone=plain_model(config.model).backbone, gaussian=False)
    training = replace(config.train, optimizer=optimizer, lr=rate)
    return replace(config, model=model, loss=replace(config.loss, time_weight=0.0), train=training)


def flow_nll(folder: Path, source: DataSource, options: argparse.Namespace) -> dict[str, Any]:
    """Bits/dim by the flow of the kept model, which is not computed again."""

    def make() -> dict[str, Any]:
        x, _ = source.split("test").tensors(options.flow_images)
        scored = probability_flow(load(folder, "cpu"), x, None, Scoring(steps=options.flow_steps))
        bits = scored.values()
        return {"flow": float(bits.mean()), "se": float(bits.std() / len(bits) ** 0.5), "images": len(bits)}

    return cache.numbers(folder / FLOW, {"images": options.flow_images, "steps": options.flow_steps}, make)


def validations(folder: Path) -> list[tuple[float, float]]:
    """Seconds and squared error of every validation of a run."""
    lines = read_metrics(RunFolder(folder).metrics)
    return [(line["seconds"], line["val_mse"]) for line in lines if "val_mse" in line]


def seconds_to(target: float, errors: Sequence[tuple[float, float]]) -> float | None:
    """When a squared error of ``target`` or less was first seen; None: never.

    Args:
        target: Mean squared error of eps.
        errors: As :func:`validations` has them.
    """
    return next((seconds for seconds, error in errors if error <= target), None)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="fashion-mnist")
    parser.add_argument("--seconds", type=float, default=3600, help="processor time of the paper's network")
    parser.add_argument("--fraction", type=float, default=0.2, help="share of it for the default network")
    parser.add_argument("--rates", type=float, nargs="*", default=[3e-4, 1e-3], help="of AdamW")
    parser.add_argument("--muon-rates", type=float, nargs="*", default=[5e-3, 1e-2])
    parser.add_argument("--default-rates", type=float, nargs="+", default=[1e-2, 2e-2], help="of the default network")
    parser.add_argument("--grid-seconds", type=float, default=120)
    parser.add_argument("--target-mse", type=float, help="validation error that a time is asked for; the least of the "
                        "paper's network when left out")  # fmt: skip
    parser.add_argument("--validate-every", type=int, help="steps; the preset's when left out")
    parser.add_argument("--images", type=int, default=1000, help="test and validation images, four noise draws each")
    parser.add_argument("--flow-images", type=int, default=64)
    parser.add_argument("--flow-steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="torch's threads")
    parser.add_argument("--out", type=Path, required=True, help="models and results")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)

    config = on_plain_grey_levels(options.preset)
    if options.validate_every is not None:
        config = replace(config, train=replace(config.train, validate_every=options.validate_every))
    source = load_source(config.data)

    rates = [("adamw", rate) for rate in options.rates] + [("muon", rate) for rate in options.muon_rates]
    papers = {f"{name}-{rate:g}": paper(config, name, rate) for name, rate in rates}
    defaults = {f"default-{rate:g}": at_rate(config, rate) for rate in options.default_rates}
    theirs, ours = papers[best(papers, options, source)], defaults[best(defaults, options, source)]
    rows = []
    contenders = {
        "default": (ours, options.fraction * options.seconds),
        "paper": (theirs, options.seconds),
    }
    for name, (contender, seconds) in contenders.items():
        numbers = measured(contender, source, seconds, options.seed, options.out / name, options.images)
        numbers |= flow_nll(options.out / name, source, options)
        rows.append({"name": name, "seconds": seconds} | numbers)
        print(f"{name:10}{seconds:8.0f} s {numbers['steps']:7} steps  MSE {numbers['mse']:.4f}  flow "
              f"{numbers['flow']:.3f} ± {numbers['se']:.3f} bits/dim", flush=True)  # fmt: skip
    errors = {name: validations(options.out / name) for name in contenders}
    target = options.target_mse
    if target is None:
        target = min(error for _, error in errors["paper"])
    for row in rows:
        row["seconds_to_target"] = reached = seconds_to(target, errors[row["name"]])
        when = "never" if reached is None else f"after {reached:.0f} s"
        print(f"{row['name']:10}validation MSE of {target:.4f} {when}")
    if options.json:
        settings = {
            "optimizer_of_paper": theirs.train.optimizer,
            "lr_of_paper": theirs.train.lr,
            "lr_of_default": ours.train.lr,
            "target_mse": target,
        }
        write_json(options.json, settings | {"rows": rows})


if __name__ == "__main__":
    main()
