"""Two processes that work together: a script in the environment that ``torchrun`` gives, without its own start."""

import os
import subprocess
import sys
from pathlib import Path

from torch.distributed import TCPStore


def run_two(script, *words):
    """Runs the script with its words as ranks 0 and 1 of a group over gloo."""
    # The store is this process's, as that of torchrun's agent: its port is taken before the ranks hear of it.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    here = Path(__file__).parent
    shared = os.environ | {
        "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": f"{here.parent}{os.pathsep}{here}",
    }  # fmt: skip
    command = [sys.executable, script, *map(str, words)]
    environments = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    ranks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=own) for own in environments]
    try:
        said = [rank.communicate(timeout=300)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(text[-3000:] for text in said)
