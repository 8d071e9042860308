"""``cdm presets``, ``cdm zoo``, ``cdm info`` and ``cdm push``."""

import argparse

from torchcdm.bridges.hub import push as pushed
from torchcdm.cli.arguments import tell
from torchcdm.training.build import base_in_words
from torchcdm.training.checkpoint import read_run, state_folders
from torchcdm.training.config_files import make_config, preset_about, preset_fields, preset_names
from torchcdm.training.run_folder import read_metrics
from torchcdm.zoo import HOME, about, names


def presets(options: argparse.Namespace) -> None:
    """One line a preset."""
    for name in preset_names():
        config, about = make_config(preset_fields(name)), preset_about(name)
        model = config.model
        what = f"{config.data.spec or 'your data'}: {about['description']}"
        how = f"{model.kind} {model.backbone.name}, {model.schedule.name} T={model.schedule.T}"
        reaches = f"; {about['reaches']} ({about['source']})" if "reaches" in about else ""
        print(f"{name:26} {what}; {how}, {config.train.steps} steps{reaches}")


def zoo(options: argparse.Namespace) -> None:
    """What each model is, its size, and what it reaches."""
    models, text = {}, ""
    for name in names():
        size, card = sum(path.stat().st_size for path in (HOME / name).iterdir()), about(name)
        models[f"zoo:{name}"] = card | {"bytes": size}
        text += f"{f'zoo:{name}':32}{size / 2**20:5.2f} MiB  {card['description']}; {card['reaches']}\n"
    text += "use them wherever a command takes a model: cdm sample zoo:digits --n 64 --out samples"
    tell(options.json, text, models)


def info(options: argparse.Namespace) -> None:
    """Architecture, data and training of a run."""
    run, info, (tensors,) = read_run(options.model)
    lines, network = read_metrics(run.metrics), info.model.backbone
    config, kept, shape = info.model, info.selected, "x".join(map(str, info.transform.shape))
    what = {"cdm": "a classification diffusion model", "ddm": "a plain diffusion model"}[config.kind]
    best = f": {kept['value']} {kept['best']:.4g} {kept['unit']}".rstrip() + " on validation" if "best" in kept else ""
    count = sum(value.numel() for key, value in tensors.items() if key.startswith("backbone."))
    grid, how = info.transform, {"none": "not used by the model", "input": "an input", "joint": "all in one pass"}
    values = {
        "model": f"{what} of samples {shape}, preset {info.preset}",
        "network": f"{network.name}, {count:,} parameters; starts from {base_in_words(config)}",
        "module": (own := getattr(network, "module", None)) and f"{own}, for torchcdm.load(path, backbone=module)",
        "schedule": f"{config.schedule.name}, T = {config.schedule.T}",
        "data": info.data.spec or "given in Python",
        "grey levels": None if None in (grid.bin, grid.low, grid.high) else f"{grid.low:g} ... {grid.high:g}",
        "columns": info.columns and ", ".join(info.columns),
        "classes": info.class_names and f"{', '.join(info.class_names)} ({how[config.labels]})",
        "kept": f"step {kept['step']}{best}" if "step" in kept else None,
        "last step": lines[-1]["step"] if lines else None,
        "states": ", ".join(path.name for path in state_folders(run)),
    }
    text = "\n".join(f"{name:12} {value}" for name, value in values.items() if value)
    tell(options.json, text, values | {"parameters": count, "selected": kept})


def push(options: argparse.Namespace) -> None:
    """Uploads weights, configuration and card."""
    print(pushed(options.model, options.repository, options.private))
