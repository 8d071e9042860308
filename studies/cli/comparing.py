"""``python -m studies compare``."""

from __future__ import annotations

import argparse
import tempfile
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcdm.cli.arguments import add_command, tell
from torchcdm.errors import UserError

if TYPE_CHECKING:
    from torchcdm.data import DataOptions, DataSource


def add_commands(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "studies.cli",
        "comparing:compare",
        "train other density models and ours for the same time on the same data, and score them alike",
        "python -m studies compare digits --budget 150 --peers cdm,nsf,realnvp --out compared --json compared.json",
        "json device",
    )
    parser.add_argument("data", metavar="DATA", help="digits, folder:PATH, array:FILE, table:FILE, toy:NAME ...")
    parser.add_argument("--budget", metavar="SECONDS", type=float, help="training time of each system; needed")
    parser.add_argument("--peers", metavar="A,B", help="names, separated by commas; all that suit the data by default")
    parser.add_argument("--list", action="store_true", help="list the peers that suit the data and do nothing else")
    parser.add_argument("--clock", default="wall", help="wall, or processor: processor time of this process (wall)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="keep results and models; what is finished there is "
                        "not made again")  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", type=Path, help="figure of likelihood against the cost of scoring")
    parser.add_argument("--seed", type=int, default=0, help="of training (0)")
    parser.add_argument("--limit", type=int, metavar="N", help="score at most N test samples, evenly spaced")
    parser.add_argument("--size", metavar="HxW", help="resize images")
    parser.add_argument("--channels", type=int, metavar="N", help="convert images to 1, 3 or 4 channels")
    parser.add_argument("--label", metavar="COLUMN", help="column of a table that is no feature: the class")
    parser.add_argument("--gaussianize", action=argparse.BooleanOptionalAction, help="all systems see grey levels "
                        "Gaussianised by the histogram of each pixel; default: as the preset of the data")  # fmt: skip
    parser.add_argument("--log-z", metavar="SWEEPS", type=int, help="normalise one pass of each CDM by log Z, "
                        "estimated by so many sweeps of replica exchange (digits: 200)")  # fmt: skip
    parser.add_argument("--frechet", metavar="N", type=int, help="Fréchet distance of N samples of each system to the "
                        "training images; 2000 at least")  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def compare(options: argparse.Namespace) -> None:
    """Trains, measures and prints."""
    from studies.compare.comparison import compare
    from studies.compare.figure import scoring_cost
    from studies.compare.own import preset_of
    from torchcdm.likelihood.log_z import Sweeps
    from torchcdm.runtime.processes import chosen_device
    from torchcdm.runtime.validation import read_as
    from torchcdm.training.build import in_units, load_source

    if options.seed < 0:
        raise UserError(f"--seed is {options.seed}; it must not be negative")
    if options.limit is not None and options.limit < 2:
        raise UserError(f"--limit is {options.limit}; at least 2 are needed")
    if options.log_z is not None:
        read_as(Sweeps, options.log_z, "--log-z")
    if options.budget is None and not options.list:
        raise UserError("the following arguments are required: --budget; see python -m studies compare --help")
    data = _data(options)
    source = load_source(data)
    if preset_of(source).data.gaussianize if options.gaussianize is None else options.gaussianize:
        data = replace(data, gaussianize=True)
        source = in_units(source, data)
    if options.list:
        _list(source)
        return
    names = None if options.peers is None else [name.strip() for name in options.peers.split(",")]
    keep = nullcontext(options.out) if options.out else tempfile.TemporaryDirectory()
    with keep as folder:
        comparison = compare(
            source,
            options.budget,
            Path(folder),
            names,
            options.clock,
            options.seed,
            options.limit,
            chosen_device(options.device),
            data,
            progress=not options.quiet,
            frechet=options.frechet,
            log_z=options.log_z,
        )
    tell(options.json, comparison.table(), comparison.to_json())
    if options.plot is not None:
        scoring_cost(comparison, options.plot)


def _data(options: argparse.Namespace) -> DataOptions:
    from torchcdm.data import DataOptions, parse_size

    size = None if options.size is None else parse_size(options.size)
    return DataOptions(spec=options.data, size=size, channels=options.channels, label=options.label)


def _list(source: DataSource) -> None:
    from studies.compare.peers import PEERS

    for name, peer in PEERS.items():
        why = peer.unsuited(source.shape)
        print(f"{name:16}{peer.title}" + (f"; not for {source.name}: {why}" if why else ""))
