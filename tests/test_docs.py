"""What the pages of the reference are made of, and the site where its extra is installed."""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def test_reference_pages_name_every_command_and_setting():
    script = runpy.run_path(str(DOCS / "write_reference.py"))
    settings, commands = script["settings"](), script["commands"]()
    for part in ("## train", "`max_seconds`", "## model.backbone: encoder", "## model.schedule: log-snr"):
        assert part in settings
    for part in ("## cdm train", "## cdm zoo", "## cdm score", "zoo:NAME"):
        assert part in commands


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
