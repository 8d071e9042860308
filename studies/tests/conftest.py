"""What the tests of several benchmarks share."""

import importlib
import json

import pytest


def not_json(constant):
    raise ValueError(f"{constant} is no JSON")


@pytest.fixture
def report_of(monkeypatch, tmp_path):
    """Runs a benchmark, with other values for some of its names, and gives its rows."""

    def run(name, *words, **values):
        module, report = importlib.import_module(f"studies.benchmarks.{name}"), tmp_path / "report.json"
        for key, value in values.items():
            monkeypatch.setattr(module, key, value)
        module.main([*words, "--json", str(report)])
        return json.loads(report.read_text(), parse_constant=not_json)["rows"]

    return run
