"""Two machines, both of them this one: the launch commands of docs/guide/machines.md."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from torchcdm.cli import main

LAUNCHERS = {
    "torchrun": "torch.distributed.run --nnodes 2 --nproc-per-node 1 --node-rank {rank} --master-addr 127.0.0.1 "
    "--master-port {port} -m -- torchcdm",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_machines 2 --num_processes 2 --machine_rank {rank} "
    "--main_process_ip 127.0.0.1 --main_process_port {port} -m torchcdm",
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_machines_draw_the_samples_of_one(launcher, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["sample", "zoo:two-moons", "--n", "9", "--steps", "3", "--format", "array", "--device", "cpu", "--out"]
    here = Path(__file__).parents[2]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(here)}
    machines = [
        subprocess.Popen(
            [sys.executable, "-m", *LAUNCHERS[launcher].format(rank=rank, port=port).split(), *words, tmp_path / "2"],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [machine.communicate(timeout=600)[1] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], errors
    assert main([*words, str(tmp_path / "one")]) == 0
    two, one = (np.load(tmp_path / name / "samples.npz")["x"] for name in ("2", "one"))
    np.testing.assert_allclose(two, one, rtol=1e-4, atol=1e-4)
