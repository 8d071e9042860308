"""What a training asks of a GPU: floating-point operations of a step, counted, and the time at an assumed rate.

    python -m studies.benchmarks.training_flops cifar10 celeba64 --rate 20e12 --json training_flops.json

Counts convolutions, matrix products and attention, forward, backward and second derivatives, as GPUs take them
(``torch.utils.flop_counter``; an addition and a multiplication are two). What is done number by number costs memory
traffic and is not in it. The ``rate`` is an assumption: what a card sustains is found by ``cdm train --dry-run``.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from studies.benchmarks.step_cost import Mode, differentiated_twice, training_step, untrained
from torchcdm.data.named import CELEBA_SIZE
from torchcdm.runtime.files import write_json
from torchcdm.training.build import build_loss, plain_model
from torchcdm.training.config_files import make_config, preset_fields
from torchcdm.training.settings import Config

SAMPLES = 2
"""Samples of the step that is counted; operations grow with them."""


class Counter(TorchDispatchMode):
    """Counts meanwhile; ``FlopCounterMode`` follows modules, which ``torch.func.grad`` does not let it do."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self.total += count(*args, **(kwargs or {}), out_val=found)
        return found


def operations(config: Config, shape: tuple[int, ...]) -> int:
    """Floating-point operations of a training step, for each sample."""
    model, x = untrained(config, shape), torch.randn(SAMPLES, *shape)
    step = differentiated_twice(training_step(build_loss(config.loss, model), x, Mode()))
    with Counter() as counter:
        step()
    return int(counter.total) // SAMPLES


def row(preset: str, rate: float) -> dict[str, Any]:
    """Operations of the preset's CDM and of its DDM, and hours of all steps of the CDM."""
    config = make_config(preset_fields(preset))
    shape = (3, *(CELEBA_SIZE if preset.startswith("celeba") else (32, 32)))
    found = operations(config, shape)
    ddm = replace(config, model=plain_model(config.model))
    total = found * config.train.batch_size * config.train.steps
    return {"preset": preset, "flops_a_sample": found, "ddm_flops_a_sample": operations(ddm, shape),
            "batch": config.train.batch_size, "steps": config.train.steps, "rate": rate,
            "hours": total / rate / 3600}  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=["cifar10"], help="presets of RGB images (cifar10)")
    parser.add_argument("--rate", type=float, default=20e12, help="operations a second that a GPU sustains (20e12)")
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = [row(preset, options.rate) for preset in options.presets]
    for one in rows:
        print(f"{one['preset']}: {one['flops_a_sample'] / 1e9:.0f} GFLOP a sample and step (DDM "
              f"{one['ddm_flops_a_sample'] / 1e9:.0f}); {one['steps']} steps of {one['batch']} are "
              f"{one['hours']:.0f} h at {options.rate:.3g} FLOP/s")  # fmt: skip
    if options.json is not None:
        write_json(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
