"""What the pages of the reference are made of, and the site where its extra is installed."""

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


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path):
    pytest.importorskip("furo")
    pytest.importorskip("myst_nb")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-b", "html", str(DOCS), str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "site" / "tutorials" / "digits.html").exists()
