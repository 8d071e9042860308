"""Every module can be imported alone, and the package itself stays light."""

import pkgutil
import subprocess
import sys

import pytest

import torchcdm

MODULES = sorted(module.name for module in pkgutil.walk_packages(torchcdm.__path__, "torchcdm."))
HEAVY = ("accelerate", "sklearn", "torchvision", "matplotlib", "diffusers", "pandas", "PIL", "datasets")
OPTIONAL = ("azula", "sbi", "pyod", "diffusers", "gradio", "ray")
"""Packages that a bridge builds on; without them it cannot be imported."""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_each_module_imports_alone():
    # One fresh process for all: torch is loaded once, each module's own tree run anew but read once.
    code = f"""
import functools, importlib, sys, torch
from importlib.machinery import SourceFileLoader
SourceFileLoader.get_code = functools.cache(SourceFileLoader.get_code)
for name in {MODULES!r}:
    for loaded in [m for m in sys.modules if m.split('.')[0] == 'torchcdm']:
        del sys.modules[loaded]
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name.split('.')[0] not in {OPTIONAL!r}:
            raise
"""
    result = run(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("statement", ["import torchcdm", "import torchcdm; torchcdm.ClassificationDiffusion"])
def test_import_is_light(statement):
    result = run(f"import sys\n{statement}\nprint([m for m in {HEAVY!r} if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_the_command_line_starts_without_torch():
    result = run("import sys, torchcdm.cli\nprint([m for m in ('torch', 'numpy', 'pydantic') if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr
