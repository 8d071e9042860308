"""What a training goes on from: weights, their average, the optimiser and counters, whole or not there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchcdm.errors import UserError
from torchcdm.runtime.artefact import damaged, read_artefact, write_artefact
from torchcdm.runtime.files import TEMPORARY, flush_folder, writing
from torchcdm.runtime.validation import encode
from torchcdm.training.config_files import differences
from torchcdm.training.run_folder import RunFolder, read_metrics
from torchcdm.training.settings import Config

KEPT = 2
"""States that are kept."""

PARTS = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")
"""Files of tensors in a state."""


class TrainingState(NamedTuple):
    """What a resumed run starts from: raw and averaged weights, :func:`optimizer_tensors`, and ``progress.json``.

    The last has the counters of the trainer, the sums of the loss terms since the last line of the log, ``data``, the
    fingerprint of the data, and ``config``, the resolved configuration.
    """

    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    progress: dict[str, Any]


def save_state(run: RunFolder, state: TrainingState) -> Path:
    """Writes ``state/step-N``, unless it is there: beside, flushed, then renamed. The last two are kept.

    Raises:
        UserError: It cannot be written, on a full disk for one; older states are still there.
    """
    final = run.states / f"step-{state.progress['step']}"
    temporary = run.states / f"{TEMPORARY}{final.name}"
    if final.exists():
        return final
    with writing(final):
        try:
            tensors = dict(zip(PARTS, state[:-1], strict=True))
            write_artefact(temporary / "progress.json", "state", state.progress, tensors)
            os.replace(temporary, final)
            flush_folder(run.states)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        for old in state_folders(run)[:-KEPT]:
            # Renamed first: a crash half way would leave one without all its files.
            doomed = old.with_name(f"{TEMPORARY}{old.name}")
            os.replace(old, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
    return final


def state_folders(run: RunFolder) -> list[Path]:
    """The saved states, oldest first."""
    found = [path for path in run.states.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


def load_state(folder: Path) -> TrainingState:
    """One saved state.

    Raises:
        UserError: A file is missing, damaged, or of another format version; names it and the way out.
    """
    mend, path = f"remove {folder} to go on from the state before it", folder / "progress.json"
    try:
        progress, tensors = read_artefact(path, "state", PARTS)
        if folder.name != f"step-{progress['step']}":
            damaged(path, f"it is of step {progress['step']}")
    except UserError as error:
        raise UserError(f"{error}; {mend}") from None
    return TrainingState(*tensors, progress)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimiser has learned, ``INDEX.NAME`` of the parameter and the moment; its rates are the training's."""
    state = optimizer.state_dict()["state"]
    return {f"{index}.{name}": value for index, moments in state.items() for name, value in moments.items()}


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of :func:`optimizer_tensors`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


FREE = (
    "preset", "sampling", "report", "data.workers", "train.steps", "train.validate_every",
    "train.validation_samples", "train.patience", "train.fallback", "train.calibration", "train.log_every",
    "train.save_every", "train.sample_every", "train.init",
)  # fmt: skip
"""Fields that may differ from the run that is resumed; all others would make it another run."""

FREE_AFTER_FAILURE = ("train.lr", "train.warmup", "train.grad_clip", "train.precision")
"""Fields that may differ too after steps that were not finite ended the run: what may mend it."""


def check_same(config: Config, kept: Mapping[str, Any], run: RunFolder) -> None:
    """Refuses to go on where a field that is not free differs from the ``kept`` configuration of a saved state."""
    lines = read_metrics(run.metrics)
    free = FREE + (FREE_AFTER_FAILURE if lines and lines[-1].get("not_finite") else ())
    for path, mine, theirs in differences(encode(config), kept):
        if not any(path == name or path.startswith(f"{name}.") for name in free):
            differ = f"was trained with {path} = {theirs}, not {mine}"
            raise UserError(f"{run.root}: {differ}; resume with the same, or choose another folder")
