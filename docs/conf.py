"""The documentation site: ``make docs``."""

import re
import runpy
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # a clone that is not installed

from torchcdm import __version__  # noqa: E402

runpy.run_path(str(HERE / "write_reference.py"))["write"]()

project = "torchcdm"
author = "torchcdm developers"
release = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"torchcdm {release}"
exclude_patterns = ["_build"]
html_theme_options = {"navigation_with_keys": True}

# Tutorials are run while the site is built; a cell that fails is an error.
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_raise_on_error = True
nb_merge_streams = True
nb_output_stderr = "remove"  # bars and warnings of the machine that builds
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_default_options = {"show-inheritance": True}
napoleon_google_docstring, napoleon_numpy_docstring = True, False
napoleon_use_rtype = False


def escaped(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """``(N, *shape)`` in a docstring is no emphasis."""
    for number, line in enumerate(lines):
        parts = line.split("``")
        parts[::2] = [re.sub(r"\*(?=\w+\))", r"\\*", part) for part in parts[::2]]
        lines[number] = "``".join(parts)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", escaped)
