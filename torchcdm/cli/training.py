"""``cdm train``, ``cdm presets``, ``cdm info`` and ``cdm convert``."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcdm.cli.arguments import add_command, count, tell
from torchcdm.errors import UserError
from torchcdm.training.run_folder import RunFolder, read_metrics

if TYPE_CHECKING:
    from torchcdm.data import DataSource
    from torchcdm.training.settings import Config

SHORT = {
    "data": ("data.spec", "SPEC", "digits, folder:PATH, array:FILE, table:FILE, toy:NAME ..."),
    "size": ("data.size", "HxW", "resize images"),
    "crop": ("data.crop", "HxW", "train on random crops of images of any size in a folder"),
    "channels": ("data.channels", "N", "convert images to 1, 3 or 4 channels"),
    "label": ("data.label", "COLUMN", "column of a table that holds the class"),
    "columns": ("data.columns", "A,B", "columns of a table to use"),
    "drop": ("data.drop", "A,B", "columns of a table to leave out"),
    "model": ("model.kind", "cdm|ddm", "ddm: the plain denoising baseline; for an encoder the U-Net of its width"),
    "steps": ("train.steps", "N", "optimiser steps"),
    "seed": ("train.seed", "S", "seed of everything random"),
    "precision": ("train.precision", "fp32|bf16", None),
    "init": ("train.init", "RUN", "start from the weights of another run, where they fit"),
}
"""Flags that stand for a field: the field, and what the help says of them."""


LABELS = {
    "none": "of the data; the model does not use them",
    "input": "an input of the network",
    "joint": "all in one pass",
}
"""``model.labels`` as ``cdm info`` says it."""


def add_commands(commands: Any) -> None:
    """Adds the commands."""
    parser = add_command(
        commands, run_train, "train", "train a model from a preset or a YAML file",
        "cdm train digits --out runs/digits", "skip-bad device",
    )  # fmt: skip
    parser.add_argument("preset", nargs="?", metavar="PRESET", help="see cdm presets")
    parser.add_argument("--config", metavar="FILE", help="YAML file instead of, or on top of, a preset")
    parser.add_argument("--out", metavar="RUN", required=True, help="folder of the run")
    for name, (_, metavar, text) in SHORT.items():
        parser.add_argument(f"--{name}", metavar=metavar, help=text)
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--resume", action="store_true", help="go on from the last state in RUN, if there is one")
    parser.add_argument("--budget", metavar="TIME", help="time for training and report: 90s, 10m, 2h; the preset "
                        "encoder takes the largest network that has enough steps in it (30m)")  # fmt: skip
    parser.add_argument("--no-report", action="store_true", help="measure nothing on the test split")
    parser.add_argument("--quiet", action="store_true", help="no progress bar, no report on the terminal")
    parser.add_argument("--section.field", dest="_", metavar="VALUE", help="any field of the configuration, such as "
                        "--train.lr 1e-3 or --model.backbone.width 48; RUN/config.yaml lists them")  # fmt: skip
    parser.set_defaults(takes_fields=True)
    add_command(commands, run_presets, "presets", "list the presets", "cdm presets")

    add_command(commands, run_info, "info", "what a run holds", "cdm info runs/digits", "model json")

    parser = add_command(
        commands, run_convert, "convert", "a checkpoint of the published CDM code as a run",
        "cdm convert cifar10.pt runs/published --preset cifar10",
    )  # fmt: skip
    parser.add_argument("checkpoint", metavar="OFFICIAL.pt", type=Path)
    parser.add_argument("out", metavar="RUN", type=Path)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", metavar="FILE", help="YAML file with the model and the data of the training")
    what.add_argument("--preset", metavar="PRESET", help="cifar10, cifar10-uniform, celeba64 ...")
    parser.add_argument("--shape", metavar="CxHxW", help="of the images; data.channels and data.size, or 3x32x32")
    parser.add_argument("--classes", type=count, metavar="N", help="number of classes, for a conditional checkpoint")


def run_train(options: argparse.Namespace) -> int:
    """Trains, then measures on the test split."""
    from torchcdm.apps.report import write_report
    from torchcdm.likelihood import check_methods
    from torchcdm.runtime.devices import chosen_device
    from torchcdm.runtime.processes import is_first
    from torchcdm.samplers import DEFAULT_SAMPLER, make_sampler
    from torchcdm.training.interrupt import Interrupted
    from torchcdm.training.loop import train

    tell = is_first() and not options.quiet
    config, source = _configuration(options, tell)
    make_sampler(config.sampling.sampler or DEFAULT_SAMPLER)
    if config.report.methods:
        check_methods(config.report.methods)
    device = chosen_device(options.device)
    try:
        result = train(config, options.out, source, options.resume, options.device, tell)
    except Interrupted as stop:
        print(f"cdm: {stop}", file=sys.stderr)
        return 128 + stop.number
    if tell:
        print(f"{options.out}: {result.step} steps in {result.seconds:.0f} s; samples in {result.samples}")
    if is_first() and not options.no_report:
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


def _configuration(options: argparse.Namespace, tell: bool) -> tuple[Config, DataSource | None]:
    """Preset, file and flags, the last strongest; of a run to resume, its own where neither is given.

    Where the preset scales itself, it needs the data, and these are given too.
    """
    from torchcdm.data import parse_size
    from torchcdm.training.build import load_source, plain_model
    from torchcdm.training.config_files import file_fields, flag_fields, make_config, preset_fields
    from torchcdm.training.scale import scales, with_budget

    layers = [] if options.preset is None else [preset_fields(options.preset)]
    if options.config is not None:
        layers.append(file_fields(options.config))
    if not layers:
        saved = RunFolder(options.out).config
        if not (options.resume and os.path.exists(saved)):
            raise UserError("give a preset or --config FILE; cdm presets lists the presets")
        layers.append(file_fields(saved))
    for name in ("size", "crop"):
        if getattr(options, name) is not None:
            setattr(options, name, str(list(parse_size(getattr(options, name)))))
    for name in ("columns", "drop"):
        if getattr(options, name) is not None:
            setattr(options, name, json.dumps(getattr(options, name).split(",")))
    given = [(path, getattr(options, name)) for name, (path, *_) in SHORT.items()]
    flags = [(path, text) for path, text in given if text is not None]
    flags += [("data.skip_bad", "true")] * options.skip_bad + [("train.compile", "true")] * options.compile
    layers.append(flag_fields(flags + options.fields))
    run, source = RunFolder(options.out), None
    saved = file_fields(run.config) if options.resume and os.path.exists(run.config) else {}
    if scales(layers, options.budget) and saved.get("preset") == options.preset:
        # What was scaled stays as it was: times differ from one measurement to the next.
        layers.insert(1, saved)
    elif scales(layers, options.budget) and int(os.environ.get("WORLD_SIZE", "1")) == 1 and not run.holds_run():
        source = load_source(make_config(*layers).data)
        if tell:
            print(*(f"{source.name}: {note}" for note in source.notes), sep="\n")
    config, notes = with_budget(layers, source, options.budget, options.device)
    if tell:
        print(*notes, sep="\n", end="\n" * bool(notes))
    return replace(config, model=plain_model(config.model)) if config.model.kind == "ddm" else config, source


def run_info(options: argparse.Namespace) -> int:
    """Architecture, data and training of a run."""
    from torchcdm.training.build import described
    from torchcdm.training.checkpoint import load, read_info
    from torchcdm.training.states import state_folders
    from torchcdm.zoo import located

    info = read_info(options.model)
    model = load(options.model)
    run = RunFolder(located(options.model))
    config = info.model
    lines = read_metrics(run.metrics)
    kept, shape = info.selected, "x".join(map(str, info.transform.shape))
    what = {"cdm": "a classification diffusion model", "ddm": "a plain diffusion model"}[config.kind]
    best = f": {kept['value']} {kept['best']:.4g} {kept['unit']}".rstrip() + " on validation" if "best" in kept else ""
    count = sum(parameter.numel() for parameter in model.parameters())
    grid = info.transform
    values = {
        "model": f"{what} of samples {shape}, preset {info.preset}",
        "network": f"{config.backbone.name}, {count:,} parameters; starts from {described(config)}",
        "schedule": f"{config.schedule.name}, T = {config.schedule.T}",
        "data": info.data.spec or "given in Python",
        "grey levels": None if grid.bin is None else f"{grid.low:g} ... {grid.high:g}",
        "columns": info.columns and ", ".join(info.columns),
        "classes": info.class_names and f"{', '.join(info.class_names)} ({LABELS[config.labels]})",
        "kept": f"step {kept['step']}{best}" if "step" in kept else None,
        "calibrated": None if model.uncalibrated is model else "on paths",
        "last step": lines[-1]["step"] if lines else None,
        "states": ", ".join(path.name for path in state_folders(run)),
    }
    text = "\n".join(f"{name:12} {value}" for name, value in values.items() if value)
    tell(options.json, text, values | {"parameters": count, "selected": kept})
    return 0


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
    net = config.model.backbone
    if net.name != "unet" or net.direction != "data" or config.model.gaussian is not False:
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
