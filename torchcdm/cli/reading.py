"""``cdm info``."""

from __future__ import annotations

import argparse
from typing import Any

from torchcdm.cli.arguments import add_command, add_json, tell
from torchcdm.training.run_folder import RunFolder, read_metrics


def add_commands(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(commands, "info", "what a run holds", "cdm info runs/digits")
    parser.add_argument("model", metavar="RUN")
    add_json(parser)
    parser.set_defaults(run=run_info)


def run_info(options: argparse.Namespace) -> int:
    """Architecture, data and training of a run."""
    from torchcdm.training.checkpoint import load, read_info
    from torchcdm.training.states import state_folders


    info = read_info(options.model)
    model = load(options.model)
    run = RunFolder(options.model)
    config = info.model
    lines = read_metrics(run.metrics)
    values = {
        "model": f"{config.kind}, labels {config.labels}",
        "network": config.backbone.name,
        "schedule": f"{config.schedule.name}, T = {config.schedule.T}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "data": f"{info.data.spec}, shape {list(info.transform.shape)}",
        "classes": info.classes,
        "grey levels": None if info.transform.bin is None else f"{info.transform.low:g} ... {info.transform.high:g}",
        "preset": info.preset,
        "calibrated": None if model.uncalibrated is model else "on paths",
        "selected": info.selected,
        "last step": lines[-1]["step"] if lines else None,
        "states": [path.name for path in state_folders(run)],
    }
    tell(options.json, "\n".join(f"{name:12} {value}" for name, value in values.items()), values)
    return 0
