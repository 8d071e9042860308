"""``cdm train`` and ``cdm convert``."""

import argparse
import math
import os
from datetime import timedelta
from typing import Any

import torch

from torchcdm.apps.report import write_report
from torchcdm.bridges.official import load_official
from torchcdm.cli.arguments import given
from torchcdm.cli.commands import SHORT
from torchcdm.data import DataSource, parse_size
from torchcdm.data.named import CELEBA_SIZE
from torchcdm.errors import UserError
from torchcdm.runtime.processes import chosen_device, is_first
from torchcdm.samplers import make_sampler
from torchcdm.training.build import build_model, load_source, resolve
from torchcdm.training.checkpoint import ModelInfo, save
from torchcdm.training.config_files import file_fields, flag_fields, make_config, merge, preset_fields
from torchcdm.training.fit import scales, seconds_a_step, with_budget
from torchcdm.training.loop import Interrupted, train as trained
from torchcdm.training.run_folder import RunFolder
from torchcdm.training.settings import Config
from torchcdm.units import DataTransform


def train(options: argparse.Namespace) -> None:
    """Trains, then measures on the test split."""
    progress = is_first() and not options.quiet
    config, source = _configuration(options, progress)
    make_sampler(config.sampling.sampler or "sa2")  # a name that is none is refused before the training
    device = chosen_device(options.device)
    if options.dry_run:
        took, limit = seconds_a_step(config, source, options.device), config.train.max_seconds or math.inf
        held = torch.cuda.max_memory_reserved(device) / 2**30 if device.type == "cuda" else 0
        what = f"{config.train.batch_size} samples" + (f", {held:.1f} GiB of GPU memory" if held else "")
        total = timedelta(seconds=round(min(config.train.steps * took, limit)))
        print(f"{took:.3g} s a step of {what}; the training takes {total}, validation, samples and report apart")
        return
    try:
        result = trained(config, options.out, source, options.resume, options.device, progress)
        if progress:
            samples = "" if result.samples is None else f"; samples in {result.samples}"
            print(f"{options.out}: {result.step} steps in {result.seconds:.0f} s{samples}")
        if is_first() and not options.no_report:
            text = write_report(options.out, result.source, device, progress=progress)
            if progress:
                print(text)
    except KeyboardInterrupt as stop:
        if isinstance(stop, Interrupted) or not RunFolder(options.out).model.exists():
            raise
        what = f"{options.out} holds the model; --resume goes on with what is missing"
        raise KeyboardInterrupt(f"interrupted; {what}") from None


def _configuration(options: argparse.Namespace, progress: bool) -> tuple[Config, DataSource | None]:
    """Preset, file and flags, the last strongest; a preset that scales itself needs the data, which are given too."""
    run, source = RunFolder(options.out), None
    layers = [] if options.preset is None else [preset_fields(options.preset)]
    saved = file_fields(run.config) if options.resume and os.path.exists(run.config) else {}
    if saved and options.preset in (None, saved.get("preset")):
        # A run goes on as it was, but for what is given; what was scaled too: no two measurements of a step agree.
        layers = [saved]
    if options.config is not None:
        layers.append(file_fields(options.config, alone=bool(saved)))
    if not layers:
        raise UserError("give a preset or --config FILE; cdm presets lists the presets")
    texts = given(**{name: getattr(options, name) for name in SHORT})
    data: dict[str, Any] = {name: parse_size(texts.pop(name)) for name in texts.keys() & {"size", "crop"}}
    data |= {name: texts.pop(name).split(",") for name in texts.keys() & {"columns", "drop"}}
    data |= {"skip_bad": True} if options.skip_bad else {}
    train = {"compile": True} if options.compile else {}
    short = flag_fields((SHORT[name][0], text) for name, text in texts.items())
    layers.append(merge(merge(short, {"data": data, "train": train}), flag_fields(options.fields)))
    if scales(layers, options.budget) and not run.holds_run():
        source = load_source(make_config(*layers).data, progress)
    return with_budget(layers, source, options.budget, options.device, progress), source


def convert(options: argparse.Namespace) -> None:
    """A run folder that every other command reads."""
    if RunFolder(options.out).holds_run():
        raise UserError(f"{options.out}: already holds a run; choose another folder")
    config = make_config(preset_fields(options.preset) if options.preset is not None else file_fields(options.config))
    net = config.model.backbone
    if net.name != "unet" or net.direction != "data" or config.model.gaussian is not False:
        what = "the published networks have model.backbone unet with direction data, and model.gaussian false"
        raise UserError(f"{what}; such as preset cifar10")
    # The published code maps 0 ... 255 to [-1, 1] and adds no noise to grey levels.
    side = CELEBA_SIZE if str(config.data.spec).startswith("celeba") else (32, 32)
    transform = DataTransform.images((config.data.channels or 3, *(config.data.size or side)), dequantize=False)
    model_config = resolve(config.model, transform)
    if (model_config.labels != "none") != (options.classes is not None):
        raise UserError("--classes is needed for a conditional model (model.labels input), and for that alone")
    model = build_model(model_config, transform, options.classes)
    load_official(options.checkpoint, model.backbone)
    names = None if options.classes is None else tuple(map(str, range(options.classes)))
    selected = {"value": "converted", "source": options.checkpoint.name}
    save(model, options.out, ModelInfo(config.preset, model_config, transform, config.data, selected, names))
    print(f"{options.out}: {sum(p.numel() for p in model.parameters())} parameters")
