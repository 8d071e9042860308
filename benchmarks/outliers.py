"""Outliers: every anomaly score against PyOD's detectors and the log p of a flow.

The list of outliers and their strengths below was written before any score was looked at, and is not changed since.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from torchcdm.data import load_data, pixels

# --- the list, fixed ---------------------------------------------------------------------------------------------

NORMAL_IMAGES = 2000
"""Test images of Fashion-MNIST, evenly spaced, that stand for normal; each corruption is applied to 2000 others."""


@dataclass(frozen=True)
class Corruption:
    """One way to spoil images, at the strength that counts and at a mild one that is reported beside it."""

    apply: Callable[[Tensor, float], Tensor]
    strength: float
    mild: float | None


def invert(x: Tensor, strength: float) -> Tensor:
    """Black for white."""
    return 255 - x


def blur(x: Tensor, sigma: float) -> Tensor:
    """A Gaussian of ``sigma`` pixels, edges repeated."""
    reach = int(np.ceil(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, dtype=torch.float32)
    kernel = (-0.5 * (offsets / sigma) ** 2).exp()
    kernel = kernel / kernel.sum()
    padded = torch.nn.functional.pad(x.float(), (reach, reach, reach, reach), mode="replicate")
    rows = torch.nn.functional.conv2d(padded, kernel.view(1, 1, 1, -1))
    return torch.nn.functional.conv2d(rows, kernel.view(1, 1, -1, 1))


def add_noise(x: Tensor, deviation: float) -> Tensor:
    """White noise of ``deviation`` grey levels, clipped."""
    return x + deviation * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))


def reduce_contrast(x: Tensor, factor: float) -> Tensor:
    """Contrast around the mean of the image times ``factor``."""
    mean = x.float().mean((1, 2, 3), keepdim=True)
    return mean + factor * (x - mean)


def shift(x: Tensor, distance: float) -> Tensor:
    """Moved by ``distance`` pixels along both axes, in one of the four diagonal directions in turn; black comes in."""
    d = int(distance)
    padded = torch.nn.functional.pad(x, (d, d, d, d))
    height, width = x.shape[-2:]
    corners = [(0, 0), (0, 2 * d), (2 * d, 0), (2 * d, 2 * d)]
    moved = [padded[i, :, a : a + height, b : b + width] for i in range(len(x)) for a, b in [corners[i % 4]]]
    return torch.stack(moved)


CORRUPTIONS = {
    "inverted": Corruption(invert, 1.0, None),
    "blurred": Corruption(blur, 1.0, 0.6),
    "noisy": Corruption(add_noise, 20.0, 8.0),
    "contrast": Corruption(reduce_contrast, 0.5, 0.8),
    "shifted": Corruption(shift, 4.0, 2.0),
}

HELD_OUT = {"classes 5-9": range(5, 10), "classes 0-4": range(5)}
"""Fashion-MNIST classes that a model never saw; it is trained on the other five, at 16x16."""

TABLES = {"breast cancer": (0,), "wine": (0, 1, 2), "digits": tuple(range(10))}
"""scikit-learn's tables, and the classes of which each in turn is the outlier (0 of breast cancer: malignant)."""


def corrupted(x: Tensor, name: str, mild: bool = False) -> Tensor:
    """Grey levels 0 ... 255, uint8, like the images themselves."""
    corruption = CORRUPTIONS[name]
    strength = corruption.mild if mild else corruption.strength
    return corruption.apply(x, strength).round().clamp(0, 255).to(torch.uint8)


def resized_digits(size: tuple[int, int]) -> Tensor:
    """scikit-learn's digits, all 1797, to ``size``, their 17 grey levels as 0 ... 255: uint8 (N, 1, H, W)."""
    source = load_data("digits")
    digits = torch.cat([split.tensors()[0] for split in (source.train, source.validation, source.test)])
    large = torch.stack([pixels.resize(image.float() * 255 / 16, size) for image in digits])
    return large.round().clamp(0, 255).to(torch.uint8)
