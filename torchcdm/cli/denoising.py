"""``cdm denoise``."""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcdm.cli.arguments import add_command, add_device
from torchcdm.errors import UserError
from torchcdm.runtime.files import write_file

if TYPE_CHECKING:
    from torch import Tensor

    from torchcdm.models.denoiser import Denoiser

BATCH = 256


def add_commands(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "denoise", "remove white noise from images, arrays or tables",
        "cdm denoise runs/pixels noisy.npy --noise-std 4 --out clean",
    )  # fmt: skip
    parser.add_argument("model", metavar="RUN")
    parser.add_argument("paths", metavar="PATH", nargs="+", help="images, folders, .npy, .npz, tables; data units")
    strength = parser.add_mutually_exclusive_group()
    strength.add_argument("--level", type=int, metavar="T", help="noise of this level")
    strength.add_argument("--noise-std", type=float, metavar="S", help="noise of this deviation, data units; for data "
                          "whose values share a scale, as images do")  # fmt: skip
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="for the clean data, and noise.csv: "
                        "level and noise_std of each input; for tables noise_ratio, the noise of every column over "
                        "the column's own deviation in training")  # fmt: skip
    add_device(parser)
    parser.set_defaults(run=run_denoise)


def run_denoise(options: argparse.Namespace) -> int:
    """Clean files, and a table of the noise that was found."""
    import torch

    from torchcdm.apps.denoising import common_scale
    from torchcdm.data import save_array, save_images, save_table
    from torchcdm.runtime.devices import chosen_device
    from torchcdm.training.checkpoint import load, read_info


    info = read_info(options.model)
    model = load(options.model, chosen_device(options.device))
    x, names, _ = info.read_inputs(options.paths, options.skip_bad, noisy=True)
    denoise = _rule(options, model)
    parts = [denoise(part.to(model.schedule.alpha.device)) for part in x.split(BATCH)]
    clean, levels, ratios = (torch.cat([part[i] for part in parts]).cpu() for i in range(3))
    scale = common_scale(model.transform)
    noise = ratios if scale is None else scale * ratios
    if x.ndim == 4:
        files = [path.name for path in save_images(clean, options.out, info.transform)]
    else:
        files = [save_table(clean, options.out / "denoised.csv", info.columns).name] * len(x)
    save_array(clean, options.out / "denoised.npy", info.transform)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["input", "file", "level", "noise_ratio" if scale is None else "noise_std"])
    for name, file, level, value in zip(names, files, levels.tolist(), noise.tolist(), strict=True):
        rows.writerow([name, file, level, f"{value:.4g}"])
    write_file(options.out / "noise.csv", text.getvalue())
    found = "{:.3g} of each column's" if scale is None else "of standard deviation {:.3g}"
    print(f"{len(x)} samples in {options.out}; noise {found.format(float(noise.median()))} (median)")
    return 0


def _rule(options: argparse.Namespace, model: Denoiser) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    """From noisy samples to clean ones, data units, their levels (B,), and the noise in model units, float64 (B,)."""
    import torch

    from torchcdm.apps.denoising import (
        common_scale,
        denoise_known,
        denoise_level,
        denoise_unknown,
        nearest_level,
        require_additive_noise,
    )
    from torchcdm.models.density import require_density

    require_additive_noise(model.transform)
    schedule, scale = model.schedule, common_scale(model.transform)

    def at_level(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        level = torch.full((len(x),), options.level, device=x.device)
        return denoise_level(model, x, level), level, schedule.ratio[level]

    def known(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        clean = denoise_known(model, x, options.noise_std)
        ratio = torch.full((len(x),), options.noise_std / scale, dtype=torch.float64, device=x.device)
        return clean, nearest_level(schedule, ratio), ratio

    if options.level is not None:
        if not 1 <= options.level <= schedule.T:
            raise UserError(f"--level is {options.level}; this model denoises the levels 1 to {schedule.T}")
        return at_level
    if options.noise_std is not None:
        if scale is None:
            raise UserError(
                "--noise-std is one number, but the columns differ in scale; give --level, or neither, to estimate it"
            )
        return known
    density = require_density(model, "estimating the noise (without --level or --noise-std)")

    def unknown(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        clean, found = denoise_unknown(density, x)
        return clean, found.level, found.ratio

    return unknown
