"""log Z of a run by replica exchange: starts, quarters, MBAR, and the processor time.

    python -m studies.benchmarks.log_z zoo:digits --name digits --sweeps 200 --json studies/results/log_z.json

The estimate is that of ``cdm nll RUN --methods logz --sweeps N``, with held-out images of the test split as one start.
The result is put under its name in the file. Seconds are those of the process on one processor.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from studies.benchmarks.files import write_named
from torchcdm.likelihood import Scoring, log_normalizer
from torchcdm.likelihood.log_z import REPLICAS, SWEEPS, TRAINING
from torchcdm.likelihood.restricted import restricted_pass
from torchcdm.training.build import load_source
from torchcdm.training.checkpoint import load, read_info


def measure(
    run: str, sweeps: int, replicas: int, seed: int, level: int | None = None, restricted: bool = False
) -> dict[str, Any]:
    """The estimate, its check and what it took; one pass of the test split where it is of the restricted density."""
    torch.set_num_threads(1)
    model, source = load(run), load_source(read_info(run).data)
    test, scoring = source.split("test").tensors(None)[0], Scoring(level, seed=seed)
    before = time.process_time()
    training = source.split("train").tensors(TRAINING)[0] if restricted else None
    z = log_normalizer(
        model, test, None, scoring, sweeps, replicas, restricted=restricted, progress=True, training=training
    )
    check = z.check and z.check.to_json()
    bits = z.to_json()
    per_bit = bits["value"] / z.value
    return {
        "data": source.name, "dim": z.dim, "level": z.level, "seed": seed, "sweeps": sweeps, "replicas": replicas,
        "cpu_seconds": round(time.process_time() - before, 1), "se": z.se * per_bit, "doubt": z.doubt,
        "log2_z_per_dim": bits, "log2_z_per_dim_check": check,
        **({"one-pass-restricted": restricted_pass(model, test, z.restricted).mean_and_error()} if restricted else {}),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, measures and writes."""
    parser = argparse.ArgumentParser(prog="python -m studies.benchmarks.log_z", description=__doc__.splitlines()[0])
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--name", required=True, help="key of the result in the file")
    parser.add_argument("--sweeps", type=int, default=SWEEPS)
    parser.add_argument("--replicas", type=int, default=REPLICAS, help="of each level, from each start")
    parser.add_argument("--level", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--restricted", action="store_true", help="of the restricted density")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    found = measure(
        options.run, options.sweeps, options.replicas, options.seed, options.level, options.restricted
    )
    print(json.dumps(found, indent=1))
    write_named(options.name, found, options.json)


if __name__ == "__main__":
    main()
