"""What every run of the tests says at its end."""

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ["torch", "numpy", "azula", "sbi", "pyod", "diffusers", "gradio", "huggingface_hub", "ray"]
"""Their tests ran with these versions, or were skipped."""


def pytest_terminal_summary(terminalreporter):
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    terminalreporter.write_line("versions: " + ", ".join(f"{name} {text}" for name, text in found.items()))
