"""What the pages of the reference are made of, and the site where its extra is installed."""

import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from torchcdm.cli.arguments import Parser
from torchcdm.cli.commands import add_commands
from torchcdm.training.settings import BACKBONES, SCHEDULES, Config

DOCS = Path(__file__).parents[1] / "docs"


def test_reference_pages_name_every_command_and_setting():
    script = runpy.run_path(str(DOCS / "write_reference.py"))
    settings, commands = script["settings"](), script["commands"]()
    for section in fields(Config()):
        value = getattr(Config(), section.name)
        names = [field.name for field in fields(value)] if is_dataclass(value) else [section.name]
        # Backbone and schedule are sections themselves.
        assert [name for name in names if f"`{name}`" not in settings] in ([], ["backbone", "schedule"])
    for part, kinds in (("backbone", BACKBONES), ("schedule", SCHEDULES)):
        assert [name for name in kinds if f"## model.{part}: {name}\n" not in settings] == []
    parsers = Parser(prog="cdm").add_subparsers(parser_class=Parser)
    add_commands(parsers)
    for name, parser in parsers.choices.items():
        page = commands.split(f"## cdm {name}\n")[1].split("\n## ")[0]
        flags = [flag for action in parser._actions for flag in action.option_strings]
        assert [flag for flag in flags if flag not in page] == []


def python_of(page):
    """The Python of a page, each line at its number."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            inside, line = line.startswith(("```python", "```{code-cell}")), ""
        lines.append(line if inside else "")
    return "\n".join(lines) + "\n"


PAGES = [DOCS.parent / "README.md", DOCS / "start.md", DOCS / "index.md", *sorted(DOCS.glob("[gt]u*/*.md"))]
"""README, start, guide and tutorials."""

CHECKERS = {
    "mypy": [
        "--follow-imports=silent", "--ignore-missing-imports", "--check-untyped-defs", "--allow-redefinition",
        *(f"--disable-error-code={name}" for name in ("name-defined", "used-before-def", "has-type")),
    ],
    "pyright": [f"--pythonpath={sys.executable}"],
}  # fmt: skip
"""Names that a page leaves open, such as the reader's data, are no errors."""


@pytest.mark.slow  # `make lint` runs it
@pytest.mark.parametrize("checker", CHECKERS)
def test_python_of_the_pages_passes_type_checkers(checker, tmp_path):
    pytest.importorskip(checker)
    for page in PAGES:
        if any(python := python_of(page)):
            (tmp_path / f"{page.parent.name}_{page.stem}.py").write_text(python)
    (tmp_path / "wrong.py").write_text("import torchcdm\n\ntorchcdm.no_such_name\n")
    # diffusers imports lazily, so that none of its own names is exported to pyright.
    settings = {"extraPaths": [str(DOCS.parent)], "reportUndefinedVariable": False, "reportMissingImports": "warning",
                "reportPrivateImportUsage": False}  # fmt: skip
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", checker, *CHECKERS[checker], "."]
    environment = os.environ | {"MYPYPATH": str(DOCS.parent), "MYPY_CACHE_DIR": str(DOCS.parent / ".mypy_cache")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    errors = [line for line in done.stdout.splitlines() if re.search(r"(:| -) error", line)]
    assert len(errors) == 1 and "no_such_name" in errors[0], done.stdout + done.stderr


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path):
    pytest.importorskip("furo")
    pytest.importorskip("myst_nb")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "tutorials" / "digits.html").exists()
