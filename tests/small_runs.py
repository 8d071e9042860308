"""Configurations that train in a second or two."""

from pathlib import Path

from torchcdm.training.config_files import flag_fields, make_config, preset_fields
from torchcdm.training.loop import TrainResult, train
from torchcdm.training.settings import Config

SMALL = {
    "model.backbone": "{name: encoder, width: 8, multipliers: [1, 2], blocks: 1, energy_maps: 4, dropout: 0.2, "
    "positions: false, pooled: [16, 32]}",
    "model.schedule": "{name: uniform-sigma, T: 20}",
    "train.steps": "12",
    "train.batch_size": "32",
    "train.log_every": "2",
    "train.validate_every": "4",
    "train.save_every": "3",
    "sampling.n": "4",
    "sampling.steps": "3",
    "report.methods": "[single]",
    "report.limit": "16",
    "report.flow_steps": "2",
    "report.draws": "1",
    "report.sweeps": "4",
    "report.baselines": "false",
}


def small_flags(**changes: str) -> list[str]:
    """The flags of a command line; ``train__steps="5"`` stands for ``--train.steps 5``."""
    fields = SMALL | {name.replace("__", "."): value for name, value in changes.items()}
    return [word for name, value in fields.items() for word in (f"--{name}", value)]


def small_config(preset: str = "digits", **changes: str) -> Config:
    """A preset, shrunk."""
    words = small_flags(**changes)
    flags = ((flag[2:], value) for flag, value in zip(words[::2], words[1::2], strict=True))
    return make_config(preset_fields(preset), flag_fields(flags))


def run_training(folder: Path, resume: bool = False, **changes: str) -> TrainResult:
    """Trains the preset for digits, shrunk."""
    return train(small_config(**changes), folder, resume=resume, device="cpu", progress=False)
