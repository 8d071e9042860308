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
from torchcdm.training.checkpoint import load_state, state_folders
from torchcdm.training.run_folder import RunFolder

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


@pytest.mark.slow
def test_one_killed_process_of_two_ends_both_within_a_minute_and_they_go_on(tmp_path):
    script = tmp_path / "command.py"
    script.write_text(
        f"import os, pathlib\npathlib.Path(r'{tmp_path}', 'pid-' + os.environ['RANK']).write_text(str(os.getpid()))\n"
        + COMMAND
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    for name in ("whole", "killed", "killed"):
        folder = tmp_path / name
        words = ["train", "digits", "--out", str(folder), "--device", "cpu", "--quiet", "--resume"]
        before = newest(folder)
        process = subprocess.Popen([*launcher, *words, *small_flags(train__steps="40", train__save_every="1")],
                                   env=environment, stderr=subprocess.DEVNULL)  # fmt: skip
        if name == "killed" and not before:
            deadline = time.monotonic() + 120
            while newest(folder) < 5 and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
            assert process.wait(timeout=60) != 0 and 5 <= newest(folder) < 40
        else:
            assert process.wait(timeout=240) == 0 and newest(folder) == 40
    a, b = (load_state(state_folders(RunFolder(tmp_path / name))[-1]) for name in ("whole", "killed"))
    assert all(torch.equal(a.model[key], b.model[key]) for key in a.model)
