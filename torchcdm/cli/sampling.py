"""``cdm sample`` and ``cdm restore``."""

import argparse
import os
from contextlib import suppress

import numpy as np
import torch

from torchcdm import compose
from torchcdm.cli.arguments import given, say
from torchcdm.compose.tilted import Map
from torchcdm.data import save_array, save_grid, save_images
from torchcdm.data.arrays import read as read_array
from torchcdm.data.images import read_image
from torchcdm.data.outputs import check_no_more, in_words, save_manifest, save_sheet
from torchcdm.errors import UserError, nearest
from torchcdm.models.denoiser import Denoiser
from torchcdm.runtime.files import check_output_folder, write_rows
from torchcdm.runtime.processes import chosen_device, sharing
from torchcdm.runtime.validation import Positive, read_as
from torchcdm.training.checkpoint import load, read_info, save_curvatures
from torchcdm.training.finish import balanced_labels, draw
from torchcdm.training.run_folder import RunFolder

SAMPLING = ("sampler", "steps", "guidance", "corrector", "spacing", "particles")  # go to the sampler as they are


def sample(options: argparse.Namespace) -> None:
    """Samples to files, with a manifest."""
    info, out = read_info(options.model), options.out
    pictures = len(info.transform.shape) == 3
    if options.format == "images" and not pictures:
        raise UserError("--format images: this model makes vectors; choose grid (a CSV table) or array")
    check_output_folder(out, [info.data.spec] if info.data.spec else ())
    if options.format in ("images", "all"):
        check_no_more(out, options.n)
    with sharing(options.device) as (device, main):
        model = load(options.model, device)
        kept = set(model.curvatures)
        # The classes of the model by number and by name.
        known = {str(k): k for k in range(model.classes or 0)}
        names = {name: k for k, name in enumerate(info.class_names or ())} if known else {}
        known = names if known.keys() & names.keys() else known | names  # names may be other numbers
        y = None
        if options.label == "balanced" and known:
            y = balanced_labels(options.n, model.classes)
        elif options.label is not None:
            y = torch.full((options.n,), _known("label", options.label, known, "balanced"))
        target = _composed(model, known, options)
        how = {name: getattr(options, name) for name in SAMPLING}
        found, log_p = draw(target, options.n, y, options.seed, progress=main and not options.quiet, **how)
        if main and model.curvatures.keys() - kept and os.path.isdir(options.model):  # not of the zoo or the Hub
            run = RunFolder(options.model)
            with suppress(UserError), run.locked():  # not while others write there, nor where nobody may
                save_curvatures(run, model)
    if not main:
        return
    y = found.y if y is None else y
    classes = in_words(y, info.class_names)
    if options.format in ("grid", "all"):
        label = None if info.data.clusters else info.data.label  # groups are no classes of the table
        save_sheet(found.x, out / "samples", model.transform, label, classes)
    files = save_images(found.x, out, model.transform) if options.format in ("images", "all") and pictures else []
    if options.format in ("array", "all"):
        save_array(found.x, out / "samples.npz", model.transform, y)
    save_manifest(out / "manifest.csv", options.seed, classes, log_p, options.n, files)
    cost = f"{found.evaluations} evaluation{'s' * (found.evaluations > 1)} of the denoiser each"
    parts = [f"{options.n} samples in {out}", cost if found.evaluations else "", found.summary()]
    print("; ".join(part for part in parts if part))


def _composed(model: Denoiser, known: dict[str, int], options: argparse.Namespace) -> Denoiser:
    """The density that ``--all-of``, ``--any-of``, ``--none-of`` and ``--beta`` make of a model."""
    asked = given(all_of=options.all_of, any_of=options.any_of, none_of=options.none_of)
    if len(asked) > 1:
        raise UserError(f"--{' and --'.join(asked)} contradict each other: give one".replace("_", "-"))
    if (asked or options.beta is not None) and (options.label is not None or options.guidance):
        flags = "--all-of, --any-of, --none-of and --beta"
        raise UserError(f"--label and --guidance are for the classes of a model; leave them out with {flags}")
    for name, text in asked.items():
        model = getattr(compose, name)(model, [_known(name, part.strip(), known) for part in text.split(",")])
    return model if options.beta is None else compose.tempered(model, options.beta)


def _known(flag: str, name: str, known: dict[str, int], *others: str) -> int:
    if name not in known:
        what = nearest(name, [*known, *others]) if known else "this model was trained without classes"
        raise UserError(f"--{flag.replace('_', '-')} {name}: {what}")
    return known[name]


def restore(options: argparse.Namespace) -> None:
    """Means, widths and draws to files."""
    info, out = read_info(options.model), options.out
    if options.noise_std is not None:
        read_as(Positive, options.noise_std, "--noise-std")
    measurement, shape = _measurement(options, info.transform.shape)
    check_output_folder(out, [*options.paths, *([options.mask] if options.mask else [])])
    x, names, notes = info.read_pictures(options.paths, options.skip_bad, shape)
    check_no_more(out, len(x))
    say(notes)
    model = load(options.model, chosen_device(options.device))
    means, widths, draws, rows = [], [], [], []
    for k, (y, name) in enumerate(zip(x, names, strict=True)):
        y = measurement(y[None])[0] if options.mask is not None else y
        target, how = compose.posterior(model, measurement, y, options.noise_std), {"particles": options.particles}
        found = compose.sample(target, options.n, seed=options.seed, details=True, progress=not options.quiet, **how)
        mean, (low, high) = found.mean(), found.interval()
        width = high - low
        means, widths, draws = [*means, mean], [*widths, width], [*draws, found.x]
        save_images(mean[None], out, info.transform, [f"{k:06d}-mean"])
        save_images(width[None], out, None, [f"{k:06d}-width"])
        save_grid(found.x, out / f"{k:06d}-draws.png", info.transform)
        rows.append([name, f"{k:06d}", f"{found.ess:.1f}", f"{float(width.mean()):.4g}"])
        say([f"{name}: effective sample size {found.ess:.0f} of {options.particles}"])
    save_array(torch.stack(means), out / "mean.npy")
    save_array(torch.stack(widths), out / "width.npy")
    which = torch.arange(len(draws)).repeat_interleave(options.n)
    save_array(torch.cat(draws), out / "draws.npz", info.transform, which)
    write_rows(out / "restored.csv", ["input", "file", "ess", "mean_width"], rows)
    print(f"{len(names)} images in {out}, {options.n} draws of each")


def _measurement(options: argparse.Namespace, shape: tuple[int, ...]) -> tuple[Map, tuple[int, ...]]:
    """What was measured, of samples; and the shape of the images of the paths."""
    if len(shape) != 3:
        raise UserError("cdm restore is for images; this model takes rows: use torchcdm.compose.posterior")
    if options.blur is not None:
        return compose.blur(options.blur), shape
    if options.scale is not None:
        K = options.scale
        if shape[1] % K or shape[2] % K:
            raise UserError(f"--scale {K}: must divide the model's {shape[1]} x {shape[2]} pixels")
        return compose.downsampling(K), (shape[0], shape[1] // K, shape[2] // K)
    if options.mask.suffix.lower() == ".npy":
        array, _, _ = read_array(options.mask)
        if array.dtype.kind not in "buif" or not np.isfinite(array).all():
            raise UserError(f"--mask {options.mask}: is no array of finite numbers, 0 where nothing is known")
        colour = known = torch.from_numpy(array != 0)
    else:
        pixels = read_image(options.mask)
        colour = pixels[:-1] * (pixels[-1:] > 0) if len(pixels) in (2, 4) else pixels  # opaque black is black
        known = (colour > 0).any(0)
    if tuple(known.shape) not in (shape, shape[1:]):
        raise UserError(f"--mask {options.mask}: has shape {tuple(known.shape)}; the model takes {shape}")
    if len(colour.unique()) > 2:  # as JPEG leaves them around its edges
        raise UserError(f"--mask {options.mask}: has grey levels; save black and white alone, as a PNG")
    if not known.any():
        raise UserError(f"--mask {options.mask}: is 0 everywhere, so nothing is known; cdm sample draws without")
    return compose.mask(known), shape
