"""What ``import torchcdm`` adds to ``import torch``.

    python -m studies.benchmarks.import_time --rounds 11 --json import_time.json

Each import runs in a process of its own, in turn; the seconds are processor time of the whole process, medians over
the rounds after one to warm the disk's cache. ``ratio_to_ddm`` divides by ``import torch``, which a DDM needs too.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from torchcdm.runtime.files import write_json

STATEMENTS = ("import torch", "import torchcdm", "from torchcdm import ClassificationDiffusion")
"""The package itself loads what is asked of it, so that the class is what a user waits for."""


def seconds_of(statement: str) -> float:
    """Processor seconds of a process that runs the import and ends."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-c", statement], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11, help="timed imports of each")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; at least 1 is needed")
    times: dict[str, list[float]] = {statement: [] for statement in STATEMENTS}
    for number in range(options.rounds + 1):
        for statement in STATEMENTS:
            took = seconds_of(statement)
            if number:
                times[statement].append(took)
    medians = {statement: statistics.median(values) for statement, values in times.items()}
    rows = [
        {"name": statement, "seconds": took, "ratio_to_ddm": took / medians[STATEMENTS[0]]}
        for statement, took in medians.items()
    ]
    for row in rows:
        print(f"{row['name']:46}{row['seconds']:8.3f} s{row['ratio_to_ddm']:8.3f} x import torch")
    if options.json:
        write_json(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
