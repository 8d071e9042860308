"""What every run of the tests does once, and says at its end."""

import gc
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ["torch", "numpy", "azula", "sbi", "pyod", "diffusers", "gradio", "huggingface_hub", "ray"]
"""Their tests ran with these versions, or were skipped."""


def pytest_collection_finish():
    """Garbage is not looked for among what imports and collection have made: a tenth of the time of all tests."""
    gc.freeze()


def pytest_terminal_summary(terminalreporter):
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    terminalreporter.write_line("versions: " + ", ".join(f"{name} {text}" for name, text in found.items()))
