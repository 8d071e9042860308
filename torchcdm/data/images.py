"""Images: what the header of a file says, its pixels in data units, and their conversion into one shape."""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from torchcdm.data.source import Size
from torchcdm.errors import UserError
from torchcdm.runtime.reading import reading

_SUFFIXES = ".png .jpg .jpeg .bmp .gif .webp .tif .tiff .pgm .ppm .pnm .jp2 .npy"
SUFFIXES = frozenset(_SUFFIXES.split())  # of images; an .npy file holds one image, of any number of channels
# What Pillow may take a file for, whatever its name says: others, PostScript for one, start programs.
FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000")
# What a file should be, and what to do about one that is not, for messages.
IMAGE = ("an image", "; skip-bad leaves such files out")
HIGHS = {"u1": 255, "u2": 65535}  # largest value of unsigned integers in .npy files
WIDE_MODES = ("I;16", "I;16B", "I;16L", "I;16N", "I")  # modes of Pillow whose values are 0 ... 65535
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601 weights of red, green and blue, as in Pillow


class ImageInfo(NamedTuple):
    """What an image file holds, read from its header."""

    channels: int  # grey 1, grey and alpha 2, colour 3, colour and alpha 4; anything in .npy files
    size: Size  # height and width in pixels, as the image is meant to be seen (EXIF orientation applied)
    high: int | None  # largest value of an unsigned integer file, 255 or 65535; None for floats

    @property
    def grid(self) -> tuple[int, int] | None:
        """Grey levels; None for floats."""
        return None if self.high is None else (0, self.high)

    def __str__(self) -> str:
        depth = {255: "8 bit", 65535: "16 bit", None: "float"}[self.high]
        return "{} x {} pixels, {} channel(s), {}".format(*self.size, self.channels, depth)


def describe(path: Path) -> ImageInfo:
    """The header of an image file, whose pixels are not decoded; UserError for what Pillow and numpy do not read."""
    with reading(path, *IMAGE) as file:
        if path.suffix.lower() == ".npy":
            array = _one_image(np.lib.format.open_memmap(path, "r"))
            return ImageInfo(len(array), array.shape[1:], HIGHS.get(array.dtype.str[1:]))
        with opened(file) as image:
            width, height = image.size
            # Not image.getexif(): for PNG files that decodes the pixels.
            if Image.Image.getexif(image).get(ExifTags.Base.Orientation) in (5, 6, 7, 8):  # by a quarter turn
                width, height = height, width
            mode = _plain_mode(image)
            return ImageInfo({"LA": 2, "RGB": 3, "RGBA": 4}.get(mode, 1), (height, width), _high(mode))


def decode(path: Path) -> tuple[Tensor, int | None]:
    """The pixels of an image file, and the largest value that they can have, None for floats. (C, H, W), uint8, or
    float32 of 16 bits or floats; UserError for a corrupt file."""
    with reading(path, *IMAGE) as file:
        if path.suffix.lower() != ".npy":
            with opened(file) as image:
                return from_pillow(image)
        array = _one_image(np.lib.format.read_array(file, allow_pickle=False))
        return _pixels(array), HIGHS.get(array.dtype.str[1:])


def opened(file: Any) -> Image.Image:
    """A Pillow image of one of ``FORMATS`` from a file or its path; ValueError where it holds several."""
    image = Image.open(file, formats=FORMATS)
    if _has_pages(image):
        raise ValueError(f"holds {image.n_frames} images; save each in a file of its own")
    return image


def _has_pages(image: Image.Image) -> bool:
    """Whether a second image as large follows the first: no thumbnail, nor a map of depths in a telephone's JPEG."""
    size, several = image.size, False
    with suppress(Exception):  # what follows it may be damaged in any way
        if image.format != "MPO" and getattr(image, "is_animated", False):
            image.seek(1)
            several = image.size == size
            image.seek(0)
    return several


def from_pillow(image: Image.Image) -> tuple[Tensor, int | None]:
    """The pixels of a Pillow image, as :func:`decode` gives them. Orientation from EXIF is applied, and a colour that
    is transparent is white."""
    upright = ImageOps.exif_transpose(image)
    mode = _plain_mode(upright)
    if "transparency" in upright.info and mode in ("RGB", "L"):
        blended = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
        upright = blended.convert(mode)
    array = np.asarray(upright if upright.mode == mode else upright.convert(mode))
    if mode in WIDE_MODES and (array.min() < 0 or array.max() > 65535):
        raise ValueError("32-bit integers beyond 0 ... 65535")
    return _pixels(array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)), _high(mode)


def read_image(
    path: Path, size: Size | None = None, channels: int | None = None, box: Sequence[int | None] = (None,) * 4
) -> Tensor:
    """An image file as :func:`conform` has it. ``box`` is cut out first: left, upper, right and lower edge, pixels."""
    (pixels, high), (left, upper, right, lower) = decode(path), box
    return conform(pixels[:, upper:lower, left:right], high, size, channels)


def conform(image: Tensor, high: float | None, size: Size | None, channels: int | None, white: float = 1.0) -> Tensor:
    """An image (C, H, W), data units, of ``size`` (H, W) and with so many ``channels``; None leaves them. It is put on
    the grid of ``high``, its largest grey level and white; None for continuous data of this ``white``."""
    image = to_channels(image, channels, high or white) if channels is not None else image
    image = resize(image, size) if size is not None else image
    return image.round() if high is not None and image.is_floating_point() else image


def resize(image: Tensor, size: Size) -> Tensor:
    """Bilinear with antialiasing to ``size`` (H, W), by Pillow; uint8 stays uint8, float32 is not rounded."""
    if tuple(image.shape[1:]) == tuple(size):
        return image
    # Each channel alone, so that every number of channels works and alpha does not premultiply.
    channels = [Image.fromarray(channel).resize(size[::-1], Image.Resampling.BILINEAR) for channel in image.numpy()]
    return torch.from_numpy(np.stack([np.asarray(channel) for channel in channels]))


def convertible(have: int, channels: int) -> bool:
    """Whether an image of so many channels can have so many others, see :func:`to_channels`."""
    return have == channels or (have in (1, 2, 3, 4) and channels in (1, 3, 4))


def to_channels(image: Tensor, channels: int, white: float) -> Tensor:
    """An image (C, H, W), data units, in 1, 3 or 4 channels: grey, colour and alpha; UserError for any other.

    Alpha, the last of 2 or 4 channels, is blended over ``white``, the data value that is opaque, too; grey to colour
    repeats; colour to grey takes ``LUMA``; an alpha channel that is asked for is opaque.
    """
    have = image.shape[0]
    if have == channels:
        return image
    if not convertible(have, channels):
        raise UserError(f"cannot convert {have} channels to {channels}: only grey, colour and alpha convert")
    value = image.float()
    if have in (2, 4):
        alpha = value[-1:] / white
        value = value[:-1] * alpha + white * (1 - alpha)
    if value.shape[0] == 3 and channels == 1:
        value = torch.einsum("chw,c->hw", value, value.new_tensor(LUMA))[None]
    elif channels > 1:
        value = value.expand(3, -1, -1)
    value = torch.cat([value, torch.full_like(value[:1], white)]) if channels == 4 else value
    return value.round().to(torch.uint8) if image.dtype == torch.uint8 else value


def flip_horizontally(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Each image of a batch (B, C, H, W) mirrored with probability one half: augmentation for training only. The
    ``generator`` of the coins is on the CPU, wherever ``x`` is."""
    coins = torch.rand(len(x), generator=generator) < 0.5
    return torch.where(coins.to(x.device)[:, None, None, None], x.flip(-1), x)


def channels_first(shape: Sequence[int], tensor: bool = False) -> bool:
    """Whether a shape is (C, H, W) and not (H, W, C): that with a square image, or else with fewer channels. That of a
    ``tensor`` of torch is, unless the last axis may be colours: 4 at most."""
    a, b, c = shape
    return (tensor and c > 4) or (b == c if (a == b) != (b == c) else a <= c)


def _pixels(array: np.ndarray) -> Tensor:
    array = array.astype(np.uint8 if array.dtype == np.uint8 else np.float32, order="C")
    if not np.isfinite(array).all():
        raise ValueError("values that are not finite numbers of float32")
    return torch.from_numpy(array)


def _high(mode: str) -> int | None:
    return None if mode == "F" else 65535 if mode in WIDE_MODES else 255


def _plain_mode(image: Image.Image) -> str:
    """The Pillow mode in which the pixels are values: palettes, bitmaps and printers' colours converted."""
    if image.mode == "P":
        return "RGBA" if "transparency" in image.info else "RGB"
    if image.mode in ("L", "LA", "RGB", "RGBA", "F", *WIDE_MODES):
        return image.mode
    return {"1": "L", "PA": "RGBA", "La": "LA", "RGBa": "RGBA", "RGBX": "RGB"}.get(image.mode, "RGB")


def _one_image(array: np.ndarray) -> np.ndarray:
    """An array that holds one image as (C, H, W)."""
    if array.ndim not in (2, 3) or 0 in array.shape or array.dtype.str[1:] not in ("u1", "u2", "f2", "f4", "f8"):
        mend = "write (H, W), (H, W, C) or (C, H, W) as uint8, uint16 or floats"
        raise ValueError(f"an array of shape {array.shape}, type {array.dtype} is not one image; {mend}")
    if array.ndim == 2:
        return array[None]
    return array if channels_first(array.shape) else np.moveaxis(array, 2, 0)
