"""Writes the pages of commands and settings: from the parsers, and from types, ranges, docstrings and comments.

The site does it whenever it is built (``make docs``); ``python docs/write_reference.py`` does it alone.
"""

from __future__ import annotations

import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from torchcdm.cli.arguments import Parser
from torchcdm.cli.commands import add_commands
from torchcdm.losses import CDMLoss
from torchcdm.training.settings import BACKBONES, NETWORKS, SCHEDULE_SETTINGS, SCHEDULES, Config

FOLDER = Path(__file__).parent / "reference"

HEAD = """\
# Settings

What a preset, a YAML file (`cdm train --config FILE.yaml`) and flags (`--section.field VALUE`) may set. A file may
begin with `preset: PRESET`, which it builds on. `RUN/config.yaml` holds the settings of a run.
"""

COMMANDS = """\
# Commands

`MODEL` is the folder of a run, `zoo:NAME` for a model that ships with the package, or `hub:OWNER/NAME` for one on the
Hugging Face Hub. A user's mistake is one line on stderr and exit code 2.
"""

WORDS = {int: "whole number", float: "number", bool: "true or false", str: "text", type(None): "null", Any: "anything"}


def type_text(annotation: Any) -> str:
    """An annotation in words, such as ``whole number or null``."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{part}`" for part in parts)
    if origin is tuple:
        return f"list, each {type_text(parts[0])}"
    if origin is dict:
        return "fields"
    if hasattr(annotation, "__metadata__"):
        return " ".join(filter(None, [type_text(parts[0]), range_text(annotation.__metadata__)]))
    return WORDS[annotation] if annotation in WORDS else " or ".join(map(type_text, parts))


def range_text(metadata: Any) -> str:
    """Bounds in words, such as ``≥ 1``."""
    signs = {"ge": "≥", "gt": ">", "lt": "<", "le": "≤"}
    bounds = [(sign, getattr(mark, key)) for mark in metadata for key, sign in signs.items() if hasattr(mark, key)]
    return ", ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound < 10**9)


def argument_texts(kind: type) -> dict[str, str]:
    """Descriptions of arguments in the docstrings of a class and its bases, by name."""
    texts: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        entries = re.findall(r"^ {4}(\w+): ((?:.+\n?)(?: {6,}.+\n?)*)", inspect.getdoc(base) or "", re.MULTILINE)
        texts |= {name: " ".join(text.split()) for name, text in entries}
    return texts


def field_texts(kind: type) -> dict[str, str]:
    """Descriptions of the fields of a class by name: their ``#:`` comments, on the lines above or at the end."""
    fields = re.findall(r"^((?: {4}#: .+\n)*) {4}(\w+): .+?(?:  #: (.+))?$", inspect.getsource(kind), re.MULTILINE)
    return {name: " ".join(f"{above} {end}".replace("#:", "").split()) for above, name, end in fields}


def table(kind: Any, path: str, described: type | None = None) -> Iterator[str]:
    """The fields of a section, a row each; those of a constructor's arguments are ``described`` in its class."""
    what = re.sub(r"^:class:`(.*)`$", r"Arguments of `\1`.", kind.__doc__.strip().splitlines()[0])
    yield f"\n## {path}\n\n{what}\n\n| field | value | default | meaning |\n|---|---|---|---|\n".replace("``", "`")
    texts = argument_texts(described) if described else field_texts(kind)
    for name, field in kind.__pydantic_fields__.items():
        if hasattr(field.default, "__pydantic_fields__"):
            continue
        kinds = " ".join(filter(None, [type_text(field.annotation), range_text(field.metadata)]))
        default = "null" if field.default is None else str(field.default).lower()
        meaning = texts.get(name) or "Which of the kinds it is."
        meaning = re.sub(r":\w+:`", "`", meaning).replace("``", "`").replace("None", "null")
        default = list(field.default) if isinstance(field.default, tuple) else default
        yield f"| `{name}` | {kinds} | `{default}` | {meaning} |\n"


def settings() -> str:
    """The page of settings."""
    parts = [HEAD, *table(Config, "the top")]
    for section in ("data", "model", "loss", "train", "sampling", "report"):
        parts += table(type(getattr(Config(), section)), section, CDMLoss if section == "loss" else None)
        if section == "model":
            for name, kind in BACKBONES.items():
                parts += table(kind, f"model.backbone: {name}", NETWORKS[name][0])
            for name, kind in SCHEDULE_SETTINGS.items():
                parts += table(kind, f"model.schedule: {name}", SCHEDULES[name])
    return "".join(parts)


def commands() -> str:
    """The page of commands: the help of each."""
    os.environ["COLUMNS"] = "100"
    subparsers = Parser(prog="cdm").add_subparsers(parser_class=Parser)
    add_commands(subparsers)
    helps = ((name, parser.format_help().strip()) for name, parser in subparsers.choices.items())
    return COMMANDS + "".join(f"\n## cdm {name}\n\n```text\n{text}\n```\n" for name, text in helps)


def write() -> None:
    """Writes both pages."""
    for name, text in (("settings", settings()), ("commands", commands())):
        (FOLDER / f"{name}.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
