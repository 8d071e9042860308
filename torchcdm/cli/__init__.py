"""The command ``cdm``: parse, build, call, print. Heavy libraries are imported by the command that runs."""

from torchcdm.cli.main import main

__all__ = ["main"]
