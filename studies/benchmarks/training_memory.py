"""The memory that training takes: what two training steps add to a process that holds the models.

    python -m studies.benchmarks.training_memory --json training_memory.json

The contenders are those of ``step_cost``, each in a process of its own: activations, gradients and the optimiser's
state, at their peak. It is the resident size of the process, as Linux counts it; the allocator decides when it gives
pages back, so that a few per cent mean nothing.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from studies.benchmarks.step_cost import BATCHES, Mode, contenders
from torchcdm.runtime.files import write_json

STEP = "training-step"


def resident(which: str) -> int:
    """``VmRSS``, the resident size of this process, or ``VmHWM``, its largest since the last reset; bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{which}:")))


def added_by(network: str, name: str, batch: int) -> int:
    """Bytes that two training steps add, in this process."""
    torch.set_num_threads(1)
    row = next(row for row in contenders(network, batch, Mode()) if row.name == name)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident("VmRSS")
    for _ in range(2):
        row.run()
    return resident("VmHWM") - before


def in_own_process(network: str, name: str, batch: int) -> int:
    """:func:`added_by` in a process that ends."""
    words = [sys.executable, "-m", "studies.benchmarks.training_memory", "--network", network, "--only", name]
    words += ["--batch", str(batch)]
    return int(json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=["all", *BATCHES], default="all")
    parser.add_argument("--batch", type=int, help=f"samples a step; by network when left out: {BATCHES}")
    parser.add_argument("--only", metavar="NAME", help="print the bytes of one row, measured in this process")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    if options.batch is not None and options.batch < 1:
        parser.error(f"--batch is {options.batch}; at least 1 is needed")
    if options.only:
        print(added_by(options.network, options.only, options.batch))
        return
    rows = []
    for network in BATCHES if options.network == "all" else [options.network]:
        batch = options.batch or BATCHES[network]
        trained = [row for row in contenders(network, batch, Mode()) if row.name.endswith(STEP)]
        found = {row.name: in_own_process(network, row.name, batch) for row in trained}
        rows += [
            {"name": row.name, "bytes": found[row.name], "ratio_to_ddm": found[row.name] / found[row.ddm]}
            for row in trained
        ]
    for row in rows:
        print(f"{row['name']:34}{row['bytes'] / 2**20:9.0f} MiB{row['ratio_to_ddm']:8.2f} x the DDM's")
    if options.json:
        write_json(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
