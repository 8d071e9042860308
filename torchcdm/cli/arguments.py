"""The parser, and arguments that several commands share."""

from __future__ import annotations

import argparse
import csv
import io
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from torchcdm.errors import UserError
from torchcdm.runtime.files import check_output, without_nan, write_file, write_json


class Parser(argparse.ArgumentParser):
    """argparse whose every error is one line on stderr and exit code 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def add_command(commands: Any, name: str, summary: str, example: str) -> Parser:
    """A subcommand whose help ends with an example."""
    return commands.add_parser(name, help=summary, description=summary, epilog=f"example:\n  {example}")


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``."""
    parser.add_argument("--device", help="cpu, cuda, cuda:1; the best there is by default")


def add_json(parser: argparse.ArgumentParser) -> None:
    """``--json``."""
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the numbers to FILE, - for stdout")


def add_data(parser: argparse.ArgumentParser) -> None:
    """``--data`` and ``--split`` of a command that measures a run."""
    parser.add_argument("--data", metavar="SPEC", help="other data than the run was trained on, of the same columns, "
                        "shape and grey levels")  # fmt: skip
    parser.add_argument("--split", default="test", help="train, validation or test")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N samples, evenly spaced")


def check_writable(path: Path | None, inputs: Iterable[str | Path] = ()) -> None:
    """:func:`torchcdm.runtime.files.check_output`, where a file and not the terminal is asked for."""
    if path is not None and str(path) != "-":
        check_output(path, inputs)


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_file(path, text.getvalue())


def write_numbers(path: Path | None, value: Any) -> None:
    """Numbers as JSON where ``--json`` says."""
    if path is None:
        return
    if str(path) == "-":
        json.dump(without_nan(value), sys.stdout, indent=1)
        print()
        return
    write_json(path, value)
