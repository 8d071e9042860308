"""``cdm sample`` and ``cdm restore``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcdm.cli.arguments import add_command, count
from torchcdm.errors import UserError, nearest
from torchcdm.runtime.files import check_output_folder, write_rows, writing

if TYPE_CHECKING:
    from torch import Tensor

    from torchcdm.models.denoiser import Denoiser
    from torchcdm.training.checkpoint import ModelInfo


FORMATS = ("grid", "images", "array", "all")


def add_commands(commands: Any) -> None:
    """Adds the commands."""
    parser = add_command(
        commands, run_sample, "sample", "draw samples",
        "cdm sample runs/digits --n 64 --out samples\n"
        "  cdm sample zoo:digits-conditional --all-of 3,8 --particles 512 --n 64 --out both\n"
        "  accelerate launch --num_processes 4 -m torchcdm sample runs/digits --n 50000 --format array --out samples",
        "model seed quiet device",
    )  # fmt: skip
    parser.add_argument("--n", type=count, default=64, help="number of samples (64)")
    parser.add_argument("--sampler", help="ddpm, ddim, dpm2, dpm++, ipndm3, ipndm4, deis3, "
                        "deis4, unipc2, unipc3: one evaluation a step; heun: two (ddpm, with moves)")  # fmt: skip
    parser.add_argument("--steps", type=count, metavar="N", help="sampling steps, up to T (25 with moves, 50 without)")
    parser.add_argument("--spacing", default="even", help="even, or adaptive: steps placed where the model's "
                        "trajectories bend, found by 64 evaluations of 16 of them (even)")  # fmt: skip
    parser.add_argument("--label", metavar="K|balanced", help="class by number or name, or all in turn")
    parser.add_argument("--guidance", type=float, default=0.0, metavar="W", help="classifier-free guidance (0)")
    for flag, what in (("all-of", "what is all of these classes at once: a product"),
                       ("any-of", "what is one of these classes: a mixture"),
                       ("none-of", "what is none of these classes")):  # fmt: skip
        parser.add_argument(f"--{flag}", metavar="A,B", help=what)
    parser.add_argument("--beta", type=float, metavar="B", help="density to the power B: above 1 more typical samples")
    parser.add_argument("--corrector", type=int, metavar="N", help="Langevin moves with accept-reject after each "
                        "step, an evaluation each (1 without --sampler, 0 with it)")  # fmt: skip
    parser.add_argument("--particles", type=int, default=0, metavar="N", help="weighted particles, at least --n, "
                        "instead of a sampler: what a composed density needs to be exact (0)")  # fmt: skip
    parser.add_argument("--format", default="grid", choices=FORMATS, help="what to write (grid)")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)

    parser = add_command(
        commands, run_restore, "restore", "images from a part of them, a blurred or a smaller one: posterior samples",
        "cdm restore zoo:digits half.png --mask upper.png --noise-std 2 --out restored\n"
        "  cdm restore runs/photos small.png --scale 2 --out larger",
        "model paths seed skip-bad quiet device",
    )  # fmt: skip
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--mask", metavar="FILE", type=Path, help="an image or .npy of the model's size, not 0 where "
                      "the pixels of PATH are known")  # fmt: skip
    what.add_argument("--blur", metavar="S", type=float, help="PATH is blurred by a Gaussian of S pixels")
    what.add_argument("--scale", metavar="K", type=count, help="PATH is K times smaller, each pixel a mean")
    parser.add_argument("--noise-std", metavar="S", type=float, help="deviation of the noise of PATH, data units; not "
                        "known by default")  # fmt: skip
    parser.add_argument("--n", type=count, default=64, help="draws of each (64)")
    parser.add_argument("--particles", type=count, default=512, metavar="N", help="weighted particles that they are "
                        "drawn from, at least --n (512)")  # fmt: skip
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="for images and arrays of the mean, "
                        "the width of 90 %% credible intervals, and the draws, and restored.csv")  # fmt: skip


def run_sample(options: argparse.Namespace) -> int:
    """Samples to files, with a manifest."""
    from torchcdm.data import save_array, save_images
    from torchcdm.runtime.processes import sharing
    from torchcdm.training.checkpoint import load, read_info
    from torchcdm.training.samples import draw, save_manifest, save_sheet

    info = read_info(options.model)
    out = options.out
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with sharing(options.device) as (device, main):
        model = load(options.model, device)
        y = _labels(options.label, options.n, model, info)
        density, spacing = _composed(model, info, options), {"spacing": options.spacing}
        drawn = draw(
            density, options.n, y, options.seed, sampler=options.sampler, steps=options.steps,
            guidance=options.guidance, corrector=options.corrector, particles=options.particles,
            progress=main and not options.quiet, **(spacing if options.spacing != "even" else {}),
        )  # fmt: skip
    if not main:
        return 0
    files, pictures = [], drawn.x.ndim == 4
    if options.format in ("grid", "all"):
        save_sheet(drawn, model, out / "samples")
    if options.format in ("images", "all") and pictures:
        files = save_images(drawn.x, out, model.transform)
    if options.format == "images" and not pictures:
        raise UserError("--format images: this model makes vectors; choose grid (a CSV table) or array")
    if options.format in ("array", "all"):
        save_array(drawn.x, out / "samples.npz", model.transform, drawn.y)
    save_manifest(drawn, out / "manifest.csv", files, info.class_names)
    cost = f"{drawn.evaluations} evaluation{'s' * (drawn.evaluations > 1)} of the denoiser each"
    parts = [f"{options.n} samples in {out}", cost if drawn.evaluations else "", drawn.summary]
    print("; ".join(part for part in parts if part))
    return 0


def run_restore(options: argparse.Namespace) -> int:
    """Means, widths and draws to files."""
    import torch

    from torchcdm.apps.restoring import restore
    from torchcdm.data import save_array, save_grid, save_images
    from torchcdm.data.inputs import read_pictures
    from torchcdm.models.inputs import check_real
    from torchcdm.runtime.devices import chosen_device
    from torchcdm.training.checkpoint import load, read_info

    info, out = read_info(options.model), options.out
    if options.noise_std is not None:
        check_real("--noise-std", options.noise_std, 1e-12, 1e12)
    measurement, shape, cut = _measurement(options, info.transform.shape)
    check_output_folder(out, options.paths)
    data = replace(info.data, skip_bad=options.skip_bad)
    x, names, _ = read_pictures(options.paths, info.transform, data, shape)
    model = load(options.model, chosen_device(options.device))
    means, widths, draws, rows = [], [], [], []
    for k, name in enumerate(names):
        found = restore(
            model, measurement, cut(x[k][None])[0], options.noise_std, options.n, options.particles, options.seed,
            not options.quiet,
        )  # fmt: skip
        means, widths, draws = [*means, found.mean], [*widths, found.width], [*draws, found.draws]
        save_images(found.mean[None], out, info.transform, [f"{k:06d}-mean"])
        save_images(found.width[None], out, None, [f"{k:06d}-width"])
        save_grid(found.draws, out / f"{k:06d}-draws.png", info.transform)
        rows.append([name, f"{k:06d}", f"{found.ess:.1f}", f"{float(found.width.mean()):.4g}"])
        print(f"{name}: effective sample size {found.ess:.0f} of {options.particles}", file=sys.stderr)
    save_array(torch.stack(means), out / "mean.npy")
    save_array(torch.stack(widths), out / "width.npy")
    which = torch.arange(len(draws)).repeat_interleave(options.n)
    save_array(torch.cat(draws), out / "draws.npz", info.transform, which)
    write_rows(out / "restored.csv", ["input", "file", "ess", "mean_width"], rows)
    print(f"{len(names)} images in {out}, {options.n} draws of each")
    return 0


def _measurement(
    options: argparse.Namespace, shape: tuple[int, ...]
) -> tuple[Callable[[Tensor], Tensor], tuple[int, ...], Callable[[Tensor], Tensor]]:
    """What was measured, of samples; the shape of the inputs; and what of these was measured."""
    from torchcdm import compose
    from torchcdm.data.images import read_image
    from torchcdm.data.reading import read_arrays

    if len(shape) != 3:
        raise UserError("cdm restore is for images; this model takes rows: use torchcdm.compose.posterior")
    if options.blur is not None:
        return compose.blur(options.blur), shape, lambda x: x
    if options.scale is not None:
        K = options.scale
        if shape[1] % K or shape[2] % K:
            raise UserError(f"--scale {K}: must divide the model's {shape[1]} x {shape[2]} pixels")
        return compose.downsampling(K), (shape[0], shape[1] // K, shape[2] // K), lambda x: x
    import torch

    if options.mask.suffix.lower() == ".npy":
        known = torch.from_numpy(read_arrays(options.mask)[""] != 0)
    else:
        known = (read_image(options.mask, None) > 0).any(0)
    if tuple(known.shape) not in (shape, shape[1:]):
        raise UserError(f"--mask {options.mask}: has shape {tuple(known.shape)}; the model takes {shape}")
    if not known.any():
        raise UserError(f"--mask {options.mask}: is 0 everywhere, so nothing is known; cdm sample draws without")
    return (part := compose.mask(known)), shape, part


def _composed(model: Denoiser, info: ModelInfo, options: argparse.Namespace) -> Denoiser:
    """The density that ``--all-of``, ``--any-of``, ``--none-of`` and ``--beta`` make of a model."""
    from torchcdm import compose

    asked = {name: getattr(options, name) for name in ("all_of", "any_of", "none_of") if getattr(options, name)}
    if len(asked) > 1:
        raise UserError(f"--{' and --'.join(asked)} contradict each other: give one".replace("_", "-"))
    for name, text in asked.items():
        known = _classes(model, info)
        chosen = [part.strip() for part in text.split(",")]
        for part in chosen:
            if part not in known:
                raise UserError(f"--{name.replace('_', '-')} {text}: {nearest(part, known)}")
        model = getattr(compose, name)(model, [known[part] for part in chosen])
    return model if options.beta is None else compose.tempered(model, options.beta)


def _classes(model: Denoiser, info: ModelInfo) -> dict[str, int]:
    """The classes of a model by number and by name."""
    return {str(k): k for k in range(model.classes or 0)} | {name: k for k, name in enumerate(info.class_names or ())}


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
    known = _classes(model, info)
    if label not in known:
        raise UserError(f"--label {label}: {nearest(label, ['balanced', *known])}")
    return torch.full((n,), known[label])
