"""Code may move and be rewritten; its numbers may not, unless a commit says so."""

from __future__ import annotations

import os

import pytest
import torch
from golden.cases import CASES, VALUES
from safetensors import safe_open
from safetensors.torch import load_file

EXACT = os.environ.get("GOLDEN") == "exact"
"""Bit for bit, on the machine that wrote the values; elsewhere sums round in another order."""


OPTIMISED = ("step", "training", "ratio")
"""Adam and Muon divide gradients by their own size: rounding that is no matter elsewhere shows in the weights."""

CHAOTIC = (*OPTIMISED, "log-z")
"""Moves are accepted or not besides: with another torch, whose rounding differs, they go another way."""

with safe_open(VALUES, "pt") as file:
    TORCH = file.metadata()["torch"]


@pytest.mark.parametrize("name", CASES)
def test_the_numbers_are_those_of_the_commit_that_wrote_them(name: str) -> None:
    optimised = name.startswith(OPTIMISED)
    if name.startswith(CHAOTIC) and torch.__version__.split("+")[0] != TORCH:
        pytest.skip(f"dropout and moves draw otherwise than with torch {TORCH}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        values = CASES[name]()
    finally:
        torch.set_num_threads(threads)
    kept = {key: value for key, value in load_file(VALUES).items() if key.startswith(f"{name}/")}
    assert {f"{name}/{key}" for key in values} == kept.keys()
    tolerance = {"rtol": 2e-3, "atol": 4e-3 if optimised else 2e-4}
    found = {f"{name}/{key}": value.detach() for key, value in values.items()}
    torch.testing.assert_close(found, kept, **({"rtol": 0, "atol": 0} if EXACT else tolerance), equal_nan=True)
