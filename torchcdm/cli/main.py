"""Entry point: the commands and what their failures look like."""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Sequence
from types import ModuleType

from torchcdm import __version__
from torchcdm.cli import (
    calibrating,
    converting,
    denoising,
    measuring,
    ratios,
    reading,
    sampling,
    scoring,
    training,
)
from torchcdm.cli.arguments import Parser
from torchcdm.errors import UserError

EPILOG = """\
examples:
  cdm train digits --out runs/digits
  cdm sample runs/digits --n 64 --out samples
  cdm nll runs/digits

exit codes: 0 done; 2 a mistake in what was given, with one line on stderr; 129, 130 and 143
stopped by SIGHUP, SIGINT and SIGTERM, in training with the state saved.
"""


DOTTED = re.compile(r"--\w+(\.\w+)+(=|$)")
"""The flag of a field of the configuration, which every command but ``train`` refuses."""


GROUPS = (training, sampling, measuring, calibrating, scoring, ratios, denoising, reading, converting)


def main(arguments: Sequence[str] | None = None) -> int:
    """``cdm``: runs one command and returns its exit code."""
    parser = Parser(prog="cdm", description="Classification diffusion models.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"torchcdm {__version__}")
    return run_command(parser, GROUPS, arguments)


def run_command(parser: Parser, groups: Sequence[ModuleType], arguments: Sequence[str] | None) -> int:
    """Runs the command that the words name; a user's mistake is one line on stderr and exit code 2.

    Args:
        parser: Named as the program.
        groups: Modules whose ``add_commands`` adds commands.
        arguments: The words after the program's name; those of the process when None.
    """
    name = parser.prog
    try:
        commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
        for group in groups:
            group.add_commands(commands)
        # The parser would take the values of flags that it does not know for arguments without a name.
        words, fields = _without_fields(sys.argv[1:] if arguments is None else arguments)
        options, rest = parser.parse_known_args(words)
        options.rest = rest = fields + rest
        if rest and not getattr(options, "takes_fields", False):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        return options.run(options) or 0
    except UserError as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output, such as head, has seen enough.
        sys.stderr.close()
        return 0


def _without_fields(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words without ``--section.field VALUE`` and ``--section.field=VALUE``, and those, for the configuration."""
    left, fields, rest = [], [], iter(words)
    for word in rest:
        if not DOTTED.match(word):
            left.append(word)
        else:
            fields += [word] if "=" in word else [word, *itertools.islice(rest, 1)]
    return left, fields
