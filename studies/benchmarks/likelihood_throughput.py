"""Images a second of one-pass likelihood against the probability flow of the same network.

    python -m studies.benchmarks.likelihood_throughput RUN --json throughput.json

Both as ``cdm nll RUN`` runs them by default, dithering and noise included: ``one-pass`` and ``one-pass-level`` with
one draw, and the flow with 40 Heun steps and 2 probes. They take turns in one process on one batch; the numbers are
medians over the rounds and ratios of medians. ``network-pass``, log p of images that are already noisy, is what the
network alone takes. Time is that of the process on its processors, so that other jobs on the machine do not count;
the times of several threads add up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchcdm.likelihood import FlowSolver, Scoring, single_pass
from torchcdm.likelihood.scoring import ScoredBatch
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.training.build import load_source
from torchcdm.training.checkpoint import load, read_info


def contenders(model: ClassificationDiffusion, x: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed, each over all images of ``x`` (N, *shape), data units."""
    scoring = Scoring(batch_size=len(x))
    level, solver = scoring.level_of(model), FlowSolver(model, scoring)
    batch = ScoredBatch(model, x, None, slice(0, len(x)), 0)

    def noisy() -> Tensor:
        return model.schedule.perturb(batch.clean()[0], level, batch.noise("noise"))

    def one_pass_noisy() -> Tensor:
        with torch.no_grad():
            return model.log_prob(x_t.float(), t=level, units="model")

    def by_flow() -> Tensor:
        return solver.log_prob(noisy()).log_prob

    x_t = noisy()
    return {
        "one-pass": lambda: single_pass(model, x, None, replace(scoring, level=0)).nats,
        "one-pass-level": lambda: single_pass(model, x, None, scoring).nats,
        "network-pass": one_pass_noisy,
        "flow": by_flow,
    }


def measure(rows: Mapping[str, Callable[[], Any]], rounds: int, passes: int) -> dict[str, float]:
    """Median CPU seconds of each row over the rounds; all take turns, after one turn to warm up.

    Args:
        rows: What to time.
        rounds: Timed turns.
        passes: How often a turn repeats each row but the flow, whose turn would otherwise be hundreds of times longer.
    """
    times: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(rounds + 1):
        for name, run in rows.items():
            repeats = 1 if name == "flow" else passes
            began = time.process_time()
            for _ in range(repeats):
                run()
            if turn:
                times[name].append((time.process_time() - began) / repeats)
    return {name: statistics.median(values) for name, values in times.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN", help="folder of a trained CDM")
    parser.add_argument("--images", type=int, default=64, help="test images a turn, one batch (64)")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each row (5)")
    parser.add_argument("--passes", type=int, default=5, help="repetitions of the one-pass rows in a turn (5)")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    for name in ("images", "rounds", "passes", "threads"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} is {getattr(options, name)}; at least 1 is needed")
    if options.threads:
        torch.set_num_threads(options.threads)

    info, model = read_info(options.run), load(options.run)
    if not isinstance(model, ClassificationDiffusion):
        parser.error(f"{options.run}: is a ddm, which has no likelihood in one pass")
    x, _ = load_source(info.data).split("test").tensors(options.images)
    seconds = measure(contenders(model, x), options.rounds, options.passes)
    report = [
        {"name": name, "seconds": took, "images_per_second": len(x) / took, "ratio_to_flow": seconds["flow"] / took}
        for name, took in seconds.items()
    ]
    print(f"{info.data.spec}: {len(x)} images a batch, {torch.get_num_threads()} thread(s), torch {torch.__version__}")
    for line in report:
        print(f"  {line['name']:16}{line['images_per_second']:12.2f} images/s{line['ratio_to_flow']:10.1f} x the flow")
    if options.json:
        options.json.write_text(json.dumps({"rows": report}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
