"""Times training steps of one joint batch; each process of a group takes its share. Started by ``step_scaling``.

Processes synchronise as in the trainer: gradients are averaged over all, and a step takes as long as the slowest.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from studies.benchmarks.step_cost import Step, untrained
from studies.benchmarks.step_scaling import SIDE, both_models
from torchcdm.runtime.files import write_json
from torchcdm.runtime.processes import Processes
from torchcdm.training.build import build_loss
from torchcdm.training.optimizers import build_optimizer
from torchcdm.training.settings import Config, TrainConfig


def joint_step(config: Config, x: Tensor, processes: Processes) -> Step:
    """A training step of this process's share of the batch, ``x`` (B, *shape).

    Args:
        config: The model and its losses.
        x: Model units.
        processes: The group.
    """
    loss = build_loss(config.loss, untrained(config, tuple(x.shape[1:])))
    module = processes.accelerator.prepare_model(loss, device_placement=False)
    parameters = list(loss.model.parameters())
    optimizer = build_optimizer(TrainConfig(optimizer=config.train.optimizer, lr=1e-5), loss.model)

    def run() -> None:
        loss.model.train()
        value = module(x, None, loss.draw_levels(len(x)), torch.randn_like(x))["loss"].mean()
        if processes.world > 1:
            # As in the trainer: the reducer waits for every parameter, and some have no influence.
            value = value + 0 * sum(parameter.sum() for parameter in parameters)
        processes.accelerator.backward(value)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return run


def seconds_of(step: Step, processes: Processes) -> float:
    """Of one step that all processes begin together; that of the slowest."""
    processes.accelerator.wait_for_everyone()
    began = time.perf_counter()
    step()
    (microseconds,) = processes.largest(round(1e6 * (time.perf_counter() - began)))
    return microseconds / 1e6


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="file for the seconds of each model's steps")
    parser.add_argument("--batch", type=int, required=True, help="samples of all processes together")
    parser.add_argument("--steps", type=int, required=True, help="timed steps, after one to warm up")
    parser.add_argument("--threads", type=int, required=True, help="torch's threads, of each process")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    processes = Processes("cpu")
    x = torch.randn(options.batch, 1, SIDE, SIDE)[processes.rank :: processes.world]
    steps = {kind: joint_step(config, x, processes) for kind, config in both_models().items()}
    found: dict[str, list[float]] = {kind: [] for kind in steps}
    for number in range(options.steps + 1):
        for kind, step in steps.items():
            took = seconds_of(step, processes)
            if number:
                found[kind].append(took)
    if processes.main:
        write_json(options.out, found)
    processes.end()


if __name__ == "__main__":
    main()
