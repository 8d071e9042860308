"""Small runs that the tests of the commands share: they leave them as they are."""

import pytest
from small_runs import small_flags

from torchcdm.cli import main


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    flags = small_flags(report__methods="[single, flow]")
    assert main(["train", "digits", "--out", str(folder), "--device", "cpu", "--quiet", *flags]) == 0
    return folder


@pytest.fixture(scope="session")
def pixels(tmp_path_factory):
    """A run in whose units noise on the pixels is additive."""
    folder = tmp_path_factory.mktemp("cli") / "pixels"
    flags = small_flags(data__gaussianize="false")
    assert main(["train", "digits", "--out", str(folder), "--device", "cpu", "--quiet", *flags]) == 0
    return folder


@pytest.fixture(scope="session")
def conditional(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "conditional"
    flags = small_flags(model__labels="joint", train__steps="2")
    assert main(["train", "digits", "--out", str(folder), "--device", "cpu", "--quiet", *flags]) == 0
    return folder
