"""``cdm train`` and ``cdm presets``."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torchcdm.cli.arguments import add_command, add_device
from torchcdm.errors import UserError
from torchcdm.training.run_folder import RunFolder

if TYPE_CHECKING:
    from torchcdm.training.settings import Config

SHORT = {
    "data": ("data.spec", "SPEC", "digits, folder:PATH, array:FILE, table:FILE, toy:NAME ..."),
    "size": ("data.size", "HxW", "resize images"),
    "channels": ("data.channels", "N", "convert images to 1, 3 or 4 channels"),
    "label": ("data.label", "COLUMN", "column of a table that holds the class"),
    "model": ("model.kind", "cdm|ddm", "ddm: the plain denoising baseline; for an encoder the U-Net of its width"),
    "steps": ("train.steps", "N", "optimiser steps"),
    "seed": ("train.seed", "S", "seed of everything random"),
    "precision": ("train.precision", "fp32|bf16", None),
    "init": ("train.init", "RUN", "start from the weights of another run, where they fit"),
}
"""Flags that stand for a field: the field, and what the help says of them."""


def add_commands(commands: Any) -> None:
    """Adds both commands."""
    parser = add_command(
        commands, "train", "train a model from a preset or a YAML file", "cdm train digits --out runs/digits"
    )
    parser.add_argument("preset", nargs="?", metavar="PRESET", help="see cdm presets")
    parser.add_argument("--config", metavar="FILE", help="YAML file instead of, or on top of, a preset")
    parser.add_argument("--out", metavar="RUN", required=True, help="folder of the run")
    for name, (_, metavar, text) in SHORT.items():
        parser.add_argument(f"--{name}", metavar=metavar, help=text)
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--resume", action="store_true", help="go on from the last state in RUN, if there is one")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no report on the terminal")
    parser.add_argument("--section.field", dest="_", metavar="VALUE", help="any field of the configuration, such as "
                        "--train.lr 1e-3 or --model.backbone.width 48; RUN/config.yaml lists them")  # fmt: skip
    add_device(parser)
    parser.set_defaults(run=run_train, takes_fields=True)

    parser = add_command(commands, "presets", "list the presets", "cdm presets")
    parser.set_defaults(run=run_presets)


def run_train(options: argparse.Namespace) -> int:
    """Trains, then measures on the test split."""
    from torchcdm.apps.report import write_report
    from torchcdm.likelihood import check_methods
    from torchcdm.runtime.devices import chosen_device
    from torchcdm.runtime.processes import is_first
    from torchcdm.samplers import make_sampler
    from torchcdm.training.interrupt import Interrupted
    from torchcdm.training.loop import train

    config = _configuration(options)
    make_sampler(config.sampling.sampler)
    if config.report.methods:
        check_methods(config.report.methods)
    tell = is_first() and not options.quiet
    device = chosen_device(options.device)
    try:
        result = train(config, options.out, resume=options.resume, device=options.device, progress=tell)
    except Interrupted as stop:
        print(f"cdm: {stop}", file=sys.stderr)
        return 128 + stop.number
    if tell:
        print(f"{options.out}: {result.step} steps in {result.seconds:.0f} s; samples in {result.samples}")
    if is_first():
        text = write_report(options.out, result.source, device, progress=tell).text
        if tell:
            print(text)
    return 0


def run_presets(options: argparse.Namespace) -> int:
    """One line a preset."""
    from torchcdm.training.config_files import make_config, preset_about, preset_fields, preset_names

    for name in preset_names():
        config, about = make_config(preset_fields(name)), preset_about(name)
        model = config.model
        reaches = f"; {about['reaches']} ({about['source']})" if "reaches" in about else ""
        print(
            f"{name:26} {config.data.spec or 'your data'}: {about['description']}; {model.kind} "
            f"{model.backbone.name}, {model.schedule.name} T={model.schedule.T}, {config.train.steps} steps{reaches}"
        )
    return 0


def _configuration(options: argparse.Namespace) -> Config:
    """Preset, file and flags, the last strongest; of a run to resume, its own where neither is given."""
    from torchcdm.data import parse_size
    from torchcdm.training.build import plain_model
    from torchcdm.training.config_files import file_fields, flag_fields, make_config, preset_fields

    layers = [] if options.preset is None else [preset_fields(options.preset)]
    if options.config is not None:
        layers.append(file_fields(options.config))
    if not layers:
        saved = RunFolder(options.out).config
        if not (options.resume and os.path.exists(saved)):
            raise UserError("give a preset or --config FILE; cdm presets lists the presets")
        layers.append(file_fields(saved))
    if options.size is not None:
        options.size = str(list(parse_size(options.size)))
    given = [(path, getattr(options, name)) for name, (path, *_) in SHORT.items()]
    flags = [(path, text) for path, text in given if text is not None]
    flags += [("data.skip_bad", "true")] * options.skip_bad + [("train.compile", "true")] * options.compile
    config = make_config(*layers, flag_fields(flags + options.fields))
    return replace(config, model=plain_model(config.model)) if config.model.kind == "ddm" else config
