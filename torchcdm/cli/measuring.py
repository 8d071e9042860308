"""``cdm nll``, ``cdm evaluate`` and ``cdm calibrate``."""

from __future__ import annotations

import argparse
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torchcdm.cli.arguments import add_command, count, tell
from torchcdm.errors import UserError
from torchcdm.training.run_folder import RunFolder

if TYPE_CHECKING:
    from torchcdm.training.path_calibration import PathCalibration
    from torchcdm.units import DataTransform


def add_commands(commands: Any) -> None:
    """Adds the commands."""
    parser = add_command(
        commands, run_nll, "nll", "likelihood of held-out data", "cdm nll runs/digits --json nll.json",
        "model data split limit quiet json device",
    )  # fmt: skip
    parser.add_argument("--methods", help="of single, elbo, flow, logz (all but logz; elbo and flow of a ddm)")
    parser.add_argument("--draws", type=int, metavar="K", help="noise draws of the one-pass rows (1)")
    parser.add_argument("--level", type=int, metavar="T", help="level of the bounds and the flow; chosen by default")
    parser.add_argument("--conditional", action="store_true", help="given the class, for models that saw classes")
    parser.add_argument("--flow-steps", type=int, metavar="N", help="Heun steps of the flow (40)")
    parser.add_argument("--flow-probes", type=int, metavar="P", help="probes of its divergence, even (2)")
    parser.add_argument("--sweeps", type=int, metavar="N", help="sweeps of the replica exchange for log Z (200)")
    parser.add_argument("--seed", type=int)

    parser = add_command(
        commands, run_evaluate, "evaluate", "level accuracy, cross-entropy and denoising error per level",
        "cdm evaluate runs/digits --json levels.json", "model data split limit json device",
    )  # fmt: skip
    parser.add_argument("--draws", type=count, default=4, help="noisy copies of each sample (4)")

    parser = add_command(
        commands, run_calibrate, "calibrate", "make one pass agree with the probability flow of the same network: "
        "changes values of log p in RUN and what is made of them, such as anomaly scores; no sample, ELBO or flow",
        "cdm calibrate runs/digits --samples 200 --rounds 1", "model seed quiet json device",
    )  # fmt: skip
    parser.add_argument("--samples", type=count, default=1024, metavar="N", help="validation samples (1024), a flow "
                        "of 25 steps for each")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=2, metavar="K", help="of particles, which find what log p gives "
                        "too much to (2)")  # fmt: skip
    parser.add_argument("--particles", type=int, default=128, metavar="N", help="in each round (128), two passes a "
                        "level and a flow for each")  # fmt: skip
    parser.add_argument("--level", type=int, metavar="T", help="lowest level; that of `cdm nll` by default")
    parser.add_argument("--remove", action="store_true", help="take back what an earlier call has set")


def run_nll(options: argparse.Namespace) -> int:
    """Likelihood of a split."""
    from torchcdm.likelihood import Scoring, methods_of, report
    from torchcdm.runtime.processes import sharing
    from torchcdm.training.checkpoint import load, read_info
    from torchcdm.training.evaluation import labels_for

    scoring = Scoring(**_given(
        level=options.level, draws=options.draws, seed=options.seed, steps=options.flow_steps,
        probes=options.flow_probes,
    ))  # fmt: skip
    log_z, info = _given(sweeps=options.sweeps), read_info(options.model)
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
        bar = main and not options.quiet
        result = report(model, x, y, scoring, methods, name=source.name, split=options.split, progress=bar, **log_z)
    if main:
        tell(options.json, result.table(), result.to_json())
    return 0


def run_evaluate(options: argparse.Namespace) -> int:
    """Classifier and denoiser by level."""
    from torchcdm.runtime.processes import sharing
    from torchcdm.training.checkpoint import load, read_info
    from torchcdm.training.evaluation import evaluate

    info = read_info(options.model)
    with sharing(options.device) as (device, main):
        model = load(options.model, device)
        source = info.read_source(model, options.data, labelled=True)
        values = evaluate(model, source.split(options.split), options.limit, options.draws)
    if main:
        text = "\n".join(f"{name:10} {value:.4f}" for name, value in values["mean"].items())
        tell(options.json, text, {"data": {"name": source.name, "split": options.split}} | values)
    return 0


def _given(**values: Any) -> dict[str, Any]:
    """Those that are not None: the defaults of the others are where they are used."""
    return {name: value for name, value in values.items() if value is not None}


def run_calibrate(options: argparse.Namespace) -> int:
    """Fits a readout and keeps it with the model, or takes it back."""
    from torchcdm.models.density import require_density
    from torchcdm.runtime.processes import is_first, sharing
    from torchcdm.training.checkpoint import load, read_info, save_model
    from torchcdm.training.path_calibration import calibrate_paths

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
    return 0


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
