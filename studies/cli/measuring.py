"""``python -m studies quality``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcdm.cli.arguments import add_command, count, tell

if TYPE_CHECKING:
    from torch import Tensor

    from torchcdm.data import DataSource


def add_commands(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "studies.cli",
        "measuring:quality",
        "how good images are: Fréchet distance, precision, recall, two-sample test, copies, grain",
        "python -m studies quality runs/fashion samples.npz --n 5000 --steps 50 --json quality.json",
        "seed quiet json device",
    )
    parser.add_argument("images", metavar="IMAGES", nargs="*", help="run folders, which draw samples, and files or "
                        "folders of images; none: test images only")  # fmt: skip
    parser.add_argument("--data", metavar="SPEC", help="training images; those of the first run by default")
    parser.add_argument("--size", metavar="HxW", help="resize the training images")
    parser.add_argument("--n", type=count, default=5000, help="images of each set at most (5000)")
    parser.add_argument("--sampler", help="of runs (that of cdm sample)")
    parser.add_argument("--steps", type=count, help="of runs (those of cdm sample)")
    parser.add_argument("--guidance", type=float, default=0.0, help="of runs with classes, which are balanced (0)")
    parser.add_argument("--cache", metavar="DIR", type=Path, help="keep what is measured of the training images")


def quality(options: argparse.Namespace) -> None:
    """Measures and prints."""
    from studies.quality.frechet import Reference
    from studies.quality.measure import measure, table, to_json
    from torchcdm.runtime.processes import chosen_device

    source, device = _training_images(options), chosen_device(options.device)
    reference = Reference(source, device, options.cache)
    sets = {name: _images(name, options, source, device) for name in options.images}
    rows = measure(sets, reference, options.seed)
    tell(options.json, table(rows, reference), to_json(rows, reference))


def _training_images(options: argparse.Namespace) -> DataSource:
    from torchcdm.data import load_data, parse_size
    from torchcdm.errors import UserError
    from torchcdm.training.checkpoint import read_info

    if options.data is not None:
        return load_data(options.data, size=None if options.size is None else parse_size(options.size))
    for name in options.images:
        if _is_run(name):
            return load_data(read_info(name).data)
    raise UserError("name the training images with --data, such as --data fashion-mnist --size 16x16")


def _is_run(name: str) -> bool:
    from torchcdm.training.run_folder import RunFolder

    return RunFolder(name).holds_run()


def _images(name: str, options: argparse.Namespace, source: DataSource, device: Any) -> Tensor:
    """Samples of a run, or the images of a file or folder; data units, (N, C, H, W)."""
    from torchcdm.compose import sample
    from torchcdm.data import load_data, spec_of
    from torchcdm.training.checkpoint import load
    from torchcdm.training.finish import balanced_labels

    if not _is_run(name):
        found = load_data(spec_of(name), source.transform, validation_fraction=0.0, test_fraction=0.0)
        return found.train.tensors(options.n)[0]
    model = load(name, device)
    y = None if model.classes is None else balanced_labels(options.n, model.classes)
    steps = None if options.steps is None else min(options.steps, model.schedule.T)
    return sample(
        model, options.n, options.sampler, steps, y, options.guidance, options.seed, progress=not options.quiet
    )
