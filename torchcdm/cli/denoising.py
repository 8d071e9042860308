"""``cdm denoise``."""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchcdm.cli.arguments import add_command, add_device, device_of
from torchcdm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from torchcdm.checkpoint import ModelInfo
    from torchcdm.denoisers import Denoiser

BATCH = 256


def add_commands(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "denoise", "remove white noise from images, arrays or tables",
        "cdm denoise runs/digits noisy.npy --noise-std 4 --out clean",
    )  # fmt: skip
    parser.add_argument("model", metavar="RUN")
    parser.add_argument("paths", metavar="PATH", nargs="+", help="images, folders, .npy, .npz, tables; data units")
    strength = parser.add_mutually_exclusive_group()
    strength.add_argument("--level", type=int, metavar="T", help="noise of this level")
    strength.add_argument("--noise-std", type=float, metavar="S", help="noise of this deviation, data units")
    parser.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True)
    add_device(parser)
    parser.set_defaults(run=run_denoise)


def run_denoise(options: argparse.Namespace) -> int:
    """Clean files, and a table of the noise that was found."""
    import torch

    from torchcdm.checkpoint import load, read_info
    from torchcdm.data import save_array, save_images, save_table
    from torchcdm.run_folder import write_file

    info = read_info(options.model)
    model = load(options.model, device_of(options.device))
    x, names, _ = info.read_inputs(options.paths, options.skip_bad, noisy=True)
    denoise = _rule(options, model, info)
    parts = [denoise(part.to(model.schedule.alpha.device)) for part in x.split(BATCH)]
    clean = torch.cat([part[0] for part in parts]).cpu()
    levels, stds = (torch.cat([part[i] for part in parts]).cpu() for i in (1, 2))
    if x.ndim == 4:
        files = [path.name for path in save_images(clean, options.out, info.transform)]
    else:
        files = [save_table(clean, options.out / "denoised.csv", info.columns).name] * len(x)
    save_array(clean, options.out / "denoised.npy", info.transform)
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["input", "file", "level", "noise_std"])
    for name, file, level, std in zip(names, files, levels.tolist(), stds.tolist(), strict=True):
        rows.writerow([name, file, level, f"{std:.4g}"])
    write_file(options.out / "noise.csv", text.getvalue())
    print(f"{len(x)} samples in {options.out}; noise of standard deviation {float(stds.median()):.3g} (median)")
    return 0


def _rule(options: argparse.Namespace, model: Denoiser, info: ModelInfo) -> Any:
    """From noisy samples to clean ones, their levels (B,), and the deviations of their noise (B,), data units."""
    import torch

    from torchcdm.cdm import ClassificationDiffusion
    from torchcdm.noise_level import denoise_known, denoise_unknown, nearest_level, require_additive_noise

    require_additive_noise(info.transform)
    schedule, scale = model.schedule, float(info.transform.scale.mean())

    def at_level(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        level = options.level
        z = info.transform(x)
        clean = info.transform.inverse(model.denoise(schedule.alpha[level].to(z.dtype) * z, level).x0)
        std = float(schedule.ratio[level]) * scale
        return clean, torch.full((len(x),), level), torch.full((len(x),), std, dtype=torch.float64)

    def known(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        std = options.noise_std
        clean = denoise_known(model, x, std)
        ratio = torch.full((len(x),), std / scale, dtype=torch.float64, device=schedule.alpha.device)
        return clean, nearest_level(schedule, ratio), ratio * scale

    def unknown(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        clean, found = denoise_unknown(model, x)
        return clean, found.level, found.ratio * scale

    if options.level is not None:
        if not 1 <= options.level <= schedule.T:
            raise UserError(f"--level is {options.level}; this model denoises the levels 1 to {schedule.T}")
        return at_level
    if options.noise_std is not None:
        return known
    if not isinstance(model, ClassificationDiffusion):
        raise UserError("a ddm cannot estimate the noise: give --level or --noise-std")
    return unknown

