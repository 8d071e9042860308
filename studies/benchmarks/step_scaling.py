"""How the cost of a step grows: with the levels, the classes, the batch, the resolution and the processes.

    python -m studies.benchmarks.step_scaling --question levels --threads 1 --json step_scaling.json

The default network (preset ``fashion-mnist``), untrained. Rows are named ``question/value/step``; the seconds are
those of a batch, and ``ratio_to_first`` divides by the same step at the question's first value. All rows of a question
take turns in one process, with the DDM of the same width (``ratio_to_ddm``: its denoising step at that value, for
training its training step).

levels
    Denoising, training and one-pass likelihood at T = 100, 400 and 1000.
classes
    Joint logits: a guided step and a training step with 10, 100 and 1000 classes.
batch
    8, 32 and 128 images.
resolution
    16, 32 and 64 pixels a side.
processes
    A training step of one batch of 64 images that 1, 2, ... processes share (``--processes``), over gloo on the CPU,
    each with ``--threads`` threads. A round starts each number of processes in turn, anew, and times three steps of
    each after one to warm up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from studies.benchmarks.step_cost import (
    Contender,
    Mode,
    denoising_step,
    guided_step,
    measure,
    one_pass_likelihood,
    training_step,
    untrained,
)
from torchcdm.models.cdm import ClassificationDiffusion
from torchcdm.runtime.files import write_json
from torchcdm.training.build import build_loss, plain_model
from torchcdm.training.config_files import make_config, preset_fields
from torchcdm.training.settings import Config

VALUES = {"levels": (100, 400, 1000), "classes": (10, 100, 1000), "batch": (8, 32, 128), "resolution": (16, 32, 64)}
BATCH, SIDE, CLASSES = 16, 28, 10

PROCESSES, JOINT_BATCH, JOINT_STEPS = "processes", 64, 3
"""The question that one process cannot answer; samples and timed steps of its groups."""


def both_models() -> dict[str, Config]:
    """The default network, and the DDM of its width."""
    config = make_config(preset_fields("fashion-mnist"))
    return {"cdm": config, "ddm": replace(config, model=replace(plain_model(config.model), gaussian=False))}


def rows_at(question: str, value: int) -> list[Contender]:
    """The steps at one value of a question, ours and the DDM's."""
    config, ddm = both_models().values()
    if question == "levels":
        config, ddm = (
            replace(model, model=replace(model.model, schedule=replace(model.model.schedule, T=value)))
            for model in (config, ddm)
        )
    batch = value if question == "batch" else BATCH
    side = value if question == "resolution" else SIDE
    classes = value if question == "classes" else CLASSES
    if question == "classes":
        config = replace(config, model=replace(config.model, labels="joint"))
        ddm = replace(ddm, model=replace(ddm.model, labels="input"))
    return steps_of("cdm", config, f"{question}/{value}", batch, side, classes) + steps_of(
        "ddm", ddm, f"{question}/{value}", batch, side, classes
    )


def steps_of(kind: str, config: Config, name: str, batch: int, side: int, classes: int) -> list[Contender]:
    """The steps of one model."""
    shape = (1, side, side)
    x, y = torch.randn(batch, *shape), torch.arange(batch) % classes
    model = untrained(config, shape, classes)
    labelled = config.model.labels != "none"
    loss, mode = build_loss(config.loss, model), Mode(optimizer=config.train.optimizer)
    denoising, training = f"{name}/ddm-denoising-step", f"{name}/ddm-training-step"
    rows = [
        Contender(f"{name}/{kind}-denoising-step", denoising_step(model, x, y if labelled else None), denoising),
        Contender(
            f"{name}/{kind}-training-step",
            training_step(loss, x, mode, y if labelled else None),
            training,
        ),
    ]
    if isinstance(model, ClassificationDiffusion):
        if labelled:
            rows.append(Contender(f"{name}/cdm-guided-step", guided_step(model, x, y), denoising))
        else:
            rows.append(Contender(f"{name}/cdm-one-pass-likelihood", one_pass_likelihood(model, x), denoising))
    return rows


def report(question: str, rounds: int) -> list[dict[str, Any]]:
    """The rows of a question, measured."""
    torch.manual_seed(0)
    contenders = [row for value in VALUES[question] for row in rows_at(question, value)]
    seconds = measure(contenders, rounds, lambda text: print(f"  {text}", flush=True))
    return lines(seconds, {row.name: row.ddm for row in contenders})


def report_processes(counts: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """The rows of ``processes``, measured."""
    times: dict[str, list[float]] = {}
    for number in range(rounds):
        for count in counts:
            for kind, seconds in joint_seconds(count).items():
                times.setdefault(f"{PROCESSES}/{count}/{kind}-training-step", []).extend(seconds)
        print(f"  round {number + 1} of {rounds}", flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return lines(medians, {name: name.replace("cdm-", "ddm-") for name in medians})


def joint_seconds(count: int) -> dict[str, list[float]]:
    """Seconds of the training steps of both models in so many processes, newly started."""
    start = [sys.executable]
    if count > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
    threads = str(torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "seconds.json"
        words = ["-m", "studies.benchmarks.joint_step", str(out), "--batch", str(JOINT_BATCH)]
        words += ["--steps", str(JOINT_STEPS), "--threads", threads]
        subprocess.run([*start, *words], check=True, env=os.environ | {"OMP_NUM_THREADS": threads})
        return json.loads(out.read_text(encoding="utf-8"))


def lines(seconds: Mapping[str, float], ddm: Mapping[str, str]) -> list[dict[str, Any]]:
    """Rows of the report.

    Args:
        seconds: By name, ``question/value/step``; the question's first value first.
        ddm: The name of the row that each is divided by.
    """
    first: dict[str, float] = {}
    found = []
    for name, took in seconds.items():
        step = name.rsplit("/", 1)[1]
        ratios = {"ratio_to_ddm": took / seconds[ddm[name]], "ratio_to_first": took / first.setdefault(step, took)}
        found.append({"name": name, "seconds": took} | ratios)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", choices=["all", *VALUES, PROCESSES], default="all")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each row")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], metavar="N", help="numbers of processes")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; at least 1 is needed")
    for count in options.processes:
        if count < 1 or JOINT_BATCH % count:
            parser.error(f"--processes {count}: {JOINT_BATCH} samples are to be shared evenly")
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = []
    for question in (*VALUES, PROCESSES) if options.question == "all" else [options.question]:
        print(f"{question}: {torch.get_num_threads()} thread(s), torch {torch.__version__}", flush=True)
        if question == PROCESSES:
            found = report_processes(options.processes, options.rounds)
        else:
            found = report(question, options.rounds)
        for row in found:
            print(f"  {row['name']:44}{1e3 * row['seconds']:10.1f} ms{row['ratio_to_ddm']:8.2f} x DDM"
                  f"{row['ratio_to_first']:8.2f} x first", flush=True)  # fmt: skip
        rows += found
    if options.json:
        write_json(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
