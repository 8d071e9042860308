"""Resizing and channel conversion of images in data units, (C, H, W)."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchcdm.errors import UserError

LUMA = (0.299, 0.587, 0.114)
"""ITU-R 601 weights of red, green and blue, as in Pillow."""

ALPHA_CHANNELS = {2: 1, 4: 3}
"""Images of 2 and 4 channels are grey and colour with an alpha channel last."""


def resize(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear with antialiasing to ``size`` (H, W), by Pillow; uint8 stays uint8, float32 is not rounded.

    The aspect ratio follows ``size``: nothing is cropped.
    """
    from PIL import Image

    if tuple(image.shape[1:]) == tuple(size):
        return image
    height, width = size
    # Each channel alone, so that every number of channels works and alpha does not premultiply.
    channels = [
        np.asarray(Image.fromarray(channel).resize((width, height), Image.Resampling.BILINEAR))
        for channel in image.numpy()
    ]
    return torch.from_numpy(np.stack(channels))


def to_channels(image: Tensor, channels: int, white: float) -> Tensor:
    """Grey, colour and alpha converted into each other.

    Alpha is blended over white; grey to colour repeats; colour to grey takes :data:`LUMA`; an alpha channel that
    is asked for is opaque.

    Args:
        image: Data units, (C, H, W).
        channels: What is wanted: 1, 3 or 4.
        white: Data value of white and of opaque.

    Raises:
        UserError: A conversion that has no meaning, such as 5 channels to 3.
    """
    have = image.shape[0]
    if have == channels:
        return image
    if have not in (1, 2, 3, 4) or channels not in (1, 3, 4):
        raise UserError(f"cannot convert {have} channels to {channels}: only grey, colour and alpha convert")
    value = image.float()
    if have in ALPHA_CHANNELS:
        alpha = value[-1:] / white
        value = value[:-1] * alpha + white * (1 - alpha)
    if value.shape[0] == 3 and channels == 1:
        value = torch.einsum("chw,c->hw", value, value.new_tensor(LUMA))[None]
    elif value.shape[0] == 1 and channels != 1:
        value = value.expand(3, -1, -1)
    if channels == 4:
        value = torch.cat([value, torch.full_like(value[:1], white)])
    return value.round().to(torch.uint8) if image.dtype == torch.uint8 else value


def flip_horizontally(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each image of the batch mirrored with probability one half: augmentation for training only.

    Args:
        x: (B, C, H, W), any units.
        generator: Source of the coin flips, one for each image; CPU, wherever ``x`` is.
    """
    coins = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(coins.to(x.device)[:, None, None, None], x.flip(-1), x)
