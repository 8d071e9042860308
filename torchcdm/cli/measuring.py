"""``cdm nll``, ``cdm evaluate`` and ``cdm calibrate``."""

from __future__ import annotations

import argparse
import math
from contextlib import nullcontext

from torchcdm.cli.arguments import given, tell
from torchcdm.errors import UserError
from torchcdm.likelihood import Scoring, methods_of, report
from torchcdm.models.density import require_density
from torchcdm.runtime.processes import is_first, sharing
from torchcdm.training.checkpoint import load, read_info, save_model
from torchcdm.training.evaluation import evaluate as evaluated
from torchcdm.training.evaluation import labels_for
from torchcdm.training.path_calibration import PathCalibration, calibrate_paths
from torchcdm.training.run_folder import RunFolder
from torchcdm.units import DataTransform


def nll(options: argparse.Namespace) -> None:
    """Likelihood of a split."""
    scoring = Scoring(**given(
        level=options.level, draws=options.draws, seed=options.seed, steps=options.flow_steps,
        probes=options.flow_probes,
    ))  # fmt: skip
    info = read_info(options.model)
    with sharing(options.device) as (device, main):
        model = load(options.model, device)
        # log Z takes longer than all others.
        methods = [method for method in methods_of(model) if method != "logz"]
        if options.methods is not None:
            methods = [method for method in map(str.strip, options.methods.split(",")) if method]
        source = info.read_source(model, options.data, labelled=options.conditional)
        x, labels = source.split(options.split).tensors(options.limit)
        y = labels_for(model, labels) if options.conditional else None
        if options.conditional and y is None:
            raise UserError("--conditional: the model or the data have no classes")
        result = report(
            model, x, y, scoring, methods, name=source.name, split=options.split,
            progress=main and not options.quiet, **given(sweeps=options.sweeps),
        )  # fmt: skip
    if main:
        tell(options.json, result.table(), result.to_json())


def evaluate(options: argparse.Namespace) -> None:
    """Classifier and denoiser by level."""
    info = read_info(options.model)
    with sharing(options.device) as (device, main):
        model = load(options.model, device)
        source = info.read_source(model, options.data, labelled=True)
        values = evaluated(model, source.split(options.split), options.limit, options.draws)
    if main:
        text = "\n".join(f"{name:10} {value:.4f}" for name, value in values["mean"].items())
        tell(options.json, text, {"data": {"name": source.name, "split": options.split}} | values)


def calibrate(options: argparse.Namespace) -> None:
    """Fits a readout and keeps it with the model, or takes it back."""
    info = read_info(options.model)
    found, run = None, RunFolder(options.model)
    with run.locked() if is_first() else nullcontext(), sharing(options.device) as (device, main):
        model = require_density(load(options.model, device), f"{options.model}: calibration").uncalibrated
        if not options.remove:
            x, _ = info.read_source(model).validation.tensors(options.samples)
            found = calibrate_paths(
                model, x, options.rounds, options.particles, options.level, options.seed,
                progress=main and not options.quiet,
            )  # fmt: skip
            model = found.model
        if main:
            save_model(run, model, info)
    if main and found is not None:
        _tell(options, found, model.transform)


def _tell(options: argparse.Namespace, found: PathCalibration, transform: DataTransform) -> None:
    """What was found, in nats for continuous data and in bits/dim else."""
    unit, size = ("nats", 1.0) if transform.bin is None else ("bits/dim", transform.dim * math.log(2))
    log_z = [{key: getattr(z, key) / size for key in ("value", "low", "high")} for z in found.log_z]
    values = {"unit": unit, "level": found.level, "before": found.before / size, "after": found.after / size}
    lines = [
        f"log p_{found.level} less the flow's, root mean square on samples not fitted to: "
        f"{values['before']:.4g} -> {values['after']:.4g} {unit}"
    ]
    for k, z in enumerate(log_z, 1):
        lines.append(f"log Z before round {k}: {z['value']:.4g} [{z['low']:.4g}, {z['high']:.4g}] {unit}")
    tell(options.json, "\n".join(lines), values | {"log_z": log_z})
