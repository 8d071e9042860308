"""A first training: 2004 patches of 32x32 RGB cut from scikit-image's own pictures, ten minutes of two cores.

    python -m studies.benchmarks.photo_patches data patches.npz
    python -m studies.benchmarks.photo_patches starts patches.npz
    cdm train encoder --data array:patches.npz --budget 10m --out runs/patches
    python -m studies.benchmarks.photo_patches denoise runs/patches

``starts`` prints bits/dim on validation of the closed-form densities that a training may start from, ``denoise`` the
PSNR of a model and of non-local means that are told the noise. Needs scikit-image; nothing is downloaded: these
pictures ship with the package.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch

PICTURES = ("astronaut", "chelsea", "coffee", "rocket", "immunohistochemistry", "stereo_motorcycle",
            "hubble_deep_field")  # fmt: skip
COUNT, SIDE = 2004, 32
NOISES = (10, 25, 50)
"""Deviations of the noise that is taken away, grey levels."""

DENOISED = 100


def patches(count: int = COUNT, side: int = SIDE, stride: int = SIDE) -> np.ndarray:
    """uint8 (count, 3, side, side): pieces that begin every ``stride`` pixels, drawn from all of them at random."""
    from skimage import data

    pieces = []
    for name in PICTURES:
        picture = getattr(data, name)()
        picture = picture[0] if isinstance(picture, tuple) else picture
        windows = np.lib.stride_tricks.sliding_window_view(picture[..., :3], (side, side), (0, 1))
        pieces.append(windows[::stride, ::stride].reshape(-1, 3, side, side))
    pieces = np.concatenate(pieces)
    return pieces[np.random.default_rng(0).permutation(len(pieces))[:count]]


def starts(path: Path) -> dict[str, float]:
    """Bits/dim on validation data of what a training may start from."""
    from torchcdm.data import DataOptions
    from torchcdm.diffusion.start import best_start
    from torchcdm.training.build import base_floor, base_samples, load_source

    source = load_source(DataOptions(spec=f"array:{path}"))
    transform, (train, _) = source.transform, base_samples(source, False)
    held_out = transform.encode(source.validation.tensors()[0], torch.Generator().manual_seed(0))
    given = {"full covariance": {"form": "full", "components": 1, "shrinkage": 0.0},
             "full covariance, shrunk": {"form": "full", "components": 1},
             "one Gaussian of cosines": {"form": "cosine", "components": 1}, "chosen": {}}  # fmt: skip
    found = {}
    for name, fields in given.items():
        start = best_start(train, held_out, base_floor(transform), fields)
        nats = start.value + float(transform.log_det(held_out[:1])) + transform.dim * transform.log_bin
        found[name] = -nats / (transform.dim * math.log(2))
    return found


def denoised(run: str) -> list[tuple[int, float, float]]:
    """Deviation of the noise, and PSNR of the model and of non-local means, dB, on test patches."""
    from skimage.restoration import denoise_nl_means

    import torchcdm
    from torchcdm.apps.denoising import denoise
    from torchcdm.training.checkpoint import read_info

    model = torchcdm.load(run)
    clean = read_info(run).read_source(model).test.tensors(DENOISED)[0].double()
    rows = []
    for noise in NOISES:
        noisy = clean + noise * torch.randn(clean.shape, generator=torch.Generator().manual_seed(noise)).double()
        ours = denoise(model, noisy, noise_std=float(noise))[0].double().clamp(0, 255)
        told = {"patch_size": 5, "patch_distance": 6, "h": 0.8 * noise, "sigma": float(noise), "fast_mode": False}
        means = [denoise_nl_means(x.numpy(), channel_axis=0, **told) for x in noisy]
        rows.append((noise, _psnr(ours, clean), _psnr(torch.from_numpy(np.stack(means)).clamp(0, 255), clean)))
    return rows


def _psnr(found: torch.Tensor, clean: torch.Tensor) -> float:
    return 10 * math.log10(255**2 / float((found - clean).square().mean()))


def main() -> None:
    """Runs one of the three commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("data", "starts"):
        commands.add_parser(name).add_argument("file", type=Path)
    data = commands.choices["data"]
    data.add_argument("--side", type=int, default=SIDE, help=f"pixels of an edge ({SIDE})")
    data.add_argument("--stride", type=int, help="pixels between neighbours; an edge when left out: no overlap")
    data.add_argument("--count", type=int, default=COUNT, help=f"at most so many ({COUNT})")
    commands.add_parser("denoise").add_argument("run", help="a model that was trained on the patches")
    options = parser.parse_args()
    if options.command == "data":
        np.savez_compressed(options.file, x=patches(options.count, options.side, options.stride or options.side))
    elif options.command == "starts":
        for name, value in starts(options.file).items():
            print(f"{name:26} {value:8.3f} bits/dim", flush=True)
    else:
        for noise, ours, theirs in denoised(options.run):
            print(f"noise {noise:3}: this model {ours:.2f} dB, non-local means {theirs:.2f} dB", flush=True)


if __name__ == "__main__":
    main()
