"""``cdm zoo`` and ``cdm push``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torchcdm.cli.arguments import add_command, tell
from torchcdm.zoo import HOME, about, names


def add_commands(commands: Any) -> None:
    """Adds the commands."""
    add_command(commands, run_zoo, "zoo", "the models that ship with the package", "cdm zoo", "json")
    parser = add_command(
        commands, run_push, "push", "a model to the Hugging Face Hub, with a card",
        "cdm push runs/photos me/photos", "model",
    )  # fmt: skip
    parser.add_argument("repository", metavar="OWNER/NAME", help="on the Hub; made where it does not exist")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--card", metavar="FILE", type=Path, help="Markdown of your own as the card")


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


def run_push(options: argparse.Namespace) -> int:
    """Uploads weights, configuration and card."""
    from torchcdm.bridges.hub import push
    from torchcdm.runtime.artefact import read_bytes

    card = "" if options.card is None else read_bytes(options.card).decode(errors="replace")
    print(push(options.model, options.repository, options.private, card=card))
    return 0
