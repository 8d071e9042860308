"""``cdm convert``."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from torchcdm.cli.arguments import add_command, count
from torchcdm.errors import UserError
from torchcdm.training.run_folder import RunFolder


def add_commands(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "convert", "a checkpoint of the published CDM code as a run",
        "cdm convert cifar10.pt runs/published --preset cifar10",
    )  # fmt: skip
    parser.add_argument("checkpoint", metavar="OFFICIAL.pt", type=Path)
    parser.add_argument("out", metavar="RUN", type=Path)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="YAML file with the model and the data of the training")
    what.add_argument("--preset", metavar="PRESET", help="cifar10, cifar10-uniform, celeba64 ...")
    parser.add_argument("--shape", metavar="CxHxW", help="of the images; data.channels and data.size, or 3x32x32")
    parser.add_argument("--classes", type=count, metavar="N", help="number of classes, for a conditional checkpoint")
    parser.set_defaults(run=run_convert)


def run_convert(options: argparse.Namespace) -> int:
    """A run folder that every other command reads."""
    from torchcdm.bridges.official import load_official
    from torchcdm.training.build import build_model, resolve
    from torchcdm.training.checkpoint import ModelInfo, save_model
    from torchcdm.training.config_files import file_fields, make_config, preset_fields
    from torchcdm.units import DataTransform

    run = RunFolder(options.out)
    if run.holds_run():
        raise UserError(f"{options.out}: already holds a run; choose another folder")
    config = make_config(preset_fields(options.preset) if options.preset is not None else file_fields(options.config))
    if config.model.backbone.name != "unet" or config.model.backbone.direction != "data" or config.model.gaussian:
        raise UserError(
            "the published networks have model.backbone unet with direction data, and model.gaussian false; "
            "such as preset cifar10"
        )
    # The published code maps 0 ... 255 to [-1, 1] and adds no noise to grey levels.
    size = "x".join(map(str, config.data.size or (32, 32)))
    shape = _shape(options.shape or f"{config.data.channels or 3}x{size}")
    transform = DataTransform.images(shape, dequantize=False)
    model_config = resolve(config.model, transform)
    if (model_config.labels != "none") != (options.classes is not None):
        raise UserError("--classes is needed for a conditional model (model.labels input), and for that alone")
    model = build_model(model_config, transform, options.classes)
    load_official(options.checkpoint, model.backbone)
    names = None if options.classes is None else tuple(map(str, range(options.classes)))
    selected = {"value": "converted", "source": options.checkpoint.name}
    info = ModelInfo(
        preset=config.preset, model=model_config, transform=transform, data=config.data, class_names=names,
        selected=selected,
    )  # fmt: skip
    with run.locked():
        save_model(run, model, info)
    print(f"{options.out}: {sum(p.numel() for p in model.parameters())} parameters")
    return 0


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"[1-9][0-9]{0,4}(x[1-9][0-9]{0,4}){2}", text.lower()):
        raise UserError(f"--shape {text}: write channels x height x width, such as 3x32x32")
    return tuple(map(int, text.lower().split("x")))
