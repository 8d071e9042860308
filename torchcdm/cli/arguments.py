"""The parser, arguments that several commands share, and what commands do with their outputs."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from torchcdm.errors import UserError, nearest
from torchcdm.runtime.files import without_nan, write_json


class Parser(argparse.ArgumentParser):
    """argparse whose every error is one line on stderr and exit code 2."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        if found := re.fullmatch(r"(.*: invalid choice: '(.*)') \(choose from (.*)\)", message):
            message = f"{found[1]}; {nearest(found[2], found[3].replace(chr(39), '').split(', '))}"
        raise UserError(f"{message}; see {self.prog} --help")


def count(text: str) -> int:
    """A whole number of what there is one of at least; argparse names the flag in its message."""
    if re.fullmatch(r"[0-9]{1,10}", text) and 1 <= int(text) <= 10**9:
        return int(text)
    raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1 to {10**9}")


def output(text: str) -> Path:
    """The path of a file or a folder to write; - is the terminal for ``--json`` alone."""
    if text in ("", "-"):
        raise argparse.ArgumentTypeError(f"'{text}' is no name of a file or a folder; give one, such as ./name")
    return Path(text)


def files(text: str) -> str:
    """A path; of ``table:FILE``, ``array:FILE`` and ``folder:PATH`` what follows, unless a file has that very name."""
    spec = re.fullmatch("(?:array|folder|table):(.+)", text, re.DOTALL)
    return text if spec is None or os.path.lexists(text) else spec[1]


SHARED: dict[str, tuple[str, str, dict[str, Any]]] = {
    "model": ("model MODEL", "a run folder, zoo:NAME (see cdm zoo) or hub:OWNER/NAME", {}),
    "paths": ("paths PATH", "images, folders, .npy, .npz or tables; data units", {"nargs": "+", "kind": files}),
    "data": ("--data SPEC", "other data than the run was trained on, of the same columns, shape and grey levels", {}),
    "split": ("--split", "train, validation or test (test, or all of --data without splits)", {}),
    "limit": ("--limit N", "at most N samples, evenly spaced", {"kind": count}),
    "skip-bad": ("--skip-bad", "leave out images and rows that cannot be read", {"kind": bool}),
    "seed": ("--seed S", "seed of everything random", {"kind": int, "default": 0}),
    "quiet": ("--quiet", "no progress bar", {"kind": bool}),
    "json": ("--json FILE", "write the numbers to FILE, - for stdout", {"kind": Path}),
    "device": ("--device D", "cpu, cuda, cuda:1; the best there is by default", {}),
}
"""Arguments that several commands share, as :func:`add` takes them."""


def add(parser: Any, words: str, text: str | None, kind: Callable[[str], Any] | None = None, **options: Any) -> None:
    """An argument: its name and, after a space, what the help calls its value; bool as ``kind``: it takes none."""
    name, *metavar = words.split(" ")
    text = f"{text} ({options['default']})" if "default" in options else text
    options |= {"action": "store_true"} if kind is bool else {"type": kind}
    parser.add_argument(name, help=text, **options, **({"metavar": metavar[0]} if metavar else {}))


def add_command(commands: Any, package: str, run: str, summary: str, example: str, shared: str = "") -> Parser:
    """A subcommand named like the function that it ``run``s, ``module:function`` of a ``package``; ``shared`` are
    names of :data:`SHARED`."""
    name = run.rpartition(":")[2]
    parser = commands.add_parser(name, help=summary, description=summary, epilog=f"example:\n  {example}")
    parser.set_defaults(command=parser, run=f"{package}.{run}")
    for word in shared.split():
        flag, text, options = SHARED[word]
        add(parser, flag, text, **options)
    return parser


def given(**values: Any) -> dict[str, Any]:
    """Those that are not None: the defaults of the others are where they are used."""
    return {name: value for name, value in values.items() if value is not None}


def say(notes: Iterable[str]) -> None:
    """Notes to stderr, a line each."""
    for note in notes:
        print(note, file=sys.stderr)


def tell(path: Path | None, text: str, numbers: Any) -> None:
    """Text on the terminal, and numbers as JSON where ``--json`` says: on the terminal alone if that is ``-``."""
    if str(path) == "-":
        json.dump(without_nan(numbers), sys.stdout, indent=1)
        print()
        return
    if path is not None:
        write_json(path, numbers)
    print(text)  # last, as its reader may have gone
