"""Where accepted moves pay: samples of steps with and without them, at equal evaluations of the network.

    python -m studies.benchmarks.corrected_sampling zoo:digits --json studies/results/corrected_sampling.json

Each cell takes about so many evaluations a sample: S steps of a sampler, and after each but the last K Langevin moves
with accept-reject (``cdm sample --steps S --corrector K``). A move costs one evaluation. Fréchet distances to the
training images are in features of the fixed network (``python -m studies quality``); their standard errors are over
seeds of the sampling, or of the bootstrap where there is one seed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from studies.quality.frechet import Reference
from studies.quality.measure import Ruler
from torchcdm import compose
from torchcdm.samplers import make_sampler
from torchcdm.training.build import load_source
from torchcdm.training.checkpoint import load, read_info

SAMPLERS, MOVES = ("ddpm", "ddim", "dpm++"), (0, 1, 3)


def steps_for(evaluations: int, moves: int) -> int:
    """Steps whose evaluations, those of moves after each but the last included, are at most so many."""
    return max(2, (evaluations + moves) // (1 + moves))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parses, measures and writes."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.benchmarks.corrected_sampling", description=__doc__.splitlines()[0]
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--n", type=int, default=1000, help="samples of each cell and seed (1000)")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--evaluations", type=int, nargs="+", default=[12, 24, 48])
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    model, source = load(options.model), load_source(read_info(options.model).data)
    ruler, rows = Ruler(Reference(source)), []
    for evaluations in options.evaluations:
        for sampler in options.samplers:
            for moves in MOVES:
                steps, before = steps_for(evaluations, moves), time.process_time()
                found = []
                for seed in range(options.seeds):
                    drawn = compose.sample(
                        model, options.n, sampler, steps, seed=seed, corrector=moves, details=True
                    )
                    found.append(ruler.quality(drawn.x))
                values = [one.frechet for one in found]
                se = found[0].frechet_se
                if len(values) > 1:
                    se = statistics.stdev(values) / math.sqrt(len(values))
                rows.append({
                    "evaluations": make_sampler(sampler).cost(steps) + moves * (steps - 1), "sampler": sampler,
                    "steps": steps, "moves": moves, "n": options.n, "seeds": options.seeds,
                    "frechet": statistics.fmean(values), "frechet_se": se,
                    "recall": statistics.fmean(one.recall for one in found), "acceptance": drawn.acceptance,
                    "cpu_seconds": time.process_time() - before,
                })  # fmt: skip
                print(json.dumps(rows[-1]), flush=True)
                if options.json is not None:
                    options.json.write_text(json.dumps({"model": options.model, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
