"""``cdm sample``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcdm.cli.arguments import add_command, count
from torchcdm.errors import UserError, nearest
from torchcdm.runtime.files import writing

if TYPE_CHECKING:
    from torch import Tensor

    from torchcdm.models.denoiser import Denoiser
    from torchcdm.training.checkpoint import ModelInfo


FORMATS = ("grid", "images", "array", "all")


def add_commands(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, run_sample, "sample", "draw samples",
        "cdm sample runs/digits --n 64 --out samples\n"
        "  accelerate launch --num_processes 4 -m torchcdm sample runs/digits --n 50000 --format array --out samples",
        "model seed quiet device",
    )  # fmt: skip
    parser.add_argument("--n", type=count, default=64, help="number of samples (64)")
    parser.add_argument("--sampler", default="ddim", help="ddpm, ddim, dpm2, dpm++, ipndm3, ipndm4, deis3, "
                        "deis4, unipc2, unipc3: one evaluation a step; heun: two (ddim)")  # fmt: skip
    parser.add_argument("--steps", type=count, metavar="N", help="sampling steps, up to T (50)")
    parser.add_argument("--spacing", default="even", help="even, or adaptive: steps placed where the model's "
                        "trajectories bend, found by 64 evaluations of 16 of them (even)")  # fmt: skip
    parser.add_argument("--label", metavar="K|balanced", help="class by number or name, or all in turn")
    parser.add_argument("--guidance", type=float, default=0.0, metavar="W", help="classifier-free guidance (0)")
    parser.add_argument("--format", default="grid", choices=FORMATS, help="what to write (grid)")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)


def run_sample(options: argparse.Namespace) -> int:
    """Samples to files, with a manifest."""
    from torchcdm.data import save_array, save_images
    from torchcdm.runtime.processes import sharing
    from torchcdm.samplers import make_sampler
    from torchcdm.training.checkpoint import load, read_info
    from torchcdm.training.samples import draw, save_manifest, save_sheet

    info = read_info(options.model)
    out = options.out
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with sharing(options.device) as (device, main):
        model = load(options.model, device)
        y = _labels(options.label, options.n, model, info)
        steps = min(50, model.schedule.T) if options.steps is None else options.steps
        bar = main and not options.quiet
        drawn = draw(
            model, options.n, y, options.seed,
            sampler=options.sampler, steps=steps, spacing=options.spacing, guidance=options.guidance, progress=bar,
        )  # fmt: skip
    if not main:
        return 0
    files = None
    if options.format in ("grid", "all"):
        save_sheet(drawn, model, out / "samples")
    if options.format in ("images", "all") and drawn.is_images:
        files = save_images(drawn.x, out, model.transform)
    if options.format == "images" and not drawn.is_images:
        raise UserError("--format images: this model makes vectors; choose grid (a CSV table) or array")
    if options.format in ("array", "all"):
        save_array(drawn.x, out / "samples.npz", model.transform, drawn.y)
    save_manifest(drawn, out / "manifest.csv", files, info.class_names)
    cost = make_sampler(options.sampler).cost(steps)
    print(f"{options.n} samples in {out}, {cost} evaluation{'s' * (cost > 1)} of the denoiser each")
    return 0


def _labels(label: str | None, n: int, model: Denoiser, info: ModelInfo) -> Tensor | None:
    """The classes that ``--label`` asks for."""
    import torch

    from torchcdm.training.samples import balanced_labels

    if label is None:
        return None
    if model.classes is None:
        raise UserError(f"--label {label}: this model was trained without classes")
    if label == "balanced":
        return balanced_labels(n, model.classes)
    known = {str(k): k for k in range(model.classes)} | {name: k for k, name in enumerate(info.class_names or ())}
    if label not in known:
        raise UserError(f"--label {label}: {nearest(label, ['balanced', *known])}")
    return torch.full((n,), known[label])
