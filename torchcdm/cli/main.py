"""Entry point: the commands and what their failures look like."""

import errno
import os
import pkgutil
import re
import signal
import sys
import warnings
from argparse import Namespace
from collections.abc import Sequence
from contextlib import suppress
from types import ModuleType

from torchcdm import __version__
from torchcdm.cli import commands
from torchcdm.cli.arguments import Parser
from torchcdm.errors import UserError, nearest, reason
from torchcdm.runtime.files import check_output

EPILOG = """\
examples:
  cdm train digits --out runs/digits
  cdm sample runs/digits --n 64 --out samples
  cdm nll runs/digits

exit codes: 0 done; 2 a mistake in what was given, with one line on stderr; 129, 130 and 143
stopped by SIGHUP, SIGINT and SIGTERM, in training with the state saved.
"""

FIELD = re.compile(r"--\w+(\.\w+)+(=|$)")  # of the configuration: every command but ``train`` refuses it
LONGEST = 500  # characters of a message; of a longer one the middle is left out

# Arguments that name files which commands write, and which they read: these are not to be replaced.
OUTPUTS = ("json", "csv", "plot")
INPUTS = ("paths", "reference", "numerator", "denominator", "query", "x", "y", "data")


def main(arguments: Sequence[str] | None = None) -> int:
    """``cdm``: runs one command and returns its exit code."""
    parser = Parser(prog="cdm", description="Classification diffusion models.", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=f"torchcdm {__version__}")
    return run_command(parser, (commands,), arguments)


def run_command(parser: Parser, groups: Sequence[ModuleType], arguments: Sequence[str] | None) -> int:
    """Runs a command of ``groups``, modules with ``add_commands``; a user's mistake is a line and exit code 2."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know ASCII alone
    pythons = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"{parser.prog}: warning: {' '.join(str(message).split())}\n"
    try:
        subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)
        for group in groups:
            group.add_commands(subparsers)
        _run(parser, sys.argv[1:] if arguments is None else arguments)
        return 0
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":  # of several processes that join in, one speaks
            text = " ".join(str(error).split())
            text = text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
            print(f"{parser.prog}: {text}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"{parser.prog}: {str(error) or 'interrupted'}", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)  # a training says which signal it was
    finally:
        warnings.formatwarning = pythons


def _run(parser: Parser, words: Sequence[str]) -> None:
    """One command; what it prints has left when it returns."""
    try:
        # The parser would take the values of flags that it does not know for arguments without a name.
        words, fields = _without_fields(words)
        options, rest = parser.parse_known_args(words)
        options.fields = fields
        if not getattr(options, "takes_fields", False):
            rest += [f"--{field}" for field, _ in fields]
        if rest and rest[0].startswith("--"):
            flags = re.findall(r"^ +--([a-z-]+)(?![\w.-])", options.command.format_help(), re.MULTILINE)
            hint = nearest(rest[0][2:].partition("=")[0], flags)
            hint += "; settings have a dot, as in --train.lr" if getattr(options, "takes_fields", False) else ""
            raise UserError(f"unknown argument '{rest[0]}'; {hint}")
        if rest:
            options.command.error(f"unrecognized arguments: {' '.join(rest)}")
        _check_outputs(options)
        pkgutil.resolve_name(options.run)(options)
        if sys.stdout is not None:  # closed before Python started
            sys.stdout.flush()
    except OSError as error:
        # A reader such as head may have seen enough; files of our own are written elsewhere, with their names.
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        # What is left to print goes nowhere: Python would try again, and fail, at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if error.errno == errno.ENOSPC:
            raise UserError(f"the output cannot be written ({error.strerror})") from None
    except (MemoryError, RuntimeError) as error:
        from accelerate.utils.memory import should_reduce_batch_size

        if not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
            raise
        raise UserError(f"out of memory ({reason(error)}); ask for less, or take smaller data or networks") from None


def _check_outputs(options: Namespace) -> None:
    """Refuses outputs that would replace an input, a file that a run keeps, or one another; - is the terminal."""
    read = [getattr(options, name, None) or () for name in INPUTS]
    inputs = [path for paths in read for path in ([paths] if isinstance(paths, str) else paths)]
    outputs = [path for name in OUTPUTS if (path := getattr(options, name, None)) is not None]
    files = [path for path in outputs if str(path) != "-"]
    if files:
        from torchcdm.training.checkpoint import read_info  # loads torch
        from torchcdm.training.run_folder import RunFolder

        with suppress(UserError):  # of a model that cannot be read the command itself will tell
            inputs += [read_info(options.model).data.spec or ""] if getattr(options, "model", None) else []
    for path in files:
        check_output(path, inputs)
        run = RunFolder(path.resolve().parent)
        if run.lock.exists() and path.resolve() in vars(run).values():
            raise UserError(f"{path}: belongs to the run; choose another name")
    if len(set(map(os.path.realpath, outputs))) < len(outputs):
        raise UserError(f"{outputs[0]}: is to hold two outputs; choose another file for one of them")


def _without_fields(words: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
    """The words without ``--section.field VALUE`` and ``--section.field=VALUE``, and those as pairs."""
    left, fields, rest = [], [], iter(words)
    for word in rest:
        if not FIELD.match(word):
            left.append(word)
            continue
        field, equals, value = word[2:].partition("=")
        value = value if equals else next(rest, None)
        if value is None:
            raise UserError(f"--{field} needs a value")
        fields.append((field, value))
    return left, fields
