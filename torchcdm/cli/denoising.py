"""``cdm denoise``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from torchcdm.cli.arguments import add_command, add_device, write_rows
from torchcdm.runtime.files import check_output_folder

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

    from torchcdm.apps.denoising import common_scale, denoise, require_additive_noise
    from torchcdm.data import save_array, save_images, save_table
    from torchcdm.runtime.devices import chosen_device
    from torchcdm.training.checkpoint import load, read_info

    info = read_info(options.model)
    check_output_folder(options.out, options.paths)
    model = load(options.model, chosen_device(options.device))
    # Before the files are read: no file would do.
    require_additive_noise(model.transform)
    x, names, _, notes = info.read_inputs(options.paths, options.skip_bad, noisy=True)
    parts = [denoise(model, part, options.level, options.noise_std) for part in x.split(BATCH)]
    clean, levels, noise = (
        torch.cat(column).cpu() for column in zip(*((part, n.level, n.ratio) for part, n in parts), strict=True)
    )
    scale = common_scale(model.transform)
    noise = noise if scale is None else scale * noise
    if x.ndim == 4:
        files = [path.name for path in save_images(clean, options.out, info.transform)]
    else:
        files = [save_table(clean, options.out / "denoised.csv", info.columns).name] * len(x)
    save_array(clean, options.out / "denoised.npy", info.transform)
    header = ["input", "file", "level", "noise_ratio" if scale is None else "noise_std"]
    values = (f"{value:.4g}" for value in noise.tolist())
    write_rows(options.out / "noise.csv", header, zip(names, files, levels.tolist(), values, strict=True))
    found = "{:.3g} of each column's" if scale is None else "of standard deviation {:.3g}"
    print(*notes, sep="\n", end="\n" * bool(notes), file=sys.stderr)
    print(f"{len(x)} samples in {options.out}; noise {found.format(float(noise.median()))} (median)")
    return 0
