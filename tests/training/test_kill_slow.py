"""SIGKILL at random moments, in training and while a state is written: nothing lost but the steps since the last."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from small_runs import small_flags

from torchcdm.runtime.files import TEMPORARY
from torchcdm.training.run_folder import RunFolder
from torchcdm.training.states import load_state, state_folders

KILLS = 12
COMMAND = "import sys; from torchcdm.cli import main; sys.exit(main())"
# A state after every step: half of the time goes into saving.
FLAGS = small_flags(train__steps="150", train__save_every="1", train__validate_every="50", train__log_every="5")


def start(folder):
    words = ["train", "digits", "--out", str(folder), "--device", "cpu", "--quiet", "--resume", *FLAGS]
    root = str(Path(__file__).parents[2])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    return subprocess.Popen([sys.executable, "-c", COMMAND, *words], env=environment)


def newest(folder):
    states = state_folders(RunFolder(folder))
    return int(states[-1].name.removeprefix("step-")) if states else 0


@pytest.mark.slow
def test_killed_at_random_moments_it_ends_in_the_same_bits(tmp_path):
    assert start(tmp_path / "whole").wait() == 0
    chance, in_a_save, folder = random.Random(0), 0, tmp_path / "killed"
    for kill in range(KILLS):
        before = newest(folder)
        process = start(folder)
        # Wait until it trains, then for a random while; every other time until a state is half written.
        deadline = time.monotonic() + 120
        while newest(folder) <= before and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.4))
        while kill % 2 and process.poll() is None and not list((folder / "state").glob(f"{TEMPORARY}*")):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        in_a_save += bool(list((folder / "state").glob(f"{TEMPORARY}*")))
        # Whatever is there under its final name can be read.
        assert newest(folder) >= before
        for state in state_folders(RunFolder(folder)):
            assert load_state(state).model
    assert in_a_save >= 2
    assert start(folder).wait() == 0
    assert newest(folder) == newest(tmp_path / "whole") == 150
    a, b = (load_state(state_folders(RunFolder(path))[-1]) for path in (tmp_path / "whole", folder))
    for mine, theirs in ((a.model, b.model), (a.ema, b.ema)):
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    for name in ("model.safetensors", "samples/manifest.csv"):
        assert (tmp_path / "whole" / name).read_bytes() == (folder / name).read_bytes()
    assert not list((folder / "state").glob(f"{TEMPORARY}*"))
