"""The preset ``encoder`` scaled to the images and to the time: width, resolutions, batch and steps.

A network that cannot take a few thousand steps in the time is too large for it, whatever it would reach later.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchcdm.compose.sampling import STEPS, default_moves
from torchcdm.data import DataSource
from torchcdm.diffusion.start import FIELDS
from torchcdm.errors import UserError
from torchcdm.runtime.processes import chosen_device
from torchcdm.training.batches import Batches
from torchcdm.training.build import build_loss, choose_base, in_units, new_model
from torchcdm.training.config_files import make_config, paths, preset_fields
from torchcdm.training.optimizers import build_optimizer
from torchcdm.training.settings import Config

SCALED, DEFAULT = "encoder", 1800.0
"""The preset that scales itself, where neither steps nor a network are given, and its seconds where no time is."""

SIZES = ((16, 16), (24, 16), (32, 16), (32, 32), (48, 32), (64, 64), (96, 64))
"""Widths and batches, from the cheapest on."""

WANTED_STEPS = 2500
"""Steps that the time must hold for a larger size to be taken."""

TRAINING_SHARE, SAMPLING_SHARE, REPORT_SHARE = 0.8, 0.04, 0.04
"""Shares of the time: for the training, for its samples, and for the flow of the report."""

FLOW_COST, TIMED_STEPS = 70, 6
"""Passes of training that the flow of one sample takes as long as; steps that are timed."""

EPOCHS = 300
"""Most times that a sample is seen."""

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds_of(budget: str | float) -> float:
    """A time such as ``10m``, ``90s``, ``2h`` or 600 as seconds; UserError for anything else."""
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smhd]?)", str(budget).strip())
    if found is None or float(found[1]) == 0:
        raise UserError(f"budget is {str(budget)!r:.60}; give a time such as 90s, 10m or 2h")
    return float(found[1]) * UNITS[found[2]]


def scales(layers: Sequence[Mapping[str, Any]], budget: str | float | None) -> bool:
    """Whether the preset of these layers scales itself: it is given no steps, or a budget, and no network."""
    preset, *others = layers
    given = {path for layer in others for path, _ in paths(layer)}
    free = budget is not None or given.isdisjoint(("train.steps", "train.max_seconds"))
    return preset == preset_fields(SCALED) and free and "model.backbone" not in given


def with_budget(
    layers: Sequence[Mapping[str, Any]],
    source: DataSource | None,
    budget: str | float | None,
    device: str | None,
    progress: bool = False,
) -> Config:
    """The configuration of these layers for a time: preset first, what a user gave after it.

    A preset that :func:`scales` does so to ``source``, unless that is None, and says what it chose where ``progress``
    is shown; ``budget`` is as in :func:`seconds_of`, None for none.
    """
    seconds = None if budget is None else seconds_of(budget)
    preset, *given = layers
    if source is None or len(source.shape) != 3 or not scales(layers, budget):
        return make_config(preset, {} if seconds is None else {"train": {"max_seconds": seconds}}, *given)
    seconds = seconds or DEFAULT
    training, asked = TRAINING_SHARE * seconds, make_config(preset, *given)
    source = in_units(source, asked.data)
    count, multipliers = len(source.train), multipliers_of(*source.shape[1:])
    model = choose_base(asked.model, source, asked.data.flip)
    base = {name: getattr(model, name) for name in FIELDS}
    width, batch, took = 0, 0, 0.0
    for wider, larger in SIZES:  # the first is taken however long it takes
        # Costs grow with the square of the width: a size that is clearly too large is not tried.
        if took and training / (took * larger / batch * (wider / width) ** 1.5) < WANTED_STEPS / 2:
            break
        network = {**base, "backbone": {"width": wider, "multipliers": multipliers}}
        sized = make_config(preset, {"model": network, "train": {"batch_size": larger}}, *given)
        needed = seconds_a_step(sized, source, device)
        if took and training / needed < WANTED_STEPS:
            break
        width, batch, took = wider, larger, needed
    most = max(WANTED_STEPS, EPOCHS * count // batch)
    steps = min(max(1, int(training / took)), most)
    every = min(max(50, steps // 12), 1000)
    moves, visited = default_moves(asked.sampling.sampler, asked.sampling.corrector), asked.sampling.steps
    evaluations = STEPS if visited is None else visited * (1 + moves)
    report = int(REPORT_SHARE * seconds / (FLOW_COST * took / batch))
    drawn = int(SAMPLING_SHARE * seconds / (evaluations * took / batch))
    dropout = 0.1 if count < 5000 else 0.05
    layer = {
        "model": {**base, "backbone": {"width": width, "multipliers": multipliers, "dropout": dropout}},
        "train": {
            # The time ends it: a machine that was busy when steps were measured takes more of them.
            "batch_size": batch, "max_seconds": training, "steps": most, "patience": None, "warmup": 50,
            "validate_every": every, "save_every": every, "log_every": min(max(1, steps // 100), 50),
            "sample_every": None, "validation_samples": 500, "ema_decay": 0.995 if steps < 5000 else 0.999,
        },
        "report": {"limit": min(max(8, report), asked.report.limit)},
        "sampling": {"n": min(max(9, drawn), asked.sampling.n)},
    }  # fmt: skip
    if progress:
        shape = "x".join(map(str, source.shape))
        print(
            f"scaled to {count} images of {shape} and {seconds:g} s: width {width} at {len(multipliers)} resolutions, "
            f"batches of {batch}, about {steps} steps of {took:.2g} s"
        )
    return make_config(preset, layer, *given)


def multipliers_of(height: int, width: int) -> list[int]:
    """Multipliers of the widths of an encoder, one a resolution: sides are halved while they are even and large."""
    found, most = [1], 4 if min(height, width) >= 64 else 3
    while len(found) < most and height % 2 == width % 2 == 0 and min(height, width) >= 8:
        found, height, width = [*found, 2], height // 2, width // 2
    return found


def seconds_a_step(config: Config, source: DataSource, device: str | None) -> float:
    """Seconds that a step of a configuration takes: the fastest of some, of an untrained model."""
    where = chosen_device(device)
    with torch.random.fork_rng(devices=[]):
        model = new_model(config.model, source, config.data.flip).to(where)
    loss, optimizer, times = build_loss(config.loss, model), build_optimizer(config.train, model), []
    batches = Batches(source, config.train.batch_size, config.train.seed, labels=model.conditional)
    for batch in batches(0, TIMED_STEPS, loss, where):
        began = time.perf_counter()
        loss(batch.x_0, batch.y, batch.t, batch.eps)["loss"].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if where.type == "cuda":
            torch.cuda.synchronize(where)
        times.append(time.perf_counter() - began)
    return min(times)
