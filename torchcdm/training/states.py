"""What a training goes on from: weights, their average, the optimiser and counters, whole or not there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import NonNegativeFloat, NonNegativeInt
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.runtime.artefact import Saved, checked_content, damaged, read_artefact, write_artefact
from torchcdm.runtime.files import TEMPORARY, flush_folder, writing
from torchcdm.training.run_folder import RunFolder

KEPT = 2
"""States that are kept."""

PARTS = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
"""Files of tensors in a state."""

MOMENTS = ({"step", "exp_avg", "exp_avg_sq"}, {"step", "momentum"})
"""Names that an optimiser keeps for a parameter."""


class Best(Saved):
    """The validation value that named the kept weights the best."""

    value: str
    unit: str
    best: float
    step: NonNegativeInt


class Progress(Saved):
    """Counters of a training beside its weights; ``progress.json``.

    Attributes:
        step: Steps done.
        ema_updates: Updates of the average.
        seconds: Time of training.
        skipped: Steps without a finite gradient.
        best: The best model so far.
        stale: Validations since then.
        window: Sums of the loss terms since the last line of the log.
        data: Fingerprint of the data.
        config: The resolved configuration.
    """

    step: NonNegativeInt
    ema_updates: NonNegativeInt
    seconds: NonNegativeFloat
    skipped: NonNegativeInt
    best: Best | None
    stale: NonNegativeInt
    window: dict[str, float | None]
    data: str
    config: dict[str, Any]


@dataclass(frozen=True)
class TrainingState:
    """What a resumed run starts from.

    Attributes:
        model: Raw weights.
        ema: Averaged weights.
        optimizer: From :func:`optimizer_tensors`.
        progress: Counters and configuration.
    """

    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    progress: Progress


def save_state(run: RunFolder, state: TrainingState) -> Path:
    """Writes ``state/step-N``: beside, flushed, then renamed. The last two are kept.

    Raises:
        UserError: It cannot be written, on a full disk for one; older states are still there.
    """
    final = run.states / f"step-{state.progress.step}"
    temporary = run.states / f"{TEMPORARY}{final.name}"
    tensors = dict(zip(PARTS, (state.model, state.ema, state.optimizer), strict=True))
    with writing(final):
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            write_artefact(temporary / "progress.json", "state", state.progress.model_dump(), tensors)
            _remove(final)
            os.replace(temporary, final)
            flush_folder(run.states)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    for old in state_folders(run)[:-KEPT]:
        _remove(old)
    return final


def _remove(folder: Path) -> None:
    """Removes a state; renamed first, because a crash half way would leave one without all its files."""
    if folder.exists():
        doomed = folder.with_name(f"{TEMPORARY}old-{folder.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def state_folders(run: RunFolder) -> list[Path]:
    """The saved states, oldest first."""
    found = [path for path in run.states.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_state(folder: Path) -> TrainingState:
    """One saved state.

    Raises:
        UserError: A file is missing, damaged, or of another format version; names it and the way out.
    """
    mend = way_out(folder)
    path = folder / "progress.json"
    try:
        content, tensors = read_artefact(path, "state", PARTS, mend)
    except UserError as error:
        raise error if mend in str(error) else UserError(f"{error}; {mend}") from None
    progress = checked_content(Progress, content, path, mend)
    if folder.name != f"step-{progress.step}":
        damaged(path, f"it is of step {progress.step}", mend)
    return TrainingState(*tensors, progress)


def way_out(folder: Path) -> str:
    """The mend for a damaged state."""
    return f"remove {folder} to go on from the state before it"


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser has learned, ``INDEX.NAME`` of the parameter and the moment; its rates are the training's."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, moments in state.items() for name, value in moments.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """The inverse of :func:`optimizer_tensors`.

    Raises:
        UserError: Moments of other parameters than the optimiser's.
    """
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        known = index.isascii() and index.isdigit() and int(index) < len(weights) and value.is_floating_point()
        if not known or value.shape != (() if name == "step" else weights[int(index)].shape):
            damaged(folder / PARTS[2], f"{key} is of no weight of this network", way_out(folder))
        state.setdefault(int(index), {})[name] = value
    if any(set(moments) not in MOMENTS for moments in state.values()):
        damaged(folder / PARTS[2], "moments are missing", way_out(folder))
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
