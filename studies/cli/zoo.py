"""``python -m studies zoo``: the models that ship with the package."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torchcdm.cli.arguments import add_command
from torchcdm.errors import UserError, nearest


def add_commands(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "studies.cli", "zoo:zoo", "make a model that ships with the package: weights, numbers and card",
        "python -m studies zoo digits --out runs/zoo-digits",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", help="digits, digits-conditional, two-moons or table-example")
    parser.add_argument("--out", metavar="RUN", type=Path, help="folder of the run; a finished one is not made again")


def zoo(options: argparse.Namespace) -> None:
    """Writes ``torchcdm/zoo/NAME``."""
    from studies.zoo import MODELS, make
    from torchcdm.zoo import HOME

    if options.name not in MODELS:
        raise UserError(f"unknown model '{options.name}'; {nearest(options.name, MODELS)}")
    out = options.out or Path("runs") / f"zoo-{options.name}"
    print(make(options.name, out, HOME / options.name))
