"""``cdm nll`` and ``cdm evaluate``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torchcdm.cli.arguments import add_command, add_data, add_device, add_json, device_of, write_numbers
from torchcdm.errors import UserError

if TYPE_CHECKING:
    from torchcdm.checkpoint import ModelInfo
    from torchcdm.data import DataSource


def add_commands(commands: Any) -> None:
    """Adds both commands."""
    parser = add_command(commands, "nll", "likelihood of held-out data", "cdm nll runs/digits --json nll.json")
    parser.add_argument("model", metavar="RUN")
    add_data(parser)
    add_json(parser)
    add_device(parser)
    parser.set_defaults(run=run_nll)

    parser = add_command(
        commands, "evaluate", "level accuracy, cross-entropy and denoising error per level",
        "cdm evaluate runs/digits --json levels.json",
    )  # fmt: skip
    parser.add_argument("model", metavar="RUN")
    add_data(parser)
    parser.add_argument("--draws", type=int, default=4, help="noisy copies of each sample (4)")
    add_json(parser)
    add_device(parser)
    parser.set_defaults(run=run_evaluate)


def run_nll(options: argparse.Namespace) -> int:
    """Likelihood of a split."""
    from torchcdm.cdm import ClassificationDiffusion
    from torchcdm.checkpoint import load, read_info
    from torchcdm.metrics import labels_for, one_pass

    model = load(options.model, device_of(options.device))
    if not isinstance(model, ClassificationDiffusion):
        raise UserError(f"{options.model}: is a ddm, which has no one-pass likelihood")
    source = _source(options, read_info(options.model))
    x, labels = source.split(options.split).tensors(options.limit)
    result = one_pass(model, x, labels_for(model, labels))
    mean, error = result.mean_and_error()
    print(f"one-pass {mean:.4f} +- {error:.4f} {result.unit} on {len(x)} samples")
    write_numbers(options.json, {"value": mean, "se": error, "unit": result.unit})
    return 0


def run_evaluate(options: argparse.Namespace) -> int:
    """Classifier and denoiser by level."""
    from torchcdm.checkpoint import load, read_info
    from torchcdm.metrics import evaluate

    model = load(options.model, device_of(options.device))
    source = _source(options, read_info(options.model))
    values = evaluate(model, source.split(options.split), options.limit, options.draws)
    for name, value in values["mean"].items():
        print(f"{name:10} {value:.4f}")
    write_numbers(options.json, {"data": {"name": source.name, "split": options.split}} | values)
    return 0


def _source(options: argparse.Namespace, info: ModelInfo) -> DataSource:
    """The data of the run, or others; in either case as the run saw them."""
    from torchcdm.building import load_source

    config = info.data if options.data is None else replace(info.data, spec=options.data)
    source = load_source(config)
    if source.shape != info.transform.shape:
        raise UserError(f"{source.name}: has shape {source.shape}; the model takes {info.transform.shape}")
    return source
