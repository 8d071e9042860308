"""How the cost of a step grows: with the levels, the classes, the batch and the resolution.

    python benchmarks/step_scaling.py --question levels --threads 1 --json step_scaling.json

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
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from step_cost import (
    Contender,
    Mode,
    denoising_step,
    guided_step,
    measure,
    one_pass_likelihood,
    training_step,
    untrained,
)

from torchcdm.building import build_loss, plain_model
from torchcdm.cdm import ClassificationDiffusion
from torchcdm.config import Config, make_config, preset_fields
from torchcdm.run_folder import write_json

VALUES = {"levels": (100, 400, 1000), "classes": (10, 100, 1000), "batch": (8, 32, 128), "resolution": (16, 32, 64)}
BATCH, SIDE, CLASSES = 16, 28, 10


def rows_at(question: str, value: int) -> list[Contender]:
    """The steps at one value of a question, ours and the DDM's."""
    config = make_config(preset_fields("fashion-mnist"))
    if question == "levels":
        config = replace(config, model=replace(config.model, schedule=replace(config.model.schedule, T=value)))
    batch = value if question == "batch" else BATCH
    side = value if question == "resolution" else SIDE
    classes = value if question == "classes" else CLASSES
    ddm = replace(config, model=replace(plain_model(config.model), gaussian=False))
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
    lines = []
    for row in contenders:
        _, value, step = row.name.split("/")
        first = seconds[f"{question}/{VALUES[question][0]}/{step}"]
        lines.append(
            {
                "name": row.name,
                "seconds": seconds[row.name],
                "ratio_to_ddm": seconds[row.name] / seconds[row.ddm],
                "ratio_to_first": seconds[row.name] / first,
            }
        )
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--question", choices=["all", *VALUES], default="all")
    parser.add_argument("--rounds", type=int, default=5, help="timed turns of each row")
    parser.add_argument("--threads", type=int, help="torch's threads")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; at least 1 is needed")
    if options.threads:
        torch.set_num_threads(options.threads)
    lines = []
    for question in VALUES if options.question == "all" else [options.question]:
        print(f"{question}: {torch.get_num_threads()} thread(s), torch {torch.__version__}", flush=True)
        for line in report(question, options.rounds):
            print(f"  {line['name']:44}{1e3 * line['seconds']:10.1f} ms{line['ratio_to_ddm']:8.2f} x DDM"
                  f"{line['ratio_to_first']:8.2f} x first", flush=True)  # fmt: skip
            lines.append(line)
    if options.json:
        write_json(options.json, {"rows": lines})


if __name__ == "__main__":
    main()
