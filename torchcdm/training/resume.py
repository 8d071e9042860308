"""What a training may change when it goes on from a saved state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchcdm.errors import UserError
from torchcdm.runtime.validation import encode
from torchcdm.training.config_files import differences
from torchcdm.training.run_folder import RunFolder, read_metrics
from torchcdm.training.settings import Config

FREE = (
    "preset", "sampling", "report", "data.workers", "train.steps", "train.validate_every",
    "train.validation_samples", "train.patience", "train.calibration", "train.log_every", "train.save_every",
    "train.sample_every", "train.trackers", "train.init",
)  # fmt: skip
"""Fields that may differ from the run that is resumed; all others would make it another run."""

FREE_AFTER_FAILURE = ("train.lr", "train.warmup", "train.grad_clip", "train.precision")
"""Fields that may differ too after steps that were not finite ended the run: what may mend it."""


def check_same(config: Config, kept: Mapping[str, Any], run: RunFolder) -> None:
    """Refuses to go on with another resolved configuration than the ``kept`` one of a saved state.

    Raises:
        UserError: A field differs that is not free.
    """
    lines = read_metrics(run.metrics)
    free = FREE + (FREE_AFTER_FAILURE if lines and lines[-1].get("not_finite") else ())
    for path, mine, theirs in differences(encode(config), kept):
        if not any(path == name or path.startswith(f"{name}.") for name in free):
            differ = f"was trained with {path} = {theirs}, not {mine}"
            raise UserError(f"{run.root}: {differ}; resume with the same, or choose another folder")
