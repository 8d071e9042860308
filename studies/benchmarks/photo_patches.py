"""Patches of photographs for a new user's first training: 2004 pieces of 32x32 RGB from scikit-image's own pictures.

    python -m studies.benchmarks.photo_patches patches.npz
    cdm train encoder --data array:patches.npz --budget 10m --out runs/patches

Needs scikit-image; nothing is downloaded: these pictures ship with the package.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

PICTURES = ("astronaut", "chelsea", "coffee", "rocket", "immunohistochemistry", "stereo_motorcycle",
            "hubble_deep_field")  # fmt: skip
COUNT, SIDE = 2004, 32


def patches(count: int = COUNT, side: int = SIDE) -> np.ndarray:
    """uint8 (count, 3, side, side): pieces that do not overlap, drawn from all of them at random."""
    from skimage import data

    pieces = []
    for name in PICTURES:
        picture = getattr(data, name)()
        picture = picture[0] if isinstance(picture, tuple) else picture
        rows, columns = (size // side for size in picture.shape[:2])
        cut = picture[: rows * side, : columns * side, :3].reshape(rows, side, columns, side, 3)
        pieces.append(cut.transpose(0, 2, 4, 1, 3).reshape(-1, 3, side, side))
    pieces = np.concatenate(pieces)
    return pieces[np.random.default_rng(0).permutation(len(pieces))[:count]]


if __name__ == "__main__":
    np.savez_compressed(Path(sys.argv[1]), x=patches())
