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
    "data": "data.spec",
    "size": "data.size",
    "channels": "data.channels",
    "label": "data.label",
    "model": "model.kind",
    "steps": "train.steps",
    "seed": "train.seed",
    "precision": "train.precision",
    "init": "train.init",
}
"""Flags that stand for a field."""


def add_commands(commands: Any) -> None:
    """Adds both commands."""
    parser = add_command(
        commands, "train", "train a model from a preset or a YAML file", "cdm train digits --out runs/digits"
    )
    parser.add_argument("preset", nargs="?", metavar="PRESET", help="see cdm presets")
    parser.add_argument("--config", metavar="FILE", help="YAML file instead of, or on top of, a preset")
    parser.add_argument("--out", metavar="RUN", required=True, help="folder of the run")
    parser.add_argument("--data", metavar="SPEC", help="digits, folder:PATH, array:FILE, table:FILE, toy:NAME ...")
    parser.add_argument("--size", metavar="HxW", help="resize images")
    parser.add_argument("--channels", metavar="N", help="convert images to 1, 3 or 4 channels")
    parser.add_argument("--label", metavar="COLUMN", help="column of a table that holds the class")
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--model", metavar="cdm|ddm", help="ddm: the plain denoising diffusion baseline; for an "
                        "encoder the U-Net of its width")  # fmt: skip
    parser.add_argument("--steps", metavar="N", help="optimiser steps")
    parser.add_argument("--seed", metavar="S", help="seed of everything random")
    parser.add_argument("--precision", metavar="fp32|bf16")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--init", metavar="RUN", help="start from the weights of another run, where they fit")
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
    from torchcdm.samplers import check_sampler
    from torchcdm.training.build import load_source
    from torchcdm.training.interrupt import Interrupted
    from torchcdm.training.loop import train

    config = _configuration(options)
    check_sampler(config.sampling.sampler)
    if config.report.methods:
        check_methods(config.report.methods)
    options.quiet = options.quiet or not is_first()
    device = chosen_device(options.device)
    source = load_source(config.data)
    if not options.quiet:
        for note in source.notes:
            print(f"{source.name}: {note}")
    try:
        result = train(config, options.out, source, options.resume, options.device, progress=not options.quiet)
    except Interrupted as stop:
        print(f"cdm: {stop}", file=sys.stderr)
        return 128 + stop.number
    if not options.quiet:
        print(f"{options.out}: {result.step} steps in {result.seconds:.0f} s; samples in {result.samples}")
    if result.main:
        text = write_report(options.out, source, device, progress=not options.quiet).text
        if not options.quiet:
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

    layers = []
    if options.preset is not None:
        layers.append(preset_fields(options.preset))
    if options.config is not None:
        layers.append(file_fields(options.config))
    if not layers:
        saved = RunFolder(options.out).config
        if not (options.resume and os.path.exists(saved)):
            raise UserError("give a preset or --config FILE; cdm presets lists the presets")
        layers.append(file_fields(saved))
    flags = [(path, getattr(options, name)) for name, path in SHORT.items() if getattr(options, name) is not None]
    flags = [(path, str(list(parse_size(text))) if path == "data.size" else text) for path, text in flags]
    flags += [("data.skip_bad", "true")] * options.skip_bad + [("train.compile", "true")] * options.compile
    config = make_config(*layers, flag_fields(flags + options.fields))
    return replace(config, model=plain_model(config.model)) if config.model.kind == "ddm" else config
