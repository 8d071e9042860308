"""``cdm zoo``."""

from __future__ import annotations

import argparse
from typing import Any

from torchcdm.cli.arguments import add_command, tell
from torchcdm.zoo import HOME, about, names


def add_commands(commands: Any) -> None:
    """Adds the command."""
    add_command(commands, run_zoo, "zoo", "the models that ship with the package", "cdm zoo", "json")


def run_zoo(options: argparse.Namespace) -> int:
    """What each model is, its size, and what it reaches."""
    models = {}
    for name in names():
        size = sum(path.stat().st_size for path in (HOME / name).iterdir())
        models[f"zoo:{name}"] = about(name) | {"bytes": size}
    lines = [
        f"{name:24}{model['bytes'] / 2**20:5.2f} MiB  {model['description']}; {model['reaches']}"
        for name, model in models.items()
    ]
    lines.append("use them wherever a command takes a model: cdm sample zoo:digits --n 64 --out samples")
    tell(options.json, "\n".join(lines), models)
    return 0
