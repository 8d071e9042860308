"""How long CDMDensity takes: rows down, processor seconds of fitting, and of scoring and drawing 1000 rows.

    python -m studies.benchmarks.estimator_times
    python -m studies.benchmarks.estimator_times --shapes 10000x8 --json times.json
    python -m studies.benchmarks.estimator_times --waits --json waits.json

``--waits``: what people wait for most often, a fit of 1000 rows of 8 columns, a ratio of 4000 rows to 3000 of 9, and
40 000 draws from a posterior.

Columns are correlated and skewed: a random linear map of a few heavy-tailed numbers, and noise. The settings are the
estimator's defaults, so early stopping decides on the number of steps, and the times of another table differ.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchcdm import DensityRatio
from torchcdm.estimators import CDMConditional, CDMDensity

SHAPES = ("100x2", "100x8", "1000x8", "10000x8", "100000x8", "100x500", "2000x500")

SCORED = 1000


def rows(count: int, columns: int, seed: int) -> np.ndarray:
    """A table (count, columns)."""
    draw = np.random.RandomState(seed)
    matrix = draw.normal(size=(max(2, columns // 10), columns))
    latent = np.sinh(draw.normal(size=(count, len(matrix))))
    return latent @ matrix + 0.3 * draw.normal(size=(count, columns))


def measure(count: int, columns: int, seed: int) -> dict[str, float]:
    """Processor seconds of one table."""
    x, new = np.split(rows(count + SCORED, columns, seed), [count])
    marks = [time.process_time()]
    density = CDMDensity(random_state=seed, device="cpu").fit(x)
    marks.append(time.process_time())
    nats = density.score(new)
    marks.append(time.process_time())
    density.sample(SCORED, random_state=seed)
    marks.append(time.process_time())
    fit, score, sample = np.diff(marks).tolist()
    return {"rows": count, "columns": columns, "fit": fit, "score": score, "sample": sample, "nats": nats}


def waits(seed: int) -> Iterator[tuple[str, float]]:
    """What people wait for, and its processor seconds."""
    yield "CDMDensity, 1000 rows of 8 columns", measure(1000, 8, seed)["fit"]
    draw = np.random.RandomState(seed)
    x, new = rows(4000, 9, seed), 1.1 * rows(7000, 9, seed)[4000:] + 0.2
    began = time.process_time()
    DensityRatio(random_state=seed, device="cpu").fit(x, new)
    yield "DensityRatio, 4000 to 3000 rows of 9 columns", time.process_time() - began
    theta = draw.uniform(0.5, 3.0, (5000, 1))
    seen = 2.0 ** (-np.array([0.5, 1.0, 2.0]) / theta) + 0.05 * draw.normal(size=(5000, 3))
    posterior = CDMConditional(random_state=seed, device="cpu", steps=300).fit(theta, seen)
    began = time.process_time()
    posterior.sample(40_000, seen[0], random_state=seed)
    yield "CDMConditional, 40 000 draws", time.process_time() - began


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Processor seconds of CDMDensity.")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="ROWSxCOLUMNS")
    parser.add_argument("--waits", action="store_true", help="the three things that people wait for, instead")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the numbers")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    found: list[dict[str, Any]] = []

    def keep(row: dict[str, Any]) -> None:
        found.append(row)
        if options.json is not None:
            options.json.write_text(json.dumps({"seed": options.seed, "rows": found}, indent=1))

    for what, seconds in waits(options.seed) if options.waits else ():
        keep({"what": what, "seconds": seconds})
        print(f"{what:46} {seconds:6.1f} s", flush=True)
    for shape in () if options.waits else options.shapes:
        count, columns = map(int, shape.split("x"))
        row = measure(count, columns, options.seed)
        keep(row)
        print(f"{count:7} x {columns:<4} fit {row['fit']:7.1f} s  score {row['score']:6.2f} s  sample "
              f"{row['sample']:6.2f} s  {row['nats']:.3f} nats a row", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
