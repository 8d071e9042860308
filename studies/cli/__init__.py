"""``python -m studies``: the commands that compare and reproduce."""

from __future__ import annotations

from collections.abc import Sequence

from studies.cli import comparing, examining, measuring, reproducing, zoo
from torchcdm.cli.arguments import Parser
from torchcdm.cli.main import run_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    parser = Parser(prog="python -m studies", description="How we know what we know about torchcdm.")
    return run_command(parser, (comparing, reproducing, examining, zoo, measuring), arguments)
