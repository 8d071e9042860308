"""Training with another loss than the model's own."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchcdm.building import resolve
from torchcdm.config import Config
from torchcdm.data import DataSource
from torchcdm.interrupt import SignalWatch
from torchcdm.run_folder import RunFolder
from torchcdm.trainer import Trainer, TrainResult


def train_with(
    loss: Callable[[Any], nn.Module],
    config: Config,
    out: Path,
    source: DataSource,
    resume: bool,
    device: str | None,
    progress: bool,
) -> TrainResult:
    """As :func:`torchcdm.trainer.train`.

    Args:
        loss: Makes the loss of a model.
        config: What and how, but for the loss.
        out: The run's folder.
        source: The data.
        resume: Go on from the last saved state.
        device: As in :func:`torchcdm.trainer.train`.
        progress: Shows a progress bar and messages.
    """
    config = replace(config, model=resolve(config.model, source.transform))
    with torch.random.fork_rng(devices=[]), SignalWatch() as watch:
        trainer = Trainer(config, RunFolder(out), source, device, progress, watch, time.monotonic)
        trainer.loss = loss(trainer.model)
        return trainer.run_to_end(resume)
