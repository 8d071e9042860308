"""``cdm calibrate``."""

from __future__ import annotations

import argparse
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torchcdm.cli.arguments import add_command, add_device, add_json, tell
from torchcdm.errors import UserError
from torchcdm.training.run_folder import RunFolder

if TYPE_CHECKING:
    from torchcdm.training.path_calibration import PathCalibration
    from torchcdm.units import DataTransform


def add_commands(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "calibrate", "make one pass agree with the probability flow of the same network",
        "cdm calibrate runs/digits --samples 200 --rounds 1",
    )  # fmt: skip
    parser.add_argument("model", metavar="RUN", help="a trained run of one density; its model is changed: values of "
                        "log p and what is made of them, such as anomaly scores; no sample, ELBO or flow")  # fmt: skip
    parser.add_argument("--samples", type=int, default=1024, metavar="N", help="validation samples (1024), a flow "
                        "of 25 steps for each")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=2, metavar="K", help="of particles, which find what log p gives "
                        "too much to (2)")  # fmt: skip
    parser.add_argument("--particles", type=int, default=128, metavar="N", help="in each round (128), two passes a "
                        "level and a flow for each")  # fmt: skip
    parser.add_argument("--level", type=int, metavar="T", help="lowest level; that of `cdm nll` by default")
    parser.add_argument("--remove", action="store_true", help="take back what an earlier call has set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    add_json(parser)
    add_device(parser)
    parser.set_defaults(run=run_calibrate)


def run_calibrate(options: argparse.Namespace) -> int:
    """Fits a readout and keeps it with the model, or takes it back."""
    from torchcdm.models.density import require_density
    from torchcdm.runtime.processes import is_first, sharing
    from torchcdm.training.checkpoint import load, read_info, save_model
    from torchcdm.training.path_calibration import calibrate_paths

    if options.samples < 1:
        raise UserError(f"--samples is {options.samples}; at least 1 is needed")
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
