"""Samples and measurements are the same whoever shares the work, and however much memory there is."""

import errno
import io
import json
import os
import platform
import re
import subprocess
import sys
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
import two_measuring
from small_runs import small_config
from torch import nn
from two_ranks import run_two

from torchcdm import ClassificationDiffusion
from torchcdm.apps.anomaly import level_profile
from torchcdm.cli import main
from torchcdm.compose import sample
from torchcdm.data import load_data
from torchcdm.diffusion.schedules import LogSNRSchedule
from torchcdm.errors import UserError
from torchcdm.likelihood import Scoring, report, single_pass
from torchcdm.runtime import processes
from torchcdm.runtime.processes import (
    Processes,
    alone,
    map_rows,
    progress_bar,
    rows_at_a_time,
    sharing,
)
from torchcdm.training.evaluation import level_sums
from torchcdm.training.loop import train
from torchcdm.units import DataTransform

# --- several processes -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A run, what two processes over gloo made of it, and a folder for one process."""
    path = tmp_path_factory.mktemp("measuring")
    run, two, one = (path / name for name in ("run", "two", "one"))
    train(small_config(train__steps="1", sampling__n="0"), run, device="cpu", progress=False)
    for out in (two, one):
        out.mkdir()
        np.save(out / "new.npy", load_data("digits").test.tensors(5)[0].numpy())
    run_two(two_measuring.__file__, run, two)
    return run, two, one


def assert_close(mine, theirs, tolerance):
    """Numbers in the same places of nested lists and dictionaries."""
    assert type(mine) is type(theirs)
    if isinstance(mine, dict):
        assert mine.keys() == theirs.keys()
        mine, theirs = list(mine.values()), list(theirs.values())
    if isinstance(mine, list):
        for pair in zip(mine, theirs, strict=True):
            assert_close(*pair, tolerance)
    elif isinstance(mine, torch.Tensor):
        assert torch.allclose(mine, theirs, rtol=tolerance, atol=tolerance)
    else:
        assert mine == (pytest.approx(theirs, rel=tolerance, abs=tolerance) if isinstance(mine, float) else theirs)


def test_two_processes_measure_what_one_does(folders):
    run, two, _ = folders
    one = two_measuring.measured(run)
    assert_close(one, torch.load(two / "measured-0.pt"), 1e-8)
    assert_close(one, torch.load(two / "measured-1.pt"), 1e-8)


def assert_same_words(one, other):
    """The same text but for the last digits of its numbers."""
    number = re.compile(r"-?\d+\.\d+")
    assert number.sub("#", one).split() == number.sub("#", other).split()
    found = ([float(x) for x in number.findall(text)] for text in (one, other))
    assert_close(*found, 1e-3)


def test_of_two_processes_one_writes_and_speaks(folders):
    run, two, one = folders
    for command in two_measuring.commands(run, one):
        with redirect_stdout(io.StringIO()) as said:
            assert main([*command.split(), "--device", "cpu"]) == 0
        name = command.split()[0]
        theirs = (two / f"{name}-0.txt").read_text().replace(str(two), str(one))
        if name == "score":
            # Batches of other sizes round otherwise, and a score divides by what increments hardly vary.
            assert_same_words(theirs, said.getvalue())
        else:
            assert theirs == said.getvalue()
        assert (two / f"{name}-1.txt").read_text() == ""
    for name, tolerance in (("nll", 1e-4), ("levels", 1e-4), ("scores", 1e-3)):
        assert_close(*(json.loads((folder / f"{name}.json").read_text()) for folder in (one, two)), tolerance)
    with np.load(one / "samples/samples.npz") as mine, np.load(two / "samples/samples.npz") as theirs:
        assert np.array_equal(mine["x"], theirs["x"])


def test_the_failure_of_a_process_is_that_of_all(folders):
    _, two, _ = folders
    failures = [(two / f"failures-{rank}.txt").read_text().splitlines() for rank in range(2)]
    # What a user can mend stays a line for the user.
    assert failures == [
        ["""RuntimeError("process 1 failed: ArithmeticError('too much')")""", "UserError('no numbers')"],
        ["ArithmeticError('too much')", "NotFinite('no numbers')"],
    ]


def test_without_a_launcher_there_is_no_group():
    with sharing("cpu") as (device, first):
        assert first and device == torch.device("cpu") and not torch.distributed.is_initialized()
        rows = map_rows(lambda rows: torch.arange(10)[rows], 10, 3, dim=1, device=device)
        assert torch.equal(rows, torch.arange(10))


def test_a_training_within_shared_work_is_refused():
    with alone(object()), pytest.raises(UserError, match=r"call it outside of sharing\(\)"):
        Processes("cpu")


# --- memory ------------------------------------------------------------------------------------------------------


class Limited(nn.Module):
    """Logits of two dimensions, (B, T+2), in a memory that holds so many samples."""

    def __init__(self, holds: int, error: Exception | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 12))
        self.holds, self.largest = holds, 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def forward(self, x):
        if len(x) > self.holds:
            raise self.error
        self.largest = max(self.largest, len(x))
        return self.layers(x)


def limited(holds: int, error: Exception | None = None) -> ClassificationDiffusion:
    schedule = LogSNRSchedule(10, 0.05, 20.0)
    return ClassificationDiffusion(Limited(holds, error), schedule, DataTransform((2,))).double()


X = torch.randn(50, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

WORK = {
    "sample": lambda model: sample(model, 50, "ddpm", 4),
    "profile": lambda model: level_profile(model, X),
    "levels": lambda model: level_sums(model, X, draws=2)["mse"],
    "report": lambda model: torch.tensor(
        [row.value for row in report(model, X, None, Scoring(steps=3), sweeps=4).rows]
    ),
}


@pytest.fixture(autouse=True)
def no_memory_of_other_tests(monkeypatch):
    monkeypatch.setattr(processes, "_HELD", {})


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", WORK)
def test_where_memory_runs_out_batches_are_halved(name):
    whole, small = limited(1000), limited(30)
    expected = WORK[name](whole)
    with pytest.warns(UserWarning, match="out of memory: went on with [0-9]+ samples at a time"):
        found = WORK[name](small)
    assert torch.allclose(found, expected, atol=1e-9, rtol=1e-9, equal_nan=True)
    assert small.backbone.largest <= 30 < whole.backbone.largest


def test_a_halved_batch_is_noticed_once():
    model = limited(7)
    with pytest.warns(UserWarning) as notices:
        level_profile(model, X)
        level_profile(model, X)
    assert [str(notice.message) for notice in notices] == ["out of memory: went on with 6 samples at a time"]


@pytest.mark.parametrize(
    ("model", "size", "error"),
    [
        (limited(10), 50, torch.OutOfMemoryError),  # a size that was asked for
        (limited(0), None, torch.OutOfMemoryError),  # not even one
        (limited(10, RuntimeError("shapes differ")), None, RuntimeError),
    ],
)
def test_what_halving_cannot_mend_fails(model, size, error):
    with pytest.raises(error):
        single_pass(model, X, None, Scoring(level=0, batch_size=size))


@pytest.mark.parametrize(
    ("dim", "on_cpu", "on_gpu"),
    [(2, 4096, 131_072), (64, 512, 4096), (784, 41, 334), (12_288, 16, 64)],
)
def test_batches_go_by_the_size_of_a_sample(dim, on_cpu, on_gpu):
    assert rows_at_a_time(dim, torch.device("cpu")) == on_cpu
    assert rows_at_a_time(dim, torch.device("cuda")) == on_gpu
    seen = []

    def work(rows):
        seen.append(rows.stop - rows.start)
        return torch.zeros(seen[-1])

    map_rows(work, on_cpu + 1, dim=dim, device=torch.device("cpu"))
    assert seen == [on_cpu, 1]


@pytest.mark.parametrize(("own", "terminal", "seconds"), [(True, False, 10), (True, True, 0.5), (False, False, 0.5)])
def test_a_log_gets_a_bar_seldom_and_a_terminal_or_a_notebook_often(monkeypatch, own, terminal, seconds):
    monkeypatch.setattr(sys, "stderr", sys.__stderr__ if own else io.StringIO())
    monkeypatch.setattr(os, "isatty", lambda _: terminal)
    with progress_bar(range(3), "work", True) as bar:
        assert bar.mininterval == seconds and list(bar) == [0, 1, 2]


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC])
def test_work_goes_on_when_nobody_reads_its_bar(monkeypatch, number):
    class Gone(io.StringIO):
        def write(self, *_):
            raise OSError(number, "gone")

        flush = write

    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    monkeypatch.setattr(os, "isatty", lambda _: True)
    bar = progress_bar(range(3), "work", True, leave=True)
    bar.mininterval = 0
    assert list(bar) == [0, 1, 2]


def test_no_rows_are_refused():
    with pytest.raises(UserError, match="empty"):
        map_rows(lambda rows: torch.zeros(rows.stop - rows.start), 0, dim=1, device=torch.device("cpu"))


KEPT = """
import math, resource, torch
from torchcdm.runtime import processes
from torchcdm.runtime.processes import map_rows, memory_kept

def given():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.empty(2**25).fill_(1.0)  # 128 MiB, of 4 KiB a page, or 2 MiB a huge one
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def warm(_=None):
    torch.empty(2**25).fill_(1.0)
    return torch.tensor([given()])

assert given() > 5 * 60
with memory_kept():
    assert warm() < 60
    with memory_kept():
        pass
    assert given() < 60, "a block within another leaves it as it is"
assert given() > 5 * 60
assert map_rows(warm, 1, dim=1, device=torch.device("cpu")) < 60
assert given() > 5 * 60
for processes.SHORT, back in ((0.0, True), (math.inf, False)):
    with memory_kept():
        warm()
    with memory_kept():
        assert (given() > 60) == back, "at once after a long block alone"
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such settings")
def test_freed_memory_is_used_again_without_the_system():
    """In a new process: one that memory did not suffice for has its large tensors elsewhere from then on."""
    pytest.importorskip("resource")
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
