"""``python -m studies exam``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from torchcdm.cli.arguments import add_command

PAIRS = (("value", "se"), ("behind", "behind_se"))


def add_commands(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "studies.cli",
        "examining:exam",
        "default settings on data sets that nobody tuned for, beside closed forms, flows, trees and neighbours",
        "python -m studies exam --half development --kinds density,ratio --out exam --json exam.json",
        "json",
    )
    parser.add_argument("--half", choices=("development", "exam"), required=True,
                        help="settings are chosen on development; exam stays closed until they are")  # fmt: skip
    parser.add_argument("--kinds", metavar="A,B", default="density,ratio,anomaly,images", help="which (all)")
    parser.add_argument("--sets", metavar="A,B", help="names of data sets; all of the half by default")
    parser.add_argument("--contenders", metavar="A,B", help="names of contenders; all by default")
    parser.add_argument("--out", metavar="DIR", type=Path, help="keep the scores: what is there is not run again")


def exam(options: argparse.Namespace) -> None:
    """Runs the contests and prints the marks."""
    import torch

    from studies.exam.contests import CONTENDERS, as_rows, contest
    from studies.exam.sets import exam_sets
    from torchcdm.errors import UserError, nearest
    from torchcdm.runtime.files import write_json

    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    contenders = None if options.contenders is None else options.contenders.split(",")
    for kind in options.kinds.split(","):
        if kind not in CONTENDERS:
            raise UserError(f"unknown kind '{kind}'; {nearest(kind, CONTENDERS)}")
        for item in exam_sets(kind, options.half):
            if options.sets is not None and item.name not in options.sets.split(","):
                continue
            found = as_rows(contest(item, contenders, options.out))
            rows.extend(found)
            for mark in found:
                value, behind = (f"{mark[key]:9.4f} +- {mark[error]:.4f}" for key, error in PAIRS)
                name, who, seconds = mark["data"], mark["contender"], mark["seconds"]
                print(f"{name:28} {who:17} {value}  behind {behind} {seconds:7.1f} s", flush=True)
    if options.json is not None:
        write_json(options.json, {"half": options.half, "marks": rows})
