"""``python -m studies reproduce``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torchcdm.cli.arguments import add_command


def add_commands(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "studies.cli", "reproducing:reproduce",
        "a table or figure of the paper, or a check against known truth",
        "python -m studies reproduce fig7 --scale smoke --out reproduced", "device",
    )  # fmt: skip
    parser.add_argument("name", metavar="NAME", nargs="?", help="left out: lists the names")
    parser.add_argument("--scale", default="smoke", help="smoke (seconds), small (two cores), paper; smoke by default")
    parser.add_argument("--out", metavar="DIR", type=Path, help="report, figures, models; run again, it goes on")
    parser.add_argument("--steps", metavar="N", type=int, help="of every training, instead of the scale's")
    parser.add_argument("--samples", metavar="N", type=int, help="of every sample set, instead of the scale's")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="of trainings and samples; 0 by default")
    parser.add_argument("--finished", action="store_true", help="report what is finished so far, and make nothing")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def reproduce(options: argparse.Namespace) -> None:
    """The report of a reproduction, made or completed."""
    from studies.reproduce import REPRODUCTIONS, reproduce
    from torchcdm.errors import UserError

    if options.name is None:
        for name, entry in REPRODUCTIONS.items():
            print(f"{name:12} {entry.title}")
        return
    if options.out is None:
        raise UserError("give a folder with --out DIR")
    path = reproduce(
        options.name, options.scale, options.out, options.device, not options.quiet, options.steps,
        options.samples, options.finished, options.seed,
    )  # fmt: skip
    print(path.read_text(encoding="utf-8") if not options.quiet else path)
